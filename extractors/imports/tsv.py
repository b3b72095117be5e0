"""Features as TSV: a line an image, arrays as base64 of float32 (ids of int64).

The variant is told by the number of columns:

    10  LXMERT           img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features
     7  ViLBERT          image_id image_w image_h num_boxes boxes features cls_prob
     6  bottom-up-attention  image_id image_w image_h num_boxes boxes features
     3  VinVL, Oscar     img_id num_boxes features
     2  VinVL            img_id and JSON: num_boxes and features, or objects of rect, class, conf and feature

VinVL's features are 2054 wide: 2048, then x1/W y1/H x2/W y2/H and the sides as shares. `--fields` names any others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from extractors.imports.keys import Entries
from extractors.imports.record import NAMES, Record, RowError, check_lengths, numbers, record_of, whole_number
from schemas.errors import PairmillError, suggest

MAX_LINE_BYTES = 1 << 28
LXMERT = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
          "features")  # fmt: skip
BUTD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LAYOUTS = {
    10: LXMERT,
    7: (*BUTD, "cls_prob"),
    6: BUTD,
    3: ("img_id", "num_boxes", "features"),
    2: ("img_id", "json"),
}
IDS = ("img_id", "image_id")
KNOWN = (*IDS, "json", *(name for names in NAMES.values() for name in names))
Read = Callable[[str, int], Record]


def fields_of(given: str | None, first: bytes, path: str) -> tuple[str, ...]:
    """The columns' names. Raises PairmillError: a number of columns nobody knows, or names nobody knows."""
    count = first.count(b"\t") + 1
    if given is None:
        if count not in LAYOUTS:
            known = ", ".join(map(str, sorted(LAYOUTS)))
            raise PairmillError(
                f"{path}: its first line has {count} columns; known are files of {known}. "
                "Name them in order: --fields img_id,img_w,img_h,num_boxes,boxes,features"
            )
        return LAYOUTS[count]
    fields = tuple(name.strip() for name in given.split(","))
    unknown = next((name for name in fields if name and name not in KNOWN), None)
    if unknown is not None:
        raise PairmillError(f"`--fields`: no `{unknown}`.{suggest(unknown, KNOWN)} Leave a place empty to skip it.")
    if not set(fields) & set(IDS) or len(fields) != count:
        raise PairmillError(
            f"`--fields` names {len(fields)} columns with {'' if set(fields) & set(IDS) else 'no '}image_id among "
            f"them; the first line of {path} has {count}."
        )
    return fields


@dataclass(frozen=True)
class TsvSource:
    """A TSV file; an entry's place is where its line begins, in bytes."""

    path: str
    fields: tuple[str, ...]
    dtype: str

    @classmethod
    def of(cls, path: str, fields: str | None, dtype: str) -> TsvSource:
        """Raises PairmillError: no such file, no line in it, or columns nobody knows."""
        if not Path(path).is_file():
            raise PairmillError(f"{path}: no such TSV file.")
        with Path(path).open("rb") as stream:
            first = stream.readline(MAX_LINE_BYTES)
        if not first.strip():
            raise PairmillError(f"{path} is empty.")
        return cls(path, fields_of(fields, first.rstrip(b"\r\n"), path), "<f4" if dtype == "float32" else "<f2")

    def scan(self, entries: Entries, warn: Callable[[str], None]) -> dict[str, Any]:
        """Reads the file once: every line's key and place, and the whole file's sha256.

        Lines without a key and a last line that is cut off are told to `warn` with their place.
        """
        digest, place, number, last, nameless = hashlib.sha256(), 0, 0, 0, []
        line = key = b""
        with Path(self.path).open("rb", buffering=1 << 20) as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                number += 1
                digest.update(line)
                key = self._key(line)
                if key:
                    entries.add(key.decode("utf-8", "surrogateescape"), place)
                elif line.strip():
                    nameless.append(f"{number:,} (byte {place:,})")
                last, place = place, place + len(line)
        torn = place > 0 and not self._ends_whole(last)
        if torn:
            fate = f"The row of {key.decode(errors='replace')} becomes `truncated`." if key else "It names no image."
            warn(f"{self.path} ends inside its last line, {number:,} (byte {last:,}): the file was cut short. {fate}")
        if nameless := nameless[: len(nameless) - (torn and not key)]:
            more = f" and {len(nameless) - 5:,} more" if len(nameless) > 5 else ""
            warn(f"{self.path}: not imported, since they name no image: lines {', '.join(nameless[:5])}{more}.")
        return {"sha256": digest.hexdigest(), "bytes": place, "fields": list(self.fields)}

    def _key(self, line: bytes) -> bytes:
        """The cell that names the image; b'' where it may be cut off or is not there."""
        at = next(i for i, name in enumerate(self.fields) if name in IDS)
        cells = line.rstrip(b"\r\n").split(b"\t", at + 1)
        return cells[at] if len(cells) > min(at + 1, len(self.fields) - 1) else b""

    def _ends_whole(self, last: int) -> bool:
        """Whether the last line is complete, be it with a newline or without."""
        with Path(self.path).open("rb") as stream:
            stream.seek(last)
            line = stream.readline(MAX_LINE_BYTES)
        return line.endswith(b"\n") or not isinstance(self._parsed(line), RowError)

    def _parsed(self, line: bytes) -> Record | RowError:
        try:
            return self._record(line)
        except RowError as error:
            return error

    @contextlib.contextmanager
    def open(self) -> Iterator[Read]:
        """A function (key, place) -> Record, which raises RowError, or PairmillError where the file has changed."""
        with Path(self.path).open("rb", buffering=1 << 16) as stream:
            yield lambda key, place: self._read(stream, key, place)

    def _read(self, stream: BinaryIO, key: str, place: int) -> Record:
        stream.seek(place)
        line = stream.readline(MAX_LINE_BYTES)
        if self._key(line) != key.encode("utf-8", "surrogateescape"):
            raise PairmillError(
                f"{self.path} changed while it was read: byte {place:,} is no longer {key}. Start again."
            )
        found = self._parsed(line)
        if isinstance(found, Record):
            return found
        if line.endswith(b"\n"):
            raise RowError(f"byte {place}: {found}")
        raise RowError(f"byte {place}: the file ends inside this line ({found})", "truncated")

    def _record(self, line: bytes) -> Record:
        cells = line.rstrip(b"\r\n").split(b"\t")
        if len(cells) != len(self.fields):
            raise RowError(f"{len(cells)} columns, {len(self.fields)} are expected")
        values: dict[str, Any] = dict(zip(self.fields, cells, strict=True))
        if "json" not in values:
            return record_of(values, self.dtype)
        try:
            found = json.loads(values["json"])
        except (ValueError, RecursionError) as error:
            raise RowError(f"bad JSON: {str(error)[:100]}") from None
        objects = found.get("objects") if isinstance(found, dict) else found
        if not isinstance(objects, list):
            return record_of(found if isinstance(found, dict) else {}, self.dtype)
        return _detections(objects, found if isinstance(found, dict) else {}, self.dtype)


def _detections(objects: list[Any], about: dict[str, Any], dtype: str) -> Record:
    """VinVL's predictions: an object a box, with rect, class, conf and feature."""
    try:
        features = [numbers(one["feature"], dtype) for one in objects]
        boxes = np.array([one["rect"] for one in objects], np.float32).reshape(-1, 4)
        conf = np.array([one["conf"] for one in objects], np.float32)
        names = tuple(str(one["class"]) for one in objects)
    except (KeyError, TypeError, ValueError) as error:
        raise RowError(f"objects need rect, class, conf and feature ({type(error).__name__}: {error})") from None
    if len({len(one) for one in features}) > 1:
        raise RowError("features of one image differ in width")
    sides = [about.get(name) for name in ("image_w", "image_h")]
    size = None if None in sides else (whole_number(sides[0]), whole_number(sides[1]))
    stacked = np.stack(features) if features else np.empty((0, 0), np.float32)
    record = Record(stacked, boxes, size=size, conf=conf, objects=(np.zeros(len(conf), np.int64), conf), names=names)
    check_lengths(record)
    return record
