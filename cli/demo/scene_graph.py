"""What is in a generated scene: objects, their relations, and whether a claim about them is true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "large")
BACKGROUNDS = ("sky", "sand", "mint", "lavender", "grey", "night")
RELATIONS = ("left of", "above", "bigger than")
INVERSE = {"right of": "left of", "below": "above", "smaller than": "bigger than"}

# Radius in shorter sides of the image. The gap between the two is what makes "bigger" beyond doubt.
_RADII = {"small": (0.070, 0.090), "large": (0.130, 0.168)}
_GAP = 0.025
_MAX_OBJECTS = 6
_MAX_LARGE = 3


@dataclass(frozen=True)
class Item:
    """One thing to draw: its attributes, and where, in shorter sides of the image."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class SceneObject:
    """One thing as drawn. `box` is x1 y1 x2 y2 in pixels, exclusive maximum, tight around what is seen."""

    shape: str
    colour: str
    texture: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, px."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True)
class Kind:
    """A description: the attributes that are said. None = not said."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None

    def fits(self, thing: Item | SceneObject | Kind) -> bool:
        """Whether every attribute that is said is the thing's."""
        names = ("shape", "colour", "texture", "size")
        return all(getattr(self, n) in (None, getattr(thing, n)) for n in names)


@dataclass(frozen=True)
class Claim:
    """One checkable statement.

    `what` is "count" (exactly `number` objects fit `kind`), "background" (`value` is its name),
    "where" (all that fit `kind` lie at `value`), or a relation of RELATIONS (each that fits `kind` to each
    that fits `other`).
    """

    what: str
    kind: Kind = Kind()
    number: int = 0
    other: Kind = Kind()
    value: str = ""


def related(name: str, a: SceneObject, b: SceneObject, side: float) -> bool:
    """Whether a stands in relation `name` to b, in an image whose shorter side is `side` px.

    A direction holds when the centres differ by more than an eighth of the side, mostly along that axis.
    """
    (ax, ay), (bx, by) = a.centre, b.centre
    dx, dy = bx - ax, by - ay
    if name == "left of":
        return dx > side / 8 and dx > 0.75 * abs(dy)
    if name == "above":
        return dy > side / 8 and dy > 0.75 * abs(dx)
    return (a.size, b.size) == ("large", "small")


def located(place: str, a: SceneObject, height: int, width: int) -> bool:
    """Whether a's centre is at `place`: left, right, top, bottom (outer 40 %) or middle (within 15 %)."""
    x, y = a.centre[0] / width, a.centre[1] / height
    if place == "middle":
        return abs(x - 0.5) < 0.15 and abs(y - 0.5) < 0.15
    return {"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6}[place]


def holds(claim: Claim, objects: Sequence[SceneObject], background: str, image_size: tuple[int, int]) -> bool:
    """Whether the claim is true of the objects on that background; image_size is (height, width), px."""
    if claim.what == "background":
        return claim.value == background
    mine = [o for o in objects if claim.kind.fits(o)]
    if claim.what == "count":
        return len(mine) == claim.number
    if claim.what == "where":
        return bool(mine) and all(located(claim.value, o, *image_size) for o in mine)
    theirs = [o for o in objects if claim.other.fits(o)]
    pairs = [(a, b) for a in mine for b in theirs]
    return bool(pairs) and all(related(claim.what, a, b, min(image_size)) for a, b in pairs)


def relations(objects: Sequence[SceneObject], side: float) -> Iterator[tuple[int, str, int]]:
    """Every (i, relation, j) that holds, relations of RELATIONS only."""
    for i, a in enumerate(objects):
        for j, b in enumerate(objects):
            for name in RELATIONS:
                if i != j and related(name, a, b, side):
                    yield i, name, j


def layout(rng: np.random.Generator, width: float, height: float) -> list[Item]:
    """Draw groups of equal things that do not touch; width and height in shorter sides."""
    while True:
        placed = _place(rng, _groups(rng), width, height)
        if placed:
            return placed


def _groups(rng: np.random.Generator) -> list[Kind]:
    """Kinds in drawing order, repeated by their count; groups differ in shape or colour."""
    kinds: list[Kind] = []
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.10, 0.42, 0.33, 0.15])):
        kind = Kind(*(str(rng.choice(v)) for v in (SHAPES, COLOURS, TEXTURES, SIZES)))
        if not any(Kind(k.shape, k.colour).fits(kind) for k in kinds):
            kinds += [kind] * rng.choice([1, 2, 3], p=[0.70, 0.20, 0.10])
    return kinds


def _place(rng: np.random.Generator, kinds: list[Kind], width: float, height: float) -> list[Item]:
    """Positions by rejection; empty when it is too crowded."""
    if len(kinds) > _MAX_OBJECTS or sum(k.size == "large" for k in kinds) > _MAX_LARGE:
        return []
    items: list[Item] = []
    for kind in kinds:
        for _ in range(60):
            radius = rng.uniform(*_RADII[str(kind.size)])
            edge = radius + _GAP
            x, y = rng.uniform(edge, width - edge), rng.uniform(edge, height - edge)
            if all(np.hypot(x - o.x, y - o.y) > radius + o.radius + _GAP for o in items):
                break
        else:
            return []
        look = (str(kind.shape), str(kind.colour), str(kind.texture), str(kind.size))
        items.append(Item(*look, float(x), float(y), float(radius), float(rng.uniform(-0.22, 0.22))))
    return items
