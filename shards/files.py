"""Files that are whole or absent, in a local folder or on an fsspec store.

A local file is written under a temporary name in its own folder (host and pid in it), flushed, fsynced and renamed, and
the folder is fsynced. On a store a file is written to the cache and uploaded whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import re
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from schemas.errors import PairmillError
from shards.system import begin_writing

_TMP = ".tmp-"
_PIECE_BYTES = 1 << 20  # at once to the system: with 16 MiB ext4 takes up to three times the processor time
_AHEAD_BYTES = 8 << 20  # so much of a file is written before the disk is set to work on it
_serial = itertools.count()


# The four calls that touch a file on its way to being whole; tests end the process at each of them.
def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)


def _write(fd: int, data: Any) -> int:
    return os.write(fd, data)


def _fsync(fd: int) -> None:
    os.fsync(fd)


def _rename(source: str, target: str) -> None:
    os.replace(source, target)


class _Raw(io.RawIOBase):
    """A file descriptor as a raw stream whose writes go through `_write`.

    Once the file is closed or given up, `fd` is -1 and late writes (a writer flushed by the garbage collector) go
    nowhere, instead of into whichever file got the same descriptor since.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._written = self._begun = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            if self.fd < 0:
                return len(view)
            done += _write(self.fd, view[done : done + _PIECE_BYTES])
        self._written += done
        if self._written - self._begun >= _AHEAD_BYTES:
            begin_writing(self.fd, self._begun, self._written - self._begun)
            self._begun = self._written
        return done

    def give_up(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def temporary_name(name: str) -> str:
    """The name a file has until it is whole; no two writers share one, be they threads or machines."""
    return f"{_TMP}{socket.gethostname()}-{os.getpid()}.{next(_serial)}-{name}"


def is_temporary(name: str) -> bool:
    """Whether `name` is that of a file nobody finished."""
    return name.startswith(_TMP)


def is_left_over(name: str) -> bool:
    """Whether `name` is a temporary file of a process of this machine that is gone."""
    found = re.match(rf"{re.escape(_TMP + socket.gethostname())}-(\d+)\.\d+-", name)
    return found is not None and not Path(f"/proc/{found[1]}").exists()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for writing; it appears, whole, when the block ends well, and never otherwise.

    Raises PairmillError when the disk or the quota is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    raw = _Raw(_open(str(temporary)))
    try:
        stream = io.BufferedWriter(raw, buffer_size=1 << 20)
        yield stream
        stream.flush()
        _fsync(raw.fd)
        raw.give_up()
        _rename(str(temporary), str(path))
        _sync(path.parent)
    except BaseException as error:
        raw.give_up()
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PairmillError(
                f"No space left for {path}. What stands is whole: free space and run the same command again."
            ) from None
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def place_folder(temporary: Path, target: Path) -> None:
    """Renames a local folder of finished files to `target`: the folder is whole or absent. An older one is replaced."""
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    aside = target.with_name(temporary_name(target.name))
    if target.exists():
        _rename(str(target), str(aside))
    _rename(str(temporary), str(target))
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


class Folder(ABC):
    """A dataset's folder, wherever it lies. Names are relative, with forward slashes."""

    url: str

    @property
    @abstractmethod
    def local(self) -> Path | None:
        """The folder on this machine, or None for a store."""

    @abstractmethod
    def names(self, inside: str) -> list[str]:
        """Names of the whole files directly in `inside`, sorted; [] where there is no such folder."""

    @abstractmethod
    def folders(self, inside: str) -> list[str]:
        """Names of the folders directly in `inside`, sorted."""

    @abstractmethod
    def left_over(self, inside: str) -> list[str]:
        """Names of temporary files directly in `inside` whose process is gone."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int: ...

    @abstractmethod
    def write(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A stream; the file appears whole when the block ends well, and never otherwise."""

    @abstractmethod
    def remove(self, name: str) -> None: ...

    @abstractmethod
    def map_path(self, name: str) -> Path:
        """A local path of the file's bytes, to be memory-mapped: its own, or a copy in the cache."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """The file for reading, seekable."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Free space, or None where it cannot be known."""

    def read_bytes(self, name: str) -> bytes:
        with self.open(name) as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.write(name) as stream:
            stream.write(data)


class LocalFolder(Folder):
    """A folder on this machine or a shared filesystem."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.url = str(self.path)

    @property
    def local(self) -> Path:
        return self.path

    def names(self, inside: str) -> list[str]:
        return self._list(inside, folders=False)

    def folders(self, inside: str) -> list[str]:
        return self._list(inside, folders=True)

    def _list(self, inside: str, folders: bool) -> list[str]:
        try:
            with os.scandir(self.path / inside) as entries:
                return sorted(e.name for e in entries if e.is_dir() == folders and not is_temporary(e.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def left_over(self, inside: str) -> list[str]:
        try:
            return sorted(n for n in os.listdir(self.path / inside) if is_left_over(n))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def write(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return atomic_file(self.path / name)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def map_path(self, name: str) -> Path:
        return self.path / name

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def free_bytes(self) -> int | None:
        place = self.path
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


class StoreFolder(Folder):
    """A folder on an fsspec store. Files for mapping are fetched whole into a size-capped cache."""

    def __init__(self, url: str) -> None:
        import fsspec

        scheme = url.split("://", 1)[0]
        try:
            # A cached listing would hide what other processes wrote since.
            self.fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme)
            mend = f" pip install 'pairmill[{extra}]'" if extra else " Install the fsspec package for it."
            raise PairmillError(f"{url}: no way to reach a `{scheme}://` store: {error}.{mend}") from None
        self.path = path.rstrip("/")
        self.url = url.rstrip("/")
        self.scheme = scheme

    @property
    def local(self) -> None:
        return None

    def _full(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _list(self, inside: str, kind: str) -> list[str]:
        try:
            entries = self.fs.ls(self._full(inside), detail=True)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(e["name"].rstrip("/")).name for e in entries if e["type"] == kind)
        return sorted(n for n in names if not is_temporary(n))

    def names(self, inside: str) -> list[str]:
        return self._list(inside, "file")

    def folders(self, inside: str) -> list[str]:
        return self._list(inside, "directory")

    def left_over(self, inside: str) -> list[str]:
        return []  # a store shows whole files only

    def exists(self, name: str) -> bool:
        return self.fs.isfile(self._full(name))

    def size(self, name: str) -> int:
        return int(self.fs.info(self._full(name))["size"])

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        temporary = str(_cache_folder() / temporary_name("upload"))
        try:
            with open(temporary, "wb") as stream:
                yield stream
            self._upload(temporary, name)
        finally:
            os.unlink(temporary)

    def _upload(self, temporary: str, name: str) -> None:
        """Raises PairmillError where the store does not take the file: network, permission, quota."""
        try:
            if self.scheme == "memory":  # has no put_file that makes folders
                with self.fs.open(self._full(name), "wb") as target, open(temporary, "rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
            else:
                self.fs.put_file(temporary, self._full(name))
        except Exception as error:  # each store has exceptions of its own
            raise PairmillError(
                f"{self.url}/{name} could not be uploaded ({type(error).__name__}: {str(error)[:200]}). "
                "What stands is whole: run the same command again when the store answers."
            ) from error

    def remove(self, name: str) -> None:
        self.fs.rm_file(self._full(name))

    def map_path(self, name: str) -> Path:
        info = self.fs.info(self._full(name))
        mark = "|".join(
            str(info.get(k)) for k in ("ETag", "etag", "generation", "LastModified", "mtime", "created", "size")
        )
        key = hashlib.blake2b(f"{self.url}/{name}|{mark}".encode(), digest_size=16).hexdigest()
        target = _cache_folder() / key
        try:
            os.utime(target)  # last used, for `_make_room`
        except FileNotFoundError:
            _make_room(int(info["size"]))
            with atomic_file(target) as stream, self.fs.open(self._full(name), "rb") as source:
                shutil.copyfileobj(source, stream, 1 << 22)
        return target

    def open(self, name: str) -> BinaryIO:
        return self.fs.open(self._full(name), "rb")

    def free_bytes(self) -> int | None:
        return None


def _cache_folder() -> Path:
    home = os.environ.get("PAIRMILL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pairmill"
    )
    folder = Path(home)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_room(size: int) -> None:
    """Removes the least recently used cached files until `size` more bytes fit under the cap.

    An unlinked file stays readable for the process that has it mapped.
    """
    cap = int(float(os.environ.get("PAIRMILL_CACHE_GB", "50")) * 2**30)
    files = []
    for path in _cache_folder().iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process made room, too
            if is_left_over(path.name):
                path.unlink()
            elif not is_temporary(path.name):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
    used = sum(f[1] for f in files)
    for _, bytes_, path in sorted(files):
        if used + size <= cap:
            break
        path.unlink(missing_ok=True)
        used -= bytes_


def open_folder(url: str | Path) -> Folder:
    """A folder or an fsspec URL (`s3://bucket/x`, `gs://…`, `memory://…` in one process only)."""
    text = str(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return StoreFolder(text) if "://" in text else LocalFolder(text)


def hash_file(path: str | Path) -> str:
    """sha256 of a file as 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_space(folder: Folder, need: int, what: str) -> None:
    """Raises PairmillError when `need` bytes do not fit."""
    free = folder.free_bytes()
    if free is not None and need > free:
        raise PairmillError(
            f"{what} needs about {need / 2**30:.1f} GiB, {folder.url} has {free / 2**30:.1f} GiB free. "
            "Nothing written. Free space, choose another place, or take fewer rows."
        )
