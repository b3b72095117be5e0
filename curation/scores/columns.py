"""The frame of scorers that read columns of pairs and no image: one shard in, its new columns out.

A scorer that reads images runs on `extractors/runner.py`; `curation/scores/pixels.py` is its frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import StageConfig
from schemas.events import Emit, StageFinished
from schemas.features import SCORES, VERSION, scores_schema
from schemas.sidecars import make_sidecar
from schemas.status import OK
from shards.dataset import PAIRS, Dataset, Stage
from shards.hand import RowInHand
from shards.parallel import run_stage
from shards.reader import read_table
from shards.writer import write_table

MEND = "Pass the old settings, or --name to start beside it."
NULL = "null"
_BYTES_PER_ROW = 64


class ColumnScorer(Protocol):
    """What is known of a scorer. Picklable: every worker gets a copy.

    columns     pair columns that it reads
    fields      columns that it writes
    identity    what decides the values beside the configuration (a model's hash, a rule's version)
    provenance  column -> what it is, with its scale, for the sidecar
    versions    package -> version
    """

    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def fields(self) -> Sequence[pa.Field]: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def provenance(self) -> dict[str, dict[str, Any]]: ...
    @property
    def versions(self) -> dict[str, str]: ...

    def __call__(self, shard: int, pairs: pa.Table) -> Mapping[str, Any]:
        """`fields` by name, each with a value for every row of `pairs` (anything that `pa.array` takes)."""


def begin_scores(
    dataset: Dataset | str | Path, name: str, config: StageConfig, scorer: ColumnScorer, command: str
) -> tuple[Stage, list[int]]:
    """`scores/NAME` with its sidecar written or compared, and the shards that are still to do.

    Raises PairmillError: no pairs; scores of other settings stand under that name.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    dataset.require(PAIRS)
    stage = dataset.stage(f"{SCORES}/{name}")
    columns = {f.name: scorer.provenance.get(f.name, {}) for f in scorer.fields}
    sidecar = make_sidecar(command, stage.name, (SCORES, VERSION), config, scorer.identity, columns, scorer.versions)
    stage.begin(sidecar, MEND)
    return stage, stage.pending()


def run_scores(
    stage: Stage,
    pending: Sequence[int],
    scorer: ColumnScorer,
    emit: Emit,
    *,
    workers: int | None = 0,
    scheduler: str | None = None,
    whole: bool = False,
) -> StageFinished:
    """Computes the pending shards.

    `whole`: the values hang on all rows of the dataset, so that a change of any pairs shard makes every shard count
    as not done. Raises PairmillError as `run_stage` does.
    """
    digest = stage.dataset.whole_digest() if whole and pending else None
    return run_stage(
        stage,
        ColumnWork(stage, scorer, digest),
        pending=pending,
        workers=workers,
        scheduler=scheduler,
        emit=emit,
        bytes_per_row=_BYTES_PER_ROW,
    )


@dataclass(frozen=True)
class ColumnWork:
    """Makes the file of one shard. Picklable."""

    stage: Stage
    scorer: ColumnScorer
    whole: str | None = None

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        pairs = self.stage.dataset.stage(PAIRS)
        digest = pairs.digest(shard)
        table = read_table(self.stage.folder, pairs.file(shard), self.scorer.columns)
        made = self.scorer(shard, table)
        schema = scores_schema(self.scorer.fields)
        scores = pa.table([pa.array(made[f.name], f.type) for f in schema], schema=schema)
        if len(scores) != len(table):
            raise ValueError(f"the scorer gave {len(scores)} rows for {len(table)} pairs")
        counts = count_scored(scores)
        write_table(self.stage.folder, self.stage.file(shard), scores, counts, digest, self.whole)
        return counts


def count_scored(scores: pa.Table) -> dict[str, int]:
    """Rows with a value in any column (`ok`), and rows without (`null`)."""
    valid = [pc.is_valid(column) for column in scores.columns]
    some = valid[0]
    for one in valid[1:]:
        some = pc.or_(some, one)
    rows = pc.sum(some).as_py() or 0
    return {OK: rows, NULL: len(scores) - rows}
