"""Lists of every kind as a stream of batches: a few thousand rows in memory, whatever the file's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from curation.list_files import ListFile, unpacked, unpacking
from curation.list_json import json_rows, line_rows
from curation.list_text import OddBytes, delimited_rows, open_text, text_lines
from schemas.errors import PairmillError

BATCH_ROWS = 10_000
Values: TypeAlias = list[Any] | pa.Array


@dataclass(frozen=True)
class Batch:
    """Rows under the list's own column names: Arrow arrays where the file has types, Python values elsewhere."""

    columns: dict[str, Values]
    rows: int


def read_batches(file: ListFile, path: Path, encoding: str | None, odd: OddBytes) -> Iterator[Batch]:
    """The list's rows, in order. `path` holds the file's bytes as they came.

    Raises PairmillError that names the file, and the line where there is one, for what cannot be read.
    """
    if file.kind in ("parquet", "arrow"):
        with unpacked(path, file.packing, file.name) as plain:
            yield from _parquet(plain, file.name) if file.kind == "parquet" else _arrow(plain, file.name)
        return
    yield from _text(file, path, encoding, odd)


def _text(file: ListFile, path: Path, encoding: str | None, odd: OddBytes) -> Iterator[Batch]:
    if file.kind == "json":
        yield from _gather(json_rows(lambda: _text_stream(file, path, encoding, odd), file.name))
        return
    with _text_stream(file, path, encoding, odd) as stream:
        lines = text_lines(stream, file.name)
        if file.kind == "jsonl":
            yield from _gather(line_rows(lines, file.name))
        elif file.kind == "txt":
            yield from _table(["url"], ([line.strip()] for line in lines if line.strip()))
        else:
            yield from _table(*delimited_rows(lines, "\t" if file.kind == "tsv" else None, file.name))


def _text_stream(file: ListFile, path: Path, encoding: str | None, odd: OddBytes) -> Any:
    return open_text(lambda: unpacking(path, file.packing, file.name), encoding, odd, file.name)


def _table(names: list[str], rows: Iterator[list[str | None]]) -> Iterator[Batch]:
    for block in _blocks(rows):
        yield Batch(dict(zip(names, map(list, zip(*block, strict=True)), strict=True)), len(block))


def _gather(rows: Iterator[dict[str, Any]]) -> Iterator[Batch]:
    """Rows with keys of their own as columns; a key that a row lacks is None."""
    for block in _blocks(rows):
        names = dict.fromkeys(name for row in block for name in row)
        yield Batch({name: [row.get(name) for row in block] for name in names}, len(block))


def _blocks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    block = []
    for row in rows:
        block.append(row)
        if len(block) == BATCH_ROWS:
            yield block
            block = []
    if block:
        yield block


def _parquet(path: Path, name: str) -> Iterator[Batch]:
    try:
        # A buffered, unmapped read keeps a row group of gigabytes out of memory.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                yield _from_arrow(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(name, "Parquet", error) from None


def _arrow(path: Path, name: str) -> Iterator[Batch]:
    try:
        with pa.memory_map(str(path)) as source:
            if path.stat().st_size and source.read(6) == b"ARROW1":
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield _from_arrow(batch.slice(start, BATCH_ROWS))
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(name, "Arrow", error) from None


def _damaged(name: str, kind: str, error: Exception) -> PairmillError:
    return PairmillError(f"{name} is no {kind} file, or damaged: {str(error).splitlines()[0]}. Fetch it again.")


def _from_arrow(batch: pa.RecordBatch) -> Batch:
    columns: dict[str, Values] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        columns.setdefault(name, column)
    return Batch(columns, batch.num_rows)
