"""`extract regions`: a detector's boxes, features and class probabilities of every image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torchvision
from torch import Tensor

from extractors.protocol import Item, Row
from extractors.regions.backends import load_detector
from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Detector, Proposals
from extractors.regions.selection import rows_from_proposals
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.errors import PairmillError
from schemas.events import Emit, StageFinished, silent
from schemas.features import region_fields
from shards.dataset import PAIRS, Dataset
from shards.images import ImageError
from shards.reader import open_parquet

_CPU_BATCH = 4
_USUAL_BOXES = 40
_LARGE_IMAGE = (800, 1067, 3)
_PARTS = ("boxes", "features", "class_probs", "regressed", "attribute_probs")


def given_boxes(value: Any, space: str, row: Row, size: tuple[int, int]) -> np.ndarray:
    """A cell of the `--boxes` column as float32 [R, 4], pixels of the stored image, cut to it; null is no box.

    space  what they count in: stored or original pixels, or shares of the sides (relative)
    size   (height, width) of the stored image
    Raises ImageError: not lists of four finite numbers, or original pixels without the original's size.
    """
    try:
        boxes = np.array([] if value is None else value, np.float32).reshape(-1, 4)
    except (TypeError, ValueError):
        raise ImageError("decode_error", "boxes are no lists of x1 y1 x2 y2") from None
    if not np.isfinite(boxes).all():
        raise ImageError("decode_error", "boxes are not finite")
    height, width = size
    if space == "relative":
        boxes = boxes * np.array([width, height, width, height], np.float32)
    elif space == "original":
        whole = (row["original_width"], row["original_height"])
        if not all(whole):
            raise ImageError("decode_error", "boxes in original pixels, of an image of unknown original size")
        x, y = width / whole[0], height / whole[1]
        boxes = boxes * np.array([x, y, x, y], np.float32)
    return boxes.clip(0, np.array([width, height, width, height], np.float32))


@dataclass(frozen=True)
class RegionExtractor:
    """A detector behind the runner's protocol."""

    config: RegionsConfig
    detector: Detector

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """uint8 [H, W, 3] -> the item's `image`, as the detector prepares it, its `size` (H, W), int64 [2], and where
        given `boxes`, float32 [R, 4].
        """
        item: Item = {"image": self.detector.prepare(rgb), "size": torch.tensor(rgb.shape[:2])}
        if self.config.boxes is not None:
            value = row[self.config.boxes]
            boxes = given_boxes(value, self.config.boxes_space, row, (rgb.shape[0], rgb.shape[1]))
            item["boxes"] = torch.from_numpy(boxes)
        return item

    def key(self, item: Item) -> Hashable:
        """Images that the detector computes in one pass."""
        height, width = item["size"].tolist()
        return self.detector.key(height, width)

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Images differ in size: one tensor each, `image.0`, `size.0` and so on, and `boxes.0` where given."""
        return {f"{name}.{i}": tensor for i, item in enumerate(items) for name, tensor in item.items()}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """All images' proposals one after the other; `counts` [B] are their numbers, `image_feature` [B, D]."""
        images = [v for k, v in batch.items() if k.startswith("image.")]
        boxes = [v for k, v in batch.items() if k.startswith("boxes.")]
        stored = torch.stack([v for k, v in batch.items() if k.startswith("size.")]).tolist()
        sizes = [(height, width) for height, width in stored]
        found = self.detector.describe(images, boxes, sizes) if boxes else self.detector.propose(images, sizes)
        out = {
            "counts": torch.tensor([len(f.boxes) for f in found], device=images[0].device),
            "image_feature": torch.stack([f.image_feature for f in found]),
        }
        for name in _PARTS:
            if getattr(found[0], name) is not None:
                out[name] = torch.cat([getattr(f, name) for f in found])
        return out

    def rows(self, items: Sequence[Item], outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """The selection rule, image by image."""
        ends = np.cumsum(outputs["counts"])[:-1]
        parts = {name: np.split(outputs[name], ends) for name in _PARTS if name in outputs}
        rows = []
        for i, feature in enumerate(outputs["image_feature"]):
            own = {name: torch.from_numpy(part[i]) for name, part in parts.items()}
            proposals = Proposals(image_feature=torch.from_numpy(feature), **own)
            given = self.config.boxes is not None
            row = rows_from_proposals(proposals, self.config, given=given, inclusive=self.detector.inclusive)
            rows.append(row | {"boxes": row["boxes"].tolist()})
        return rows

    def example(self) -> Item:
        """A large image; given boxes of the usual number."""
        item = {
            "image": self.detector.prepare(np.zeros(_LARGE_IMAGE, np.uint8)),
            "size": torch.tensor(_LARGE_IMAGE[:2]),
        }
        if self.config.boxes is not None:
            item["boxes"] = torch.tensor([[0.0, 0.0, 100.0, 100.0]]).repeat(_USUAL_BOXES, 1)
        return item


@dataclass(frozen=True)
class RegionLoader:
    """What `extract regions` writes, known from the detector's weights."""

    config: RegionsConfig
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    feature_dim: int
    fingerprint: str
    score_fields: tuple[pa.Field, ...] = ()
    state_column: str = "state"
    cpu_batch: int = _CPU_BATCH

    @classmethod
    def of(cls, config: RegionsConfig) -> RegionLoader:
        """Load the detector once to learn what it is. Raises PairmillError as `load_detector` does."""
        detector = load_detector(config)
        return cls(config, detector.classes, detector.attributes, detector.feature_dim, detector.fingerprint)

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.config.boxes is None else (self.config.boxes, "original_width", "original_height")

    @property
    def fields(self) -> list[pa.Field]:
        return region_fields(self.feature_dim, len(self.classes), self.config.cls_probs, len(self.attributes))

    @property
    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    @property
    def about(self) -> dict[str, Any]:
        names = {"classes": list(self.classes), "attributes": list(self.attributes)}
        return {**names, "detector": self.fingerprint, **self._rule()}

    def _rule(self) -> dict[str, Any]:
        """Which boxes stand in a row."""
        config = self.config
        source = "given" if config.boxes is not None else config.box_source
        limits = {"min_boxes": config.min_boxes, "max_boxes": config.max_boxes}
        return {"box_source": source, "conf": config.conf, "nms": config.nms, **limits}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        return {
            "boxes": {"what": "x1 y1 x2 y2, px of the stored image, exclusive maximum", **self._rule()},
            "features": {"what": "pooled over the proposal", "detector": self.fingerprint},
        }

    @property
    def versions(self) -> dict[str, str]:
        found = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        if self.config.detector.startswith("detectron2:"):
            found["detectron2"] = version("detectron2")
        return found

    @property
    def bytes_per_row(self) -> int:
        """Of an image with 40 boxes, or as many as are allowed."""
        probs = {"full": len(self.classes) + 1, "none": 0}.get(self.config.cls_probs, 3 * self.config.top_classes)
        return min(_USUAL_BOXES, self.config.max_boxes) * (2 * (self.feature_dim + probs) + 32)

    def load(self, device: torch.device) -> RegionExtractor:
        return RegionExtractor(self.config, load_detector(self.config).to(device))


def extract_regions(dataset: Dataset | str | Path, config: RegionsConfig, emit: Emit = silent) -> StageFinished:
    """Writes `features/NAME`: regions of every pair with an image.

    Raises PairmillError as `run_extractor` and `load_detector` do, and for a `--boxes` column that is not there.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    if config.boxes is not None:
        _check_column(dataset, config.boxes)

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, f"features/{config.name}")

    return run_extractor(dataset, config, RegionLoader.of(config), outputs, "extract regions", emit)


def _check_column(dataset: Dataset, column: str) -> None:
    stage = dataset.require(PAIRS)
    standing = sorted(stage.standing())
    if not standing:
        return
    with open_parquet(dataset.folder, stage.file(standing[0])) as file:
        schema = file.schema_arrow
    lists = [f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type)]
    if column not in lists:
        raise PairmillError(
            f"`--boxes {column}`: {dataset.url} has no such column of lists. "
            f"Its columns of lists: {', '.join(lists) or 'none'}."
        )
