"""Rows of one or more datasets cut anew into shards: what `export dataset` and `merge` share.

Row k of the new dataset is the k-th kept row of the parts, in order; it lies in shard k // shard_rows. Every file of
the new dataset follows from that alone, so a killed run goes on and ends with the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from extractors.resume import MARKS, marks_metadata, row_marks
from schemas.pairs import carried_fields, pairs_schema
from schemas.status import OK
from schemas.tables import COUNTS, DIGEST, WHOLE
from shards.dataset import Dataset, new_manifest
from shards.files import Folder
from shards.hand import RowInHand
from shards.reader import MappedShard, open_parquet, read_table, row_groups
from shards.select import read_selection
from shards.writer import write_features, write_pairs, write_table


@dataclass(frozen=True)
class Part:
    """A dataset to take rows from; `selection` None takes all of them."""

    dataset: Dataset
    selection: str | None = None

    def kept(self, shard: int) -> np.ndarray:
        """Rows of the shard that are taken, in order: int64 [rows]."""
        if self.selection is None:
            return np.arange(self.dataset.manifest.shards[shard])
        return np.flatnonzero(_mask(self.dataset.url, self.selection)(shard))

    def counts(self) -> list[int]:
        """Rows taken from each shard."""
        return [len(self.kept(s)) for s in range(self.dataset.num_shards)]


@lru_cache(maxsize=4)
def _mask(url: str, selection: str) -> Callable[[int], np.ndarray]:
    return read_selection(Dataset.open(url), selection).mask


def forget_selections() -> None:
    """A new run reads the selections as they stand now."""
    _mask.cache_clear()


@dataclass(frozen=True)
class Segment:
    """Rows of one shard of one part that lie together in a new shard."""

    part: int
    shard: int
    rows: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Where every row of the new dataset comes from. `starts[i]` is the first new row of source i = (part, shard)."""

    parts: tuple[Part, ...]
    sources: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    shard_rows: int

    @property
    def rows(self) -> int:
        return self.starts[-1]

    def sizes(self) -> list[int]:
        """Row count of each new shard."""
        whole, rest = divmod(self.rows, self.shard_rows)
        return [self.shard_rows] * whole + ([rest] if rest else [])

    def segments(self, shard: int) -> Iterator[Segment]:
        """What the new shard is made of, in order."""
        first, last = shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)
        at = int(np.searchsorted(self.starts, first, side="right")) - 1
        while at < len(self.sources) and self.starts[at] < last:
            part, source = self.sources[at]
            low, high = max(first - self.starts[at], 0), last - self.starts[at]
            rows = self.parts[part].kept(source)[low:high]
            if len(rows):
                yield Segment(part, source, rows)
            at += 1

    def new_places(self, part: int) -> Callable[[int, int], tuple[int, int] | None]:
        """A function of an old (shard, row) of the part: the new one, or None where the row is not taken."""
        starts = {shard: start for (p, shard), start in zip(self.sources, self.starts, strict=False) if p == part}
        kept = lru_cache(maxsize=64)(self.parts[part].kept)

        def place(shard: int, row: int) -> tuple[int, int] | None:
            rows = kept(shard)
            at = int(np.searchsorted(rows, row))
            if at == len(rows) or rows[at] != row:
                return None
            return divmod(starts[shard] + at, self.shard_rows)

        return place


def make_plan(parts: Sequence[Part], shard_rows: int) -> Plan:
    """Counts the kept rows of every part."""
    forget_selections()
    sources = tuple((p, s) for p, part in enumerate(parts) for s in range(part.dataset.num_shards))
    counts = [n for part in parts for n in part.counts()]
    return Plan(tuple(parts), sources, (0, *np.cumsum(counts, dtype=np.int64).tolist()), shard_rows)


def target_of(folder: Folder, plan: Plan, columns: Mapping[str, str]) -> Dataset:
    """The new dataset, its manifest still unwritten."""
    return Dataset(folder, new_manifest(plan.shard_rows, plan.sizes(), columns=dict(columns)))


def pairs_schema_of(dataset: Dataset) -> pa.Schema:
    """Schema of the pairs as the first shard tells it."""
    if not dataset.num_shards:
        return pairs_schema()
    with open_parquet(dataset.folder, dataset.stage("pairs").file(0)) as file:
        return pairs_schema(carried_fields(file.schema_arrow))


@dataclass(frozen=True)
class PairsWork:
    """Writes one new shard of pairs. `renames`, one a part: column -> its name in the new dataset."""

    plan: Plan
    target: Dataset
    schema: pa.Schema
    renames: tuple[Mapping[str, str], ...]

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        done = 0
        with write_pairs(self.target.folder, self.target.stage("pairs").file(shard), self.schema) as writer:
            for segment in self.plan.segments(shard):
                dataset = self.plan.parts[segment.part].dataset
                for table in taken(dataset, dataset.stage("pairs").file(segment.shard), segment.rows):
                    writer.extend(_shaped(table, self.schema, self.renames[segment.part]))
                    done += len(table)
                    hand.progress(done, 0)
        return dict(writer.counts)


def taken(dataset: Dataset, file: str, rows: np.ndarray) -> Iterator[pa.Table]:
    """The rows of a Parquet file, a row group's at a time."""
    for start, table in row_groups(dataset.folder, file):
        inside = rows[(rows >= start) & (rows < start + len(table))] - start
        if len(inside) == len(table):
            yield table
        elif len(inside):
            yield table.take(pa.array(inside))


def _shaped(table: pa.Table, schema: pa.Schema, renames: Mapping[str, str]) -> pa.Table:
    """The table under the schema's names, types and order; a column it lacks is null."""
    table = table.rename_columns([renames.get(n, n) for n in table.column_names])
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class ScoresWork:
    """Writes one new shard of a score set."""

    plan: Plan
    target: Dataset
    path: str

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        pieces = []
        for segment in self.plan.segments(shard):
            stage = self.plan.parts[segment.part].dataset.stage(self.path)
            table = read_table(stage.folder, stage.file(segment.shard))
            pieces.append(table.take(pa.array(segment.rows)))
        table = pa.concat_tables(pieces).replace_schema_metadata(_bare(pieces[0].schema.metadata)).combine_chunks()
        counts = score_counts(table)
        digest = self.target.stage("pairs").digest(shard)
        write_table(self.target.folder, self.target.stage(self.path).file(shard), table, counts, digest)
        return counts


def score_counts(table: pa.Table) -> dict[str, int]:
    """Rows by state, where the scorer wrote one; else rows with a score and rows without any."""
    for name in table.column_names:
        if name.endswith("state"):
            return dict(Counter(table[name].to_pylist()))
    scored = reduce(pc.or_, [pc.is_valid(c) for c in table.columns])
    some = pc.sum(scored).as_py() or 0
    return {OK: some, "null": len(table) - some}


def _bare(metadata: Mapping[bytes, bytes] | None) -> dict[bytes, bytes]:
    """Schema metadata without what the writer adds to a shard's footer."""
    return {k: v for k, v in (metadata or {}).items() if k not in (COUNTS, DIGEST, WHOLE, MARKS)}


@dataclass(frozen=True)
class FeaturesWork:
    """Writes one new shard of a feature set, tensors copied once, from the map to the file."""

    plan: Plan
    target: Dataset
    path: str

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        segments = list(self.plan.segments(shard))
        shards = [self._source(segment) for segment in segments]
        metadata = shards[0].schema.metadata or {}
        marks = self._marks(shard) if MARKS in metadata else {}
        schema = shards[0].schema.with_metadata({**_bare(metadata), **marks})
        digest = self.target.stage("pairs").digest(shard)
        done = 0
        with write_features(self.target.folder, self.target.stage(self.path).file(shard), schema, digest) as writer:
            for segment, mapped in zip(segments, shards, strict=True):
                for row in segment.rows.tolist():
                    writer.append(mapped.row(row))
                    done += 1
                    hand.progress(done, 0)
        return dict(writer.counts)

    def _marks(self, shard: int) -> dict[bytes, bytes]:
        pairs = self.target.stage("pairs")
        table = read_table(self.target.folder, pairs.file(shard), ["status", "sha256"])
        return marks_metadata(row_marks(table["status"].to_pylist(), table["sha256"].to_pylist()))

    def _source(self, segment: Segment) -> MappedShard:
        stage = self.plan.parts[segment.part].dataset.stage(self.path)
        return MappedShard(stage.folder, stage.file(segment.shard))


def complete_shards(plan: Plan, target: Dataset, path: str) -> list[int]:
    """New shards whose rows all stand, up to date, in the stage of every part they come from."""
    done = [part.dataset.stage(path).done() for part in plan.parts]
    return [
        shard
        for shard in range(target.num_shards)
        if all(segment.shard in done[segment.part] for segment in plan.segments(shard))
    ]
