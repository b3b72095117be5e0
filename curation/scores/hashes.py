"""Perceptual hashes of the decoded image, and a hash of its very pixels. docs/formats.md gives them bit by bit."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image

from curation.scores.config import HashScoreConfig
from curation.scores.pixels import PixelScorer, score_pixels
from extractors.protocol import Item, Row
from schemas.events import Emit, StageFinished, silent
from shards.dataset import Dataset

SIDE = 32  # px, of the square that is transformed
LOW = 8  # rows and columns of its lowest frequencies
DECIMALS = 6


def _dct_rows() -> np.ndarray:
    """float64 [8, 32]: 2 cos(pi k (2 n + 1) / 64), the first rows of the DCT-II that scipy calls type 2, no norm."""
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    return 2 * np.cos(math.pi * k * (2 * n + 1) / (2 * SIDE))


_ROWS = _dct_rows()
_WEIGHTS = np.uint64(1) << np.arange(63, -1, -1, dtype=np.uint64)


def _number(bits: np.ndarray) -> int:
    """64 bits, the first one highest, as a number."""
    return int(_WEIGHTS[bits.ravel()].sum(dtype=np.uint64))


def luma(rgb: np.ndarray) -> Image.Image:
    """Pillow's mode L: (19595 R + 38470 G + 7471 B + 32768) >> 16, of uint8 [H, W, 3]."""
    return Image.fromarray(rgb).convert("L")


def phash(grey: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of the image at 32 x 32 px lie above their median.

    Lanczos to 32 x 32, DCT-II of columns, then of rows, rounded to 6 decimals; bit 63 is the constant, bits run along
    the rows. The median of 64 numbers is the mean of the middle two.
    Source: N. Krawetz, "Looks Like It" (hackerfactor.com, 2011), as ImageHash computes it.
    """
    pixels = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    low = np.round(_ROWS @ pixels @ _ROWS.T, DECIMALS)
    return _number(low > np.median(low))


def dhash(grey: Image.Image) -> int:
    """64 bits: where the image at 9 x 8 px grows brighter to the right.

    Lanczos to 9 x 8; bit 63 is the step from the first to the second pixel of the top row, bits run along the rows.
    Source: N. Krawetz, "Kind of Like That" (hackerfactor.com, 2013), as ImageHash computes it.
    """
    pixels = np.asarray(grey.resize((LOW + 1, LOW), Image.Resampling.LANCZOS))
    return _number(pixels[:, 1:] > pixels[:, :-1])


def pixel_sha256(rgb: np.ndarray) -> bytes:
    """sha256 of the image as a binary PPM file: `P6`, width and height, 255, and the pixels, uint8 [H, W, 3]."""
    height, width = rgb.shape[:2]
    digest = hashlib.sha256(f"P6\n{width} {height}\n255\n".encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()


IDENTITY: dict[str, Any] = {"luma": "pillow L", "resample": "pillow lanczos", "decimals": DECIMALS}
PROVENANCE: dict[str, dict[str, Any]] = {
    "phash": {"what": "pHash-64 of the decoded image", "scale": "64 bits; compare by the bits that differ"},
    "dhash": {"what": "dHash-64 of the decoded image", "scale": "64 bits; compare by the bits that differ"},
    "pixel_sha256": {"what": "sha256 of the decoded pixels as a binary PPM file", "scale": "equal or not"},
}


class HashScorer(PixelScorer):
    """The columns of `scores/hash`."""

    state_column = "hash_state"
    score_fields = (
        pa.field("phash", pa.uint64()),
        pa.field("dhash", pa.uint64()),
        pa.field("pixel_sha256", pa.binary(32)),
        pa.field("hash_state", pa.string()),
    )
    identity = IDENTITY
    provenance = PROVENANCE

    @property
    def versions(self) -> dict[str, str]:
        return {"pillow": PIL.__version__, "numpy": np.__version__}

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        grey = luma(rgb)
        return {"phash": phash(grey), "dhash": dhash(grey), "pixel_sha256": pixel_sha256(rgb)}


def score_hash(dataset: Dataset | str | Path, config: HashScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: phash and dhash uint64, pixel_sha256 32 bytes; hash_state tells why a row has none.

    Raises PairmillError as `run_extractor` does.
    """
    return score_pixels(dataset, config.name, config, HashScorer(), "score hash", emit)
