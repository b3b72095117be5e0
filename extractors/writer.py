"""Whole rows in, a shard's files out: features, scores, or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from extractors.protocol import Loader
from extractors.resume import Outputs, Plan, marks_metadata
from schemas.features import features_schema, scores_schema
from shards.writer import write_features, write_table

Row = dict[str, Any]


class ShardWriter:
    """Takes whole rows: tensors go to the features' file, score columns are kept for the scores' file."""

    def __init__(self, loader: Loader, append: Callable[[Row], None] | None) -> None:
        self.loader, self._append = loader, append
        self.counts: Counter[str] = Counter()
        self.scores: list[Row] = []

    def append(self, row: Row) -> None:
        self.counts[row["state"]] += 1
        if self._append:
            self._append(row)
        if self.loader.score_fields:
            one = {f.name: row.get(f.name) for f in self.loader.score_fields}
            self.scores.append(one | {self.loader.state_column: row["state"]})

    def table(self) -> pa.Table:
        """The scores' columns."""
        return pa.Table.from_pylist(self.scores, schema=scores_schema(self.loader.score_fields))


@contextmanager
def open_outputs(outputs: Outputs, loader: Loader, shard: int, plan: Plan) -> Iterator[ShardWriter]:
    """A writer of the shard's files, whole at the end: features first, then scores."""
    folder = outputs.dataset.folder
    if outputs.features:
        schema = features_schema(loader.fields, loader.about)
        schema = schema.with_metadata({**(schema.metadata or {}), **marks_metadata(plan.marks)})
        name = outputs.dataset.stage(outputs.features).file(shard)
        with write_features(folder, name, schema, plan.digest) as features:
            writer = ShardWriter(loader, features.append)
            yield writer
    else:
        writer = ShardWriter(loader, None)
        yield writer
    if outputs.scores:
        name = outputs.dataset.stage(outputs.scores).file(shard)
        write_table(folder, name, writer.table(), writer.counts, plan.digest)
