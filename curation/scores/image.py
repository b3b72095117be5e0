"""Numbers of a decoded image: shape, light, sharpness, colours.

All of it must cost a tenth of decoding: a JPEG is decoded at 1/2, 1/4 or 1/8 where its shorter side keeps 160 px,
colours and entropy are read from a grid of pixels, sharpness is measured at a fixed size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from curation.scores.config import ImageScoreConfig
from curation.scores.pixels import PixelScorer, score_pixels
from extractors.protocol import Item, Row
from schemas.events import Emit, StageFinished, silent
from shards.dataset import Dataset

SIDE = 160  # px, of the square that sharpness is measured at
GRID = 64  # rows and columns of pixels that colours and entropy are read from
LEVELS = 8  # of each channel, for the dominant colour
GREY = 8  # how far the channels of a grey pixel may lie apart, of 255


def sharpness(luma: np.ndarray) -> float:
    """Variance of the Laplacian of uint8 [H, W], brought to 160 x 160 and smoothed.

    A power of two is averaged out of each side, as long as 160 px are left, and the rest is bilinear. How much that
    blurs hangs on the size; after a blur by 1 2 1 both ways, copies of one photograph from 400 x 300 to 1024 x 768
    px lie within 8 % of each other (without it: within 25 %). The Laplacian is 0 1 0, 1 -4 1, 0 1 0, mirrored at the
    border.
    """
    height, width = luma.shape
    down, across = _halvings(height), _halvings(width)
    if down > 1 or across > 1:
        height, width = height // down, width // across
        whole = luma[: height * down, : width * across]
        luma = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    if luma.shape != (SIDE, SIDE):
        luma = cv2.resize(luma, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(cv2.GaussianBlur(luma, (3, 3), 0), cv2.CV_16S))
    return float(deviation[0, 0]) ** 2


def _halvings(side: int) -> int:
    """The largest power of two that leaves at least 160 px."""
    return 1 << max(0, (side // SIDE).bit_length() - 1)


def grid(rgb: np.ndarray) -> np.ndarray:
    """64 x 64 pixels of uint8 [H, W, 3], evenly spaced: row i is row floor(i * H / 64)."""
    return cv2.resize(rgb, (GRID, GRID), interpolation=cv2.INTER_NEAREST)


def entropy(grey: np.ndarray) -> float:
    """Shannon entropy of the 256 levels of uint8 [H, W], in bits."""
    counts = cv2.calcHist([grey], [0], None, [256], [0, 256])
    shares = counts[counts > 0] / grey.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def dominant_share(pixels: np.ndarray) -> float:
    """Share of uint8 [H, W, 3] that falls into the fullest of 8 x 8 x 8 equal boxes of colours."""
    histogram = cv2.calcHist([pixels], [0, 1, 2], None, [LEVELS] * 3, [0, 256] * 3)
    return float(histogram.max()) / (pixels.shape[0] * pixels.shape[1])


def is_grey(pixels: np.ndarray) -> bool:
    """Whether no two channels of a pixel of uint8 [H, W, 3] lie further apart than 8."""
    red, green, blue = cv2.split(pixels)
    pairs = ((red, green), (green, blue), (red, blue))
    return all(cv2.norm(one, other, cv2.NORM_INF) <= GREY for one, other in pairs)


IDENTITY: dict[str, Any] = {"side": SIDE, "grid": GRID, "levels": LEVELS, "grey": GREY}
PROVENANCE: dict[str, dict[str, Any]] = {
    "aspect": {"what": "width over height of the stored image, upright", "scale": "above 1 is wider than high"},
    "bytes_per_pixel": {"what": "size of the stored file over its pixels", "scale": "bytes"},
    "mean": {"what": "mean luma", "scale": "0 to 255"},
    "contrast": {"what": "standard deviation of luma", "scale": "0 to 127.5"},
    "sharpness": {
        "what": f"variance of the Laplacian of luma, smoothed by 1 2 1, at {SIDE} x {SIDE} px",
        "scale": "from 0; compare images of one dataset with each other",
    },
    "entropy": {"what": f"of luma's levels, on a grid of {GRID} x {GRID} px", "scale": "0 to 8 bits"},
    "dominant_share": {
        "what": f"share of the fullest of {LEVELS}^3 boxes of colours, same grid",
        "scale": "0 to 1",
    },
    "is_grey": {"what": f"channels of every pixel of the grid within {GREY}"},
}


class ImageScorer(PixelScorer):
    """The columns of `scores/image`."""

    state_column = "image_state"
    columns = ("width", "height")
    score_fields = (
        pa.field("aspect", pa.float32()),
        pa.field("bytes_per_pixel", pa.float32()),
        pa.field("mean", pa.float32()),
        pa.field("contrast", pa.float32()),
        pa.field("sharpness", pa.float32()),
        pa.field("entropy", pa.float32()),
        pa.field("dominant_share", pa.float32()),
        pa.field("is_grey", pa.bool_()),
        pa.field("image_state", pa.string()),
    )
    identity = IDENTITY
    provenance = PROVENANCE

    at_least = SIDE

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """`rgb` may be reduced by 2, 4 or 8. Luma is OpenCV's: 0.299 R + 0.587 G + 0.114 B, rounded."""
        width, height = row["width"], row["height"]
        luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        mean, deviation = cv2.meanStdDev(luma)
        pixels = grid(rgb)
        return {
            "aspect": width / height,
            "bytes_per_pixel": row["image_bytes"] / (width * height),
            "mean": float(mean[0, 0]),
            "contrast": float(deviation[0, 0]),
            "sharpness": sharpness(luma),
            "entropy": entropy(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)),
            "dominant_share": dominant_share(pixels),
            "is_grey": is_grey(pixels),
        }


def score_image(dataset: Dataset | str | Path, config: ImageScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: numbers of every image; image_state tells why a row has none.

    Raises PairmillError as `run_extractor` does.
    """
    return score_pixels(dataset, config.name, config, ImageScorer(), "score image", emit)
