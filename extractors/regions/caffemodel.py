"""Weights of a .caffemodel, read as the protocol buffer that it is; Caffe is not needed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schemas.errors import PairmillError

# Field numbers of caffe.proto: NetParameter.layer; LayerParameter.name and .blobs; BlobProto.
_LAYER, _NAME, _BLOBS = 100, 1, 7
_DATA, _SHAPE, _DIM = 5, 7, 1
_OLD_SHAPE = (1, 2, 3, 4)  # num, channels, height, width
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

View = memoryview


def read_caffemodel(path: Path) -> dict[str, list[Tensor]]:
    """Layer -> its blobs, fp32, in Caffe's order. Layers without blobs are left out.

    Raises PairmillError: a file that is cut short or is none.
    """
    out: dict[str, list[Tensor]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, View(mapped) as view:
        try:
            for number, value in _fields(view):
                if number == _LAYER and isinstance(value, View):
                    name, blobs = _layer(value)
                    if blobs:
                        out[name] = blobs
                if isinstance(value, View):
                    value.release()
        except (IndexError, ValueError) as error:
            raise PairmillError(f"`{path}`: not a .caffemodel, or one that was cut short ({error}).") from None
    if not out:
        raise PairmillError(f"`{path}`: no layer with weights in it.")
    return out


def _fields(view: View) -> Iterator[tuple[int, View | int]]:
    """(field number, integer or bytes) of a message."""
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == _VARINT:
            number, at = _varint(view, at)
            yield tag >> 3, number
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            length, at = _varint(view, at)
        if length is None:
            raise ValueError(f"wire type {kind}")
        if at + length > len(view):
            raise ValueError(f"{length} bytes announced, {len(view) - at} left")
        yield tag >> 3, view[at : at + length]
        at += length


def _varint(view: View, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def _layer(view: View) -> tuple[str, list[Tensor]]:
    name, blobs = "", []
    for number, value in _fields(view):
        if number == _NAME and isinstance(value, View):
            name = bytes(value).decode("utf-8")
        elif number == _BLOBS and isinstance(value, View):
            blobs.append(_blob(value))
    return name, blobs


def _blob(view: View) -> Tensor:
    old: dict[int, int] = {}
    shape: list[int] | None = None
    parts = []
    for number, value in _fields(view):
        if number in _OLD_SHAPE and isinstance(value, int):
            old[number] = value
        elif number == _SHAPE and isinstance(value, View):
            shape = _shape(value)
        elif number == _DATA and isinstance(value, View):  # packed, or one number at a time
            parts.append(np.frombuffer(bytes(value), "<f4"))
    data = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    sides = shape if shape is not None else [old[n] for n in _OLD_SHAPE if n in old]
    return torch.from_numpy(data.astype(np.float32)).reshape(sides)


def _shape(view: View) -> list[int]:
    sides: list[int] = []
    for number, value in _fields(view):
        if number != _DIM:
            continue
        if isinstance(value, int):
            sides.append(value)
            continue
        at = 0
        while at < len(value):
            side, at = _varint(value, at)
            sides.append(side)
    return sides
