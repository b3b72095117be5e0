"""Configuration of `pairmill extract regions`."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from extractors.config import NAME, DeviceConfig
from schemas.config import execution, identity

_CLS_PROBS = re.compile(r"full|none|topk:[1-9][0-9]*")


class RegionsConfig(DeviceConfig):
    """`pairmill extract regions`. What the weights are is identity by their hash; where they lie is not."""

    name: str = execution("regions", "name of the feature set", pattern=NAME)

    detector: str = identity(
        "torchvision:tiny",
        "torchvision:tiny, or with weights torchvision:NAME, rcnn:C4, rcnn:FPN, butd, vinvl, detectron2:CONFIG",
    )
    weights: str | None = execution(
        None, "weights file, or DEFAULT for torchvision's own; `torchvision:tiny` brings its own"
    )
    boxes: str | None = identity(None, "column of given boxes (lists of x1 y1 x2 y2) to describe in place of proposals")
    boxes_space: Literal["stored", "original", "relative"] = identity(
        "stored", "what given boxes count in: pixels of the stored or the original image, or shares of it"
    )
    box_source: Literal["proposal", "regressed"] = identity(
        "proposal", "store the proposal that the features were pooled from, or its refined box"
    )
    cls_probs: str = identity("full", "class probabilities to store: full, topk:K or none")
    min_boxes: NonNegativeInt = identity(10, "boxes kept at least, where the detector proposes as many")
    max_boxes: PositiveInt = identity(100, "boxes kept at most")
    conf: float = identity(0.2, "confidence from which a box is kept, 0 to 1", ge=0, le=1)
    nms: float = identity(0.3, "overlap (IoU) above which the less confident of two boxes goes", ge=0, le=1)
    proposals: PositiveInt | None = identity(
        None, "proposals an image (default: the detector's, 300; of detectron2: CONFIG's)"
    )
    size: PositiveInt | None = identity(
        None,
        "shorter side that the detector sees, px (default: the detector's, 600; its longer side 5/3 of it; of "
        "detectron2: CONFIG's)",
    )

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if not _CLS_PROBS.fullmatch(self.cls_probs):
            raise ValueError(f"`cls_probs` must be full, none or topk:K, got {self.cls_probs!r}")
        if self.min_boxes > self.max_boxes:
            raise ValueError(f"`min_boxes` {self.min_boxes} is above `max_boxes` {self.max_boxes}")
        return self

    @property
    def top_classes(self) -> int:
        """K of cls_probs topk:K, else 0."""
        return int(self.cls_probs[5:]) if self.cls_probs.startswith("topk:") else 0
