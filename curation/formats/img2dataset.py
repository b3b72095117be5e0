"""img2dataset's output: its three layouts in, joined by its key, statuses kept; its webdataset layout out.

`NNNNN.parquet` lists every row with its status, in the order in which they ended; the key gives the list's order back.
Images are in `NNNNN.tar`, in the folder `NNNNN/`, or in the Parquet file itself. Its sha256 is of the original bytes.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.exporting import Job, job
from curation.formats.samples import (
    IMAGE_SUFFIXES,
    SUFFIX_OF,
    Sample,
    Source,
    describe,
    find_files,
    pair_values,
    to_json,
)
from curation.formats.webdataset import add_member, groups, load
from curation.maintenance_config import ExportConfig, ImportConfig
from curation.reshard import Part
from schemas.errors import PairmillError
from schemas.status import SUCCESS
from shards.files import Folder

_FILE = re.compile(r"(?:.*/)?(\d+)\.(parquet|tar)\Z")
_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}\Z")

# What its messages say, the first that matches: (status, pattern). Exceptions of urllib, http.client and its own words.
_DOWNLOAD = (
    ("hash_mismatch", r"hash mismatch"),
    ("disallowed", r"X-Robots-Tag"),
    ("http_error", r"HTTP Error \d{3}"),
    ("redirect_error", r"redirect"),
    ("dns_error", r"Name or service not known|nodename nor servname|name resolution|getaddrinfo|No address associated"),
    ("timeout", r"timed out|timeout"),
    ("tls_error", r"SSL|CERTIFICATE|certificate"),
    ("truncated", r"IncompleteRead"),
    ("bad_url", r"unknown url type|no host given|Invalid URL|nonnumeric port|control characters|can't contain"),
    ("connect_error", r"Connection|refused|reset|unreachable|closed connection|Errno"),
)
_RESIZE = (("too_small", r"too small"), ("bad_aspect", r"aspect ratio"), ("bomb", r"area too large"))
_URL = re.compile(r"\S+://\S+")
Load = Callable[[str], Callable[[], bytes] | None]  # key -> how to get its image


def sources(paths: Sequence[str]) -> list[Source]:
    """Its Parquet files and tars. Raises PairmillError where there is none, or one without its Parquet file."""
    found = find_files(paths, lambda name: bool(_FILE.match(name)), "img2dataset output (NNNNN.parquet)")
    stems = {_stem(s) for s in found if s.name.endswith(".parquet")}
    for source in found:
        if _stem(source) not in stems:
            raise PairmillError(
                f"{source.url}: its .parquet file, which tells the statuses, is not beside it. "
                "Use `pairmill import webdataset` for tars alone."
            )
    return found


def _stem(source: Source) -> str:
    return source.url.rsplit(".", 1)[0]


def read(sources: Sequence[Source], config: ImportConfig) -> Iterator[Sample]:
    """Every row of every shard, failures included, in the order of the keys."""
    tars = {_stem(s): s for s in sources if s.name.endswith(".tar")}
    for source in sources:
        if source.name.endswith(".parquet"):
            try:
                yield from _shard(source, tars.get(_stem(source)), config)
            except (pa.ArrowException, tarfile.TarError, EOFError) as error:
                raise PairmillError(f"{source.url} or its images are damaged: {error}.") from None


def _shard(source: Source, tar: Source | None, config: ImportConfig) -> Iterator[Sample]:
    with ExitStack() as stack:
        file = pq.ParquetFile(stack.enter_context(source.open()))
        names = file.schema_arrow.names
        missing = {"key", "status"} - set(names)
        if missing:
            raise PairmillError(
                f"{source.url} has no column {', '.join(sorted(missing))}: it is none of img2dataset's."
            )
        inside = next((n for n in IMAGE_SUFFIXES if n in names and _is_binary(file.schema_arrow.field(n).type)), None)
        table = file.read(columns=[n for n in names if n != inside])
        keys = table["key"].to_pylist()
        if inside is not None:
            find = _in_parquet(file, inside, keys)
        elif tar is not None:
            find = _in_tar(stack.enter_context(tarfile.open(fileobj=stack.enter_context(tar.open()))), tar, config)
        else:
            find = _in_folder(_stem(source), config)
        for at in sorted(range(len(keys)), key=keys.__getitem__):
            yield _sample(source, table.slice(at, 1).to_pylist()[0], find, config)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _in_parquet(file: pq.ParquetFile, column: str, keys: Sequence[str]) -> Load:
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    places = dict(zip(keys, ((g, i) for g, n in enumerate(sizes) for i in range(n)), strict=True))

    @lru_cache(maxsize=4)
    def group(number: int) -> pa.ChunkedArray:
        return file.read_row_group(number, columns=[column])[column]

    def get(key: str) -> bytes:
        number, row = places[key]
        value = group(number)[row].as_py()
        if value is None:
            raise FileNotFoundError(key)
        return value

    return lambda key: partial(get, key)


def _in_tar(tar: tarfile.TarFile, source: Source, config: ImportConfig) -> Load:
    images = {}
    for key, members in groups(tar, source):
        image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
        if image is not None:
            images[key] = partial(load, tar, image, config.max_bytes)
    return images.get


def _in_folder(stem: str, config: ImportConfig) -> Load:
    fs, root = fsspec.core.url_to_fs(stem)
    found = {} if not fs.isdir(root) else {name.rsplit("/", 1)[-1]: name for name in fs.find(root, maxdepth=1)}

    def get(name: str) -> bytes:
        with fs.open(name, "rb") as stream:
            return stream.read(config.max_bytes + 1)

    def find(key: str) -> Callable[[], bytes] | None:
        name = next((found[f"{key}.{s}"] for s in IMAGE_SUFFIXES if f"{key}.{s}" in found), None)
        return None if name is None else partial(get, name)

    return find


def _sample(source: Source, row: dict[str, Any], find: Load, config: ImportConfig) -> Sample:
    key = str(row["key"])
    sample = Sample(f"{source.name}: {key}", None)
    if row["status"] == SUCCESS:
        sample.image = find(key) if _KEY.match(key) else None
        if sample.image is None:
            sample.status, sample.error = "missing_file", f"missing_file: {sample.where}"
    else:
        sample.status, sample.http_status = status_of(row["status"], row.get("error_message") or "")
        sample.error = f"{row['status']}: {_URL.sub('URL', row.get('error_message') or '')}"
    return describe(sample, row, config)


def status_of(status: str, message: str) -> tuple[str, int | None]:
    """(our status, HTTP status) of its status and message."""
    if status == "failed_to_resize":
        return next((ours for ours, pattern in _RESIZE if re.search(pattern, message)), "decode_error"), None
    for ours, pattern in _DOWNLOAD:
        if re.search(pattern, message):
            code = re.search(r"HTTP Error (\d{3})", message)
            return ours, int(code[1]) if code else None
    return "protocol_error", None


def jobs(part: Part, config: ExportConfig) -> list[Job]:
    """Files of `shard_rows` rows, with the keys that it gives in shards of that many."""
    return [job(Writer(config.shard_rows), part, config)]


class Writer:
    """Writes its webdataset layout: tar, Parquet and `_stats.json`, by which it knows that a shard is done."""

    def __init__(self, shard_rows: int) -> None:
        self.digits = len(str(shard_rows - 1)) if shard_rows > 1 else 0

    def key(self, number: int, index: int) -> str:
        """10^digits * shard + row, five digits wider than `digits`: its `compute_key`."""
        return f"{number:05d}{index:0{self.digits}d}" if self.digits else f"{number:05d}"

    def stands(self, folder: Folder, number: int) -> bool:
        return folder.exists(f"{number:05d}_stats.json")

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        metas = []
        with folder.write(f"{number:05d}.tar") as stream:
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for index, row in enumerate(rows):
                    metas.append(_add(tar, self.key(number, index), row))
        with folder.write(f"{number:05d}.parquet") as stream:
            pq.write_table(pa.Table.from_pylist(_even(metas)), stream, row_group_size=100)
        counts = {"count": len(metas), "successes": len(metas), "failed_to_download": 0, "failed_to_resize": 0}
        times = {"duration": 0.0, "start_time": 0.0, "end_time": 0.0}
        stats = {**counts, **times, "status_dict": {SUCCESS: len(metas)}}
        folder.write_bytes(f"{number:05d}_stats.json", json.dumps(stats, indent=4).encode())

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        """Its layout has no file that tells of all shards."""


def _add(tar: tarfile.TarFile, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
    meta = {"key": key, "status": SUCCESS, "error_message": None, "exif": "{}"} | pair_values(row)
    add_member(tar, f"{key}.{SUFFIX_OF.get(row['format'], row['format'])}", row["image"])
    add_member(tar, f"{key}.txt", (row["caption"] or "").encode())
    add_member(tar, f"{key}.json", to_json(meta))
    return meta


def _even(metas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with every column, in one order; what has no type of its own in all rows as JSON text."""
    names = list(dict.fromkeys(name for meta in metas for name in meta))
    mixed = {n for n in names if n != "captions" and len({_type(m.get(n)) for m in metas} - {type(None)}) > 1}
    mixed |= {n for n in names if any(isinstance(m.get(n), dict) for m in metas)}
    rows = [{n: m.get(n) for n in names} for m in metas]
    for row in rows:
        row |= {n: json.dumps(row[n], ensure_ascii=False, sort_keys=True) for n in mixed if row[n] is not None}
    return rows


def _type(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)
