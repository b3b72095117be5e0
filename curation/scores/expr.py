"""A new column from an expression over columns that stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from curation.expressions import compile_column
from curation.filter import require_complete
from curation.scores.columns import begin_scores, run_scores
from curation.scores.config import ExprScoreConfig
from curation.table import Table
from schemas.errors import PairmillError
from schemas.events import Emit, StageFinished, silent
from schemas.pairs import RESERVED
from shards.dataset import Dataset
from shards.scan import starts


@dataclass(frozen=True, eq=False)
class ExprScorer:
    """The one column, computed over the whole dataset; `values` has a row for each of it, `first` those of shards."""

    field: pa.Field
    text: str
    sets: Mapping[str, str]
    values: pl.Series | None = None
    first: np.ndarray | None = None
    columns: tuple[str, ...] = ("status",)

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        return (self.field,)

    @property
    def identity(self) -> dict[str, Any]:
        return {"scores": dict(self.sets)}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return {self.field.name: {"what": self.text, "scale": "as the expression gives it", "scores": dict(self.sets)}}

    @property
    def versions(self) -> dict[str, str]:
        return {"polars": pl.__version__}

    def __call__(self, shard: int, pairs: pa.Table) -> Mapping[str, pa.Array]:
        if self.values is None or self.first is None:
            raise AssertionError("computed before shards are written")
        return {self.field.name: self.values[self.first[shard] : self.first[shard + 1]].to_arrow()}


def score_expr(dataset: Dataset | str | Path, config: ExprScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME` with one column: the expression's number, text or truth value for every row.

    An aggregate or window means the whole dataset, rows of every status included; NaN becomes null. Any change of the
    pairs makes every shard count as not done. Raises PairmillError: unknown or ambiguous column, text that is no
    expression, a value that no score column holds, score sets that are unfinished or were made again since.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    if config.column in RESERVED:
        raise PairmillError(f"`--column {config.column}` is a column of pairs. Choose another name.")
    table = Table(dataset)
    compiled = compile_column(config.expr, table)
    sets = table.sets_in(compiled.columns)
    if config.name in sets:
        raise PairmillError(
            f"`{config.expr}` reads scores/{config.name}, which it would write. Pass --name to write beside it."
        )
    made_from = require_complete(table, sets)
    frame = table.frame(compiled.columns)
    field = pa.field(config.column, _arrow_type(frame, compiled.expr))
    scorer = ExprScorer(field, config.expr, made_from["scores"])
    # Computed before the sidecar stands: an expression that fails on the rows leaves nothing behind.
    if dataset.stage(f"scores/{config.name}").pending():
        values = _compute(frame, compiled.expr, config.expr)
        scorer = ExprScorer(field, config.expr, scorer.sets, values, starts(dataset))
    stage, pending = begin_scores(dataset, config.name, config, scorer, "score expr")
    return run_scores(stage, pending, scorer, emit, whole=True)


def _arrow_type(frame: pl.LazyFrame, expr: pl.Expr) -> pa.DataType:
    kind = frame.select(value=expr).collect_schema()["value"]
    return pa.string() if kind == pl.String else pl.Series(dtype=kind).to_arrow().type


def _compute(frame: pl.LazyFrame, expr: pl.Expr, text: str) -> pl.Series:
    """The column over the whole dataset; a single value is that of every row."""
    try:
        return frame.with_columns(__value=expr).select("__value").collect()["__value"]
    except pl.exceptions.PolarsError as error:
        raise PairmillError(f"`{text}` cannot be computed: {str(error).splitlines()[0]}. Nothing written.") from None
