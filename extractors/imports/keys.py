"""Rows of a dataset and entries of a file of features, joined once by what names the image.

Two rules: `name`, the last part of the key's path without the suffix of a picture or array; `number`, the integer that
name ends with (COCO_val2014_000000391895 is 391895). What stands for several images on one side joins nothing: a name
of two keys whose images differ (1/image.jpg and 2/image.jpg), a number of two names.
Memory: 48 bytes and the key an entry, 40 bytes a row, and half as much again while they are sorted. Keys are compared
by 64-bit hashes: among 10 million on each side the chance that two differ and look equal is 5 in a million.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import numpy as np

from schemas.errors import PairmillError, suggest
from shards.dataset import PAIRS, Dataset
from shards.reader import open_parquet, read_table

KEY = "key"  # the column of a dataset made with --new that holds each entry's key
_SUFFIX = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|npy|npz)$", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+)$", re.ASCII)
RULES = ("name", "number")
NOTHING = -1


def name_of(key: str) -> str:
    """`train2014/COCO_1.jpg` and `http://host/COCO_1.jpg?x=y` are `COCO_1`."""
    path = unquote(urlsplit(key).path) if "://" in key else key
    return _SUFFIX.sub("", path.rstrip("/").rsplit("/", 1)[-1])


def number_of(name: str) -> str | None:
    """The integer a name ends with, without leading zeros."""
    found = _NUMBER.search(name)
    return None if found is None else found[1].lstrip("0") or "0"


def hash_of(text: str) -> int:
    """64 bits, never 0, which stands for no key."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) or 1


def row_keys(dataset: Dataset, shard: int, column: str | None) -> list[str | None]:
    """What names each row's image: the column, or by default `url`, and `key` where that is null.

    Raises PairmillError where there is no such column.
    """
    file = dataset.stage(PAIRS).file(shard)
    with open_parquet(dataset.folder, file) as opened:
        names = opened.schema_arrow.names
    wanted = [column] if column else [name for name in ("url", KEY) if name in names]
    if column and column not in names:
        raise PairmillError(f"`--key {column}`: {dataset.url} has no such column.{suggest(column, names)}")
    table = read_table(dataset.folder, file, wanted)
    rows = zip(*(table[name].to_pylist() for name in wanted), strict=True)
    values = (next((v for v in row if v is not None), None) for row in rows)
    return [None if v is None else v.hex() if isinstance(v, bytes) else str(v) for v in values]


class Hashes:
    """The names, numbers and images of many keys as 64-bit hashes, 32 bytes a key; null is 0."""

    def __init__(self) -> None:
        self._names, self._numbers, self._keys, self._images = array("Q"), array("Q"), array("Q"), array("Q")

    def add(self, key: str | None, sha256: bytes | None = None) -> None:
        """`sha256` of the image where it is known."""
        name = "" if key is None else name_of(key)
        number = number_of(name)
        self._names.append(hash_of(name) if name else 0)
        self._numbers.append(hash_of(number) if number is not None else 0)
        self._keys.append(hash_of(key) if name and key else 0)
        self._images.append(int.from_bytes(sha256[:8]) if name and sha256 else self._keys[-1])

    def shared(self) -> np.ndarray:
        """bool [keys]: those whose name is that of another key and another image, too."""
        names, keys, images = (np.array(one, np.uint64) for one in (self._names, self._keys, self._images))
        return (names != 0) & np.isin(names, _several(names, keys)) & np.isin(names, _several(names, images))

    def by(self, rule: str) -> np.ndarray:
        """uint64 of each key under the rule, 0 where it stands for several images."""
        names = np.array(self._names, np.uint64)
        several = self.shared()
        if rule == "name":
            return np.where(several, 0, names)
        numbers = np.array(self._numbers, np.uint64)
        return np.where(several | np.isin(numbers, _several(numbers, names)), 0, numbers)

    def firsts(self) -> np.ndarray:
        """Keys that none before equals, int64, in order."""
        return np.sort(np.unique(np.array(self._keys, np.uint64), return_index=True)[1])


def _several(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The values beside which more than one value of `of` stands."""
    order = np.lexsort((of, values))
    values, of = values[order], of[order]
    return values[1:][(values[1:] == values[:-1]) & (of[1:] != of[:-1])]


class Entries:
    """The entries of a file: each one's key, and the place it lies at."""

    def __init__(self) -> None:
        self._text, self._ends, self._places = bytearray(), array("q", [0]), array("q")
        self.hashes = Hashes()

    def add(self, key: str, place: int = 0) -> None:
        self._text += key.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))
        self._places.append(place)
        self.hashes.add(key)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, at: int) -> tuple[str, int]:
        """(key, place)"""
        text = self._text[self._ends[at] : self._ends[at + 1]]
        return text.decode("utf-8", "surrogateescape"), self._places[at]


@dataclass(frozen=True)
class Join:
    """`entry` [rows]: the entry of each row, or NOTHING; `wanted` bool [rows]: rows that could have one."""

    rule: str
    entry: np.ndarray
    wanted: np.ndarray

    @property
    def share(self) -> float:
        """Of the wanted rows, those matched; 1 where none is wanted."""
        return float((self.entry[self.wanted] != NOTHING).mean()) if self.wanted.any() else 1.0

    def lonely_rows(self) -> np.ndarray:
        """Wanted rows without an entry."""
        return np.flatnonzero(self.wanted & (self.entry == NOTHING))

    def lonely_entries(self, entries: Entries) -> np.ndarray:
        """Entries that no row takes; a later entry of a key is the same image's."""
        taken: np.ndarray = np.zeros(len(entries), bool)
        taken[self.entry[self.entry != NOTHING]] = True
        firsts = entries.hashes.firsts()
        return firsts[~taken[firsts]]


def join(rows: Hashes, wanted: np.ndarray, entries: Entries, rules: Iterable[str] = RULES) -> Join:
    """By the rule under which most wanted rows find an entry, or the first such. Of equal entries the first counts."""
    found = [Join(rule, _first_equal(rows.by(rule), entries.hashes.by(rule)), wanted) for rule in rules]
    return max(found, key=lambda one: one.share)


def _first_equal(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64 [left]: where in `right` the same value first stands, or NOTHING; 0 equals nothing."""
    values, first = np.unique(right, return_index=True)
    if not len(values):
        return np.full(len(left), NOTHING)
    at = np.searchsorted(values, left).clip(max=len(values) - 1)
    return np.where((values[at] == left) & (left != 0), first[at], NOTHING)
