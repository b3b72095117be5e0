"""JSON lists of every shape, a value at a time: an array of rows, columns of values, rows under one key, lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TextIO

from schemas.errors import PairmillError

_CHUNK = 1 << 16
_WHOLE = 16 << 20  # an object that ends within so many characters is read whole
_MAX_VALUE = 256 << 20
_decoder = json.JSONDecoder()

Opener = Callable[[], AbstractContextManager[TextIO]]


def line_rows(lines: Iterator[str], where: str) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines. Raises PairmillError that names the line which is none."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PairmillError(f"{where} line {number} is no JSON: {error}. Mend or remove that line.") from None
        yield _row(value, f"{where} line {number}")


def json_rows(opener: Opener, where: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSON file, streamed. `opener` may be called several times: columns are read side by side."""
    with opener() as stream:
        cursor = _Cursor(stream, where)
        start = cursor.peek()
        if start == "[":
            yield from (_row(value, where) for value in cursor.items())
            return
        if start != "{":
            raise PairmillError(f"{where} is no JSON list: it begins with {start!r}. Expected an array or an object.")
        if cursor.is_lines():
            while cursor.peek():
                yield _row(cursor.value(), where)
            return
        parts = _parts(cursor)
    yield from _object_rows(opener, parts, where)


def object_items(opener: Opener, where: str) -> Iterator[tuple[str, Any]]:
    """(key, item) for each item of each list in a JSON object, in the file's order; any other value, and an empty list,
    whole.

    Raises PairmillError where the file is no JSON object, or a damaged one.
    """
    with opener() as stream:
        cursor = _Cursor(stream, where)
        start = cursor.peek()
        if start != "{":
            raise PairmillError(f"{where} is no JSON object: it begins with {start!r}.")
        for key in cursor.each_key():
            items = cursor.items() if cursor.peek() == "[" else iter((cursor.value(),))
            first: Any = next(items, [])
            yield key, first
            for item in items:
                yield key, item


@dataclass(frozen=True)
class _Part:
    """One key of the outer object: how many items its list or object has, and whether they are objects."""

    key: str
    items: int | None
    of_objects: bool


def _parts(cursor: _Cursor) -> list[_Part]:
    parts = []
    for key in cursor.each_key():
        if cursor.peek() not in "[{":
            cursor.value()
            parts.append(_Part(key, None, False))
            continue
        kind = cursor.peek()
        count, objects = 0, kind == "["
        for value in cursor.items():
            count += 1
            objects = objects and isinstance(value, dict)
        parts.append(_Part(key, count, objects and count > 0))
    return parts


def _object_rows(opener: Opener, parts: list[_Part], where: str) -> Iterator[dict[str, Any]]:
    wrapped = [p for p in parts if p.of_objects]
    columns = [p for p in parts if p.items is not None]
    if len(wrapped) == 1:
        yield from (_row(value, where) for value in _items(opener, wrapped[0].key, where))
    elif columns and not wrapped and len(columns) == len(parts) and len({p.items for p in columns}) == 1:
        streams = [_items(opener, p.key, where) for p in columns]
        for values in zip(*streams, strict=True):
            yield dict(zip((p.key for p in columns), values, strict=True))
    else:
        shape = ", ".join(f"{p.key} ({'one value' if p.items is None else f'{p.items} items'})" for p in parts[:10])
        raise PairmillError(
            f"{where} is a JSON object with {shape or 'nothing in it'}: "
            "no list of rows and no columns of equal length. Save the rows as jsonl or as one array of objects."
        )


def _items(opener: Opener, key: str, where: str) -> Iterator[Any]:
    with opener() as stream:
        cursor = _Cursor(stream, where)
        for found in cursor.each_key():
            if found == key:
                yield from cursor.items()
                return
            cursor.skip()


def _row(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"url": value}
    raise PairmillError(f"{where}: a row must be an object or a URL, found {str(value)[:60]!r}.")


class _Cursor:
    """A place in JSON text that is read in pieces."""

    def __init__(self, stream: TextIO, where: str) -> None:
        self.stream, self.where = stream, where
        self.text, self.at, self.end = "", 0, False

    def _more(self) -> bool:
        new = self.stream.read(max(_CHUNK, len(self.text) - self.at))
        if new:
            self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def peek(self) -> str:
        """The next character that is no white space, or ''."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Steps over one of the `expected` characters. Raises PairmillError for another one."""
        found = self.peek()
        if not found or found not in expected:
            raise PairmillError(f"{self.where} is damaged JSON: expected {expected!r}, found {found or 'its end'!r}.")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value, whole. Raises PairmillError where there is none, or one beyond all bounds."""
        self.peek()
        while True:
            try:
                value, end = _decoder.raw_decode(self.text, self.at)
            except ValueError as error:
                if len(self.text) - self.at > _MAX_VALUE or not self._more():
                    raise PairmillError(f"{self.where} is damaged JSON: {error}. Fetch or mend it.") from None
                continue
            except RecursionError:
                raise PairmillError(f"{self.where} is JSON nested too deeply.") from None
            if end == len(self.text) and self._more():  # a number may go on there
                continue
            self.at = end
            return value

    def is_lines(self) -> bool:
        """Whether another object follows the one that begins here; nothing is taken."""
        while True:
            try:
                _, end = _decoder.raw_decode(self.text, self.at)
                rest = self.text[end:].lstrip()
                if rest:
                    return rest[0] == "{"
            except RecursionError:
                return False
            except ValueError:
                if len(self.text) - self.at > _WHOLE:
                    return False
            if not self._more():
                return False

    def items(self) -> Iterator[Any]:
        """The values of the list or object that begins here."""
        closing = "]" if self.take("[{") == "[" else "}"
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            if closing == "}":
                self.value()
                self.take(":")
            yield self.value()
            if self.take("," + closing) == closing:
                return

    def each_key(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller takes each one's value before the next."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            self.take(":")
            yield str(key)
            if self.take(",}") == "}":
                return

    def skip(self) -> None:
        """Steps over the next value without holding a list of it."""
        if self.peek() in ("[", "{"):
            for _ in self.items():
                pass
        else:
            self.value()
