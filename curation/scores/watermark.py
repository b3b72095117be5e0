"""How likely an image bears a watermark: LAION's detector, as LAION-5B was tagged with it.

Source: LAION-AI/LAION-5B-WatermarkDetection, example_use.py and inference.py: timm's efficientnet_b3a with a head of
three linear layers, ReLU between; both sides to 256 px, Pillow bilinear; ImageNet's mean and deviation; softmax.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from torch import Tensor, nn

from curation.scores.config import WatermarkScoreConfig
from extractors.protocol import Item, Row
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.errors import PairmillError
from schemas.events import Emit, StageFinished, silent
from schemas.features import SCORES
from shards.dataset import Dataset
from shards.files import hash_file
from shards.transforms import BILINEAR, IMAGENET_MEAN, IMAGENET_STD, normalise, resize_square
from shards.weights import checkpoint_file, read_checkpoint

MODEL = "efficientnet_b3"  # timm's present name of efficientnet_b3a
SIZE = 256  # px
STATE = "pwatermark_state"
_HEAD = (1536, 625, 256, 2)


def build_detector() -> nn.Module:
    """The network without weights: float [B, 3, 256, 256] -> logits [B, 2]."""
    model = timm.create_model(MODEL, pretrained=False, num_classes=_HEAD[-1])
    model.classifier = nn.Sequential(
        nn.Linear(_HEAD[0], _HEAD[1]),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(_HEAD[1], _HEAD[2]),
        nn.ReLU(),
        nn.Linear(_HEAD[2], _HEAD[3]),
    )
    return model


def read_detector(path: str | Path) -> nn.Module:
    """The detector of a file, fp32, in eval mode.

    Raises PairmillError: as `read_checkpoint` does; another network than this one.
    """
    tensors = read_checkpoint(path).tensors
    model = build_detector()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        short = " ".join(str(error).split())[:400]
        raise PairmillError(
            f"`--weights {path}`: not LAION's watermark detector (efficientnet_b3a with a head of "
            f"{'-'.join(map(str, _HEAD))}): {short}"
        ) from None
    return model.eval()


class WatermarkDetector:
    """Item: `pixels` uint8 [256, 256, 3]."""

    def __init__(self, model: nn.Module, positive: int) -> None:
        self.model, self.positive = model, positive

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        return {"pixels": resize_square(rgb, SIZE, BILINEAR)}

    def key(self, item: Item) -> Hashable:
        """Every image has the same size."""
        return None

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """pixels uint8 [B, 256, 256, 3]."""
        return {"pixels": torch.from_numpy(np.stack([item["pixels"] for item in items]))}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """pwatermark fp32 [B]."""
        pixels = normalise(batch["pixels"].permute(0, 3, 1, 2), IMAGENET_MEAN, IMAGENET_STD)
        return {"pwatermark": self.model(pixels).float().softmax(1)[:, self.positive]}

    def rows(self, items: Sequence[Item], outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Raises PairmillError where the model overflowed."""
        if not np.isfinite(outputs["pwatermark"]).all():
            raise PairmillError("The detector gives undefined numbers. In fp16 it overflowed: pass --precision bf16.")
        return [{"pwatermark": value} for value in outputs["pwatermark"].tolist()]

    def example(self) -> Item:
        """A grey image."""
        return {"pixels": np.full((SIZE, SIZE, 3), 128, np.uint8)}


@dataclass(frozen=True)
class WatermarkLoader:
    """What `score watermark` writes. `path` leads to the weights on every worker, `name` is for people."""

    path: str
    name: str
    sha256: str
    positive: int
    fields: tuple[pa.Field, ...] = ()
    columns: tuple[str, ...] = ()
    state_column: str = STATE
    bytes_per_row: int = 16
    cpu_batch: int = 16

    @property
    def score_fields(self) -> tuple[pa.Field, ...]:
        return (pa.field("pwatermark", pa.float32()), pa.field(STATE, pa.string()))

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": self.sha256, "model": MODEL}

    @property
    def about(self) -> dict[str, Any]:
        return {}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        told = {
            "what": f"softmax of class {self.positive} of {_HEAD[-1]}, which is watermark",
            "scale": "0 to 1, 1 is watermark",
            "model": f"{MODEL}, {self.name}",
            "weights": self.sha256,
            "preprocess": f"{SIZE} x {SIZE} px, aspect not kept, Pillow bilinear, ImageNet mean and deviation",
        }
        return {"pwatermark": told}

    @property
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "timm": timm.__version__}

    def load(self, device: torch.device) -> WatermarkDetector:
        return WatermarkDetector(read_detector(self.path).to(device), self.positive)


def score_watermark(dataset: Dataset | str | Path, config: WatermarkScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: `pwatermark` fp32, the probability of a watermark, and `pwatermark_state`.

    Raises PairmillError: weights of another network, nothing written; else as `run_extractor` does.
    """
    path = checkpoint_file(config.weights).absolute()
    read_detector(path)
    loader = WatermarkLoader(str(path), path.name, hash_file(path), config.watermark_class)

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, None, f"{SCORES}/{config.name}", STATE)

    return run_extractor(dataset, config, loader, outputs, "score watermark", emit)
