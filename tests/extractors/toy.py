"""An extractor whose answers are known: the mean colour of an image. In a module of its own so that workers find it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from extractors.config import DeviceConfig
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.config import identity
from schemas.events import Emit, StageFinished, silent
from schemas.tensors import blob_tensor, fixed_tensor
from shards.dataset import Dataset


class ToyConfig(DeviceConfig):
    scale: float = identity(1.0, "a number that changes the rows")


@dataclass
class ToyExtractor:
    """`most`: rows that fit into memory. `seen` keeps the size of every batch tried."""

    scale: float
    most: int
    kill: str

    def __post_init__(self) -> None:
        self.seen: list[int] = []

    def prepare(self, rgb: np.ndarray, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.kill and row["caption"].endswith(self.kill):
            os._exit(9)
        return {"rgb": rgb, "words": len(row["caption"].split())}

    def key(self, item: dict[str, Any]) -> Hashable:
        return item["rgb"].shape

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"pixels": torch.from_numpy(np.stack([item["rgb"] for item in items]))}

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen.append(len(batch["pixels"]))
        if len(batch["pixels"]) > self.most:
            raise torch.OutOfMemoryError("the toy's memory is full")
        assert batch["pixels"].dtype == torch.uint8
        assert torch.is_inference_mode_enabled()
        return {"mean": batch["pixels"].float().mean((1, 2)) * self.scale}

    def rows(self, items: Sequence[dict[str, Any]], outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        return [
            {"mean": mean, "n": 1, "bytes": mean.astype(np.uint8)[None], "score": mean[0], "words": item["words"]}
            for item, mean in zip(items, outputs["mean"], strict=True)
        ]

    def example(self) -> dict[str, Any]:
        return {"rgb": np.zeros((4, 4, 3), np.uint8), "words": 0}


@dataclass(frozen=True)
class ToyLoader:
    scale: float = 1.0
    most: int = 1000
    kill: str = ""
    columns: tuple[str, ...] = ("caption",)
    state_column: str = "toy_state"
    bytes_per_row: int = 100
    cpu_batch: int = 4

    @property
    def fields(self) -> list[pa.Field]:
        return [fixed_tensor("mean", 3), pa.field("n", pa.int32()), blob_tensor("bytes", "uint8", ["n", 3])]

    @property
    def score_fields(self) -> list[pa.Field]:
        return [pa.field("score", pa.float32()), pa.field("words", pa.int32()), pa.field("toy_state", pa.string())]

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": "none"}

    @property
    def about(self) -> dict[str, Any]:
        return {"toy": True}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return {"mean": {"what": "mean colour"}}

    @property
    def versions(self) -> dict[str, str]:
        return {"toy": "1"}

    def load(self, device: torch.device) -> ToyExtractor:
        loaded = ToyExtractor(self.scale, self.most, self.kill)
        LOADED.append(loaded)
        return loaded


LOADED: list[ToyExtractor] = []


def run_toy(
    dataset: Dataset | str,
    emit: Emit = silent,
    scores: bool = False,
    features: bool = True,
    loader: ToyLoader | None = None,
    **values: Any,
) -> StageFinished:
    config = ToyConfig(**{"workers": 0, "device": "cpu", **values})

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, "features/toy" if features else None, "scores/toy" if scores else None, "toy_state")

    return run_extractor(dataset, config, loader or ToyLoader(config.scale), outputs, "extract toy", emit)
