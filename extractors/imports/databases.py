"""Features in LMDB databases.

UNITER  `NAME.npz` -> an npz file, or msgpack (perhaps in an lz4 frame) with arrays as msgpack_numpy writes them, of
        features [n, D], norm_bb [n, 6], conf [n], soft_labels [n, K], float16; `__keys__` is a JSON list of the keys
MMF     key -> a pickled dict of features, bbox, cls_prob, objects, num_boxes, image_width, image_height, float32 (or
        ViLBERT's, arrays as base64); `keys` is a pickled list of the keys
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from extractors.imports.files import sampled_hash
from extractors.imports.keys import Entries
from extractors.imports.pickles import MAX_BYTES, load_npz, load_pickle
from extractors.imports.record import Record, RowError, record_of
from extractors.imports.tsv import Read
from schemas.errors import PairmillError

KEYS = {"uniter": b"__keys__", "mmf": b"keys"}
_LZ4 = b"\x04\x22\x4d\x18"
_ZIP = b"PK\x03\x04"


def need(name: str) -> Any:
    """The module. Raises PairmillError that says how to install it."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise PairmillError(f"LMDB features need the package {package}. Run: pip install 'pairmill[lmdb]'") from None


def database_path(path: str) -> Path:
    """The database itself: a file, a folder with data.mdb, or one folder below that has it (UNITER's image folder).

    Raises PairmillError where there is none, or several.
    """
    root = Path(path)
    if root.is_file() or (root / "data.mdb").is_file():
        return root
    inside = sorted(p.parent for p in root.glob("*/data.mdb"))
    if len(inside) == 1:
        return inside[0]
    found = f"several: {', '.join(p.name for p in inside)}. Name one" if inside else "no data.mdb there"
    raise PairmillError(f"{path}: {found}.")


@contextlib.contextmanager
def _transaction(path: Path) -> Iterator[Any]:
    """Raises PairmillError: no lmdb package, no database, or one that was cut short (reading it would crash)."""
    lmdb = need("lmdb")
    try:
        env = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise PairmillError(f"{path} cannot be opened as LMDB: {error}.") from None
    try:
        file = path / "data.mdb" if path.is_dir() else path
        least = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if file.stat().st_size < least:
            raise PairmillError(f"{file} has {file.stat().st_size:,} of {least:,} bytes: cut short. Fetch it again.")
        with env.begin(buffers=False) as transaction:
            yield transaction
    finally:
        env.close()


@dataclass(frozen=True)
class LmdbSource:
    """An LMDB database; `tolerant` reads one whose list of keys is missing."""

    path: Path
    kind: Literal["uniter", "mmf"]
    tolerant: bool

    def scan(self, entries: Entries, warn: Callable[[str], None]) -> dict[str, Any]:
        """The keys it lists. Raises PairmillError where it has no list, which its writer puts in last."""
        own = KEYS[self.kind]
        with _transaction(self.path) as transaction:
            listed = transaction.get(own)
            if listed is not None:
                keys = self._listed(listed)
            elif self.tolerant:
                keys = [key for key in transaction.cursor().iternext(values=False) if key not in KEYS.values()]
                warn(f"{self.path} has no record `{own.decode()}`: its writer stopped early. All it holds was taken.")
            else:
                raise PairmillError(
                    f"{self.path} has no record `{own.decode()}`, which is written last: its writer stopped early, or "
                    f"this is no LMDB of {self.kind.upper()}. Pass --allow-missing to take the entries that are there."
                )
        for key in keys:
            entries.add(key.decode("utf-8", "surrogateescape"))
        file = self.path / "data.mdb" if self.path.is_dir() else self.path
        return sampled_hash(file)

    def _listed(self, data: bytes) -> list[bytes]:
        try:
            keys = json.loads(data) if self.kind == "uniter" else load_pickle(io.BytesIO(data))
            return [key if isinstance(key, bytes) else str(key).encode() for key in keys]
        except (ValueError, TypeError, RowError) as error:
            raise PairmillError(f"{self.path}: its record of keys is damaged: {str(error)[:100]}.") from None

    @contextlib.contextmanager
    def open(self) -> Iterator[Read]:
        """A function (key, place) -> Record, which raises RowError."""
        with _transaction(self.path) as transaction:
            yield lambda key, _: self._read(transaction.get(key.encode("utf-8", "surrogateescape")))

    def _read(self, data: bytes | None) -> Record:
        if data is None:
            raise RowError("its key is listed, the entry is missing", "missing_file")
        values = load_pickle(io.BytesIO(data)) if self.kind == "mmf" else _uniter(data)
        if not isinstance(values, dict):
            raise RowError(f"a dict is expected, found {type(values).__name__}")
        return record_of(values)


def _uniter(data: bytes) -> Any:
    if data.startswith(_ZIP):
        return load_npz(io.BytesIO(data))
    if data.startswith(_LZ4):
        frame = need("lz4.frame")
        try:
            data = frame.LZ4FrameDecompressor().decompress(data, max_length=MAX_BYTES)
        except RuntimeError as error:
            raise RowError(f"a damaged lz4 frame ({error})") from None
    msgpack = need("msgpack")
    try:
        return _arrays(msgpack.unpackb(data, raw=False, strict_map_key=True))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise RowError(f"damaged msgpack ({type(error).__name__}: {str(error)[:100]})") from None


def _arrays(value: Any) -> Any:
    """msgpack_numpy's maps as arrays: {b'nd': True, b'type': '<f2', b'shape': [..], b'data': ..}."""
    if not isinstance(value, dict):
        return value
    if value.get(b"nd") is True:
        kind = value[b"type"]
        dtype = np.dtype(kind.decode() if isinstance(kind, bytes) else kind)
        if dtype.kind not in "fiub":
            raise TypeError(f"an array of {dtype}")
        return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])
    return {key: _arrays(item) for key, item in value.items()}
