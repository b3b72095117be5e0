"""Pairs that somebody already has: a format yields samples, this engine makes a dataset of them.

Samples come in an order that depends on the input alone, and are cut into shards as they come. A killed import goes on:
of shards that stand only the samples are counted, their images are not loaded again. dataset.json is written last.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from curation.columns import ATTRIBUTION
from curation.formats.samples import Sample, Source, clean
from curation.maintenance_config import ImportConfig
from schemas.config import fingerprint
from schemas.errors import PairmillError, suggest
from schemas.events import Emit, Notice, Progress, ShardDone, StageFinished, StageStarted
from schemas.pairs import PAIRS, VERSION, carried_fields, carried_name, given_uid, pair_uid, pairs_schema
from schemas.sidecars import make_sidecar
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import MANIFEST, Dataset, new_manifest, write_manifest
from shards.files import check_space, open_folder
from shards.images import ImageError, header
from shards.locks import lock
from shards.reader import open_parquet
from shards.writer import write_pairs

FORMATS = {
    "webdataset": "curation.formats.webdataset",
    "img2dataset": "curation.formats.img2dataset",
    "folder": "curation.formats.folder",
    "huggingface": "curation.formats.huggingface",
    "arrow": "curation.formats.vilt_arrow",
    "albef": "curation.formats.albef",
    "llava": "curation.formats.llava",
    "csv": "curation.formats.clip_csv",
    "coco": "curation.formats.coco",
    "visual_genome": "curation.formats.visual_genome",
    "datacomp": "curation.formats.datacomp",
    "text": "curation.formats.text",
}
LOOKED_AT = 1000  # samples from which the types of carried columns are learnt


class Reader(Protocol):
    """What a format's module offers to the import.

    `features(dataset, sources)`, where it has that, writes feature sets beside the pairs, which stand.
    """

    def sources(self, paths: Sequence[str]) -> list[Source]:
        """Every file of the input. Raises PairmillError where there is none of this format."""

    def read(self, sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
        """The samples, in an order that depends on the sources alone."""


def load_format(name: str) -> Any:
    """The module of a format. Raises PairmillError that lists them."""
    if name not in FORMATS:
        raise PairmillError(f"There is no format `{name}`.{suggest(name, FORMATS)} There are: {', '.join(FORMATS)}.")
    return import_module(FORMATS[name])


def import_pairs(
    format: str, paths: Sequence[str], output: str | Path, config: ImportConfig, emit: Emit
) -> StageFinished:
    """Makes (or goes on making) the dataset `output` of the samples in `paths`.

    Raises PairmillError: an unknown format, nothing found, a damaged or unsafe archive, `output` made from other input.
    """
    start = time.monotonic()
    reader: Reader = load_format(format)
    sources = reader.sources([str(p) for p in paths])
    folder = open_folder(output)
    known = fingerprint({"files": [[s.name, s.bytes] for s in sources]})
    sidecar = make_sidecar(f"import {format}", PAIRS, (PAIRS, VERSION), config, {"input": known})
    stage = Dataset(folder, new_manifest(config.shard_rows, ())).stage(PAIRS)
    with lock(folder, PAIRS):
        if folder.exists(MANIFEST):
            stage.begin(sidecar, "Choose another place with -o.")
            emit(Notice(f"{folder.url} is finished already."))
            return StageFinished(PAIRS, 0, (), 0.0, {})
        if not folder.names(PAIRS):
            check_space(folder, sum(s.bytes for s in sources), "The import")
        stage.begin(sidecar, "Choose another place with -o.")
        emit(StageStarted(PAIRS, 0, len(folder.names(PAIRS)) - 1, 0))
        maker = _Maker(Dataset(folder, new_manifest(config.shard_rows, ())), config, emit)
        sizes = maker.make(partial(reader.read, sources, config))
        manifest = new_manifest(config.shard_rows, sizes, columns=maker.renamed)
        if hasattr(reader, "features"):
            reader.features(Dataset(folder, manifest), sources)
        write_manifest(folder, manifest)
    finished = StageFinished(PAIRS, maker.written, (), time.monotonic() - start, dict(maker.counts))
    emit(finished)
    return finished


class _Maker:
    """Cuts samples into shards of pairs."""

    def __init__(self, dataset: Dataset, config: ImportConfig, emit: Emit) -> None:
        self.dataset, self.config, self.emit = dataset, config, emit
        self.counts: Counter[str] = Counter()
        self.written = self.rows = self.failed = 0
        self.renamed: dict[str, str] = {}
        self._columns: dict[str, pa.Field] = {}
        self._unknown: set[str] = set()
        self._odd: set[str] = set()

    def make(self, read: Callable[[], Iterator[Sample]]) -> list[int]:
        """Writes the shards that do not stand; the row count of every shard."""
        schema = self._learn(islice(read(), LOOKED_AT))
        stream = read()
        sizes: list[int] = []
        while batch := list(islice(stream, 1)):
            shard = chain(batch, islice(stream, self.config.shard_rows - 1))
            sizes.append(self._shard(len(sizes), shard, schema))
        if self._unknown:
            names = ", ".join(sorted(self._unknown)[:10])
            self.emit(Notice(f"Not carried, since none of the first {LOOKED_AT} samples has them: {names}.", True))
        if self._odd:
            names = ", ".join(sorted(self._odd)[:10])
            self.emit(Notice(f"Values that do not fit the type of the first samples became null in: {names}.", True))
        if not sizes:
            raise PairmillError("The input holds no samples. Nothing written but the sidecar.")
        return sizes

    def _learn(self, samples: Iterable[Sample]) -> pa.Schema:
        """Types of the carried columns, and the usual names of license, author and source_url made ours."""
        seen: dict[str, set[type]] = {}
        for sample in samples:
            for name, value in sample.carried.items():
                seen.setdefault(name, set()).add(type(value))
        ours = _attribution(list(seen))
        for name, kinds in seen.items():
            column = ours.get(name) or carried_name(name)
            self._columns[name] = pa.field(column, _kind(kinds - {type(None)}))
        self.renamed = {f.name: name for name, f in self._columns.items() if f.name != name}
        return pairs_schema(self._columns.values())

    def _shard(self, number: int, samples: Iterator[Sample], schema: pa.Schema) -> int:
        name = f"{PAIRS}/{self.dataset.shard_name(number)}.parquet"
        if self.dataset.folder.exists(name):
            with open_parquet(self.dataset.folder, name) as file:
                if carried_fields(file.schema_arrow) != carried_fields(schema):
                    where = f"{self.dataset.url}/{name}"
                    raise PairmillError(f"{where} has other columns than the input. Choose another place with -o.")
            return sum(1 for _ in samples)
        start, rows = time.monotonic(), 0
        with write_pairs(self.dataset.folder, name, schema) as writer:
            for sample in samples:
                row = self._row(sample)
                writer.append(row)
                rows += 1
                self._progress(row["status"])
        self.counts.update(writer.counts)
        self.written += 1
        self.emit(ShardDone(PAIRS, number, rows, time.monotonic() - start, dict(writer.counts)))
        return rows

    def _progress(self, status: str) -> None:
        self.rows += 1
        self.failed += status not in (SUCCESS, NO_IMAGE)
        if self.rows % 100 == 0:
            self.emit(Progress(PAIRS, self.rows, self.failed))

    def _row(self, sample: Sample) -> dict[str, Any]:
        row = _looked_at(sample, self.config)
        caption = sample.captions[0] if sample.captions else None
        if sample.uid is not None:
            uid, input_uid = given_uid(sample.uid)
            row |= {"uid": uid, "input_uid": sample.input_uid or input_uid}
        else:
            row["uid"] = pair_uid(sample.url, caption, row.get("sha256"))
        row |= {"url": sample.url, "caption": caption, "http_status": sample.http_status}
        if len(sample.captions) > 1:
            row["captions"] = sample.captions
        for name, value in sample.carried.items():
            column = self._columns.get(name)
            if column is None:
                self._unknown.add(name)
            else:
                row[column.name] = self._fit(value, column)
        return row

    def _fit(self, value: Any, column: pa.Field) -> Any:
        try:
            return _fitted(value, column.type)
        except (TypeError, ValueError, OverflowError):
            self._odd.add(column.name)
            return None


def _attribution(names: Sequence[str]) -> dict[str, str]:
    """Name in the input -> ours, for the likeliest of each that does not bear our name already."""
    out = {}
    for ours, usual in ATTRIBUTION.items():
        found = [n for u in usual for n in names if n.lower() == u]
        if found and ours not in names:
            out[found[0]] = ours
    return out


def _kind(kinds: set[type]) -> pa.DataType:
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.string()


def _fitted(value: Any, kind: pa.DataType) -> Any:
    """The value in the column's type; lists and objects as JSON text. Raises where it does not fit."""
    if value is None:
        return None
    if pa.types.is_string(kind):
        return clean(value) if isinstance(value, str) else clean(json.dumps(value, ensure_ascii=False, default=str))
    if pa.types.is_boolean(kind) != isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("another type")
    if pa.types.is_integer(kind):
        if int(value) != value or not -(2**63) <= value < 2**63:
            raise ValueError("no 64-bit integer")
        return int(value)
    return float(value) if pa.types.is_floating(kind) else value


def _looked_at(sample: Sample, config: ImportConfig) -> dict[str, Any]:
    """Status, image, hashes and sizes, as the bytes tell them."""
    if sample.status not in (None, SUCCESS):
        width, height = sample.original
        told = {"sha256": sample.sha256, "original_width": width, "original_height": height}
        return {"status": sample.status, "error": _short(sample.error), **told}
    if sample.image is None:
        return {"status": sample.status or NO_IMAGE, "error": _short(sample.error)}
    try:
        data = sample.image()
    except FileNotFoundError:
        return {"status": "missing_file", "error": _short(f"missing_file: {sample.where}")}
    except (pa.ArrowException, tarfile.TarError, EOFError, OSError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PairmillError(f"{sample.where} is damaged: {text}. Take its file out of the input.") from None
    if len(data) > config.max_bytes:
        return {"status": "too_large", "error": f"too_large: {len(data)} bytes, at most {config.max_bytes} are taken"}
    digest = hashlib.sha256(data).digest()
    try:
        head = header(data, config.max_pixels)
    except ImageError as error:
        return {"status": error.status, "error": _short(str(error)), "sha256": sample.sha256 or digest}
    width, height = head.upright
    return {
        "status": SUCCESS,
        "error": _short(sample.error),
        "image": data,
        "format": head.kind,
        "width": width,
        "height": height,
        "original_width": sample.original[0] or width,
        "original_height": sample.original[1] or height,
        "sha256": sample.sha256 or digest,
        "stored_sha256": digest,
    }


def _short(text: str | None) -> str | None:
    return None if text is None else clean(text)[:300]
