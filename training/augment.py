"""Image augmentation of the originals, drawn from a generator that is passed in.

RandAugment is ViLT's list (vilt/transforms/randaug.py; METER's file is the same): n = 2 operations at magnitude
m = 9 of 30, before the resize. CLIP's is a random resized crop (open_clip: scale 0.9 to 1.0, bicubic).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from schemas.errors import PairmillError, suggest
from shards.transforms import flip, flip_patches, resized_crop

NUM_OPERATIONS = 2
MAGNITUDE = 9
CLIP_SCALE = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
NAMES = ("none", "flip", "vilt-randaug", "clip-crop")
ON_PATCHES = ("none", "flip")


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Nearest neighbour, black where nothing is known: Pillow's defaults, on which the original relies."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    """Add `value` to every pixel, then solarize at 128."""
    brighter = np.clip(np.asarray(image) + value, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(brighter), threshold=128)


@dataclass(frozen=True)
class Operation:
    """One entry of the list: its strength goes from `low` to `high`; `signed` ones turn either way."""

    apply: Callable[[Image.Image, float], Image.Image]
    low: float
    high: float
    signed: bool = False

    def value(self, magnitude: float) -> float:
        """Strength at a magnitude of 0 to 30."""
        return (magnitude / 30) * (self.high - self.low) + self.low


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image), 0, 1),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image), 0, 1),
    "Rotate": Operation(lambda image, v: image.rotate(v), 0, 30, signed=True),
    "Posterize": Operation(lambda image, v: ImageOps.posterize(image, max(1, int(v))), 0, 4),
    "Solarize": Operation(lambda image, v: ImageOps.solarize(image, v), 0, 256),
    "SolarizeAdd": Operation(_solarize_add, 0, 110),
    "Color": Operation(lambda image, v: ImageEnhance.Color(image).enhance(v), 0.1, 1.9),
    "Contrast": Operation(lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.1, 1.9),
    "Brightness": Operation(lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.1, 1.9),
    "Sharpness": Operation(lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.1, 1.9),
    "ShearX": Operation(lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), 0, 0.3, signed=True),
    "ShearY": Operation(lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), 0, 0.3, signed=True),
    "TranslateXabs": Operation(lambda image, v: _affine(image, 1, 0, v, 0, 1, 0), 0, 100, signed=True),
    "TranslateYabs": Operation(lambda image, v: _affine(image, 1, 0, 0, 0, 1, v), 0, 100, signed=True),
}


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, n: int = NUM_OPERATIONS, m: float = MAGNITUDE
) -> np.ndarray:
    """`n` operations drawn with replacement, each at magnitude `m`. uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    picture = Image.fromarray(image)
    for name in rng.choice(list(OPERATIONS), size=n):
        operation = OPERATIONS[str(name)]
        value = operation.value(m)
        if operation.signed and rng.random() > 0.5:
            value = -value
        picture = operation.apply(picture, value)
    return np.array(picture)


def draw_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = CLIP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in px: a box of `scale` of the area and `ratio` width / height.

    torchvision's rule: ten tries, then the largest middle box whose ratio is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(0, height - box_height + 1))
            return top, int(rng.integers(0, width - box_width + 1)), box_height, box_width
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@dataclass(frozen=True)
class Augmentation:
    """A recipe by name: `none`, `flip`, `vilt-randaug`, or `clip-crop`, which needs the model's image size.

    Call it before the resize. Only `none` and `flip` can work on stored patch tensors.
    Raises PairmillError for an unknown name, or a `clip-crop` without size.
    """

    name: str
    size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise PairmillError(
                f"`augmentation` must be one of {', '.join(NAMES)}, got `{self.name}`.{suggest(self.name, NAMES)}"
            )
        if self.name == "clip-crop" and (self.size is None or self.size < 1):
            raise PairmillError(f"Augmentation `clip-crop` needs an image size in px, got {self.size}.")

    @property
    def on_patches(self) -> bool:
        """Whether it can be used on patch tensors, whose resize is already done."""
        return self.name in ON_PATCHES

    def check_patches(self) -> None:
        """Raises PairmillError where the recipe cannot work on patch tensors."""
        if not self.on_patches:
            raise PairmillError(
                f"Augmentation `{self.name}` changes pixels before the resize; patch tensors are already resized. "
                f"Use one of {', '.join(ON_PATCHES)}, or train with --input images."
            )

    def __call__(self, image: np.ndarray | Image.Image, rng: np.random.Generator) -> np.ndarray:
        """RGB picture or uint8 [H, W, 3] -> a new uint8 [H', W', 3]; `clip-crop` gives [size, size, 3]."""
        pixels = np.array(image)
        if self.name == "flip":
            return flip(pixels) if rng.random() < 0.5 else pixels
        if self.name == "vilt-randaug":
            return rand_augment(pixels, rng)
        if self.size is not None and self.name == "clip-crop":
            box = draw_crop(pixels.shape[0], pixels.shape[1], rng)
            return resized_crop(pixels, *box, self.size)
        return pixels

    def patches(self, patches: np.ndarray, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
        """The same draw on a picture stored as patches: uint8 [N, P * P * 3] -> uint8 [N, P * P * 3].

        Raises PairmillError as `check_patches` does.
        """
        self.check_patches()
        if self.name == "flip" and rng.random() < 0.5:
            return flip_patches(patches, rows, columns)
        return patches
