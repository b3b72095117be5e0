"""Rows in, whole shard files out."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.pairs import pairs_digest
from schemas.tables import COUNTS, DIGEST, WHOLE
from schemas.tensors import array_to_fixed, arrays_to_blobs, tensor_spec
from shards.files import Folder

GROUP_BYTES = 16 << 20
BATCH_ROWS = 256
ROW_BYTES = 256  # what a row weighs beside its image
_NO_DICTIONARY = frozenset({"FLOAT", "DOUBLE", "FIXED_LEN_BYTE_ARRAY"})

Row = Mapping[str, Any]


def parquet_writer(stream: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Metadata in zstd; the image column raw, without dictionary or statistics (it does not compress).

    Fractions and hashes hardly repeat: a dictionary of them makes the file half as large again, and slower to read.
    """
    leaves = _leaf_types(schema)
    raw = _raw_columns(schema)
    plain = [path for path in leaves if path not in raw]
    return pq.ParquetWriter(
        stream,
        schema,
        compression={path: "NONE" if path in raw else "ZSTD" for path in leaves},
        use_dictionary=[path for path in plain if leaves[path] not in _NO_DICTIONARY],
        write_statistics=plain,
        write_page_checksum=True,  # `check` tells a damaged page from a good one
    )


@lru_cache(maxsize=64)
def _leaf_types(schema: pa.Schema) -> dict[str, str]:
    """Parquet's path of every leaf column and its physical type there."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return {leaf.path: leaf.physical_type for leaf in (leaves.column(i) for i in range(len(leaves)))}


def _raw_columns(schema: pa.Schema) -> set[str]:
    return {f.name for f in schema if pa.types.is_large_binary(f.type)}


class PairsWriter:
    """Writes one `pairs/` shard row by row, in row groups of about 16 MiB of image bytes."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        self.schema = schema
        self.writer = parquet_writer(stream, schema)
        self.counts: Counter[str] = Counter()
        self._rows: list[Row] = []
        self._parts: list[pa.Table] = []
        self._bytes = 0
        self._seen: list[pa.Table] = []

    def append(self, row: Row) -> None:
        """`row` has the schema's columns; a missing one is null."""
        self._rows.append(row)
        self.counts[row["status"]] += 1
        self._bytes += len(row.get("image") or b"") + ROW_BYTES
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def extend(self, table: pa.Table) -> None:
        """Rows as a table of the schema, cut into row groups as if they were appended one by one."""
        self._settle()
        self.counts.update(table["status"].to_pylist())
        lengths = pc.fill_null(pc.binary_length(table["image"]), 0).to_numpy() + ROW_BYTES
        start = 0
        for at, length in enumerate(lengths.tolist(), 1):
            self._bytes += length
            if self._bytes >= GROUP_BYTES:
                self._parts.append(table.slice(start, at - start))
                self._flush()
                start = at
        self._parts.append(table.slice(start))

    def _settle(self) -> None:
        if self._rows:
            columns = [_array([row.get(field.name) for row in self._rows], field.type) for field in self.schema]
            self._rows = []
            self._parts.append(pa.Table.from_arrays(columns, schema=self.schema))

    def _flush(self) -> None:
        self._settle()
        parts = self._parts or [self.schema.empty_table()]
        table = parts[0] if len(parts) == 1 else pa.concat_tables(parts).combine_chunks()
        if len(table) or not self._seen:
            self.writer.write_table(table, row_group_size=max(1, len(table)))
            self._seen.append(table.select(["status", "sha256"]))
        self._parts, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        seen = pa.concat_tables(self._seen)
        digest = pairs_digest(seen["status"], seen["sha256"])
        self.writer.add_key_value_metadata(footer(dict(self.counts), digest))
        self.writer.close()


def footer(counts: Mapping[str, int], digest: str | None = None, whole: str | None = None) -> dict[str, str]:
    """Footer entries of a shard: its counts, the digest of the pairs it is or was made from, that of all pairs."""
    out = {COUNTS.decode(): json.dumps(dict(sorted(counts.items())))}
    made_from = {DIGEST.decode(): digest, WHOLE.decode(): whole}
    return out | {key: value for key, value in made_from.items() if value is not None}


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """As `pa.array`, whose buffers grow by doubling; images are put into one of their own size."""
    if not pa.types.is_large_binary(kind):
        return pa.array(values, kind)
    lengths = np.array([len(value or b"") for value in values])
    valid = pa.array([value is not None for value in values]).buffers()[1]
    offsets = pa.py_buffer(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    data = pa.py_buffer(b"".join(value for value in values if value is not None))
    return pa.Array.from_buffers(kind, len(values), [valid, offsets, data], values.count(None))


@contextlib.contextmanager
def write_pairs(folder: Folder, name: str, schema: pa.Schema) -> Iterator[PairsWriter]:
    """A writer for one pairs shard; the file appears whole when the block ends well."""
    with folder.write(name) as stream:
        writer = PairsWriter(stream, schema)
        yield writer
        writer.close()


def write_table(
    folder: Folder,
    name: str,
    table: pa.Table,
    counts: Mapping[str, int],
    digest: str | None = None,
    whole: str | None = None,
) -> None:
    """Writes an input, scores, selection or task shard: one row group.

    `whole` (`Dataset.whole_digest`) marks scores that hang on every row of the dataset: a change of any pairs shard
    makes them count as not done.
    """
    with folder.write(name) as stream:
        writer = parquet_writer(stream, table.schema)
        writer.write_table(table, row_group_size=max(1, len(table)))
        writer.add_key_value_metadata(footer(counts, digest, whole))
        writer.close()


class FeatureWriter:
    """Writes one `features/` shard row by row: Arrow IPC, batches of at most 256 rows and 16 MiB."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema, digest: str) -> None:
        meta = {**(schema.metadata or {}), DIGEST: digest.encode()}
        self.schema = schema.with_metadata(meta)
        self.writer = pa.ipc.new_file(stream, self.schema)
        specs = {field.name: tensor_spec(field) for field in schema}
        self._item = {name: spec[0].itemsize for name, spec in specs.items() if spec is not None}
        self.counts: Counter[str] = Counter()
        self._rows: list[Row] = []
        self._bytes = 0

    def append(self, row: Row) -> None:
        """`row["state"]` and, where it is ok, the tensors (numpy arrays) and lists of the schema."""
        size = sum(v.size * self._item.get(k, v.itemsize) for k, v in row.items() if isinstance(v, np.ndarray))
        if self._rows and (len(self._rows) == BATCH_ROWS or self._bytes + size > GROUP_BYTES):
            self._flush()
        self._rows.append(row)
        self._bytes += size
        self.counts[row["state"]] += 1

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = [_column(field, [r.get(field.name) for r in self._rows]) for field in self.schema]
        batch = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        counts = Counter(r["state"] for r in self._rows)
        self.writer.write_batch(batch, custom_metadata={COUNTS: json.dumps(dict(sorted(counts.items())))})
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self.writer.close()


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if isinstance(field.type, pa.FixedShapeTensorType):
        dim = field.type.shape[0]
        valid = np.array([v is not None for v in values])
        zero = np.zeros(dim, np.float16)
        return array_to_fixed(np.stack([zero if v is None else v for v in values]), valid, dim)
    if tensor_spec(field) is not None:
        return arrays_to_blobs(values, field)
    if any(isinstance(v, np.ndarray) for v in values):
        values = [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
    return pa.array(values, field.type)


@contextlib.contextmanager
def write_features(folder: Folder, name: str, schema: pa.Schema, digest: str) -> Iterator[FeatureWriter]:
    """A writer for one feature shard; the file appears whole when the block ends well."""
    with folder.write(name) as stream:
        writer = FeatureWriter(stream, schema, digest)
        yield writer
        writer.close()
