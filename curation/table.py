"""The whole dataset as one table: pair columns and score columns side by side, a column's name resolved."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

import polars as pl

from schemas.errors import PairmillError, suggest
from shards.dataset import PAIRS, Dataset, Stage
from shards.scan import metadata_schema, polars_schema, scan

# Python's str.split() also splits at the four separators U+001C to U+001F.
_WORD = r"[^\s\x1c-\x1f]+"
DERIVED: dict[str, tuple[pl.DataType, pl.Expr]] = {
    "caption_words": (pl.UInt32(), pl.col("caption").str.count_matches(_WORD)),
    "caption_collapsed_characters": (
        pl.UInt32(),
        pl.col("caption").str.extract_all(_WORD).list.join(" ").str.len_chars(),
    ),
}


class Table:
    """Names: `width` for a column of pairs, `NAME.column` for one of scores/NAME.

    `caption_words` is the number of words of the caption, as Python's `len(caption.split())` counts them.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.pairs = dataset.require(PAIRS)
        self._scans: dict[str, pl.LazyFrame] = {}

    @cached_property
    def score_sets(self) -> dict[str, Stage]:
        """Score sets of which a shard stands, by name."""
        return {s.name: s for s in self.dataset.stages() if s.kind == "scores" and s.standing()}

    @cached_property
    def columns(self) -> dict[str, pl.DataType]:
        """Every column by its full name."""
        found: dict[str, pl.DataType] = dict(polars_schema(metadata_schema(self.pairs)))
        found |= {name: kind for name, (kind, _) in DERIVED.items() if name not in found}
        for name, stage in self.score_sets.items():
            found |= {f"{name}.{c}": kind for c, kind in polars_schema(metadata_schema(stage)).items()}
        return found

    @cached_property
    def _dotted(self) -> list[tuple[re.Pattern[str], str]]:
        """Ways to write each score column, longest first."""
        names = sorted((n for n in self.columns if self.set_of(n)), key=len, reverse=True)
        out = []
        for full in names:
            group, column = full.rsplit(".", 1)[0], full.rsplit(".", 1)[1]
            left, right = (f'(?:{re.escape(p)}|"{re.escape(p)}")' for p in (group, column))
            out.append((re.compile(rf'(?:"{re.escape(full)}"|{left}\.{right})(?![\w.])'), full))
        return out

    def dotted_name(self, text: str, at: int) -> tuple[str, int] | None:
        """(full name, length) of the score column written `NAME.column` at this place, or None."""
        for pattern, full in self._dotted:
            match = pattern.match(text, at)
            if match is not None:
                return full, match.end() - at
        return None

    def set_of(self, full: str) -> str | None:
        """The score set of a full name, or None for a column of pairs."""
        group, dot, _ = full.rpartition(".")
        return group if dot and group in self.score_sets else None

    def resolve(self, name: str) -> str:
        """The full name of a column.

        Raises PairmillError: unknown (with the nearest and the list), or in several score sets.
        """
        owners = [full for full in self.columns if self.set_of(full) and full.rpartition(".")[2] == name]
        if name in self.columns:
            owners.append(name)
        if len(owners) == 1:
            return owners[0]
        if name in self.columns and self.set_of(name):
            return name
        if owners:
            raise PairmillError(
                f"`{name}` is in several places: write {' or '.join(f'`{o}`' for o in sorted(owners))}."
            )
        bare = {full.rpartition(".")[2] if self.set_of(full) else full for full in self.columns}
        raise PairmillError(
            f"{self.dataset.url} has no column `{name}`.{suggest(name, [*self.columns, *sorted(bare)])} "
            f"It has: {', '.join(self.columns)}."
        )

    def sets_in(self, columns: Iterable[str]) -> list[str]:
        """Score sets that these columns come from, sorted."""
        return sorted({s for c in columns if (s := self.set_of(c)) is not None})

    def frame(self, columns: Iterable[str]) -> pl.LazyFrame:
        """The columns over the whole dataset, in row order, under their full names.

        NaN becomes null here, in this one place: Polars holds it to be greater than every number.
        """
        wanted = sorted(columns)
        of_pairs = [c for c in wanted if self.set_of(c) is None]
        parts = [self._pairs_frame(of_pairs)] if of_pairs or not wanted else []
        for group in self.sets_in(wanted):
            names = {c: c.rpartition(".")[2] for c in wanted if self.set_of(c) == group}
            parts.append(self._scan(self.score_sets[group]).select(pl.col(s).alias(f) for f, s in names.items()))
        frame = parts[0] if len(parts) == 1 else pl.concat(parts, how="horizontal")
        floats = [c for c in wanted if self.columns[c].is_float()]
        return frame.with_columns(pl.col(floats).fill_nan(None)) if floats else frame

    def _scan(self, stage: Stage) -> pl.LazyFrame:
        """The stage's rows; its files are listed once."""
        if stage.path not in self._scans:
            self._scans[stage.path] = scan(stage)
        return self._scans[stage.path]

    def _pairs_frame(self, names: list[str]) -> pl.LazyFrame:
        pairs = self._scan(self.pairs)
        derived = {n: DERIVED[n][1] for n in names if n in DERIVED and n not in pairs.collect_schema()}
        return pairs.with_columns(**derived).select(names or ["status"])
