"""Lines and delimited records out of text of any encoding."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, TextIO

from schemas.errors import PairmillError

MAX_LINE = 64 << 20
_MAX_JOINED = 200  # lines that one quoted field may run over
_URL = re.compile(r"\s*(?:https?|data|s3|gs)://|\s*//|\s*data:", re.IGNORECASE)
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class OddBytes:
    """Counts the bytes that were no UTF-8 and were read as Windows-1252."""

    count: int = 0

    def decode(self, error: UnicodeError) -> tuple[str, int]:
        """A codec's error handler."""
        if not isinstance(error, UnicodeDecodeError):
            raise error
        wrong = error.object[error.start : error.end]
        self.count += len(wrong)
        return legacy_text(wrong), error.end


def legacy_text(data: bytes) -> str:
    """Windows-1252, and Latin-1 for the five bytes that it lacks."""
    return "".join(_CP1252[byte] for byte in data)


_CP1252 = [bytes([b]).decode("cp1252" if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "latin-1") for b in range(256)]


@contextlib.contextmanager
def open_text(
    opener: Callable[[], AbstractContextManager[BinaryIO]], encoding: str | None, odd: OddBytes, where: str
) -> Iterator[TextIO]:
    """The bytes as text whose lines end at a line feed (a carriage return in a file that has no line feed).

    Raises PairmillError for an encoding that does not exist.
    """
    codecs.register_error("pairmill-odd-bytes", odd.decode)
    with opener() as stream:
        head = stream.peek(1 << 16)[: 1 << 16] if isinstance(stream, io.BufferedReader) else b""
        marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
        errors = "pairmill-odd-bytes" if encoding is None and marked is None else "replace"
        ending = "\r" if b"\r" in head and b"\n" not in head else "\n"
        try:
            text = io.TextIOWrapper(stream, encoding or marked or "utf-8-sig", errors, newline=ending)
        except LookupError:
            raise PairmillError(
                f"{where}: `encoding` is {encoding!r}, which no codec has. Try utf-8, gb18030, shift_jis."
            ) from None
        try:
            yield text
        finally:
            with contextlib.suppress(ValueError):
                text.detach()


def text_lines(stream: TextIO, where: str) -> Iterator[str]:
    """Lines without their ends. Raises PairmillError for one of more than 64 Mi characters."""
    number = 0
    while line := stream.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise PairmillError(
                f"{where} line {number} has more than {MAX_LINE >> 20} Mi characters: is it a text list?"
            )
        yield line.rstrip("\n").rstrip("\r")


def looks_like_url(text: str | None) -> bool:
    return text is not None and _URL.match(text) is not None


def delimited_rows(
    lines: Iterator[str], delimiter: str | None, where: str
) -> tuple[list[str], Iterator[list[str | None]]]:
    """(column names, rows) of a csv or tsv list, quoted or not. A first row with a URL in it is no header.

    `delimiter` None takes what the first line shows: comma, else tab, else semicolon. A headerless list's columns are
    url and caption where it has one or two, as CC3M and CC12M, else column_0, column_1, ... with url among them.
    """
    first = next((line for line in lines if line), None)
    if first is None:
        return ["url"], iter(())
    delimiter = delimiter or _delimiter(first)
    records = _Records(lines, delimiter, where)
    head = records.record(first)
    if any(looks_like_url(field) for field in head):
        names = _headerless(head)
        records.width = len(names)
        return names, _rows(records, head)
    records.width = len(head)
    return _unique([name.strip() or f"column_{i}" for i, name in enumerate(head)]), _rows(records, None)


def _delimiter(line: str) -> str:
    if looks_like_url(line) and "\t" in line:
        return "\t"
    return next((d for d in (",", "\t", ";") if d in line), ",")


def _headerless(head: list[str]) -> list[str]:
    where = next(i for i, field in enumerate(head) if looks_like_url(field))
    if len(head) <= 2:
        return ["url", "caption"][: len(head)] if where == 0 else ["caption", "url"]
    return ["url" if i == where else f"column_{i}" for i in range(len(head))]


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out


def _rows(records: _Records, first: list[str] | None) -> Iterator[list[str | None]]:
    if first is not None:
        yield records.fit(first)
    for line in records.lines():
        if line:
            yield records.fit(records.record(line))


class _Records:
    """Records of a delimited text. A quote that closes nowhere is a character like any other."""

    def __init__(self, lines: Iterator[str], delimiter: str, where: str) -> None:
        self.source, self.delimiter, self.where = lines, delimiter, where
        self.width: int | None = None
        self.number = 1
        self.back: deque[str] = deque()
        csv.field_size_limit(MAX_LINE)

    def lines(self) -> Iterator[str]:
        while (line := self._next()) is not None:
            yield line

    def _next(self) -> str | None:
        self.number += 1
        return self.back.popleft() if self.back else next(self.source, None)

    def record(self, line: str) -> list[str]:
        """The fields of the record that begins with `line`; takes the lines that its quoted fields run over."""
        if '"' not in line:
            return line.split(self.delimiter) if self.width != 1 else [line]
        joined = self._joined(line)
        if joined is not None:
            return joined
        plain = line.split(self.delimiter)
        if self.width in (None, len(plain)):
            return plain
        return next(csv.reader([line], delimiter=self.delimiter), plain)

    def _joined(self, line: str) -> list[str] | None:
        text = line
        taken: list[str] = []
        while True:
            fields = self._strict(text) if text.count('"') % 2 == 0 else None
            if fields is not None and self.width in (None, len(fields)):
                return fields
            more = self._next() if text.count('"') % 2 and len(taken) < _MAX_JOINED and len(text) < MAX_LINE else None
            if more is None:
                self.back.extendleft(reversed(taken))
                self.number -= len(taken)
                return None
            taken.append(more)
            text += "\n" + more

    def _strict(self, text: str) -> list[str] | None:
        try:
            return next(csv.reader([text], delimiter=self.delimiter, strict=True), None)
        except csv.Error:
            return None

    def fit(self, fields: list[str]) -> list[str | None]:
        """As many fields as there are columns: missing ones None, surplus ones joined where that is sure.

        Raises PairmillError where it is not.
        """
        width = self.width or len(fields)
        if len(fields) <= width:
            return [*fields, *([None] * (width - len(fields)))]
        if width == 1:
            return [self.delimiter.join(fields)]
        if width > 2:
            raise PairmillError(
                f"{self.where} line {self.number} has {len(fields)} fields, the list has {width} columns. "
                "Quote the field that holds the delimiter, or save the list as Parquet or jsonl."
            )
        # Two columns, an unquoted delimiter in one: the URL begins at the first field that looks like one.
        cut = next((i for i, field in enumerate(fields) if looks_like_url(field)), 0) or 1
        return [self.delimiter.join(fields[:cut]), self.delimiter.join(fields[cut:])]
