"""Whatever a decoder hands out, as 8-bit sRGB: profiles, CMYK, 16 bits, palettes, alpha."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SRGB = ImageCms.createProfile("sRGB")
# Colours that a profile has to leave within SAME_LEVELS of where they are to count as sRGB: a 9-step cube.
_CUBE = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3, indexing="ij"), -1).round().astype(np.uint8)
SAME_LEVELS = 2
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})


def is_srgb(icc: bytes) -> bool:
    """Whether a profile moves no colour by more than 2 of 255 levels, or is broken (and so is ignored)."""
    transform = srgb_transform(icc, "RGB")
    if transform is None:
        return srgb_transform(icc, "L") is None
    cube = Image.fromarray(_CUBE.reshape(27, 27, 3))
    moved = np.abs(np.asarray(apply(cube, transform), dtype=np.int16) - np.asarray(cube))
    return bool(moved.max() <= SAME_LEVELS)


@lru_cache(maxsize=64)
def srgb_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile to 8-bit sRGB; None where the profile is broken or is not for `mode`."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.buildTransform(profile, _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


_cached_is_srgb = lru_cache(maxsize=64)(is_srgb)


def needs_conversion(icc: bytes | None) -> bool:
    """Whether pixels under this profile must be converted to be shown as sRGB."""
    return icc is not None and not _cached_is_srgb(icc)


def apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """`image` through `transform`. Raises ImageCms.PyCMSError where they do not fit."""
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only an in-place transform returns None
    return converted


def to_rgb(image: Image.Image, icc: bytes | None) -> tuple[np.ndarray, bool]:
    """(uint8 [H, W, 3] sRGB, whether a plain decoder would have shown the same) of a loaded Pillow image.

    16-bit values are scaled to 8 bits, not cut; float values are taken as 0..1 where none is above 1, else as
    0..255; transparent pixels lie on white; a profile that does not fit the pixels is ignored.
    """
    if image.mode in _DEEP:
        return profiled(Image.fromarray(_eight_bits(image)), icc)[0], False
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"), icc)
    rgb, converted = profiled(image, icc)
    return rgb, not converted and image.mode in ("1", "L", "P", "RGB")


def profiled(image: Image.Image, icc: bytes | None) -> tuple[np.ndarray, bool]:
    """(uint8 [H, W, 3] in sRGB, whether the profile changed them) of an 8-bit image."""
    if needs_conversion(icc):
        assert icc is not None
        if image.mode not in ("L", "RGB", "CMYK"):
            image = image.convert("RGB")
        transform = srgb_transform(icc, image.mode)
        if transform is not None:
            return np.asarray(apply(image, transform)), True
    return np.asarray(image.convert("RGB")), False


def _on_white(image: Image.Image, icc: bytes | None) -> tuple[np.ndarray, bool]:
    alpha = np.asarray(image.getchannel("A"))
    rgb, converted = profiled(image.convert("RGB"), icc)
    if alpha.min() == 255:
        return rgb, not converted
    share = alpha[..., None].astype(np.uint16)
    return ((rgb * share + 255 * (255 - share) + 127) // 255).astype(np.uint8), False


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey of 16 or 32 bits or floats -> uint8 [H, W]."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.max() <= 1.0 else 1.0
        return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    deep = np.clip(values.astype(np.int64), 0, 65535)
    return ((deep * 255 + 32767) // 65535).astype(np.uint8)
