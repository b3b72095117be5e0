"""Shard files out again: Parquet in a stream of row groups, Arrow mapped without a copy."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import PairmillError
from schemas.tables import COUNTS, VERSIONS, check_version, table_version
from schemas.tensors import fixed_to_array, from_blob, tensor_spec
from shards.files import Folder


@contextlib.contextmanager
def _naming(folder: Folder, name: str) -> Iterator[None]:
    """Turns what Arrow says of a missing or damaged file into a PairmillError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise PairmillError(f"{folder.url}/{name} is missing. Run the command that makes it.") from None
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise PairmillError(
            f"{folder.url}/{name} is damaged ({error}). Delete it and run the command that made it again."
        ) from None


def _check_known(metadata: Mapping[bytes, bytes] | None, where: str) -> None:
    table, number = table_version(metadata)
    if table:
        check_version(table, number, VERSIONS.get(table, 0), where)


def open_parquet(folder: Folder, name: str, verify: bool = False) -> pq.ParquetFile:
    """Raises PairmillError where the file is absent, cut short or of a newer version.

    `verify` compares every page read with its checksum.
    """
    with _naming(folder, name):
        local = folder.local is not None
        source: Any = folder.map_path(name) if local else folder.open(name)
        file = pq.ParquetFile(source, memory_map=local, pre_buffer=not local, page_checksum_verification=verify)
    _check_known(file.metadata.metadata, f"{folder.url}/{name}")
    return file


def parquet_footer(folder: Folder, name: str) -> dict[bytes, bytes]:
    """Key-value metadata of a Parquet file, read from its last bytes.

    Raises PairmillError as `open_parquet` does.
    """
    if folder.local is None:
        with open_parquet(folder, name) as file:
            return dict(file.metadata.metadata or {})
    import polars as pl  # reads a footer in a fifth of pyarrow's time, and a filter reads one for every shard

    with _naming(folder, name):
        try:
            found = pl.read_parquet_metadata(folder.map_path(name))
        except pl.exceptions.PolarsError as error:
            raise ValueError(str(error).splitlines()[0]) from None
    metadata = {key.encode(): value.encode() for key, value in found.items()}
    _check_known(metadata, f"{folder.url}/{name}")
    return metadata


def read_table(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole shard's columns. Raises PairmillError as `open_parquet` does."""
    with open_parquet(folder, name) as file, _naming(folder, name):
        return file.read(columns=None if columns is None else list(columns))


def row_groups(
    folder: Folder,
    name: str,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    verify: bool = False,
) -> Iterator[tuple[int, pa.Table]]:
    """(first row, table) of each row group, in order: a group's memory at a time.

    Raises PairmillError as `open_parquet` does, and where a page is damaged.
    """
    with open_parquet(folder, name, verify) as file:
        start = 0
        for group in range(file.num_row_groups):
            if groups is None or group in groups:
                with _naming(folder, name):
                    table = file.read_row_group(group, columns=None if columns is None else list(columns))
                yield start, table
            start += file.metadata.row_group(group).num_rows


def group_rows(folder: Folder, name: str) -> list[int]:
    """Row count of each row group."""
    with open_parquet(folder, name) as file:
        return [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]


def stored_counts(folder: Folder, name: str) -> dict[str, int]:
    """Rows by status or state as the file tells them."""
    if name.endswith(".parquet"):
        return json.loads(parquet_footer(folder, name).get(COUNTS, b"{}"))
    total: Counter[str] = Counter()
    file = _open_arrow(folder, name)
    with _naming(folder, name):
        for i in range(file.num_record_batches):
            total.update(json.loads(file.get_batch_with_custom_metadata(i).custom_metadata[COUNTS]))
    return dict(sorted(total.items()))


def _open_arrow(folder: Folder, name: str) -> pa.RecordBatchFileReader:
    with _naming(folder, name):
        file = pa.ipc.open_file(pa.memory_map(str(folder.map_path(name))))
    _check_known(file.schema.metadata, f"{folder.url}/{name}")
    return file


def arrow_schema(folder: Folder, name: str) -> dict[bytes, bytes]:
    """Schema metadata of an Arrow file."""
    return dict(_open_arrow(folder, name).schema.metadata or {})


def _list_value(value: pa.ListScalar) -> np.ndarray | None:
    """A list as numpy in its element type [N], lists of lists of one length as [N, K]; None where null."""
    if not value.is_valid:
        return None
    items = value.values
    if pa.types.is_fixed_size_list(items.type) and not items.null_count:
        size = items.type.list_size
        flat = items.values.to_numpy(zero_copy_only=False)  # of the whole batch: `flatten` would copy these rows
        return flat[items.offset * size : (items.offset + len(items)) * size].reshape(len(items), size)
    return items.to_numpy(zero_copy_only=False)


class MappedShard:
    """One feature shard, memory-mapped: random access to rows, no copy until a batch is built."""

    def __init__(self, folder: Folder, name: str) -> None:
        file = _open_arrow(folder, name)
        self.where = f"{folder.url}/{name}"
        self.schema = file.schema
        with _naming(folder, name):
            self.batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            for batch in self.batches:
                batch.validate(full=True)  # offsets that point outside the map would read foreign memory
            for field in self.schema:
                tensor_spec(field)
        self.ends = list(itertools.accumulate(b.num_rows for b in self.batches))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def states(self) -> list[str]:
        """`state` of every row."""
        return [s for b in self.batches for s in b.column("state").to_pylist()]

    def row(self, row: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """The row's columns: tensors and lists as read-only numpy views in their element type, None where null."""
        index = bisect.bisect_right(self.ends, row)
        batch = self.batches[index]
        at = row - (self.ends[index - 1] if index else 0)
        wanted = self.schema.names if columns is None else columns
        return {name: self._value(batch, name, at) for name in wanted}

    def _value(self, batch: pa.RecordBatch, name: str, at: int) -> Any:
        field = self.schema.field(name)
        column = batch.column(name)
        spec = tensor_spec(field)
        if spec is not None:
            dims = {d: batch.column(d)[at].as_py() for d in spec[1] if isinstance(d, str)}
            return from_blob(field, column, at, dims)
        if isinstance(field.type, pa.FixedShapeTensorType):
            return fixed_to_array(column.slice(at, 1))[0] if column[at].is_valid else None
        return _list_value(column[at]) if pa.types.is_list(field.type) else column[at].as_py()

    def column(self, name: str) -> np.ndarray:
        """A fixed-tensor column [rows, dim] (null rows NaN) or a scalar column as numpy."""
        if isinstance(self.schema.field(name).type, pa.FixedShapeTensorType):
            parts = [fixed_to_array(b.column(name)) for b in self.batches]
        else:
            parts = [b.column(name).to_numpy(zero_copy_only=False) for b in self.batches]
        return np.concatenate(parts) if parts else np.empty(0)
