"""Arrays and dicts out of pickles, npy and npz files of strangers: nothing in them is executed."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np

from extractors.imports.record import RowError
from shards.weights import RestrictedUnpickler

MAX_BYTES = 1 << 28  # of one image's features; MMF's largest have 1.5 MB


def _from_buffer(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """What numpy writes for a contiguous array from pickle protocol 5 on."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array that is not of numbers")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


class _Unpickler(RestrictedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return _from_buffer
        return super().find_class(module, name)


def load_pickle(stream: BinaryIO) -> Any:
    """Plain values and arrays; objects of any class are inert. Raises RowError."""
    try:
        return _Unpickler(stream, encoding="latin1").load()
    except Exception as error:  # a stranger's bytes can fail in any way; none of them is our bug
        raise RowError(f"a damaged pickle ({type(error).__name__}: {str(error)[:100]})") from None


def load_npy(stream: BinaryIO) -> Any:
    """The array of a npy file; where it holds one object (a dict), that object. Raises RowError."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        count = int(np.prod(shape, dtype=np.int64))
        if not dtype.hasobject:
            if not 0 <= count * dtype.itemsize <= MAX_BYTES:
                raise RowError(f"{count * dtype.itemsize:,} bytes in one array, at most {MAX_BYTES:,} are read")
            data = stream.read(count * dtype.itemsize)
            return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran else "C")
    except (ValueError, EOFError, OSError, TypeError, SyntaxError) as error:
        raise RowError(f"a damaged npy file ({str(error)[:100]})") from None
    found = load_pickle(stream)
    return found.item() if isinstance(found, np.ndarray) and found.size == 1 else found


def load_npz(data: BinaryIO) -> dict[str, Any]:
    """Every array of an npz file by its name. Raises RowError."""
    try:
        with zipfile.ZipFile(data) as archive:
            out: dict[str, Any] = {}
            for entry in archive.infolist():
                if entry.file_size > MAX_BYTES:
                    raise RowError(f"{entry.filename} has {entry.file_size:,} bytes, at most {MAX_BYTES:,} are read")
                with archive.open(entry) as stream:
                    out[entry.filename.removesuffix(".npy")] = load_npy(io.BytesIO(stream.read(MAX_BYTES)))
            return out
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError) as error:
        raise RowError(f"a damaged npz file ({str(error)[:100]})") from None
