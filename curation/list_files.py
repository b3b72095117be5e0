"""Which files a LIST names, and how to reach their bytes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from schemas.errors import PairmillError
from shards.files import Folder

KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "txt",
}
PACKINGS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
# What a dataset keeps in its own folder: never read as a list, though a dataset may lie in a folder of lists.
_OURS = frozenset(
    {
        "input",
        "pairs",
        "scores",
        "features",
        "tasks",
        "selections",
        "logs",
        "reports",
        "dataset.json",
        "removed.parquet",
    }
)


@dataclass(frozen=True)
class ListFile:
    """One file of a list. `name` is what dataset.json records: no folder of this machine, no signature of a URL."""

    url: str
    name: str
    kind: str
    packing: str
    bytes: int


def find_lists(lists: Sequence[str], output: Folder | None = None) -> list[ListFile]:
    """The files that LISTs (files, folders, globs, fsspec URLs) name, in order; a folder's are sorted.

    Raises PairmillError: nothing there, a kind we do not read, a folder with several kinds.
    """
    if not lists:
        raise PairmillError("No list given. Name a parquet, csv, tsv, json, jsonl, arrow or txt file of URLs.")
    return [file for text in lists for file in _find(text, output)]


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, packing) by the endings of a file's name, or None for a kind we do not read."""
    stem, last = os.path.splitext(name.lower())
    packing = PACKINGS.get(last, "")
    if packing:
        last = os.path.splitext(stem)[1]
    kind = KINDS.get(last)
    return (kind, packing) if kind else None


def _find(text: str, output: Folder | None) -> list[ListFile]:
    fs, path = _filesystem(text)
    shown = shown_url(text)
    try:
        # First of all: over http, asking whether something is a folder reads it whole.
        if kind_of(_file_name(path)) and fs.isfile(path):
            return [_file(fs, path, _file_name(path))]
        if fs.isdir(path):
            return _in_folder(fs, path, shown, output)
        found = [path] if fs.exists(path) else sorted(fs.glob(path)) if any(c in path for c in "*?[") else []
        files = [p for p in found if not fs.isdir(p)]
    except PermissionError as error:
        raise PairmillError(f"{shown} cannot be read: {error.strerror or error}.") from None
    if not files:
        raise PairmillError(f"No list at {shown}: there is no such file, folder or match.")
    return [_file(fs, p, _file_name(p)) for p in files]


def _file_name(path: str) -> str:
    return PurePosixPath(urlsplit(path).path if "://" in path else path).name


def _filesystem(text: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise PairmillError(
            f"{shown_url(text)}: no way to reach it: {error}. Install the fsspec package for it."
        ) from None


def shown_url(text: str) -> str:
    """A URL without user, password and query, fit for a message."""
    if "://" not in text:
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _in_folder(fs: Any, folder: str, shown: str, output: Folder | None) -> list[ListFile]:
    paths = sorted(fs.find(folder))
    datasets = {p.rpartition("/")[0] for p in paths if p.endswith("/dataset.json")}
    if output is not None:
        datasets.add(_filesystem(output.url)[1].rstrip("/"))
    files = []
    for path in paths:
        inside = path[len(folder.rstrip("/")) + 1 :]
        hidden = any(part.startswith((".", "_")) for part in inside.split("/"))
        if not hidden and kind_of(path) and not any(_is_ours(path, dataset) for dataset in datasets):
            files.append(_file(fs, path, inside))
    kinds = sorted({f.kind for f in files})
    if not files:
        raise PairmillError(
            f"The folder {shown} holds no list: no file ends in {', '.join(sorted(KINDS))} (.gz, .zst)."
        )
    if len(kinds) > 1:
        raise PairmillError(
            f"The folder {shown} holds files of several kinds ({', '.join(kinds)}): which are the list? "
            f"Give a glob, for example '{shown.rstrip('/')}/*.{kinds[0]}'."
        )
    return files


def _is_ours(path: str, dataset: str) -> bool:
    return path.startswith(dataset + "/") and path[len(dataset) + 1 :].split("/", 1)[0] in _OURS


def _file(fs: Any, path: str, name: str) -> ListFile:
    kind = kind_of(name)
    if kind is None:
        raise PairmillError(
            f"{shown_url(path)} is of a kind that is not read: its name must end in {', '.join(sorted(KINDS))}, "
            "with .gz or .zst behind it or not."
        )
    return ListFile(fs.unstrip_protocol(path), name, *kind, int(fs.size(path) or 0))


@contextlib.contextmanager
def local_copy(file: ListFile) -> Iterator[Path]:
    """A path on this machine of the file's bytes: its own, or a copy that is gone when the block ends."""
    fs, path = _filesystem(file.url)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        yield Path(path)
        return
    with _temporary() as target:
        try:
            with fs.open(path, "rb") as source, target.open("wb") as stream:
                shutil.copyfileobj(source, stream, 1 << 22)
        except FileNotFoundError:
            raise PairmillError(f"{shown_url(file.url)} is gone.") from None
        yield target


@contextlib.contextmanager
def unpacked(path: Path, packing: str, where: str) -> Iterator[Path]:
    """A path of the unpacked bytes, for kinds that are read back and forth (they go to TMPDIR)."""
    if not packing:
        yield path
        return
    with _temporary() as target:
        with unpacking(path, packing, where) as source, target.open("wb") as stream:
            shutil.copyfileobj(source, stream, 1 << 22)
        yield target


@contextlib.contextmanager
def unpacking(path: Path, packing: str, where: str) -> Iterator[BinaryIO]:
    """The file's bytes as a stream, unpacked on the way. `where` names the list in messages.

    Raises PairmillError where the packing is damaged or cut short.
    """
    try:
        if packing == "gz":
            with gzip.open(path, "rb") as stream:
                yield io.BufferedReader(cast(Any, stream), 1 << 20)
        elif packing == "zst":
            import pyarrow as pa

            with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
                yield io.BufferedReader(cast(Any, stream), 1 << 20)
        else:
            with path.open("rb", buffering=1 << 20) as plain:
                yield plain
    except (EOFError, gzip.BadGzipFile) as error:
        raise PairmillError(f"{where} is damaged or cut short: {error}. Fetch it again.") from None
    except OSError as error:
        if packing and error.errno is None:  # Arrow's own complaint about the compressed bytes
            raise PairmillError(f"{where} is damaged or cut short: {error}. Fetch it again.") from None
        raise


def hash_list(path: Path) -> str:
    """blake2b-128 of the bytes as they lie there, 32 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix="pairmill-list-")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        os.unlink(name)
