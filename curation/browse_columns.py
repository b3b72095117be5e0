"""Columns of a table in memory, up to so many bytes: numbers with their bins, facets as codes, text to search in."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa

from curation.browse_config import KEPT
from curation.table import DERIVED, Table
from schemas.pairs import RESERVED
from shards.reader import open_parquet
from shards.select import read_selection

T = TypeVar("T")
BINS = 48
NO_BIN = 255
SEPARATOR = " "  # between caption and url where words are looked for
MAX_VALUES = 64  # a column of text with more different values is no facet
_PLAIN = ("width", "height", "caption_words")


class Memory:
    """What was computed, by its key; what was used least recently goes when there is more than `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T], size: Callable[[T], int]) -> T:
        """The value of `key`, made where it is not held."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = (value, size(value))
                self.held += self._values[key][1]
            while self.held > self.most and len(self._values) > 1:
                self.held -= self._values.popitem(last=False)[1][1]
        return value

    def drop(self, key: Hashable) -> None:
        """Forgets the value of `key`."""
        with self._lock:
            self.held -= self._values.pop(key, (None, 0))[1]


@dataclass(frozen=True)
class Numbers:
    """A column of numbers.

    values  [rows] in the column's own type, null for null and NaN
    bins    uint8 [rows]: the bin of each value, NO_BIN for null; what lies beyond the edges is in the end bins
    edges   rising, one more than there are bins; [] where there is no value
    counts  rows in each bin, over the whole dataset
    """

    values: pl.Series
    bins: np.ndarray
    edges: list[float]
    counts: list[int]
    minimum: float | None
    maximum: float | None
    nulls: int

    @property
    def whole(self) -> bool:
        """Whether the column holds whole numbers."""
        return self.values.dtype.is_integer()

    @property
    def nbytes(self) -> int:
        return int(self.values.estimated_size()) + self.bins.nbytes


@dataclass(frozen=True)
class Codes:
    """A column of few values. `codes` uint8 or int16 [rows]: place in `values`; None among them is null."""

    codes: np.ndarray
    values: tuple[str | None, ...]

    def mask(self, wanted: Sequence[str | None]) -> np.ndarray:
        """bool [rows]: rows that have one of the values."""
        table = np.array([v in wanted for v in self.values], bool)
        return table[self.codes]

    def count(self, mask: np.ndarray | None) -> list[int]:
        """Rows by value among those of `mask`."""
        codes = self.codes if mask is None else self.codes[mask]
        return np.bincount(codes, minlength=len(self.values)).tolist()


class Columns:
    """The columns of one table that can be searched, slid and counted."""

    def __init__(self, table: Table, memory: Memory) -> None:
        self.table, self.memory = table, memory
        self.rows = len(table.dataset)
        self.made: dict[str, Callable[[], pl.Series]] = {}
        whole = range(table.dataset.num_shards)
        self.sets = [n for n, s in table.score_sets.items() if s.standing() >= set(whole)]
        self.unfinished = sorted(set(table.score_sets) - set(self.sets))
        self.numbers = [c for c in table.columns if self._is_number(c)]
        candidates = ["status", *(c for c in table.columns if self._may_be_facet(c))]
        self.facets = [c for c in candidates if self._few(c)]

    def add_made(self, column: str, make: Callable[[], pl.Series]) -> None:
        """A column of numbers that is computed when it is first asked for."""
        self.made[column] = make
        self.numbers.append(column)

    def _is_number(self, full: str) -> bool:
        group, kind = self.table.set_of(full), self.table.columns[full]
        if not kind.is_numeric() or full.endswith("hash"):
            return False
        return group in self.sets if group is not None else full in _PLAIN or full not in RESERVED | DERIVED.keys()

    def _may_be_facet(self, full: str) -> bool:
        kind = self.table.columns[full]
        group = self.table.set_of(full)
        theirs = group in self.sets if group is not None else full not in RESERVED and full not in DERIVED
        return theirs and kind in (pl.String, pl.Boolean) and not full.endswith("_state")

    def _few(self, column: str) -> bool:
        return self.table.frame([column]).select(pl.first().n_unique()).collect(engine="streaming").item() <= MAX_VALUES

    def number(self, column: str) -> Numbers:
        """The column's values and bins."""
        return self.memory.get(("number", column), lambda: self._read_number(column), lambda n: n.nbytes)

    def _read_number(self, column: str) -> Numbers:
        if column in self.made:
            values = self.made[column]()
        else:
            values = self.table.frame([column]).collect(engine="streaming")[column]
        numbers = values.cast(pl.Float64).to_numpy()
        there = numbers[np.isfinite(numbers)]
        if not len(there):
            return Numbers(values, np.full(len(values), NO_BIN, np.uint8), [], [], None, None, len(values))
        low, high = np.quantile(there, [0.005, 0.995])
        edges = _edges(float(low), float(high), values.dtype.is_integer())
        count = len(edges) - 1
        with np.errstate(invalid="ignore"):
            place = np.floor((numbers - edges[0]) / (edges[-1] - edges[0]) * count)
            bins = np.where(np.isnan(numbers), NO_BIN, np.clip(np.nan_to_num(place), 0, count - 1)).astype(np.uint8)
        counts = np.bincount(bins, minlength=256)[:count].tolist()
        return Numbers(values, bins, edges, counts, float(there.min()), float(there.max()), values.null_count())

    def codes(self, column: str) -> Codes:
        """A facet's values as codes, the most frequent first."""
        return self.memory.get(("codes", column), lambda: self._read_codes(column), lambda c: c.codes.nbytes)

    def _read_codes(self, column: str) -> Codes:
        values = self.table.frame([column]).select(pl.first().cast(pl.String)).collect(engine="streaming")[column]
        ranked = values.value_counts(sort=True)[column]
        places = pl.Series(range(len(ranked)), dtype=pl.UInt8)
        return Codes(values.replace_strict(ranked, places).to_numpy(), tuple(ranked))

    def reasons(self, selection: str) -> Codes:
        """A selection's reasons, `kept` where there is none.

        Raises PairmillError where the selection is unknown or older than what it was made from.
        """
        return self.memory.get(("reasons", selection), lambda: self._read_reasons(selection), lambda c: c.codes.nbytes)

    def _read_reasons(self, selection: str) -> Codes:
        read_selection(self.table.dataset, selection)  # checks it
        with open_parquet(self.table.dataset.folder, f"selections/{selection}.parquet") as file:
            column = file.read(columns=["reason"])["reason"].unify_dictionaries().combine_chunks()
        array: Any = column if isinstance(column, pa.Array) else column.chunk(0)
        names = array.dictionary.to_pylist()
        codes = array.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int16)
        return Codes(codes, (*names, KEPT))

    def forget_reasons(self, selection: str) -> None:
        """After a selection was written anew."""
        self.memory.drop(("reasons", selection))

    def captions(self) -> pl.Series:
        """The caption of each row."""

        def read() -> pl.Series:
            return self.table.frame(["caption"]).collect(engine="streaming")["caption"]

        return self.memory.get("captions", read, lambda s: int(s.estimated_size()))

    def haystack(self) -> pl.Series:
        """Caption and url of each row in lower case: where words are looked for."""
        return self.memory.get("haystack", self._read_haystack, lambda s: int(s.estimated_size()))

    def _read_haystack(self) -> pl.Series:
        parts = [pl.col(c).fill_null("") for c in ("caption", "url")]
        joined = pl.concat_str(parts, separator=SEPARATOR).str.to_lowercase()
        return self.table.frame(["caption", "url"]).select(text=joined).collect(engine="streaming")["text"]


def _edges(low: float, high: float, whole: bool) -> list[float]:
    """Bin edges between two values; whole numbers get a bin each where there are few."""
    if whole and high - low < BINS:
        low, high = int(low), max(int(np.ceil(high)), int(low))
        return [low - 0.5 + i for i in range(int(high - low) + 2)]
    if high <= low:
        return [low - 0.5, low + 0.5]
    return [low + (high - low) * i / BINS for i in range(BINS + 1)]
