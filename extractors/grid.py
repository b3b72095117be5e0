"""Grid features: a backbone's feature map before it is pooled, one vector a cell, and a ViT's class token."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from extractors.config import GridConfig
from extractors.grid_models import Backbone, find_backbone
from extractors.patches import check_aspect
from extractors.protocol import Item, Row
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.errors import PairmillError
from schemas.events import Emit, StageFinished, silent
from schemas.features import grid_fields
from shards.dataset import Dataset
from shards.transforms import normalise

_CPU_BATCH = 32


class GridExtractor:
    """A loaded backbone. Item: `pixels` uint8 [S, S, 3]."""

    def __init__(self, backbone: Backbone, device: torch.device, pool_cells: int | None) -> None:
        self.size, self.pool_cells = backbone.size, pool_cells
        preprocess = backbone.preprocess
        self.mean, self.std = preprocess["mean"], preprocess["std"]
        self.resize = backbone.resize()
        self.tower = backbone.build(device)

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """Raises ImageError: bad_aspect."""
        check_aspect(rgb)
        return {"pixels": self.resize(rgb)}

    def key(self, item: Item) -> Hashable:
        """Every image has the same size."""
        return None

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """pixels uint8 [B, S, S, 3]."""
        return {"pixels": torch.from_numpy(np.stack([item["pixels"] for item in items]))}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """grid fp16 [B, rows, cols, C], class_token fp16 [B, C] where there is one; finite bool [B]."""
        grid, token = self.tower(normalise(batch["pixels"].permute(0, 3, 1, 2), self.mean, self.std))
        if self.pool_cells is not None:
            grid = F.adaptive_avg_pool2d(grid.float(), self.pool_cells)
        out = {"grid": grid.permute(0, 2, 3, 1).half().contiguous()}
        if token is not None:
            out["class_token"] = token.half()
        return out | {"finite": torch.stack([part.flatten(1).isfinite().all(1) for part in out.values()]).all(0)}

    def rows(self, items: Sequence[Item], outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Raises PairmillError where fp16 cannot hold what the model gives."""
        if not outputs["finite"].all():
            raise PairmillError(
                "The model gives numbers that fp16 cannot hold. Computed in fp16 large models overflow: pass "
                "--precision bf16."
            )
        _, rows, cols, _ = outputs["grid"].shape
        shape = {"rows": rows, "cols": cols, "num_cells": rows * cols}
        tensors = [name for name in ("grid", "class_token") if name in outputs]
        return [shape | {name: outputs[name][i] for name in tensors} for i in range(len(items))]

    def example(self) -> Item:
        """A grey image."""
        return {"pixels": np.full((self.size, self.size, 3), 128, np.uint8)}


@dataclass(frozen=True)
class GridLoader:
    """What `extract grid` writes, known from one pass of the backbone."""

    backbone: Backbone
    pool_cells: int | None
    cells: int
    dim: int
    class_token: bool
    score_fields: tuple[pa.Field, ...] = ()
    state_column: str = "state"
    columns: tuple[str, ...] = ()
    cpu_batch: int = _CPU_BATCH

    @classmethod
    def of(cls, config: GridConfig) -> GridLoader:
        """Builds the backbone once to learn what it gives. Raises PairmillError as `find_backbone` does, for weights
        that do not fit, and where the map has fewer cells than asked for.
        """
        backbone = find_backbone(config)
        extractor = GridExtractor(backbone, torch.device("cpu"), None)
        with torch.inference_mode():
            found = extractor(extractor.collate([extractor.example()]))
        _, rows, cols, dim = found["grid"].shape
        if config.pool_cells is not None:
            if config.pool_cells > min(rows, cols):
                raise PairmillError(
                    f"`--pool-cells {config.pool_cells}`: the map of {backbone.label} at {backbone.size} px has "
                    f"{rows} x {cols} cells only."
                )
            rows = cols = config.pool_cells
        return cls(backbone, config.pool_cells, rows * cols, dim, "class_token" in found)

    @property
    def fields(self) -> list[pa.Field]:
        return grid_fields(self.dim, self.class_token)

    @property
    def identity(self) -> dict[str, Any]:
        return self.backbone.identity

    @property
    def about(self) -> dict[str, Any]:
        made = {"backbone": self.backbone.label, "weights": self.backbone.sha256}
        return {**made, "size": self.backbone.size, "pool_cells": self.pool_cells}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        made = {**self.about, "preprocess": self.backbone.preprocess}
        return {
            "grid": {"what": "feature map before pooling: row, column, channel", **made},
            "class_token": {"what": "the ViT's class token beside that map", **made},
        }

    @property
    def versions(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "open_clip_torch": open_clip.__version__,
            "timm": timm.__version__,
        }

    @property
    def bytes_per_row(self) -> int:
        return 2 * self.dim * (self.cells + self.class_token)

    def load(self, device: torch.device) -> GridExtractor:
        return GridExtractor(self.backbone, device, self.pool_cells)


def extract_grid(dataset: Dataset | str | Path, config: GridConfig, emit: Emit = silent) -> StageFinished:
    """Writes `features/NAME`: the feature map of every pair with an image.

    Raises PairmillError as `GridLoader.of` and `run_extractor` do.
    """

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, f"features/{config.name}")

    return run_extractor(dataset, config, GridLoader.of(config), outputs, "extract grid", emit)
