"""The row in hand: a small mapped file in which a task notes what it is about to decode.

When a worker dies, the parent reads there which rows were being decoded: its suspects. Each suspect is decoded once
more with no other row in hand; one that takes a worker down again, alone, is the culprit and becomes `decoder_crash`.
So a worker that was killed from outside costs no row.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

SLOTS = 64
_HEAD = struct.Struct("<qq")  # rows done, rows failed
_SLOT = struct.Struct("<q")  # row + 1, 0 when empty
_NOTE = struct.Struct("128s")  # UTF-8, what limits the task just now
_NOTE_AT = _HEAD.size + SLOTS * _SLOT.size
_SIZE = _NOTE_AT + _NOTE.size


class RowInHand:
    """One task's note. Threads of the task hold different rows at once, in different slots."""

    def __init__(
        self, path: Path | None, crashed: frozenset[int] = frozenset(), suspects: frozenset[int] = frozenset()
    ):
        self.crashed = crashed
        self._suspects = suspects
        self._map: mmap.mmap | bytearray = bytearray(_SIZE)
        if path is not None:
            path.write_bytes(bytes(_SIZE))
            with path.open("r+b") as stream:
                self._map = mmap.mmap(stream.fileno(), _SIZE)
        self._free = list(range(SLOTS))
        self._change = threading.Condition()
        self._alone = False

    @contextlib.contextmanager
    def hold(self, row: int) -> Iterator[None]:
        """Around the decoding of `row`. A suspect waits until no other row is in hand, and keeps others out."""
        alone = row in self._suspects
        with self._change:
            self._change.wait_for(lambda: self._free and not self._alone and (not alone or len(self._free) == SLOTS))
            slot = self._free.pop()
            self._alone = alone
            _SLOT.pack_into(self._map, _HEAD.size + slot * _SLOT.size, row + 1)
        try:
            yield
        finally:
            with self._change:
                _SLOT.pack_into(self._map, _HEAD.size + slot * _SLOT.size, 0)
                self._free.append(slot)
                self._alone = False
                self._change.notify_all()

    def progress(self, done: int, failed: int, note: str = "") -> None:
        """Rows done and failed so far, and a word on what limits the task, for the live line."""
        _HEAD.pack_into(self._map, 0, done, failed)
        _NOTE.pack_into(self._map, _NOTE_AT, note.encode())


def read_hand(path: Path) -> tuple[int, int, frozenset[int]]:
    """(rows done, rows failed, rows in hand) as another process noted them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0, 0, frozenset()
    if len(data) < _SIZE:
        return 0, 0, frozenset()
    done, failed = _HEAD.unpack_from(data, 0)
    rows = (_SLOT.unpack_from(data, _HEAD.size + i * _SLOT.size)[0] for i in range(SLOTS))
    return done, failed, frozenset(r - 1 for r in rows if r)


def read_note(path: Path) -> str:
    """What limits the task, as another process noted it; '' where it said nothing."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) < _SIZE:
        return ""
    return _NOTE.unpack_from(data, _NOTE_AT)[0].rstrip(b"\0").decode(errors="ignore")
