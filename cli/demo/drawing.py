"""Items on a background to pixels, anti-aliased by signed distances; nothing is ever drawn twice as large."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from cli.demo.scene_graph import Item

Array = np.ndarray

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (212, 38, 44),
    "orange": (246, 134, 28),
    "yellow": (250, 214, 40),
    "green": (40, 158, 70),
    "blue": (34, 92, 216),
    "purple": (124, 54, 186),
    "pink": (248, 138, 190),
    "brown": (120, 74, 40),
    "white": (250, 250, 248),
    "black": (32, 32, 36),
}
_SKIES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sky": ((166, 208, 240), (214, 234, 248)),
    "sand": ((236, 218, 182), (222, 196, 152)),
    "mint": ((196, 232, 210), (164, 214, 190)),
    "lavender": ((220, 208, 240), (196, 184, 226)),
    "grey": ((204, 206, 210), (166, 170, 178)),
    "night": ((28, 34, 66), (62, 66, 108)),
}


def _box(x: Array, y: Array, half_x: float, half_y: float, rounding: float = 0.0) -> Array:
    qx, qy = np.abs(x) - half_x + rounding, np.abs(y) - half_y + rounding
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - rounding


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.84, 0.84, 0.10)


def _triangle(x: Array, y: Array) -> Array:
    half = 0.5 * 3**0.5
    y = y - 0.12
    return np.maximum.reduce([y, half * x - 0.5 * y, -half * x - 0.5 * y]) - 0.55


def _star(x: Array, y: Array) -> Array:
    """Five points: fold the plane into one point's half, then the distance to its one edge."""
    turn, inner = 2 * np.pi / 5, 0.46
    angle = np.arctan2(x, -y)
    folded = np.abs(np.mod(angle + turn / 2, turn) - turn / 2)
    radius = np.hypot(x, y)
    # The edge runs from the tip (0, 1) to the dent between two points.
    along_x, along_y = inner * float(np.sin(turn / 2)), inner * float(np.cos(turn / 2)) - 1
    away = radius * np.sin(folded) * -along_y + (radius * np.cos(folded) - 1) * along_x
    return away / float(np.hypot(along_x, along_y))


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner and a disc on each of its upper sides."""
    half, s = 0.55, 0.5**0.5
    y = y - 0.10
    diamond = _box(s * (x + y), s * (y - x), half, half)
    lobes = np.hypot(np.abs(x) - half * s, y + half * s) - half
    return np.minimum(diamond, lobes)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.98, 0.33, 0.05), _box(x, y, 0.33, 0.98, 0.05))


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.71) - 0.27


def _moon(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x - 0.15, y) - 1, 0.80 - np.hypot(x - 0.68, y))


_DISTANCE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
}


def _pattern(texture: str, x: Array, y: Array, scale: float) -> Array:
    """How much of the second tone shows, 0 to 1; `scale` is the radius in px, for soft edges."""
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        wave = np.sin((x + y) * 2 * np.pi / 0.62) * (0.62 / (2 * np.pi))
    elif texture == "checked":
        wave = np.sin(x * np.pi / 0.36) * np.sin(y * np.pi / 0.36) * 0.12
    else:
        cell = 0.50
        wave = 0.155 - np.hypot(np.mod(x + cell / 2, cell) - cell / 2, np.mod(y + cell / 2, cell) - cell / 2)
    return np.clip(0.5 + wave * scale, 0, 1)


def _second_tone(colour: Array) -> Array:
    """A clearly lighter tone of a dark colour, a darker one of a light colour."""
    light = float(colour @ np.array([0.299, 0.587, 0.114])) > 150
    return colour * 0.66 if light else colour + (255 - colour) * 0.55


def _background(rng: np.random.Generator, name: str, height: int, width: int) -> Array:
    """[H, W, 3] float32: a turned or round gradient with clouds or paper lines, and grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width - 0.5, y / height - 0.5
    if rng.random() < 0.7:
        angle = rng.uniform(0, 2 * np.pi)
        way = 0.5 + float(np.cos(angle) / 1.42) * x + float(np.sin(angle) / 1.42) * y
    else:
        way = np.hypot(x - rng.uniform(-0.3, 0.3), y - rng.uniform(-0.3, 0.3))
    if rng.random() < 0.6:
        clouds = rng.standard_normal((6, 6)).astype(np.float32) * 0.22
        way = way + cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
    first, last = (np.array(c, np.float32) + rng.uniform(-8, 8) for c in _SKIES[name])
    grain = rng.standard_normal((height, width), dtype=np.float32) * rng.uniform(0.8, 4.5)
    image = first + (last - first) * np.clip(way, 0, 1)[..., None] + grain[..., None]
    if rng.random() < 0.25:
        lines = max(6, min(height, width) // 12)
        image[::lines] *= 0.95
        image[:, ::lines] *= 0.95
    return image


def _draw_item(image: Array, item: Item, tint: Array, dark: bool, side: int) -> tuple[int, int, int, int]:
    """Paint one item onto the float image in place; its tight box in px, exclusive maximum."""
    height, width = image.shape[:2]
    radius, cx, cy = item.radius * side, item.x * side, item.y * side
    reach = int(np.ceil(radius * 1.25)) + 3
    left, top = max(0, int(cx) - reach), max(0, int(cy) - reach)
    right, bottom = min(width, int(cx) + reach), min(height, int(cy) + reach)
    yy, xx = np.mgrid[top:bottom, left:right].astype(np.float32)
    xx, yy = (xx + 0.5 - cx) / radius, (yy + 0.5 - cy) / radius
    cos, sin = float(np.cos(item.angle)), float(np.sin(item.angle))
    x, y = cos * xx + sin * yy, cos * yy - sin * xx
    distance = _DISTANCE[item.shape](x, y) * radius
    patch = image[top:bottom, left:right]

    shift, blur = max(1, round(radius * 0.09)), max(1.5, radius * 0.16)
    fallen = np.roll(distance, (shift, shift), (0, 1))
    patch *= 1 - 0.42 * np.clip(0.5 - fallen / blur, 0, 1)[..., None]

    colour = np.clip(np.array(PALETTE[item.colour], np.float32) + tint, 0, 255)
    mixed = _pattern(item.texture, x, y, radius)[..., None]
    paint = colour + (_second_tone(colour) - colour) * mixed
    paint = paint * (1 - 0.10 * (xx + yy))[..., None]
    line = max(1.0, radius * 0.055)
    rim = colour * 0.45 if not dark else colour * 0.6 + 96
    inner = np.clip(0.5 - (distance + line), 0, 1)[..., None]
    paint = rim + (paint - rim) * inner
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    patch += (paint - patch) * cover

    seen = distance < 0
    columns, rows = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def draw(
    rng: np.random.Generator, items: Sequence[Item], background: str, height: int, width: int
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Paint the items: image uint8 [H, W, 3] RGB and each item's tight box, px, exclusive maximum."""
    image = _background(rng, background, height, width)
    # The palette's names must stay true: a tint never leaves its colour's neighbourhood.
    tints = (rng.uniform(-10, 10, (len(items), 1)) + rng.uniform(-4, 4, (len(items), 3))).astype(np.float32)
    side, dark = min(height, width), background == "night"
    boxes = [_draw_item(image, item, tint, dark, side) for item, tint in zip(items, tints, strict=True)]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), boxes
