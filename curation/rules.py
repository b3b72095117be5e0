"""The rules of a recipe. Each says of every row of the dataset: true keeps it, false drops it, null could not tell."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import polars as pl

from curation.expressions import Compiled, Threshold, compile_predicate, compile_value
from curation.filter_config import SampleConfig, SplitConfig, TopConfig, WhereConfig
from curation.table import Table
from schemas.config import StageConfig
from schemas.errors import PairmillError
from schemas.events import Emit, silent
from shards.scan import rows_at

C = TypeVar("C", bound=StageConfig)
_HASHES = frozenset({"uid", "sha256", "stored_sha256"})  # evenly spread already


@dataclass(frozen=True)
class Match:
    """A dropped row and what it was dropped for: a row of this dataset, or a pair of another one.

    row      number in the dataset
    like     number in the dataset of the row that stays in its place, or None
    value    how like: bits that differ, or a cosine
    group    rows in its group, the one that stays included
    other    where the pair of another dataset lies, as "NAME 0:17"
    image    its thumbnail, JPEG bytes
    caption  its caption
    """

    row: int
    like: int | None = None
    value: float | None = None
    group: int | None = None
    other: str | None = None
    image: bytes | None = None
    caption: str | None = None


class Rule(ABC, Generic[C]):
    """One rule over one dataset.

    `inputs` are expressions over the whole table, all rules' computed in one pass. `mark` turns their values into the
    verdict: Boolean [rows], true, false, or null where a value it hangs on is null.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[StageConfig]]
    shorthand: ClassVar[str | None] = None  # the field that `KIND: value` sets

    def __init__(self, config: C, table: Table) -> None:
        self.config = config
        self.table = table
        self.columns: frozenset[str] = frozenset()
        self.thresholds: tuple[Threshold, ...] = ()
        self.rests: tuple[pl.Expr, ...] = ()  # for each threshold: whether the rest of the rule holds
        self.features: frozenset[str] = frozenset()  # feature sets that `mark` reads
        self.emit: Emit = silent  # set before `mark`, for what takes minutes
        self.matches: tuple[Match, ...] = ()  # at most 40 dropped rows beside what they are too like, set by `mark`
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Checks the configuration against the table and sets `columns` (full names) and `thresholds`."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What the rule is called in reasons and the funnel."""

    def recorded(self) -> dict[str, Any]:
        """The settings as the selection's recipe holds them, defaults left out."""
        return self.config.model_dump(mode="json", exclude_defaults=True)

    @abstractmethod
    def inputs(self) -> dict[str, pl.Expr]:
        """Expressions over the whole table whose values `mark` needs."""

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        """The verdict on every row.

        `seen`: rows that all earlier rules keep; `successes`: rows of status success or no_image. Both Boolean [rows].
        """
        return values["keep"]


class Where(Rule[WhereConfig]):
    """Keeps rows for which an expression is true. An aggregate in it means the whole dataset."""

    kind, config_class, shorthand = "where", WhereConfig, "expr"
    compiled: Compiled

    def prepare(self) -> None:
        self.compiled = compile_predicate(self.config.expr, self.table)
        self.columns, self.thresholds = self.compiled.columns, self.compiled.thresholds
        self.rests = self.compiled.rests

    @property
    def label(self) -> str:
        return self.config.name or " ".join(self.config.expr.split())

    def inputs(self) -> dict[str, pl.Expr]:
        return {"keep": self.compiled.expr}


class Top(Rule[TopConfig]):
    """Keeps the rows with the highest values."""

    kind, config_class = "top", TopConfig
    compiled: Compiled

    def prepare(self) -> None:
        self.compiled = compile_value(self.config.by, self.table)
        self.columns = self.compiled.columns

    @property
    def label(self) -> str:
        size = self.config.count if self.config.share is None else self.config.share
        return self.config.name or f"top {size} by {self.config.by}" + (" of all" if self.config.of == "all" else "")

    def inputs(self) -> dict[str, pl.Expr]:
        return {"by": self.compiled.expr}

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        by = values["by"]
        base = successes if self.config.of == "all" else seen
        ranked = by.filter(base & by.is_not_null()).to_numpy()
        rows = int(base.sum())
        if self.config.ties == "datacomp":
            cut = datacomp_threshold(ranked, rows, self.config.share, self.config.count)
            self._cut(cut)
            return by >= pl.Series([cut], dtype=by.dtype)
        size = self.config.count or math.floor(Decimal(str(self.config.share)) * rows)
        if size >= len(ranked):
            self._cut(ranked.min() if len(ranked) else None)
            return pl.select(pl.when(by.is_not_null()).then(True)).to_series()
        if size == 0:
            return pl.select(pl.when(by.is_not_null()).then(False)).to_series()
        cut = np.partition(ranked, len(ranked) - size)[len(ranked) - size]
        self._cut(cut)
        tied = np.flatnonzero(((by == cut) & base).fill_null(False).to_numpy())
        room = size - int((ranked > cut).sum())
        if room < len(tied):
            tied = self._first_by_uid(tied, room)
        return (by > pl.Series([cut], dtype=by.dtype)) | _at(tied, len(by))

    def _first_by_uid(self, tied: np.ndarray, room: int) -> np.ndarray:
        """Of equal rows those with the smallest uid, then the smallest (shard, row)."""
        uids = rows_at(self.table.pairs, tied, ["uid"])
        order = uids.with_columns(index=tied).sort("uid", "index")["index"]
        return order.head(room).to_numpy()

    def _cut(self, cut: Any) -> None:
        """Notes the threshold that the data gave, where the ranking is by one column."""
        if cut is not None and self.compiled.column is not None:
            self.thresholds = (Threshold(self.compiled.column, ">=", float(cut)),)
            self.rests = (pl.lit(True),)


def _at(index: np.ndarray, rows: int) -> pl.Series:
    out: np.ndarray = np.zeros(rows, bool)
    out[index] = True
    return pl.Series(out)


def datacomp_threshold(scores: np.ndarray, rows: int, share: float | None, count: int | None) -> Any:
    """The threshold of mlfoundations/datacomp, baselines/apply_filter.py: n = int(rows * share), -sort(-scores)[n].

    `scores` are those that are not null, float [at most rows]. `score >= threshold` then keeps n + 1 rows and the ties
    of the last. Raises PairmillError where the pool has no more than n scores.
    """
    n = count if share is None else int(rows * share)
    if n is None or n >= len(scores):
        raise PairmillError(
            f"DataComp's threshold is score number {n} from the top, and there are {len(scores)} scores."
        )
    return np.partition(scores, len(scores) - 1 - n)[len(scores) - 1 - n]


def uid_share(uid: pl.Expr) -> pl.Expr:
    """Float64 in [0, 1): the first 8 bytes of a uid, big-endian, over 2**64 (schemas.pairs.uid_share, by columns)."""
    return uid.bin.slice(0, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big").cast(pl.Float64) / 2.0**64


class Sample(Rule[SampleConfig]):
    """Keeps a share of the rows by uid: stable under re-sharding and growth."""

    kind, config_class, shorthand = "sample", SampleConfig, "share"

    def prepare(self) -> None:
        self.columns = frozenset({"uid"})

    @property
    def label(self) -> str:
        return self.config.name or f"sample {self.config.share}"

    def inputs(self) -> dict[str, pl.Expr]:
        return {"keep": uid_share(pl.col("uid")) < self.config.share}


class Split(Rule[SplitConfig]):
    """Keeps one part of a split in two; rows with equal values stay on one side, a null value goes by uid."""

    kind, config_class = "split", SplitConfig

    def prepare(self) -> None:
        self.by = self.table.resolve(self.config.by)
        self.columns = frozenset({self.by, "uid"})
        dtype = self.table.columns[self.by]
        if not (dtype.is_integer() or dtype in (pl.String, pl.Binary, pl.Boolean)):
            raise PairmillError(
                f"split cannot go by `{self.by}`, which is {dtype}: give a column of text, bytes or whole numbers."
            )

    @property
    def label(self) -> str:
        by = "" if self.config.by == "sha256" else f" by {self.config.by}"
        return self.config.name or f"split {self.config.share} {self.config.part}{by}"

    def inputs(self) -> dict[str, pl.Expr]:
        value = pl.col(self.by)
        if self.by in _HASHES:
            share = _second_share(value)
        else:
            as_bytes = value if self.table.columns[self.by] == pl.Binary else value.cast(pl.String)
            share = as_bytes.map_batches(_hash_shares, return_dtype=pl.Float64, is_elementwise=True)
        first = pl.coalesce(share, _second_share(pl.col("uid"))) < self.config.share
        return {"keep": first if self.config.part == "first" else ~first}


def _second_share(value: pl.Expr) -> pl.Expr:
    """Float64 in [0, 1) of bytes 8 to 15 of a hash, big-endian: independent of what `sample` looks at."""
    return value.bin.slice(8, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big").cast(pl.Float64) / 2.0**64


def _hash_shares(values: pl.Series) -> pl.Series:
    """blake2b-64 of the bytes or UTF-8 text, big-endian over 2**64: float64 in [0, 1); null stays null."""
    return pl.Series(values.name, [None if v is None else _hash_share(v) for v in values], dtype=pl.Float64)


def _hash_share(value: bytes | str) -> float:
    data = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2.0**64
