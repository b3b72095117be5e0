"""Pixel patches: an image resized for ViLT or cropped square, cut into uint8 patches. Training reads them without a
JPEG decoder; what they cost on disk is in docs/scale.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import torch

from extractors.config import PatchesConfig
from extractors.protocol import Item, Row
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.events import Emit, StageFinished, silent
from schemas.features import patch_fields
from shards.dataset import Dataset
from shards.images import ImageError
from shards.transforms import patch_cells, resize_clip, resize_vilt

# Resizing the shorter side of a stripe 200 times as long as wide makes an image of some hundred MB.
MOST_ASPECT = 200


def check_aspect(rgb: np.ndarray) -> None:
    """Raises ImageError for an image more than 200 times as long as wide."""
    height, width = rgb.shape[:2]
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise ImageError("bad_aspect", f"{width} x {height} px")


@dataclass(frozen=True)
class PatchPreparer:
    """Needs no device: `prepare` makes the whole row."""

    config: PatchesConfig

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """uint8 [H, W, 3] -> patches uint8, a view [rows, cols, P, P * 3] of the resized image: the writer's copy of it
        into a column, [N, P * P * 3] in raster order with N = rows x cols, is the only one.

        Raises ImageError: bad_aspect.
        """
        check_aspect(rgb)
        size, patch = self.config.size, self.config.patch
        image = resize_vilt(rgb, size, patch) if self.config.layout == "vilt" else resize_clip(rgb, size)
        cells = patch_cells(image, patch)
        rows, cols = cells.shape[:2]
        return {"rows": rows, "cols": cols, "num_patches": rows * cols, "patches": cells}


@dataclass(frozen=True)
class PatchLoader:
    """What `extract patches` writes."""

    config: PatchesConfig
    score_fields: tuple[pa.Field, ...] = ()
    state_column: str = "state"
    columns: tuple[str, ...] = ()
    cpu_batch: int = 0

    @property
    def fields(self) -> list[pa.Field]:
        return patch_fields(self.config.patch)

    @property
    def identity(self) -> dict[str, Any]:
        return {"resample": "pillow bicubic"}

    @property
    def about(self) -> dict[str, Any]:
        return {"layout": self.config.layout, "size": self.config.size, "patch": self.config.patch}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return {"patches": {"what": "uint8 pixels of RGB patches, not normalised", **self.about}}

    @property
    def versions(self) -> dict[str, str]:
        return {"pillow": PIL.__version__}

    @property
    def bytes_per_row(self) -> int:
        """Of a 4:3 image in ViLT's layout."""
        square = self.config.size**2 * 3
        return square * 4 // 3 if self.config.layout == "vilt" else square

    def load(self, device: torch.device) -> PatchPreparer:
        return PatchPreparer(self.config)


def extract_patches(dataset: Dataset | str | Path, config: PatchesConfig, emit: Emit = silent) -> StageFinished:
    """Writes `features/NAME`: patches of every pair with an image.

    Raises PairmillError as `run_extractor` does.
    """

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, f"features/{config.name}")

    return run_extractor(dataset, config, PatchLoader(config), outputs, "extract patches", emit)
