"""Folders of images: captions in `.txt`/`.json` beside each, or in metadata.csv, .jsonl or .parquet (HF ImageFolder).

Where a folder has a metadata file, its rows come first, in their order; other images follow, sorted by name. Written:
folders `NNNNN/` of images and one `metadata.jsonl`, which Hugging Face's `imagefolder` loads as it is. It takes the
columns and their types from the first rows of one metadata file, and several files in any order: so there is one, and
every line has every column.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.formats.samples import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    SUFFIX_OF,
    Sample,
    Source,
    describe,
    find_files,
    pair_values,
    read_json,
    safe_name,
    to_json,
)
from curation.formats.webdataset import sample_key
from curation.maintenance_config import ImportConfig
from schemas.errors import PairmillError
from schemas.pairs import RESERVED
from shards.files import Folder

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_BESIDE = ("txt", "json")
_ALL = "metadata.jsonl"
_NULLABLE = ("input_uid", "url", "sha256")


def sources(paths: Sequence[str]) -> list[Source]:
    """Images, sidecars and metadata files. Raises PairmillError where there is neither image nor metadata file."""
    found = find_files(paths, _wanted, "images")
    if not any(_is_image(s.url) or _is_metadata(s.url) for s in found):
        raise PairmillError(f"{', '.join(paths)}: no images there.")
    return found


def _wanted(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and (_is_image(name) or _is_metadata(name) or _suffix(name) in _BESIDE)


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower().removeprefix(".")


def _is_image(name: str) -> bool:
    return _suffix(name) in IMAGE_SUFFIXES


def _is_metadata(name: str) -> bool:
    return posixpath.basename(name) in METADATA


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """Rows of metadata files, then the images that none of them names, each with its sidecars.

    Raises PairmillError: a damaged metadata file, a row without `file_name`, a name that leaves its folder.
    """
    known = {source.url for source in sources}
    named: set[str] = set()
    for source in sources:
        if _is_metadata(source.url):
            for number, row in enumerate(_metadata(source), 1):
                yield _listed(source, number, row, named, config)
    for source in sources:
        if _is_image(source.url) and source.url not in named:
            yield _with_sidecars(source, known, config)


def _metadata(source: Source) -> Iterator[dict[str, Any]]:
    try:
        with source.open() as stream:
            if source.url.endswith(".parquet"):
                for batch in pq.ParquetFile(stream).iter_batches(1000):
                    yield from batch.to_pylist()
                return
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
            if source.url.endswith(".csv"):
                for row in csv.DictReader(text):
                    yield {k: v for k, v in row.items() if k is not None and v not in ("", None)}
            else:
                for line in text:
                    if line.strip():
                        yield read_json(line.encode("utf-8", "replace"))
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise PairmillError(f"{source.url} is damaged: {error}.") from None


def _listed(source: Source, number: int, row: dict[str, Any], named: set[str], config: ImportConfig) -> Sample:
    where = f"{source.name} row {number}"
    name = row.pop("file_name", None)
    if not isinstance(name, str) or not name:
        raise PairmillError(f"{source.url} row {number}: it has no `file_name`. Give every row the name of its image.")
    url = f"{source.url.rsplit('/', 1)[0]}/{safe_name(posixpath.normpath(name), source.url)}"
    safe_name(name, source.url)
    named.add(url)
    return describe(Sample(f"{where}: {name}", partial(_load, url, config.max_bytes)), row, config)


def _with_sidecars(source: Source, known: set[str], config: ImportConfig) -> Sample:
    sample = Sample(source.name, partial(_load, source.url, config.max_bytes))
    stem = posixpath.splitext(source.url)[0]
    values: dict[str, Any] = {}
    if f"{stem}.txt" in known:
        values["txt"] = _load(f"{stem}.txt", MAX_TEXT_BYTES).decode("utf-8-sig", "replace").rstrip("\r\n") or None
    if f"{stem}.json" in known:
        try:
            values |= read_json(_load(f"{stem}.json", MAX_TEXT_BYTES))
        except ValueError as error:
            sample.error = f"json: {error}"
    return describe(sample, values, config)


def _load(url: str, most: int) -> bytes:
    with fsspec.open(url, "rb") as stream:
        return stream.read(most + 1)


class Writer:
    """Writes folders of images; their lines lie in `NNNNN.jsonl` until all are there, then in `metadata.jsonl`."""

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(_ALL) or folder.exists(_lines(number))

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = []
        for index, row in enumerate(rows):
            name = f"{number:05d}/{sample_key(number, index)}.{SUFFIX_OF.get(row['format'], row['format'])}"
            folder.write_bytes(name, row["image"])
            lines.append(to_json({"file_name": name, **_every_column(row)}))
        folder.write_bytes(_lines(number), b"".join(line + b"\n" for line in lines))

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        if not folder.exists(_ALL):
            with folder.write(_ALL) as stream:
                for number in range(len(sizes)):
                    stream.write(folder.read_bytes(_lines(number)))
        for number in range(len(sizes)):
            if folder.exists(_lines(number)):
                folder.remove(_lines(number))


def _lines(number: int) -> str:
    return f"{number:05d}.jsonl"


def _every_column(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair's values, null where it has none; `captions` is a list in every line."""
    values = pair_values(row)
    names = [n for n in row if n not in RESERVED]
    captions = [] if row["caption"] is None else [row["caption"]]
    return {**dict.fromkeys([*_NULLABLE, *names]), "captions": captions, **values}
