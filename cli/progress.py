"""Draws the events of stages on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import TextIO

from schemas.events import Event, Notice, Progress, ShardDone, ShardFailed, StageFinished, StageStarted

PLAIN_EVERY_S = 10.0


class Drawer:
    """An `Emit` with a beginning and an end."""

    def __init__(self, verbose: bool = False, quiet: bool = False, log_file: str | None = None) -> None:
        self.verbose, self.quiet = verbose, quiet
        self.stream: TextIO = sys.stderr
        self.live = self.stream.isatty() and not quiet
        self.log = open(log_file, "a", encoding="utf-8") if log_file else None  # noqa: SIM115 - closed in __exit__
        self.rows = 0
        self.unit = "rows"
        self.start = self.last = time.monotonic()
        self._drawn = False

    def __enter__(self) -> Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()
        if self.log:
            self.log.close()

    def __call__(self, event: Event) -> None:
        if self.log:
            self.log.write(json.dumps({"event": type(event).__name__, "at": time.time(), **event.__dict__}) + "\n")
            self.log.flush()
        match event:
            case StageStarted():
                self.rows, self.start, self.last = event.rows, time.monotonic(), time.monotonic()
                self.unit = event.unit
                where = f" in {event.shards:,} shards" if event.shards else ""
                standing = f", {event.standing:,} shards stand already" if event.standing else ""
                if event.rows or where or standing:  # an import does not know beforehand
                    self._line(f"{event.stage}: {event.rows:,} {event.unit}{where} to do{standing}")
            case Progress():
                self._progress(event)
            case ShardDone() if self.verbose:
                self._line(f"{event.stage}: shard {event.shard} done, {event.rows:,} rows in {event.seconds:.1f} s")
            case ShardFailed():
                self._line(f"{event.stage}: shard {event.shard} FAILED: {event.error}", always=True)
            case Notice():
                self._line(("warning: " if event.warning else "") + event.text, always=event.warning)
            case StageFinished():
                self._line(summary(event))
            case _:
                pass

    def _progress(self, event: Progress) -> None:
        now = time.monotonic()
        if not self.live and now - self.last < PLAIN_EVERY_S:
            return
        rate = event.rows / max(now - self.start, 1e-9)
        left = f", {_clock((self.rows - event.rows) / rate)} left" if rate and self.rows > event.rows else ""
        failed = f", {event.failed:,} failed" if event.failed else ""
        note = f" | {event.note}" if event.note else ""
        text = f"{event.stage}: {event.rows:,}/{self.rows:,} {self.unit}, {rate:,.3g}/s{failed}{left}{note}"
        if self.live:
            self.stream.write("\r\x1b[2K" + text)
            self.stream.flush()
            self._drawn = True
        else:
            self.last = now
            self._line(text)

    def _line(self, text: str, always: bool = False) -> None:
        if self.quiet and not always:
            return
        self._clear()
        print(text, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._drawn:
            self.stream.write("\r\x1b[2K")
            self._drawn = False


def summary(event: StageFinished) -> str:
    """`pairs: 1,000 rows in 12.3 s (81/s): success 900, timeout 100`."""
    rows = sum(event.counts.values())
    if not rows:
        return f"{event.stage}: nothing to do" if not event.left else f"{event.stage}: no shard done"
    counts = ", ".join(f"{k} {v:,}" for k, v in sorted(event.counts.items(), key=lambda i: (-i[1], i[0])))
    return f"{event.stage}: {rows:,} rows in {event.seconds:.1f} s ({rows / max(event.seconds, 1e-9):,.0f}/s): {counts}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
