"""Tensors as Arrow columns.

Two kinds. `fixed_tensor`: embeddings of up to 4 KB a row, `arrow.fixed_shape_tensor` fp16. `blob_tensor`: everything
larger or ragged, `large_binary`, little-endian, C order, its shape columns beside it; element type and shape are in the
field's metadata, so a null row costs nothing and the buffer is read without a copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from schemas.errors import PairmillError

_KEY = b"pairmill.tensor"
_DTYPES = {"uint8": np.dtype("u1"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "int32": np.dtype("<i4")}


def fixed_tensor(name: str, dim: int) -> pa.Field:
    """A column of fp16 vectors [dim]."""
    return pa.field(name, pa.fixed_shape_tensor(pa.float16(), [dim]))


def blob_tensor(name: str, dtype: str, shape: Sequence[int | str]) -> pa.Field:
    """A column of ragged tensors. A str in `shape` names the int column that holds that length."""
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {sorted(_DTYPES)}, got {dtype!r}")
    meta = json.dumps({"dtype": dtype, "shape": list(shape)})
    return pa.field(name, pa.large_binary(), metadata={_KEY: meta.encode()})


def tensor_spec(field: pa.Field) -> tuple[np.dtype, list[int | str]] | None:
    """(element type, shape) of a blob field, or None for any other field."""
    meta = (field.metadata or {}).get(_KEY)
    return None if meta is None else _parse_spec(meta)


@lru_cache(maxsize=256)
def _parse_spec(meta: bytes) -> tuple[np.dtype, list[int | str]]:
    spec = json.loads(meta)
    return _DTYPES[spec["dtype"]], spec["shape"]


def to_blob(array: np.ndarray, field: pa.Field) -> bytes:
    """The array's bytes in the field's element type, little-endian, C order."""
    spec = tensor_spec(field)
    if spec is None:
        raise ValueError(f"`{field.name}` is not a blob tensor column")
    return np.ascontiguousarray(array, dtype=spec[0]).tobytes()


def binary_view(column: pa.Array, at: int) -> memoryview:
    """The bytes of one value of a `large_binary` column, in place (`column[at].as_buffer()` copies them)."""
    _, offsets, values = column.buffers()
    start, end = np.frombuffer(offsets, np.int64, 2, (column.offset + at) * 8)
    return memoryview(values)[start:end] if values is not None else memoryview(b"")


def arrays_to_blobs(arrays: Sequence[np.ndarray | None], field: pa.Field) -> pa.Array:
    """A blob column of many rows, each copied once, views and other element types, too. None is null.

    Equal to pa.array of `to_blob` of each.
    """
    spec = tensor_spec(field)
    if spec is None:
        raise ValueError(f"`{field.name}` is not a blob tensor column")
    dtype = spec[0]
    ends = np.cumsum([0] + [0 if a is None else a.size for a in arrays])
    data = np.empty(ends[-1], dtype)
    for start, array in zip(ends.tolist(), arrays, strict=False):
        if array is not None and array.size:
            place = data[start : start + array.size].reshape(array.shape)
            if array.dtype == dtype and array.strides[-1] == dtype.itemsize:
                whole = f"V{array.shape[-1] * dtype.itemsize}"  # its rows as one element each: half the time
                place, array = place.view(whole), array.view(whole)
            place[...] = array
    present = pa.array([a is not None for a in arrays], pa.bool_())
    valid = present.buffers()[1] if any(a is None for a in arrays) else None
    offsets = pa.py_buffer(ends.astype(np.int64) * dtype.itemsize)
    return pa.Array.from_buffers(pa.large_binary(), len(arrays), [valid, offsets, pa.py_buffer(data)])


def from_blob(field: pa.Field, column: pa.Array, at: int, shapes: Mapping[str, int | None]) -> np.ndarray | None:
    """The tensor of row `at` as a read-only view of the mapped file, or None where the row is null.

    Raises PairmillError when the bytes do not fit the shape columns (a damaged file).
    """
    if column.null_count and column.slice(at, 1).null_count:
        return None
    spec = tensor_spec(field)
    if spec is None:
        raise ValueError(f"`{field.name}` is not a blob tensor column")
    dtype, shape = spec
    lengths = [shapes[d] if isinstance(d, str) else d for d in shape]
    dims = [-1 if d is None else d for d in lengths]
    buffer = binary_view(column, at)
    if min(dims, default=0) < 0 or buffer.nbytes != math.prod(dims) * dtype.itemsize:
        raise PairmillError(
            f"`{field.name}` holds {buffer.nbytes} bytes, which its shape {dims} of {dtype} does not explain: "
            "the feature file is damaged. Delete that shard's file and run the extract command again."
        )
    return np.frombuffer(buffer, dtype=dtype).reshape(dims)


def fixed_view(column: pa.Array) -> np.ndarray:
    """A fixed-tensor column as fp16 [rows, dim] in place; a null row holds anything."""
    dim = column.type.shape[0]
    storage = column.storage
    values = storage.values.to_numpy(zero_copy_only=True)
    start = storage.offset * dim
    return values[start : start + len(storage) * dim].reshape(len(storage), dim)


def fixed_to_array(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A fixed-tensor column as fp16 [rows, dim]; null rows are NaN."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ChunkedArray):  # no rows
        return np.empty((0, column.type.shape[0]), np.float16)
    out = fixed_view(column)
    if column.storage.null_count:
        out = out.copy()
        out[np.asarray(column.storage.is_null())] = np.nan
    return out


def array_to_fixed(array: np.ndarray, valid: np.ndarray, dim: int) -> pa.Array:
    """fp16 [rows, dim] as a fixed-tensor column, null where `valid` is False."""
    flat = np.ascontiguousarray(array, dtype=np.float16).reshape(-1)
    storage = pa.FixedSizeListArray.from_arrays(
        pa.array(flat, pa.float16()), dim, mask=pa.array(~np.asarray(valid, dtype=bool))
    )
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float16(), [dim]), storage)
