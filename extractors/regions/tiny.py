"""The small detector of the demo and the tests: a Faster R-CNN on four convolutions, 1.2 M parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

TRAINED_PX = 128
_WIDTHS = (32, 64, 96, 96)
_CELLS = 6
_FEATURE_DIM = 256


class Backbone(nn.Module):
    """[B, 3, H, W] -> [B, 96, H/4, W/4]; the dilations let a cell see half of a 128 px image."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for out, stride, dilation in zip(_WIDTHS, (2, 2, 1, 1), (1, 1, 2, 3), strict=True):
            conv = nn.Conv2d(width, out, 3, stride, padding=dilation, dilation=dilation, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.out_channels = width

    def forward(self, images: Tensor) -> Tensor:
        """Return one feature map."""
        return self.body(images)


class FactoredPredictor(nn.Module):
    """Class scores of shape x colour as a sum of the two, so that each pair learns from all others.

    [R, D] -> logits [R, 1 + S*C], background first, colour running fastest; box deltas [R, (1 + S*C)*4],
    the same for every class.
    """

    def __init__(self, dim: int, shapes: int, colours: int) -> None:
        super().__init__()
        self.shape = nn.Linear(dim, shapes + 1)
        self.colour = nn.Linear(dim, colours)
        self.delta = nn.Linear(dim, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits, deltas)."""
        shape = self.shape(features)
        pairs = shape[:, 1:, None] + self.colour(features)[:, None, :]
        logits = torch.cat([shape[:, :1], pairs.flatten(1)], dim=1)
        return logits, self.delta(features).repeat(1, logits.shape[1])


def build_tiny(shapes: int, colours: int, min_size: int = TRAINED_PX, proposals: int = 100) -> FasterRCNN:
    """The untrained network. `min_size` is the shorter side that images get, px."""
    backbone = Backbone()
    return FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=5 * min_size // 3,
        rpn_anchor_generator=AnchorGenerator(((18, 26, 38, 56, 84),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], _CELLS, sampling_ratio=1),
        box_head=TwoMLPHead(backbone.out_channels * _CELLS**2, _FEATURE_DIM),
        box_predictor=FactoredPredictor(_FEATURE_DIM, shapes, colours),
        rpn_batch_size_per_image=128,
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=150,
        rpn_pre_nms_top_n_test=400,
        rpn_post_nms_top_n_test=proposals,
        box_batch_size_per_image=32,
        box_positive_fraction=0.5,
    )


def pair_names(shapes: Sequence[str], colours: Sequence[str]) -> tuple[str, ...]:
    """Class names in the predictor's order, background not among them: 'red circle', 'orange circle', ..."""
    return tuple(f"{colour} {shape}" for shape in shapes for colour in colours)
