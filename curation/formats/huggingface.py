"""Hugging Face Parquet: `image: struct<bytes, path>`, of the type Image in the schema key `huggingface`.

Read: any Parquet with such a column (or with a plain binary one), images loaded a few rows at a time when they are
asked for. Written: `data/train-00000-of-00005.parquet`, the names that `datasets` looks for, in row groups of at most
100 images and 16 MiB, so that a reader of one row reads little else.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.exporting import Job
from curation.formats.samples import SUFFIX_OF, Sample, Source, describe, find_files
from curation.formats.webdataset import sample_key
from curation.maintenance_config import ExportConfig, ImportConfig
from curation.reshard import Part, make_plan, pairs_schema_of
from schemas.errors import PairmillError, suggest
from schemas.pairs import carried_fields
from shards.files import Folder
from shards.writer import GROUP_BYTES

IMAGE = "image"
GROUP_ROWS = 100
_READ_ROWS = 32  # images decoded from Parquet at a time
_BUFFER = 1 << 20  # bytes of a column chunk read at a time, instead of the whole of it
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_OWN = pa.schema(
    [
        (IMAGE, _IMAGE_TYPE),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("uid", pa.string()),
        ("input_uid", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


def sources(paths: Sequence[str]) -> list[Source]:
    """Parquet files among `paths`; those of a folder sorted by name."""
    return find_files(paths, lambda name: name.endswith(".parquet"), "Parquet file")


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """Rows of each file, in order.

    Raises PairmillError: a damaged file, no column of images, several and none is named.
    """
    for source in sources:
        try:
            with source.open() as stream:
                yield from _read_file(source, pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False), config)
        except (pa.ArrowException, OSError) as error:
            raise PairmillError(
                f"{source.url} is damaged: {_line(error)}. Take it out of the input, or fetch it again."
            ) from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_file(source: Source, file: pq.ParquetFile, config: ImportConfig) -> Iterator[Sample]:
    schema = file.schema_arrow
    column = image_column(schema, getattr(config, "image_key", None), source.url)
    names = [f.name for f in schema if f.name != column and not _holds_bytes(f.type)]
    first = 0
    for group in range(file.num_row_groups):
        images = _Images(file, group, column, source)
        rows = file.metadata.row_group(group).num_rows
        told = _rows(file, group, names) if names else iter([{}] * rows)
        for at, values in enumerate(told):
            sample = Sample(f"{source.name} row {first + at}", partial(images.get, at))
            yield describe(sample, {k: _plain(v) for k, v in values.items()}, config)
        first += rows


def _rows(file: pq.ParquetFile, group: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(1000, row_groups=[group], columns=list(names)):
        yield from batch.to_pylist()


def image_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    """The column that holds the images. Raises PairmillError where none can be told from the others."""
    found = [f.name for f in schema if _holds_image(f.type)]
    if wanted is not None:
        if wanted in found:
            return wanted
        known = ", ".join(f"`{f.name}`" for f in schema)
        raise PairmillError(f"{where} has no image column `{wanted}`.{suggest(wanted, schema.names)} It has: {known}.")
    typed = [name for name in found if name in _typed(schema)]
    structs = [name for name in found if pa.types.is_struct(schema.field(name).type)]
    for names in ([n for n in typed if n == IMAGE], typed, [n for n in structs if n == IMAGE], structs, found):
        if len(names) == 1:
            return names[0]
        if names:
            shown = ", ".join(f"`{n}`" for n in names)
            raise PairmillError(f"{where} has several image columns: {shown}. Name one with --image-key.")
    known = ", ".join(f"`{f.name}` {f.type}" for f in schema)
    raise PairmillError(f"{where} has no image column (struct of bytes and path, or binary). It has: {known}.")


def _typed(schema: pa.Schema) -> set[str]:
    """Columns of type Image, as the schema's metadata tells them."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
        return {n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image"}
    except (ValueError, LookupError, TypeError, AttributeError):
        return set()


def _holds_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether there are bytes in it: other images, sound. They are not carried."""
    if _is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _plain(value: Any) -> Any:
    """Dates and decimals as text; what JSON knows as it is."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, (decimal.Decimal, datetime.timedelta)) else value


class _Images:
    """The images of one row group, a few in memory at a time. Asked for in order, the group is read once."""

    def __init__(self, file: pq.ParquetFile, group: int, column: str, source: Source) -> None:
        self.file, self.group, self.column, self.source = file, group, column, source
        self._first, self._next = 0, 0
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._batch: pa.RecordBatch | None = None

    def get(self, row: int) -> bytes:
        """Raises FileNotFoundError where the row only names a file or holds nothing."""
        if self._batches is None or row < self._first:
            self._first = self._next = 0
            self._batches = self.file.iter_batches(_READ_ROWS, row_groups=[self.group], columns=[self.column])
        while self._next <= row:
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise pa.ArrowInvalid(f"`{self.column}` has fewer rows than the other columns")
            self._first, self._next = self._next, self._next + len(self._batch)
        assert self._batch is not None, "`_next` is past the row"
        value = self._batch.column(0)[row - self._first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise FileNotFoundError(self.column)
        return data


def jobs(part: Part, config: ExportConfig) -> list[Job]:
    """Files of `shard_rows` rows, whose names say how many there are."""
    plan = make_plan([part], config.shard_rows)
    return [Job(Writer(len(plan.sizes()), pairs_schema_of(part.dataset)), plan)]


class Writer:
    """Writes `data/train-NNNNN-of-NNNNN.parquet`. `pairs` is the schema of the rows."""

    def __init__(self, files: int, pairs: pa.Schema) -> None:
        self.files = files
        told = {"info": {"features": {IMAGE: {"_type": "Image"}}}}
        fields = [*_OWN, *carried_fields(pairs)]
        self.schema = pa.schema(fields, metadata={"huggingface": json.dumps(told)})

    def name(self, number: int) -> str:
        return f"data/train-{number:05d}-of-{self.files:05d}.parquet"

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(self.name(number))

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        with folder.write(self.name(number)) as stream:
            with parquet_of_images(stream, self.schema) as writer:
                group: list[dict[str, Any]] = []
                size = 0
                for index, row in enumerate(rows):
                    if group and (len(group) == GROUP_ROWS or size + len(row["image"]) > GROUP_BYTES):
                        self._flush(writer, group)
                        group, size = [], 0
                    group.append(self._row(row, sample_key(number, index)))
                    size += len(row["image"])
                self._flush(writer, group)

    def _row(self, row: Mapping[str, Any], key: str) -> dict[str, Any]:
        name = f"{key}.{SUFFIX_OF.get(row['format'], row['format'])}"
        own = {
            "image": {"bytes": row["image"], "path": name},
            "uid": row["uid"].hex(),
            "sha256": row["sha256"].hex() if row["sha256"] else None,
        }
        return {n: row[n] for n in self.schema.names if n not in own} | own

    def _flush(self, writer: pq.ParquetWriter, group: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(group, schema=self.schema)
        writer.write_table(table, row_group_size=max(1, len(table)))

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        """The names tell how many files there are."""


def parquet_of_images(stream: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer whose images are stored as they are, without dictionary or statistics, and the rest compressed."""
    lists = {f.name for f in schema if pa.types.is_list(f.type)}
    plain = [f"{name}.list.element" if name in lists else name for name in schema.names if name != IMAGE]
    return pq.ParquetWriter(
        stream,
        schema,
        compression={**dict.fromkeys([*plain, f"{IMAGE}.path"], "ZSTD"), f"{IMAGE}.bytes": "NONE"},
        use_dictionary=plain,
        write_statistics=plain,
    )
