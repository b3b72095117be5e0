"""Generated scenes: pictures whose content is known, for the demo, the tests and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from cli.demo.captions import Caption, Subject, describe
from cli.demo.drawing import draw
from cli.demo.scene_graph import BACKGROUNDS, SceneObject, layout, relations


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and all that is known of it.

    image       uint8 [H, W, 3] RGB
    objects     in drawing order; boxes in px, exclusive maximum
    background  one of scene_graph.BACKGROUNDS
    described   five captions with their claims; the first is the most specific
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    background: str
    described: tuple[Caption, ...]

    @property
    def captions(self) -> list[str]:
        """The sentences alone."""
        return [caption.text for caption in self.described]

    @property
    def subject(self) -> Subject:
        """The scene without its pixels."""
        return Subject(self.objects, self.background, self.image.shape[:2])

    @cached_property
    def relations(self) -> list[tuple[int, str, int]]:
        """Every (i, "left of" | "above" | "bigger than", j) between objects i and j."""
        return list(relations(self.objects, min(self.image.shape[:2])))

    def fits(self, caption: Caption) -> bool:
        """Whether everything the caption claims is true of this scene."""
        return all(self.subject.true(claim) for claim in caption.claims)


def generate_scene(seed: int | np.random.Generator, size: int | tuple[int, int] = 256) -> Scene:
    """One scene; the same seed and size give the same bytes in every process.

    seed  an integer >= 0, or a generator, from which one integer is drawn
    size  px: the side of a square image, or (height, width); at least 32
    """
    number = int(seed.integers(2**62)) if isinstance(seed, np.random.Generator) else seed
    height, width = (size, size) if isinstance(size, int) else size
    plan, paint, words = (np.random.default_rng([number, stream]) for stream in range(3))
    side = min(height, width)
    items = layout(plan, width / side, height / side)
    background = str(plan.choice(BACKGROUNDS))
    image, boxes = draw(paint, items, background, height, width)
    objects = tuple(SceneObject(i.shape, i.colour, i.texture, i.size, box) for i, box in zip(items, boxes, strict=True))
    return Scene(image, objects, background, describe(words, Subject(objects, background, (height, width))))


def encode(image: np.ndarray, kind: str = "jpeg", quality: int = 90) -> bytes:
    """uint8 [H, W, 3] RGB as JPEG, PNG or WebP bytes. Raises ValueError for another kind."""
    flags = {
        "jpeg": [cv2.IMWRITE_JPEG_QUALITY, quality],
        "png": [],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
    }
    if kind not in flags:
        raise ValueError(f"`kind` must be jpeg, png or webp, got {kind!r}")
    _, data = cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]), flags[kind])
    return data.tobytes()
