"""What each rule did: verdicts of all rules -> which rows stay, why the others do not, and what if."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import and_
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa

from curation.expressions import Threshold

CURVE_POINTS = 41


@dataclass(frozen=True)
class FunnelStep:
    """One rule: rows that reached it, that it dropped (of them for a null value), that are left.

    `alone`: rows that this rule drops and every other rule keeps, as their thresholds stand in this run.
    """

    rule: str
    rows_in: int
    dropped: int
    nulls: int
    left: int
    alone: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Curve:
    """Rows left in the end were one threshold another, all other rules as they stand."""

    rule: str
    column: str
    op: str
    value: float
    points: tuple[tuple[float, int], ...]  # (threshold, rows left), thresholds rising

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Ledger:
    """Collects verdicts rule by rule. One bit a row for each rule; one byte a row at the end."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.labels: list[str] = []
        self.verdicts: list[pl.Series] = []
        self.passed: list[pl.Series] = []  # the verdicts without their nulls
        self.seen: list[pl.Series] = [pl.Series([True]).new_from_index(0, rows)]

    def add(self, label: str, verdict: pl.Series) -> None:
        """`verdict` Boolean [rows]: true keeps, false or null drops. A label met before gets a number."""
        twins = sum(1 for known in self.labels if known == label or known.startswith(f"{label} #"))
        self.labels.append(f"{label} #{twins + 1}" if twins else label)
        self.verdicts.append(verdict)
        self.passed.append(verdict.fill_null(False))
        self.seen.append(self.seen[-1] & self.passed[-1])

    @property
    def kept(self) -> pl.Series:
        """Boolean [rows]: what is left so far."""
        return self.seen[-1]

    def others(self, index: int) -> pl.Series:
        """Boolean [rows]: rows that every rule but number `index` keeps."""
        return reduce(and_, self.passed[index + 1 :], self.seen[index])

    def steps(self) -> tuple[FunnelStep, ...]:
        out = []
        for i, (label, verdict) in enumerate(zip(self.labels, self.verdicts, strict=True)):
            before, after = self.seen[i], self.seen[i + 1]
            rows_in, left = int(before.sum()), int(after.sum())
            nulls = int((before & verdict.is_null()).sum())
            alone = int((self.others(i) & ~self.passed[i]).sum())
            out.append(FunnelStep(label, rows_in, rows_in - left, nulls, left, alone))
        return tuple(out)

    def reasons(self) -> pa.DictionaryArray:
        """[rows]: the first rule that dropped the row (`RULE:null` where it met a null), null where it is kept."""
        names: list[str] = []
        codes: np.ndarray = np.zeros(self.rows, np.int16)
        for label, verdict, before in zip(self.labels, self.verdicts, self.seen[:-1], strict=True):
            for name, mask in ((label, ~verdict.fill_null(True)), (f"{label}:null", verdict.is_null())):
                hit = (before & mask).to_numpy()
                if hit.any():
                    np.copyto(codes, len(names), where=hit, casting="unsafe")
                    names.append(name)
        kept = self.kept.to_numpy()
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=kept), pa.array(names, pa.string()))


def what_if(label: str, threshold: Threshold, values: pl.Series, candidates: pl.Series) -> Curve:
    """The curve of one threshold.

    `values` numeric [rows]; `candidates` Boolean [rows]: rows that everything but this threshold keeps.
    """
    ranked = np.sort(values.filter(candidates & values.is_not_null()).to_numpy().astype(np.float64))
    if not len(ranked):
        return Curve(label, threshold.column, threshold.op, threshold.value, ())
    at: np.ndarray = np.append(np.quantile(ranked, np.linspace(0, 1, CURVE_POINTS)), threshold.value)
    if values.dtype == pl.Float32:  # a rule compares in the column's own precision
        at = at.astype(np.float32).astype(np.float64)
    at = np.unique(at)
    side: Literal["left", "right"] = "left" if threshold.op in (">=", "<") else "right"
    below: list[int] = np.atleast_1d(np.searchsorted(ranked, at, side)).tolist()
    left = [len(ranked) - n for n in below] if threshold.op[0] == ">" else below
    points = tuple((float(a), int(n)) for a, n in zip(at, left, strict=True))
    return Curve(label, threshold.column, threshold.op, threshold.value, points)


def far_outside(threshold: Threshold, values: Sequence[float | None]) -> bool:
    """Whether the threshold lies more than a quarter of the observed range (minimum, maximum) outside it."""
    low, high = values
    if low is None or high is None:
        return False
    margin = 0.25 * ((high - low) or abs(high))
    return not low - margin <= threshold.value <= high + margin
