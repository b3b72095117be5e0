"""One downloaded image: check it, resize it, encode it, or keep its bytes.

Bytes are kept as received wherever nothing changed: no pixel was resized, turned, cropped or padded, no colour
converted, no transparency flattened, and the kind is JPEG, PNG or WebP (whatever `encode` says: it names the format
of images that had to change). Kept images are still decoded once, at 1/8 where the kind allows, so that a broken
one never gets into a dataset. With `resize="none"` every image that decodes keeps its bytes, whatever its kind;
readers apply orientation and profile when they decode (`shards.images.decode_rgb`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import cv2
import numpy as np

from curation.config import DownloadConfig
from shards.images import PLAIN_KINDS, Decoded, Header, ImageError, decode, encode, header

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Processed:
    """An image as it is stored. Sizes are in px and upright: those of `decode_rgb(image)`."""

    image: bytes
    format: str
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: bytes
    stored_sha256: bytes


@dataclass(frozen=True)
class Plan:
    """Scale to (scaled_width, scaled_height), then crop or pad to (width, height), all px."""

    scaled_width: int
    scaled_height: int
    width: int
    height: int


def plan(width: int, height: int, config: DownloadConfig) -> Plan:
    """What `config` does to an image of this (upright) size."""
    by_longer = config.resize in ("keep-ratio-largest", "border")
    scale = config.size / (max(width, height) if by_longer else min(width, height))
    if config.resize == "none" or (scale > 1 and not config.upscale):
        scale = 1.0
    scaled = max(round(width * scale), 1), max(round(height * scale), 1)
    if config.resize == "border":
        return Plan(*scaled, config.size, config.size) if max(scaled) <= config.size else Plan(*scaled, *scaled)
    if config.resize == "center-crop":
        return Plan(*scaled, min(scaled[0], config.size), min(scaled[1], config.size))
    return Plan(*scaled, *scaled)


def process(data: bytes, config: DownloadConfig, expected_hash: str | None = None) -> Processed:
    """The image to store for the bytes received.

    expected_hash  `sha256:HEX` or `md5:HEX` that `data` must have
    Raises ImageError: hash_mismatch, not_image, decode_error, bomb, too_small, bad_aspect.
    """
    if expected_hash is not None:
        check_hash(data, expected_hash)
    head = header(data, config.max_pixels)
    _check_shape(head, config)
    width, height = head.upright
    steps = plan(width, height, config)
    untouched = steps == Plan(width, height, width, height)
    # Bytes that may be kept only have to prove that they decode.
    shrink_to = (1, 1) if untouched else (steps.scaled_width, steps.scaled_height)
    decoded = decode(data, shrink_to=shrink_to, max_pixels=config.max_pixels)
    if config.resize == "none" or (untouched and decoded.plain and decoded.kind in PLAIN_KINDS):
        return _stored(data, data, decoded.kind, (decoded.width, decoded.height), decoded)
    if untouched and decoded.rgb.shape[:2] != (decoded.height, decoded.width):
        decoded = decode(data, max_pixels=config.max_pixels)
    # Some kinds tell only after decoding that they lie on their side.
    rgb = _resized(decoded.rgb, plan(decoded.width, decoded.height, config), config.max_pixels)
    image = encode(rgb, config.encode, config.quality)
    return _stored(data, image, config.encode, (rgb.shape[1], rgb.shape[0]), decoded)


def check_hash(data: bytes, expected: str) -> None:
    """Raises ImageError hash_mismatch unless `data` has the hash `sha256:HEX` or `md5:HEX`."""
    name, _, digest = expected.partition(":")
    if hashlib.new(name, data, usedforsecurity=False).hexdigest() != digest.lower():
        raise ImageError("hash_mismatch", f"{name} differs from the list's")


def _check_shape(head: Header, config: DownloadConfig) -> None:
    shorter, longer = sorted((head.width, head.height))
    if shorter < config.min_side:
        raise ImageError("too_small", f"{head.width} x {head.height} px, the shorter side has to be {config.min_side}")
    if config.max_aspect is not None and longer > config.max_aspect * shorter:
        raise ImageError("bad_aspect", f"{head.width} x {head.height} px, at most {config.max_aspect:g} to 1")


def _stored(data: bytes, image: bytes, kind: str, size: tuple[int, int], decoded: Decoded) -> Processed:
    received = hashlib.sha256(data).digest()
    stored = received if image is data else hashlib.sha256(image).digest()
    return Processed(image, kind, *size, decoded.width, decoded.height, received, stored)


def _resized(rgb: np.ndarray, steps: Plan, max_pixels: int) -> np.ndarray:
    if max(steps.scaled_width * steps.scaled_height, steps.width * steps.height) > max_pixels:
        raise ImageError("bomb", f"would become {steps.width} x {steps.height} px")
    rgb = resample(rgb, steps.scaled_width, steps.scaled_height)
    left, top = (steps.width - steps.scaled_width) // 2, (steps.height - steps.scaled_height) // 2
    if left < 0 or top < 0:  # crop
        rgb = rgb[max(-top, 0) :, max(-left, 0) :][: steps.height, : steps.width]
    if left > 0 or top > 0:  # pad
        canvas: np.ndarray = np.full((steps.height, steps.width, 3), WHITE, np.uint8)
        canvas[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
        return canvas
    return np.ascontiguousarray(rgb)


def resample(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: area down, Lanczos up.

    Area: the mean of k x k bilinear samples under each new pixel, k the power of two that puts them about one
    old pixel apart (k = 1 below a reduction of 1.3). At reductions by 2, 4, 8 this is the plain mean. Against OpenCV's
    INTER_AREA nine photographs in ten are above 46 dB (27 photographs, 11 sizes), in a third to a fifth of its time,
    which would otherwise exceed the decoder's.
    """
    if rgb.shape[:2] == (height, width):
        return rgb
    reduction = min(rgb.shape[1] / width, rgb.shape[0] / height)
    if reduction < 1:
        return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_LANCZOS4)
    samples = 1 if reduction < 1.3 else 2 ** max(math.ceil(math.log2(reduction / 1.5) - 1e-9), 0)
    if (width * samples, height * samples) != (rgb.shape[1], rgb.shape[0]):
        rgb = cv2.resize(rgb, (width * samples, height * samples), interpolation=cv2.INTER_LINEAR)
    while samples > 1:
        samples //= 2
        rgb = cv2.resize(rgb, (width * samples, height * samples), interpolation=cv2.INTER_AREA)
    return rgb
