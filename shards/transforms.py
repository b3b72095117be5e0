"""Resize, crop, flip, patchify, normalise: the one copy that extractors, training and tests share.

Images are uint8 RGB arrays [H, W, 3]. Resampling is Pillow's, bicubic unless said, as in the original ViLT and CLIP
code: pixels equal theirs exactly. Randomness is drawn elsewhere: the functions here take explicit numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from schemas.errors import PairmillError

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")
Constants = tuple[float, float, float]

CLIP_MEAN: Constants = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Constants = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN: Constants = (0.5, 0.5, 0.5)
HALF_STD: Constants = (0.5, 0.5, 0.5)
IMAGENET_MEAN: Constants = (0.485, 0.456, 0.406)
IMAGENET_STD: Constants = (0.229, 0.224, 0.225)
NORMALISATIONS: dict[str, tuple[Constants, Constants]] = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": (HALF_MEAN, HALF_STD),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
}
VILT_PATCH = 32
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def check_patch_size(size: int, patch: int) -> None:
    """Raises PairmillError where an image of `size` pixels cannot be cut into whole patches."""
    if patch < 1 or size < patch or size % patch:
        raise PairmillError(
            f"`size` must be a positive multiple of `patch`, got size {size} and patch {patch}. "
            f"Pass --size {max(size // max(patch, 1), 1) * max(patch, 1)}."
        )


def check_pixels(image: np.ndarray) -> None:
    """Raises ValueError unless `image` is uint8 [H, W, 3] with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"the image has no pixels: {image.shape[1]} x {image.shape[0]}")


def resize(image: np.ndarray, width: int, height: int, resample: Image.Resampling = BICUBIC) -> np.ndarray:
    """Pillow's resize with antialiasing. uint8 [H, W, 3] -> uint8 [height, width, 3], always a new array.

    Raises ValueError for an image or a target without pixels.
    """
    check_pixels(image)
    if width < 1 or height < 1:
        raise ValueError(f"cannot resize to {width} x {height}: a side must be at least 1 px")
    return np.array(Image.fromarray(image).resize((width, height), resample=resample))


def vilt_size(width: int, height: int, size: int, patch: int = VILT_PATCH) -> tuple[int, int]:
    """(width, height) in px that ViLT resizes an image to (vilt/transforms/utils.py, MinMaxResize).

    The shorter side becomes `size`, the longer is bounded by int(1333 / 800 * size), both are rounded and
    then floored to multiples of `patch`: at 384 the bound of 639 is in effect 608. A side never gets less
    than one patch (the original fails on an image more than about 20 times as long as wide).
    """
    longest = int(1333 / 800 * size)
    # The order of these operations is the original's: another one rounds some sizes differently.
    scale = size / min(width, height)
    new_width, new_height = (scale * width, float(size)) if height < width else (float(size), scale * height)
    if max(new_width, new_height) > longest:
        shrink = longest / max(new_width, new_height)
        new_width, new_height = new_width * shrink, new_height * shrink
    columns, rows = int(new_width + 0.5) // patch, int(new_height + 0.5) // patch
    return max(columns, 1) * patch, max(rows, 1) * patch


def resize_vilt(image: np.ndarray, size: int, patch: int = VILT_PATCH) -> np.ndarray:
    """ViLT's resize: uint8 [H, W, 3] -> uint8 [rows * patch, cols * patch, 3], see `vilt_size`."""
    check_pixels(image)
    check_patch_size(size, patch)
    return resize(image, *vilt_size(image.shape[1], image.shape[0], size, patch))


def resize_square(image: np.ndarray, size: int, resample: Image.Resampling = BICUBIC) -> np.ndarray:
    """Both sides to `size` px, aspect not kept: uint8 [size, size, 3]."""
    return resize(image, size, size, resample)


def resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """The shorter side to `size` px, the longer truncated as torchvision's Resize does: uint8 [H', W', 3]."""
    check_pixels(image)
    height, width = image.shape[:2]
    if width <= height:
        return resize(image, size, int(size * height / width))
    return resize(image, int(size * width / height), size)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle uint8 [size, size, 3]; an odd rest is rounded as torchvision's CenterCrop rounds it.

    Raises ValueError where a side is shorter than `size`.
    """
    height, width = image.shape[:2]
    if height < size or width < size:
        raise ValueError(f"cannot crop {size} x {size} px out of {width} x {height}")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def resize_clip(image: np.ndarray, size: int) -> np.ndarray:
    """CLIP's evaluation transform: shorter side to `size`, then the middle square. uint8 [size, size, 3]."""
    check_pixels(image)
    return centre_crop(resize_shorter(image, size), size)


def resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """The box [top, top + height) x [left, left + width) of `image`, resized to uint8 [size, size, 3].

    Raises ValueError where the box is empty or leaves the image.
    """
    rows, columns = image.shape[:2]
    if not (0 <= top < top + height <= rows and 0 <= left < left + width <= columns):
        raise ValueError(f"box {left},{top} {width} x {height} is not inside the {columns} x {rows} image")
    return resize_square(np.ascontiguousarray(image[top : top + height, left : left + width]), size)


def flip(image: np.ndarray) -> np.ndarray:
    """Left to right mirrored copy, uint8 [H, W, 3]."""
    return np.ascontiguousarray(image[:, ::-1])


def patch_cells(image: Array, patch: int) -> Array:
    """A view of the patches in place: [..., H, W, 3] -> [..., H/P, W/P, P, P * 3].

    Array or tensor of any dtype. Raises ValueError where a side is no multiple of `patch`.
    """
    *lead, height, width, channels = image.shape
    if patch < 1 or height < patch or width < patch or height % patch or width % patch:
        raise ValueError(f"{width} x {height} px cannot be cut into patches of {patch} x {patch}")
    return image.reshape(*lead, height // patch, patch, width // patch, patch * channels).swapaxes(-3, -2)


def patchify(image: Array, patch: int) -> Array:
    """Cut into patches: [..., H, W, 3] -> [..., N, P * P * 3], N = H/P * W/P, both in raster order.

    Array or tensor of any dtype. Raises ValueError where a side is no multiple of `patch`.
    """
    cells = patch_cells(image, patch)
    *lead, rows, columns, _, width = cells.shape
    return cells.reshape(*lead, rows * columns, patch * width)


def unpatchify(patches: Array, rows: int, columns: int, patch: int) -> Array:
    """The inverse of `patchify`: [..., rows * columns, P * P * 3] -> [..., rows * P, columns * P, 3].

    Raises ValueError where the number or the width of the patches does not fit.
    """
    *lead, count, width = patches.shape
    if count != rows * columns or width != patch * patch * 3:
        raise ValueError(
            f"{count} patches of width {width} are not {rows} x {columns} patches of {patch} x {patch} x 3"
        )
    cells = patches.reshape(*lead, rows, columns, patch, patch, 3).swapaxes(-4, -3)
    return cells.reshape(*lead, rows * patch, columns * patch, 3)


def flip_patches(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Mirror a picture stored as patches: equals patchify(flip(image)). uint8 [N, P * P * 3] -> the same."""
    patch = round((patches.shape[-1] // 3) ** 0.5)
    cells = patches.reshape(rows, columns, patch, patch, 3)
    return np.ascontiguousarray(cells[:, ::-1, :, ::-1]).reshape(patches.shape)


def normalise_array(pixels: np.ndarray, mean: Constants, std: Constants) -> np.ndarray:
    """(x / 255 - mean) / std in numpy; uint8 [..., 3] or patches [..., P * P * 3] -> float32, same shape."""
    interleaved = pixels.reshape(-1, 3).astype(np.float32) / np.float32(255)
    interleaved = (interleaved - np.float32(mean)) / np.float32(std)
    return interleaved.reshape(pixels.shape)


def normalise(pixels: torch.Tensor, mean: Constants, std: Constants) -> torch.Tensor:
    """(x / 255 - mean) / std on the tensor's own device: send uint8 there, not floats.

    pixels  [B, 3, H, W] images or [B, N, P * P * 3] patches, uint8
    ->      the same shape, float32; a pixel gets the same value in both, bit for bit

    Raises ValueError for another shape, or floats.
    """
    if pixels.is_floating_point():
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}")
    images = pixels.ndim == 4 and pixels.shape[1] == 3
    if not images and (pixels.ndim != 3 or pixels.shape[2] % 3):
        raise ValueError(f"pixels must be [B, 3, H, W] or [B, N, P * P * 3], got {list(pixels.shape)}")
    # In place: fresh memory for every step costs more than the arithmetic.
    values = pixels.contiguous().float().div_(255)
    channels = values if images else values.view(*values.shape[:-1], values.shape[-1] // 3, 3)
    shape = (3, 1, 1) if images else (3,)
    # Three separate operations: a fused multiply-add may round one layout otherwise than the other.
    channels.sub_(values.new_tensor(mean).view(shape)).div_(values.new_tensor(std).view(shape))
    return values
