"""Pictures for tests: smooth ones, photograph-like ones, as bytes of any kind."""

import io

import numpy as np
from PIL import Image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def smooth(width: int = 60, height: int = 40) -> np.ndarray:
    """A picture whose corners differ: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1).astype(np.uint8)


def photograph(width: int, height: int, seed: int) -> np.ndarray:
    """Noise with the spectrum of photographs, amplitude falling as 1/f^1.3."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = np.maximum(np.hypot(fy, fx), 1 / width) ** -1.3
    shared = rng.standard_normal((height, width))
    planes = []
    for _ in range(3):
        noise = np.fft.rfft2(shared + 0.3 * rng.standard_normal((height, width)))
        plane = np.fft.irfft2(noise * falloff, s=(height, width))
        planes.append((plane - plane.mean()) / plane.std() * 45 + 125)
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def exif_block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()
