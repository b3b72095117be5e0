"""Boxes with class names and confidences on a picture."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rectangle = tuple[float, float, float, float]

# Colours that differ from each other in hue and are strong on light and dark pictures.
_COLOURS = (
    (230, 57, 70),
    (29, 120, 216),
    (22, 160, 90),
    (245, 140, 20),
    (142, 68, 190),
    (0, 150, 170),
    (214, 51, 132),
    (120, 120, 20),
    (96, 82, 220),
    (176, 84, 40),
    (0, 105, 92),
    (173, 20, 87),
    (40, 53, 147),
    (96, 150, 40),
    (150, 20, 20),
    (78, 52, 46),
    (84, 110, 122),
    (0, 140, 210),
    (110, 0, 150),
    (50, 50, 50),
)
_GAP = 2
_ASIDE = 8  # px between the places that are tried where all beside the box are taken


@dataclass(frozen=True)
class _Tag:
    text: str
    width: int
    height: int


def region_labels(
    object_ids: Sequence[int],
    classes: Sequence[str],
    attribute_ids: Sequence[int] | None = None,
    attributes: Sequence[str] = (),
) -> list[str]:
    """'red car' for an attribute and a class, the class alone without attributes; ids are 0-based foreground."""
    names = [classes[i] for i in object_ids]
    if attribute_ids is None or not attributes:
        return names
    return [f"{attributes[a]} {name}" for a, name in zip(attribute_ids, names, strict=True)]


def row_regions(found: Mapping[str, Any], said: Mapping[str, Any]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(boxes float32 [N, 4], labels, confidences float32 [N]) of a row that is ok; `said` is the set's `about`.

    An imported set may lack some of it: no box then, labels '', confidence 1.
    """
    boxes = np.asarray([] if found["boxes"] is None else found["boxes"], np.float32).reshape(-1, 4)
    ids, conf = found.get("obj_id"), found.get("det_conf")
    if ids is None:
        labels = [""] * len(boxes)
    else:
        labels = region_labels(ids, said.get("classes") or [], found.get("attr_id"), said.get("attributes") or [])
    return boxes, labels, np.ones(len(boxes), np.float32) if conf is None else np.asarray(conf, np.float32)


def draw_regions(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    confidence: Sequence[float],
    *,
    max_boxes: int = 24,
    min_confidence: float = 0.0,
    side_px: int = 640,
) -> np.ndarray:
    """The picture with its most confident boxes; uint8 [H', W', 3] RGB.

    image      uint8 [H, W, 3] RGB; enlarged until its longer side is side_px, so that labels can be read
    boxes      [N, 4] x1 y1 x2 y2, pixels of the image, exclusive maximum
    labels     N names; one colour a name, of its own while there are colours

    A name is drawn once where its boxes overlap by more than half (IoU): the rule of selection keeps a box for
    its second-best class as well. Tags lie above their box where there is room, else at another of its sides,
    else at the nearest place where no tag is. A name wider than the picture is cut.
    """
    height, width = image.shape[:2]
    scale = max(1.0, side_px / max(height, width))
    canvas = Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    order = _distinct(boxes, labels, confidence, min_confidence)[:max_boxes]
    pen = ImageDraw.Draw(canvas)
    longer, shorter = max(canvas.size), min(canvas.size)
    line = max(2, round(min(longer / 300, shorter / 100)))
    font = ImageFont.load_default(max(11, round(min(longer / 48, shorter / 16))))
    colours = _colours(labels[i] for i in order)
    scaled = {i: tuple(float(v) * scale for v in boxes[i]) for i in order}
    # The most confident is drawn last, on top.
    for i in reversed(order):
        _outline(pen, scaled[i], colours[labels[i]], line)
    placed: list[Rectangle] = []
    for i in order:
        tag = _tag(pen, font, labels[i], f"{confidence[i]:.2f}", canvas.width)
        spot = _place(tag, scaled[i], placed, list(scaled.values()), canvas.size)
        placed.append(spot)
        _write(pen, font, tag, spot, colours[labels[i]])
    return np.asarray(canvas)


def _distinct(
    boxes: np.ndarray, labels: Sequence[str], confidence: Sequence[float], min_confidence: float
) -> list[int]:
    """Rows to draw, the most confident first."""
    kept: list[int] = []
    for i in np.argsort(-np.asarray(confidence, np.float64), kind="stable").tolist():
        repeats = any(labels[i] == labels[j] and _iou(boxes[i], boxes[j]) > 0.5 for j in kept)
        if confidence[i] >= min_confidence and not repeats:
            kept.append(i)
    return kept


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    shared = _shared(tuple(a), tuple(b))
    whole = sum(float((c[2] - c[0]) * (c[3] - c[1])) for c in (a, b)) - shared
    return shared / whole if whole > 0 else 0.0


def _colours(names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """A colour for each name: in every picture the same, but for the next of the least used where another has it."""
    used: Counter[int] = Counter()
    out: dict[str, tuple[int, int, int]] = {}
    for name in names:
        if name not in out:
            own = zlib.crc32(name.encode())
            ring = [(own + step) % len(_COLOURS) for step in range(len(_COLOURS))]
            taken = min(ring, key=lambda i: used[i])
            used[taken] += 1
            out[name] = _COLOURS[taken]
    return out


def _outline(pen: ImageDraw.ImageDraw, box: Rectangle, colour: tuple[int, int, int], line: int) -> None:
    """The box in its colour inside a thin white frame; a box thinner than a line is drawn as one."""
    x1, y1, x2, y2 = box
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(255, 255, 255))
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _measure(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str) -> _Tag:
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    return _Tag(text, int(right - left) + 8, int(bottom - top) + 6)


def _tag(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, name: str, number: str, width: int) -> _Tag:
    """The name and its number, or as much of the name as goes into `width` px."""
    tag = _measure(pen, font, f"{name} {number}")
    while tag.width > width and name:
        name = name[:-1]
        tag = _measure(pen, font, f"{name}... {number}")
    return tag


def _spots(tag: _Tag, box: Rectangle, size: tuple[int, int]) -> list[Rectangle]:
    """Places for the tag, best first, moved into the picture."""
    x1, y1, x2, y2 = box
    w, h = tag.width, tag.height
    corners = [
        (x1, y1 - h - _GAP),
        (x2 - w, y1 - h - _GAP),
        (x1, y2 + _GAP),
        (x2 - w, y2 + _GAP),
        (x2 + _GAP, y1),
        (x1 - w - _GAP, y1),
        (x1 + _GAP, y1 + _GAP),
        (x1 + _GAP, y2 - h - _GAP),
        (x1, y1 - 2 * h - 2 * _GAP),
        (x1, y2 + h + 2 * _GAP),
    ]
    inside = [(max(min(x, size[0] - w), 0), max(min(y, size[1] - h), 0)) for x, y in corners]
    return [(x, y, x + w, y + h) for x, y in inside]


def _shared(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles share, square px."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _place(
    tag: _Tag, box: Rectangle, placed: Sequence[Rectangle], boxes: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle:
    """The spot that hides least: of other tags first, then of what is boxed; the earlier where equal.

    Where all beside the box hide a tag, the nearest in the picture that hides none.
    """
    spots = _spots(tag, box, size)
    if all(any(_shared(s, p) for p in placed) for s in spots):
        spots = _free(tag, box, placed, size) or spots
    hidden = [
        (sum(_shared(s, p) for p in placed), round(sum(_shared(s, b) for b in boxes) / (tag.width * tag.height), 1))
        for s in spots
    ]
    return spots[min(range(len(spots)), key=lambda i: (hidden[i], i))]


def _free(tag: _Tag, box: Rectangle, placed: Sequence[Rectangle], size: tuple[int, int]) -> list[Rectangle]:
    """The place nearest to the middle of the box where no tag is, in a list, which is empty where there is none."""
    taken = np.array(placed, np.float64)
    ys, xs = np.mgrid[0 : size[1] - tag.height + 1 : _ASIDE, 0 : size[0] - tag.width + 1 : _ASIDE].reshape(2, -1, 1)
    across = np.minimum(xs + tag.width, taken[:, 2]) > np.maximum(xs, taken[:, 0])
    down = np.minimum(ys + tag.height, taken[:, 3]) > np.maximum(ys, taken[:, 1])
    free = np.flatnonzero(~(across & down).any(1))
    if not len(free):
        return []
    x, y = xs[free, 0], ys[free, 0]
    far = np.hypot(x + tag.width / 2 - (box[0] + box[2]) / 2, y + tag.height / 2 - (box[1] + box[3]) / 2)
    best = int(far.argmin())
    return [(float(x[best]), float(y[best]), float(x[best] + tag.width), float(y[best] + tag.height))]


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    tag: _Tag,
    spot: Rectangle,
    colour: tuple[int, int, int],
) -> None:
    x1, y1, x2, y2 = spot
    pen.rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius=3, fill=colour, outline=(255, 255, 255))
    pen.text(((x1 + x2) / 2, (y1 + y2) / 2), tag.text, font=font, fill=(255, 255, 255), anchor="mm")
