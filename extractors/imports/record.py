"""One image's regions as other programs store them, and the row of regions-v1 they become.

Letters: n boxes, D width of a feature, K columns of class probabilities, C foreground classes.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from schemas.errors import PairmillError
from schemas.status import OK

# Our name of a value -> the names it has in BUTD's, LXMERT's, UNITER's, MMF's, Pythia's and MILVLG's files.
NAMES = {
    "features": ("features", "x", "image_features", "image_feature", "image_feat", "feature"),
    "boxes": ("boxes", "bbox", "image_bboxes"),
    "norm_bb": ("norm_bb",),
    "conf": ("conf",),
    "probs": ("soft_labels", "cls_prob"),
    "obj_id": ("objects_id", "objects"),
    "obj_conf": ("objects_conf",),
    "attr_id": ("attrs_id",),
    "attr_conf": ("attrs_conf",),
    "num": ("num_boxes", "num_bbox"),
    "width": ("image_w", "image_width", "img_w"),
    "height": ("image_h", "image_height", "img_h"),
}
_ARRAYS = ("features", "boxes", "norm_bb", "conf", "probs", "obj_id", "obj_conf", "attr_id", "attr_conf")
_FLAT = ("conf", "obj_id", "obj_conf", "attr_id", "attr_conf")
_MOST_PX = 1 << 30
# VinVL's six geometry numbers behind a feature whose own width is a multiple of 8: 2054 = 2048 + 6.
_GEOMETRY = 6
_SAME_ASPECT = 0.02
_FULL_SUM = 0.02  # class probabilities that sum to 1 within this hold the background, too
VISUAL_GENOME = (1600, 400)  # classes and attributes of the bottom-up-attention detector


class RowError(Exception):
    """An entry that cannot become a row: the row's state, and what is wrong."""

    def __init__(self, message: str, state: str = "decode_error") -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True)
class Record:
    """What an entry says. Arrays have n rows; None: the format has no such thing.

    features  float [n, D]
    boxes     float32 [n, 4] x1 y1 x2 y2, of the image the detector saw: px, or shares of its sides (`relative`)
    size      width and height of that image, px
    conf      [n], what rows are sorted by
    objects   0-based foreground class ids [n] and their confidences [n] or None; `attributes` likewise
    probs     [n, K] as the file has them
    names     class names in place of ids
    """

    features: np.ndarray
    boxes: np.ndarray | None = None
    relative: bool = False
    size: tuple[int, int] | None = None
    conf: np.ndarray | None = None
    objects: tuple[np.ndarray, np.ndarray | None] | None = None
    attributes: tuple[np.ndarray, np.ndarray | None] | None = None
    probs: np.ndarray | None = None
    names: tuple[str, ...] = ()


def numbers(value: Any, dtype: str) -> np.ndarray:
    """An array as it is, or the one behind base64 text. Raises RowError."""
    if isinstance(value, (str, bytes)):
        try:
            data = base64.b64decode(value, validate=True)
            return np.frombuffer(data, dtype)
        except (binascii.Error, ValueError) as error:
            raise RowError(f"bad base64: {error}") from None
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise RowError(f"numbers are expected, found {type(value).__name__} of {array.dtype}")
    return array


def whole_number(value: Any) -> int:
    """A count or side as text or number. Raises RowError."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise RowError(f"a whole number is expected, found {value!r:.40}") from None


def record_of(values: Mapping[str, Any], dtype: str = "<f4") -> Record:
    """The record among values under any of the known names. `dtype`: floats behind base64; ids there are int64.

    MILVLG's npz have `info`, a dict of ids that count the background as class 0: where it won, the id is 0 with
    confidence 0, since nothing is known of the foreground. Raises RowError.
    """
    inner = values.get("info")
    counts_background = isinstance(inner, Mapping) and "x" in values
    values = {**(inner if isinstance(inner, Mapping) else {}), **values}
    found: dict[str, Any] = {}
    for ours, theirs in NAMES.items():
        name = next((t for t in theirs if values.get(t) is not None), None)
        if name is not None:
            kind = "<i8" if ours in ("obj_id", "attr_id") else dtype
            found[ours] = numbers(values[name], kind) if ours in _ARRAYS else whole_number(values[name])
            if ours in _FLAT:
                found[ours] = found[ours].reshape(-1).astype(np.int64 if ours.endswith("id") else np.float32)
    if "features" not in found:
        raise RowError(f"no features among {', '.join(sorted(map(str, values)))[:200] or 'nothing'}")
    boxes = found.get("boxes", found.get("norm_bb"))
    features = _matrix(found["features"], found.get("num"), boxes)
    relative = "boxes" not in found
    if boxes is not None:
        boxes = _corners(boxes, len(features))
    elif features.shape[1] % 8 == _GEOMETRY:
        boxes, features = features[:, -_GEOMETRY:-2], features[:, :-_GEOMETRY]
    sides = (found.get("width", 0), found.get("height", 0))
    conf, obj_conf = found.get("conf"), found.get("obj_conf")
    objects, attributes = (
        _ids(found.get(f"{kind}_id"), found.get(f"{kind}_conf"), counts_background) for kind in ("obj", "attr")
    )
    if conf is None and objects is not None and obj_conf is not None:
        conf = objects[1]
    probs = found.get("probs")
    record = Record(
        features=features,
        boxes=None if boxes is None else boxes.astype(np.float32),
        relative=relative,
        size=sides if 0 < min(sides) <= max(sides) < _MOST_PX else None,
        conf=conf,
        objects=objects,
        attributes=attributes,
        probs=None if probs is None else _matrix(probs, len(features), None),
    )
    check_lengths(record)
    return record


def _ids(ids: np.ndarray | None, conf: np.ndarray | None, counts_background: bool) -> Any:
    if ids is None:
        return None
    if not counts_background:
        return ids, conf
    known = ids > 0
    return np.where(known, ids - 1, 0), None if conf is None else np.where(known, conf, 0)


def _corners(boxes: np.ndarray, n: int) -> np.ndarray:
    """[n, 4]: the first four numbers of each box, whether the array is flat or not."""
    if not n and not boxes.size:
        return np.empty((0, 4))
    if not n or boxes.size % n or boxes.size // n < 4:
        raise RowError(f"boxes of shape {list(boxes.shape)} do not fit {n} features")
    return boxes.reshape(n, -1)[:, :4]


def _matrix(array: np.ndarray, num: int | None, boxes: np.ndarray | None) -> np.ndarray:
    """[n, D] of features in any of the shapes there are: flat, [n, D], [D, n] beside n boxes, maps [.., H, W, D]."""
    if array.ndim == 1:
        if num is None:
            raise RowError("features are flat, and nothing says how many boxes there are")
        if num < 0 or (num == 0) != (array.size == 0) or (num and array.size % num):
            raise RowError(f"{array.size} numbers do not make {num} boxes")
        return array.reshape(num, array.size // num if num else 0)
    if array.ndim > 2:
        return array.reshape(-1, array.shape[-1])
    if array.ndim != 2:
        raise RowError(f"features have shape {list(array.shape)}")
    rows = None if boxes is None or boxes.ndim != 2 else len(boxes)
    return array.T if rows is not None and rows != len(array) and rows == array.shape[1] else array


def check_lengths(record: Record) -> None:
    """Raises RowError where an array has not one row a box."""
    parts = {"boxes": record.boxes, "confidences": record.conf, "class probabilities": record.probs}
    for name, pair in (("object", record.objects), ("attribute", record.attributes)):
        parts |= {f"{name} ids": pair and pair[0], f"{name} confidences": pair and pair[1]}
    for name, array in parts.items():
        if array is not None and len(array) != len(record.features):
            raise RowError(f"{len(array)} {name} for {len(record.features)} features")


@dataclass(frozen=True)
class Layout:
    """What all rows of a set share, learnt from the first readable entries. Identity.

    `background` says where its column lies in the file's class probabilities; C = 0: there are none.
    """

    dim: int
    classes: int = 0
    background: Literal["first", "last", "none"] = "first"
    attributes: bool = False
    boxes_a_row: int = field(default=0, compare=False)


def learn(records: Sequence[Record], background: str, where: str) -> Layout:
    """The layout of a file by the most frequent widths of its first entries.

    Raises PairmillError: 1027 numbers, which is VinVL's 2054 read in the wrong element type.
    """
    full = [r for r in records if len(r.features)]
    if not full:
        raise PairmillError(f"{where}: none of its first entries has a box, so their width is unknown.")
    dim = Counter(r.features.shape[1] for r in full).most_common(1)[0][0]
    if dim == (2048 + _GEOMETRY) // 2:
        raise PairmillError(
            f"{where}: features of {dim} numbers are half of VinVL's {2048 + _GEOMETRY}: "
            "float16 read as float32. Pass --dtype float16. Nothing written."
        )
    boxes = sum(len(r.features) for r in full) // len(full)
    layout = Layout(dim, attributes=any(r.attributes for r in full), boxes_a_row=boxes)
    probs = [r.probs for r in full if r.probs is not None]
    if not probs:
        return layout
    width = Counter(p.shape[1] for p in probs).most_common(1)[0][0]
    place: Any = background
    if background == "auto":
        sums = np.concatenate([p.astype(np.float32).sum(1) for p in probs if p.shape[1] == width])
        place = "first" if np.median(np.abs(sums - 1)) <= _FULL_SUM else "none"
    return replace(layout, classes=width - (place != "none"), background=place)


@dataclass(frozen=True)
class Sizes:
    """Width and height of a pair's image, px: stored, and as received; None where unknown."""

    stored: tuple[int, int] | None
    original: tuple[int, int] | None


@dataclass(frozen=True)
class Classes:
    """Names of the foreground classes; `given` by the user, or else their numbers."""

    names: tuple[str, ...]
    given: bool

    @cached_property
    def ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


def row_of(record: Record, layout: Layout, classes: Classes, attributes: int, sizes: Sizes) -> dict[str, Any]:
    """The row of regions-v1, sorted by confidence where there is one; what the record lacks is null. `attributes` is
    how many there are.

    Boxes are px of the stored image; without one, of the original; where no size is known, shares of the sides.
    Raises RowError: another width than the set's, numbers that are not finite, ids of no class, another image's aspect.
    """
    n = len(record.features)
    if n and record.features.shape[1] != layout.dim:
        raise RowError(f"features are {record.features.shape[1]} wide, those of the set {layout.dim}")
    order = np.arange(n) if record.conf is None else np.argsort(-np.asarray(record.conf, np.float32), kind="stable")
    with np.errstate(over="ignore"):
        features = record.features[order].reshape(n, layout.dim).astype(np.float16)
    probs = None if record.probs is None or not n else _background_first(record.probs[order], layout)
    for name, array in (("features", features), ("class probabilities", probs), ("confidences", record.conf)):
        if array is not None and not np.isfinite(array).all():
            raise RowError(f"{name} are not finite, or too large for float16")
    boxes = None if record.boxes is None else _boxes(record, sizes)[order]
    named, sure = _class_ids(record, classes), None if record.objects is None else record.objects[1]
    ids, conf = (None if a is None else a[order] for a in (named, sure))
    if probs is not None:
        ids = probs[:, 1:].argmax(1) if ids is None else ids
        conf = probs[np.arange(n), ids + 1] if conf is None else conf
    row = {
        "state": OK,
        "num_boxes": n,
        "boxes": None if boxes is None else boxes.tolist(),
        "features": features,
        "det_conf": None if record.conf is None else _floats(record.conf[order]),
        "obj_id": None if ids is None else ids.tolist(),
        "obj_conf": None if conf is None else _floats(conf),
    }
    if layout.classes:
        row["cls_probs"] = np.empty((0, layout.classes + 1)) if not n and record.probs is not None else probs
    if record.attributes is not None:
        found, conf = record.attributes
        if n and not 0 <= found.min() <= found.max() < attributes:
            raise RowError(f"attribute ids from {found.min()} to {found.max()} among {attributes} attributes")
        row |= {"attr_id": found[order].tolist(), "attr_conf": None if conf is None else _floats(conf[order])}
    return row


def _floats(values: np.ndarray) -> list[float]:
    return np.asarray(values, np.float32).tolist()


def _background_first(probs: np.ndarray, layout: Layout) -> np.ndarray:
    """float16 [n, C + 1]; a background that the file left out is what is missing from 1."""
    if probs.shape[1] != layout.classes + (layout.background != "none"):
        raise RowError(f"class probabilities are {probs.shape[1]} wide, unlike the first rows'")
    probs = probs.astype(np.float32)
    if layout.background == "last":
        probs = np.roll(probs, 1, axis=1)
    elif layout.background == "none":
        probs = np.concatenate([(1 - probs.sum(1, keepdims=True)).clip(0), probs], axis=1)
    return probs.astype(np.float16)


def _class_ids(record: Record, classes: Classes) -> np.ndarray | None:
    """0-based ids [n] of the foreground classes; null where rows have names and nobody gave a list of them."""
    if record.names:
        if not classes.given:
            return None
        try:
            return np.array([classes.ids[name] for name in record.names], np.int64)
        except KeyError as error:
            raise RowError(f"class {error} is not in the file of --classes") from None
    ids = None if record.objects is None else record.objects[0]
    if ids is not None and len(ids) and not 0 <= ids.min() <= ids.max() < len(classes.names):
        raise RowError(f"class ids from {ids.min()} to {ids.max()} among {len(classes.names)} classes")
    return ids


def _boxes(record: Record, sizes: Sizes) -> np.ndarray:
    """float32 [n, 4] in px of the stored image, cut to it."""
    assert record.boxes is not None
    seen, original = record.size, sizes.original
    if seen and original and abs(seen[0] * original[1] / (seen[1] * original[0]) - 1) > _SAME_ASPECT:
        raise RowError(f"made of an image of {seen[0]} x {seen[1]} px, this pair's has {original[0]} x {original[1]}")
    shares = record.boxes
    if not np.isfinite(shares).all():
        raise RowError("boxes are not finite")
    if not record.relative:
        whole = seen or original
        if whole is None:
            raise RowError("boxes in px of an image whose size nothing tells")
        shares = shares / np.array([*whole, *whole], np.float32)
    width, height = sizes.stored or original or seen or (1, 1)
    return (shares.clip(0, 1) * np.array([width, height, width, height], np.float32)).astype(np.float32)
