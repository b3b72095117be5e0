"""Boxes with class names and confidences on a picture."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

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
)
_GAP = 2


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
    labels     N names; one colour a name

    A name is drawn once where its boxes overlap by more than half (IoU): the rule of selection keeps a box for
    its second-best class as well. Tags lie above their box where there is room, else at another of its sides,
    and off each other where possible.
    """
    height, width = image.shape[:2]
    scale = max(1.0, side_px / max(height, width))
    canvas = Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    order = _distinct(boxes, labels, confidence, min_confidence)[:max_boxes]
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 300))
    font = ImageFont.load_default(max(11, round(max(canvas.size) / 48)))
    scaled = {i: tuple(float(v) * scale for v in boxes[i]) for i in order}
    # The most confident is drawn last, on top.
    for i in reversed(order):
        _outline(pen, scaled[i], _colour(labels[i]), line)
    placed: list[Rectangle] = []
    for i in order:
        tag = _measure(pen, font, f"{labels[i]} {confidence[i]:.2f}")
        spot = _place(tag, scaled[i], placed, list(scaled.values()), canvas.size)
        placed.append(spot)
        _write(pen, font, tag, spot, _colour(labels[i]))
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


def _colour(label: str) -> tuple[int, int, int]:
    """The same colour for a name in every picture and process."""
    return _COLOURS[zlib.crc32(label.encode()) % len(_COLOURS)]


def _outline(pen: ImageDraw.ImageDraw, box: Rectangle, colour: tuple[int, int, int], line: int) -> None:
    """The box in its colour inside a thin white frame; a box thinner than a line is drawn as one."""
    x1, y1, x2, y2 = box
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(255, 255, 255))
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _measure(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, text: str) -> _Tag:
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    return _Tag(text, int(right - left) + 8, int(bottom - top) + 6)


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
    inside = [(min(max(x, 0), size[0] - w), min(max(y, 0), size[1] - h)) for x, y in corners]
    return [(x, y, x + w, y + h) for x, y in inside]


def _shared(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles share, square px."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _place(
    tag: _Tag, box: Rectangle, placed: Sequence[Rectangle], boxes: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle:
    """The spot that hides least: of other tags first, then of what is boxed; the earlier where equal."""
    spots = _spots(tag, box, size)
    hidden = [
        (sum(_shared(s, p) for p in placed), round(sum(_shared(s, b) for b in boxes) / (tag.width * tag.height), 1))
        for s in spots
    ]
    return spots[min(range(len(spots)), key=lambda i: (hidden[i], i))]


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
