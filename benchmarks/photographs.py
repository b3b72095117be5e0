"""Pictures that weigh and decode like photographs."""

from __future__ import annotations

import cv2
import numpy as np

QUALITY = 90


def photograph(width: int, height: int, seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: noise with a photograph's spectrum and a dozen hard edges; as JPEG about 0.3 bytes a pixel."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    falloff = np.maximum(frequency, 1 / width) ** -1.4
    shared = rng.standard_normal((height, width))
    planes = []
    for _ in range(3):
        noise = np.fft.rfft2(shared + 0.3 * rng.standard_normal((height, width)))
        plane = np.fft.irfft2(noise * falloff, s=(height, width))
        planes.append((plane - plane.mean()) / plane.std() * 40 + 125)
    image = np.stack(planes, -1)
    for _ in range(12):
        corners = rng.integers(0, (width, height), (4, 2)).astype(np.int32)
        shape: np.ndarray = np.zeros((height, width), np.uint8)
        cv2.fillPoly(shape, [cv2.convexHull(corners)], 255, cv2.LINE_AA)
        image += shape[..., None] / 255 * rng.integers(-70, 70, 3)
    return image.clip(0, 255).astype(np.uint8)


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    """`count` photographs as JPEGs of quality 90."""
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    return [cv2.imencode(".jpg", photograph(width, height, seed), options)[1].tobytes() for seed in range(count)]
