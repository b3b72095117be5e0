"""The metadata of a whole dataset as lazy tables: row n of one is row n of every other.

Locally Polars' own scanner reads the files in manifest order; from a store pyarrow reads them through fsspec and hands
Polars the batches. Images are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

from schemas.errors import PairmillError
from shards.dataset import Dataset, Stage
from shards.reader import open_parquet, read_table

IMAGE = "image"
FETCHES = 8  # files of a store read ahead


def metadata_schema(stage: Stage, shards: Sequence[int] | None = None) -> pa.Schema:
    """Columns of a stage without the images: those of its first shard and of the first shard of every list.

    Raises PairmillError: no shard stands; two lists carry one column with different types.
    """
    standing = sorted(stage.standing()) if shards is None else list(shards)
    if not standing:
        raise PairmillError(f"{stage.folder.url}/{stage.path} has no shards yet. Run the command that makes it.")
    heads = _list_heads(stage.dataset) if stage.path in ("pairs", "input") else set()
    schemas = [_schema(stage, s) for s in sorted({standing[0], *heads} & set(standing))]
    try:
        merged = pa.unify_schemas(schemas)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise PairmillError(f"{stage.folder.url}/{stage.path}: lists carry one column in two types: {error}.") from None
    return pa.schema([f for f in merged if f.name != IMAGE])


def _schema(stage: Stage, shard: int) -> pa.Schema:
    with open_parquet(stage.folder, stage.file(shard)) as file:
        return file.schema_arrow.remove_metadata()


def _list_heads(dataset: Dataset) -> set[int]:
    """The first shard of each list: carried columns may change there."""
    lengths = [source.shards for source in dataset.manifest.lists]
    return {int(s) for s in np.cumsum([0, *lengths]) if s < dataset.num_shards}


def scan(stage: Stage, shards: Sequence[int] | None = None) -> pl.LazyFrame:
    """Rows of the stage (all shards, or those given) in manifest order; every metadata column.

    A carried column that a shard lacks is null there. Raises PairmillError as `metadata_schema` does.
    """
    wanted = range(stage.dataset.num_shards) if shards is None else shards
    arrow = metadata_schema(stage, wanted)
    names = [stage.file(s) for s in wanted]
    schema = polars_schema(arrow)
    root = stage.folder.local
    if root is None:
        return _scan_store(stage, names, arrow, schema)
    return pl.scan_parquet(
        [root / n for n in names],
        schema=schema,
        missing_columns="insert",
        extra_columns="ignore",
        hive_partitioning=False,
        glob=False,
    )


def polars_schema(schema: pa.Schema) -> pl.Schema:
    """The types Polars gives these columns."""
    return pl.Schema(schema.remove_metadata())


def _scan_store(stage: Stage, names: list[str], arrow: pa.Schema, schema: pl.Schema) -> pl.LazyFrame:
    def source(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = arrow.names if with_columns is None else with_columns
        left = n_rows
        for table in _fetch(stage, names, arrow, wanted):
            frame = _frame(table)
            if left is not None:
                frame = frame.head(left)
                left -= frame.height
            yield frame if predicate is None else frame.filter(predicate)
            if left == 0:
                return

    return register_io_source(source, schema=schema)


def _fetch(stage: Stage, names: list[str], arrow: pa.Schema, wanted: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of the files in order, a few read ahead."""

    def read(name: str) -> pa.Table:
        with open_parquet(stage.folder, name) as file:
            table = file.read(columns=[c for c in wanted if c in file.schema_arrow.names])
        columns = [
            table[c].cast(arrow.field(c).type) if c in table.column_names else pa.nulls(len(table), arrow.field(c).type)
            for c in wanted
        ]
        return pa.Table.from_arrays(columns, names=list(wanted))

    with ThreadPoolExecutor(FETCHES) as pool:
        futures = [pool.submit(read, n) for n in names[:FETCHES]]
        for n in range(len(names)):
            table = futures.pop(0).result()
            if n + FETCHES < len(names):
                futures.append(pool.submit(read, names[n + FETCHES]))
            yield table


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(f"a table gave {type(frame).__name__}")
    return frame


def starts(dataset: Dataset, shards: Sequence[int] | None = None) -> np.ndarray:
    """int64 [shards + 1]: the number of the first row of each shard, and the number of rows at the end."""
    sizes = dataset.manifest.shards
    chosen = sizes if shards is None else [sizes[s] for s in shards]
    return np.concatenate([[0], np.cumsum(chosen)]).astype(np.int64)


def positions(dataset: Dataset, shards: Sequence[int] | None = None) -> pl.DataFrame:
    """`shard` and `row` (int32) of every row, in order."""
    wanted = range(dataset.num_shards) if shards is None else shards
    sizes = [dataset.manifest.shards[s] for s in wanted]
    shard: np.ndarray = np.repeat(np.array(list(wanted), np.int32), sizes)
    row = np.arange(len(shard), dtype=np.int32) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes).astype(np.int32)
    return pl.DataFrame({"shard": shard, "row": row})


def rows_at(stage: Stage, index: np.ndarray, columns: Sequence[str]) -> pl.DataFrame:
    """The columns of a few rows, given by their numbers in the dataset (ascending); reads only their shards' files."""
    begin = starts(stage.dataset)
    cuts = np.asarray(np.searchsorted(index, begin))
    parts = [
        read_table(stage.folder, stage.file(s), columns).take(pa.array(index[cuts[s] : cuts[s + 1]] - begin[s]))
        for s in np.flatnonzero(np.diff(cuts)).tolist()
    ]
    if not parts:
        return pl.DataFrame({c: [] for c in columns})
    return _frame(pa.concat_tables(parts, promote_options="default"))
