"""Manners towards hosts: a few connections each, rest for those that fail, rows taken in turns."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass
class _Host:
    active: int = 0
    failures: int = 0
    rests_until: float | None = None
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    def idle(self) -> bool:
        return not (self.active or self.failures or self.waiting or self.rests_until)


class Hosts:
    """Connections and failures of every host of a run; hosts without either are forgotten.

    per_host  open connections to one host
    failures  failed requests in a row after which a host rests for `rest_s` seconds, then gets one trial
    """

    def __init__(self, per_host: int, failures: int, rest_s: float, clock: Callable[[], float] = time.monotonic):
        self._per_host = per_host
        self._failures = failures
        self._rest_s = rest_s
        self._clock = clock
        self._hosts: dict[str, _Host] = {}
        self.on_free: Callable[[str], None] = lambda host: None
        #: The host that alone limits the rows under way, None where none does. For the live line.
        self.limiting: str | None = None

    def __len__(self) -> int:
        return len(self._hosts)

    def has_room(self, host: str) -> bool:
        """Whether one more connection to `host` may be opened now."""
        state = self._hosts.get(host)
        return state is None or state.active < self._per_host

    async def enter(self, host: str) -> None:
        """Take one of the host's connections, waiting in line for it."""
        state = self._hosts.setdefault(host, _Host())
        if state.active < self._per_host:
            state.active += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        state.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(host)
            raise

    def leave(self, host: str) -> None:
        """Give the connection back: to the next in line, else to whoever watches `on_free`."""
        state = self._hosts[host]
        while state.waiting:
            turn = state.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        state.active -= 1
        self._forget(host, state)
        self.on_free(host)

    def admits(self, host: str) -> bool:
        """False while the host rests. After the rest, True once in a rest's length: for the trial."""
        state = self._hosts.get(host)
        if state is None or state.rests_until is None:
            return True
        if self._clock() < state.rests_until:
            return False
        # Others rest on while the trial is under way, and after a trial of which nothing is heard.
        state.rests_until = self._clock() + self._rest_s
        return True

    def report(self, host: str, good: bool) -> None:
        """How a request ended."""
        state = self._hosts.setdefault(host, _Host())
        if good:
            state.failures, state.rests_until = 0, None
        else:
            state.failures += 1
            if state.failures >= self._failures:
                state.rests_until = self._clock() + self._rest_s
        self._forget(host, state)

    def _forget(self, host: str, state: _Host) -> None:
        if state.idle():
            self._hosts.pop(host, None)


class RowQueue:
    """Rows to fetch, host by host in turns, never one whose host has no room.

    A row of a busy host so never keeps a worker from a row of another.
    """

    def __init__(self, rows: Iterable[tuple[int, str]], hosts: Hosts):
        self._rows: dict[str, deque[int]] = {}
        for row, host in rows:
            self._rows.setdefault(host, deque()).append(row)
        self._hosts = hosts
        self._ready = deque(self._rows)
        self._full: set[str] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        hosts.on_free = self._freed

    async def next(self) -> int | None:
        """The next row, None when all have been given out. The caller enters the row's host at once."""
        while True:
            row = self._take()
            if row is not None:
                if self._ready:  # there may be room for one more
                    self._wake_one()
                return row
            if not self._full:
                while self._waiting:
                    self._wake_one()
                return None
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    @property
    def held_up(self) -> str | None:
        """A host that alone limits the run: all rows left are its, and it has no room."""
        return next(iter(self._full)) if len(self._full) == 1 and not self._ready else None

    def _take(self) -> int | None:
        while self._ready:
            host = self._ready.popleft()
            if not self._hosts.has_room(host):
                self._full.add(host)
                continue
            rows = self._rows[host]
            row = rows.popleft()
            if rows:
                self._ready.append(host)
            else:
                del self._rows[host]
            return row
        return None

    def _freed(self, host: str) -> None:
        if host in self._full:
            self._full.discard(host)
            self._ready.append(host)
            self._wake_one()

    def _wake_one(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
