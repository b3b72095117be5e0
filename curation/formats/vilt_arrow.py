"""The `.arrow` files of ViLT, METER and VLMo: an Arrow IPC file of images and their captions.

Columns: `image: binary`, `caption: list<string>`, `image_id: string`, `split: string`; Visual Genome has the boxes of
its captions (`width, height, x, y: list<int64>`) instead of a split, VLMo's text files `image: string` ("None") and
`source`. The readers know the files by name alone (`arrow_layouts.py`), skip a name that is missing and then mix up the
others: an export writes every name, empty where no row falls there. What the columns have no place for lies in
`NAME.parquet` beside `NAME.arrow`, row by row; an import joins the two.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.exporting import Job
from curation.formats.arrow_layouts import LAYOUTS, Layout, files_of, keeps_ids, split_rows
from curation.formats.samples import SUFFIX_OF, Sample, Source, describe, find_files
from curation.maintenance_config import ArrowExportConfig, ExportConfig, ImportConfig
from curation.reshard import Part, make_plan, pairs_schema_of
from schemas.errors import PairmillError
from schemas.pairs import carried_fields
from shards.files import Folder, open_folder

BATCH_BYTES = 64 << 20  # of images in a record batch; `binary` ends at 2 GiB
BATCH_ROWS = 1000
_BOX = ("x", "y", "width", "height")
_BESIDE = pa.schema(
    [
        ("uid", pa.string()),
        ("input_uid", pa.string()),
        ("url", pa.string()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


# in


def sources(paths: Sequence[str]) -> list[Source]:
    """`.arrow` files, those of a folder by name, numbers by size, each with the `.parquet` beside it.

    Raises PairmillError where there is none, or one holds no pairs.
    """
    found = [s for path in paths for s in sorted(find_files([path], _wanted, ".arrow file"), key=_natural)]
    if not any(_is_arrow(s) for s in found):
        raise PairmillError(f"{', '.join(paths)}: no .arrow file there.")
    for source in filter(_is_arrow, found):
        with _naming(source), source.open() as stream, pa.ipc.open_file(stream) as reader:
            _check_columns(reader.schema, source)
    stems = {_stem(s) for s in found if _is_arrow(s)}
    found = [s for s in found if _is_arrow(s) or _stem(s) in stems]
    known = {s.url for s in found}
    for source in [s for s in found if _is_arrow(s)]:
        beside = f"{_stem(source)}.parquet"
        if beside not in known:
            found += _if_there(beside)
    return found


def _wanted(name: str) -> bool:
    return name.endswith((".arrow", ".parquet"))


def _is_arrow(source: Source) -> bool:
    return source.url.endswith(".arrow")


def _stem(source: Source) -> str:
    return source.url.rsplit(".", 1)[0]


def _natural(source: Source) -> list[tuple[int, str]]:
    """`x_2` before `x_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", source.name)]


def _if_there(url: str) -> list[Source]:
    try:
        return find_files([url], _wanted, ".parquet file")
    except PairmillError:
        return []


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """Rows of each `.arrow` file, in order.

    Raises PairmillError: a damaged file, one that holds no pairs, a `.parquet` beside it that has other rows.
    """
    beside = {_stem(s): s for s in sources if not _is_arrow(s)}
    for source in sources:
        if _is_arrow(source):
            with _naming(source):
                yield from _read_file(source, beside.get(_stem(source)), config)


@contextlib.contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Turns what Arrow says of a damaged file into a PairmillError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PairmillError(
            f"{source.url} is damaged, or no Arrow IPC file: {text}. Take it out of the input, or fetch it again."
        ) from None


def _read_file(source: Source, beside: Source | None, config: ImportConfig) -> Iterator[Sample]:
    with pa.memory_map(_local(source)) as stream, pa.ipc.open_file(stream) as reader:
        told = _told_beside(beside) if beside is not None else None
        first = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)  # offsets of strangers: none may point outside
            for at, values in enumerate(_values(batch)):
                where = f"{source.name} row {first + at}"
                yield _sample(where, batch, at, values, None if told is None else next(told, _END), config)
            first += len(batch)
        if told is not None and next(told, _END) is not _END:
            raise _misfit(source.name)


_END: dict[str, Any] = {"": None}


def _misfit(where: str) -> PairmillError:
    return PairmillError(
        f"{where}: the .parquet beside it has another number of rows. "
        "Put the one that was written with it there, or take it away to import the .arrow file alone."
    )


def _local(source: Source) -> str:
    """The file on this machine; one of a store is fetched into the cache."""
    folder, name = source.url.rsplit("/", 1)
    return str(open_folder(folder).map_path(name))


def _check_columns(schema: pa.Schema, source: Source) -> None:
    kinds = {f.name: f.type for f in schema}
    image, caption = kinds.get("image"), kinds.get("caption")
    if image is None or caption is None or not _is_text(caption) or not (_is_image(image) or pa.types.is_null(image)):
        columns = ", ".join(f"{n} {k}" for n, k in kinds.items())
        raise PairmillError(
            f"{source.url} holds no pairs: an `image` (binary) and a `caption` (list of strings) are looked for, "
            f"found {columns}. Name the files of pairs alone, such as 'DIR/coco_caption_karpathy_*.arrow'."
        )


def _is_image(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = [n for n in batch.schema.names if n != "image" and not pa.types.is_binary(batch.schema.field(n).type)]
    rest = batch.select(names)
    for start in range(0, len(rest), BATCH_ROWS):
        yield from rest.slice(start, BATCH_ROWS).to_pylist()


def _told_beside(source: Source) -> Iterator[dict[str, Any]]:
    with source.open() as stream:
        for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()


def _sample(
    where: str,
    batch: pa.RecordBatch,
    at: int,
    values: dict[str, Any],
    beside: dict[str, Any] | None,
    config: ImportConfig,
) -> Sample:
    column = batch.column("image")
    without = pa.types.is_null(column.type) or pa.types.is_string(column.type) or not column[at].is_valid
    sample = Sample(where, None if without else partial(_image, column, at))
    if beside is None:
        boxes = [values.pop(name, None) for name in _BOX]
        describe(sample, values, config)
        if all(isinstance(numbers, list) for numbers in boxes):  # as `visual_genome.py` carries them
            sample.carried["regions"] = [list(box) for box in zip(*boxes, strict=False)]
        return sample
    if beside is _END:
        raise _misfit(where)
    return describe(sample, {**beside, "caption": values["caption"]}, config)


def _image(column: pa.Array, at: int) -> bytes:
    return column[at].as_py()


# out


def jobs(part: Part, config: ExportConfig) -> list[Job]:
    """One job a split of the layout.

    Raises PairmillError: a split that the layout has no file for, more rows than its files take.
    """
    if not isinstance(config, ArrowExportConfig):
        config = ArrowExportConfig(**config.model_dump())
    layout, schema = LAYOUTS[config.layout], pairs_schema_of(part.dataset)
    out = []
    for split, rows in split_rows(part, layout, config.split, schema).items():
        plan = make_plan([rows], files_of(layout, split, sum(rows.counts()), config.shard_rows))
        keep, notes = keeps_ids(rows, schema) if "image_id" in layout.schema.names else (False, ())
        out.append(Job(Writer(layout, split, schema, plan.shard_rows, keep), plan, notes))
    return out


class Writer:
    """Writes the files of one split. `keep_ids`: rows have an `image_id` that the readers can use."""

    def __init__(self, layout: Layout, split: str, pairs: pa.Schema, shard_rows: int, keep_ids: bool) -> None:
        self.layout, self.split, self.shard_rows, self.keep_ids = layout, split, shard_rows, keep_ids
        self.names = layout.names[split]
        self.beside = pa.schema([*_BESIDE, *carried_fields(pairs)])

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(f"{self.names[number]}.arrow")

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """`NAME.parquet`, then `NAME.arrow`, both row by row."""
        name = self.names[number]
        with folder.write(f"{name}.arrow") as stream, folder.write(f"{name}.parquet") as other:
            arrow = pa.ipc.new_file(stream, self.layout.schema)
            beside = pq.ParquetWriter(other, self.beside, compression="ZSTD")
            for first, batch in _cut(rows):
                made = [self._row(row, number * self.shard_rows + first + i) for i, row in enumerate(batch)]
                arrow.write_batch(pa.RecordBatch.from_pylist(made, schema=self.layout.schema))
                told = [{n: row.get(n) for n in self.beside.names} | _hex(row) for row in batch]
                beside.write_table(pa.Table.from_pylist(told, schema=self.beside))
            arrow.close()
            beside.close()

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        """Names without rows get an empty file."""
        for number in range(len(sizes), len(self.names)):
            if not self.stands(folder, number):
                with folder.write(f"{self.names[number]}.arrow") as stream:
                    pa.ipc.new_file(stream, self.layout.schema).close()

    def _row(self, row: Mapping[str, Any], place: int) -> dict[str, Any]:
        captions = row["captions"] or ([] if row["caption"] is None else [row["caption"]])
        out = {"image": row["image"], "caption": captions, "split": self.split}
        names = self.layout.schema.names
        if "image_id" in names:
            suffix = SUFFIX_OF.get(row["format"], row["format"])
            out["image_id"] = str(row["image_id"]) if self.keep_ids else f"{self.split}_{place:09d}.{suffix}"
        if "x" in names:
            out |= _boxes(row, len(captions))
        if "source" in names:
            out |= {"image": "None", "source": row.get("source") or "wikibk"}
        return out


def _cut(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    """(place of the first, rows) of each record batch."""
    first, size = 0, 0
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        length = len(row["image"] or b"")
        if batch and (len(batch) == BATCH_ROWS or size + length > BATCH_BYTES):
            yield first, batch
            first, size, batch = first + len(batch), 0, []
        batch.append(row)
        size += length
    if batch:
        yield first, batch


def _hex(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"uid": row["uid"].hex(), "sha256": row["sha256"].hex() if row["sha256"] else None}


def _boxes(row: Mapping[str, Any], captions: int) -> dict[str, list[int]]:
    """The box of each caption as `regions` carries them; without them each caption is of the whole image."""
    boxes = _regions(row.get("regions"))
    if len(boxes) != captions:
        boxes = [[0, 0, row["width"], row["height"]]] * captions
    return {name: [box[i] for box in boxes] for i, name in enumerate(_BOX)}


def _regions(text: Any) -> list[list[int]]:
    """Boxes of a JSON list, four whole numbers each; [] where it holds anything else."""
    try:
        boxes = json.loads(text)
    except (TypeError, ValueError):
        return []
    good = isinstance(boxes, list) and all(isinstance(b, list) and len(b) == 4 for b in boxes)
    whole = good and all(type(v) is int and -(2**63) <= v < 2**63 for b in boxes for v in b)
    return boxes if whole else []
