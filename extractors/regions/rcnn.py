"""A Faster R-CNN of torchvision's operations, after the rules of detectron2 or of Caffe: `FasterRcnn`.

The two families differ in how pixels are counted (Caffe's boxes include their last pixel), in which proposals go
before which are ranked, in how a box is pooled, and in where the background stands; `Rules` holds every such choice.
It runs part by part, so that each proposal keeps its feature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, nms, roi_align, roi_pool

from extractors.regions.resnet import ConvNorm, LastMap, Pyramid, stage

_RPN_OVERLAP = 0.7
_LARGEST_GROWTH = math.log(1000 / 16)
_RATIOS = (0.5, 1.0, 2.0)  # height over width
# A C4's last stage would take 2 GB for 300 boxes; the large matrices of an FPN's head are read once for all.
_ROIS_AT_ONCE = {"C4": 64, "FPN": 1000}
_CELLS = {"C4": 14, "FPN": 7}
ANCHORS = "proposal_generator.anchor_generator.cell_anchors."


@dataclass(frozen=True)
class Rules:
    """What a family of detectors does beside its weights.

    mean              subtracted from pixels, blue green red, of 255
    resize            pillow: the 8-bit image, each side rounded by itself; torchvision: the same with the sizes of
                      maskrcnn-benchmark; opencv: pixels less the mean, one scale
    shorter, longer   px that the shorter side gets, and that the longer must not exceed
    anchor_sizes      px, per feature map
    caffe_anchors     ratios before sizes, rounded, centred at 7.5 px; sizes count in 16 px
    caffe_pool        see `resnet.Stem`
    inclusive         a box includes its last pixel: widths are x2 - x1 + 1
    far_less_one      maskrcnn-benchmark's inclusive boxes: moved ones end at x2 = centre + width / 2 - 1, and neither
                      overlaps nor the order of corners count the last pixel
    limit_growth      a box grows at most 62.5-fold
    min_side          proposals need sides above this, px of the original image
    min_side_itself   sides of exactly that do as well
    clip_first        proposals are clipped and sorted out before the best `before_nms` are taken, else after it
    before_nms        proposals a feature map that enter suppression
    proposals         that leave it
    align             RoIAlign, else RoIPool
    half_pixel        RoIAlign begins half a cell earlier (`aligned` of torchvision)
    last_stage        of a C4: "dilated" keeps 14 x 14 cells, "strided" has 7 x 7
    box_weights       what refinements are divided by
    background_first  the background's column is the first, else the last
    foreground_named  attributes are told of the likeliest foreground class, else of the likeliest of all
    """

    mean: tuple[float, float, float]
    resize: Literal["pillow", "torchvision", "opencv"]
    anchor_sizes: tuple[tuple[float, ...], ...]
    shorter: int = 600
    longer: int = 1000
    caffe_anchors: bool = False
    caffe_pool: bool = False
    inclusive: bool = False
    far_less_one: bool = False
    limit_growth: bool = True
    min_side: float = 0.0
    min_side_itself: bool = False
    clip_first: bool = False
    before_nms: int = 6000
    proposals: int = 300
    align: bool = True
    half_pixel: bool = True
    last_stage: Literal["dilated", "strided"] = "strided"
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    background_first: bool = False
    foreground_named: bool = False


def cell_anchors(sizes: Sequence[float]) -> Tensor:
    """Anchors of one cell, size by size, centred at 0: fp32 [sizes x 3, 4] (DefaultAnchorGenerator)."""
    out = []
    for size in sizes:
        for ratio in _RATIOS:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            out.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(out)


def caffe_cell_anchors(scales: Sequence[float], base: int = 16) -> Tensor:
    """Anchors of one cell, ratio by ratio, centred at 7.5, last pixel included: fp32 [3 x scales, 4].

    py-faster-rcnn, lib/rpn/generate_anchors.py: the sides of 16 x 16 px at each ratio are rounded, then scaled.
    """
    out = []
    for ratio in _RATIOS:
        width = round(math.sqrt(base**2 / ratio))
        height = round(width * ratio)
        for scale in scales:
            x, y = (width * scale - 1) / 2, (height * scale - 1) / 2
            centre = (base - 1) / 2
            out.append((centre - x, centre - y, centre + x, centre + y))
    return torch.tensor(out)


def grid_anchors(cell: Tensor, height: int, width: int, stride: int) -> Tensor:
    """`cell` [A, 4] at every cell of a map: [height x width x A, 4], rows first, then columns, then anchors."""
    y = torch.arange(height, device=cell.device, dtype=torch.float32) * stride
    x = torch.arange(width, device=cell.device, dtype=torch.float32) * stride
    ys, xs = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([xs, ys, xs, ys], -1)[:, :, None] + cell).reshape(-1, 4)


def decode(
    deltas: Tensor,
    boxes: Tensor,
    weights: Sequence[float],
    *,
    inclusive: bool = False,
    limit: bool = True,
    far_less_one: bool = False,
) -> Tensor:
    """Boxes moved and stretched by `deltas`: [R, K, 4] or [R, 4] like `deltas`, of boxes [R, 4].

    Girshick et al. 2014; detectron2 Box2BoxTransform.apply_deltas. inclusive: py-faster-rcnn bbox_transform_inv, whose
    far sides are not one less; with far_less_one they are (maskrcnn-benchmark, modeling/box_coder.py).
    """
    if deltas.dim() == 3:
        boxes = boxes[:, None]
    sides = boxes[..., 2:] - boxes[..., :2] + float(inclusive)
    centres = boxes[..., :2] + 0.5 * sides
    scaled = deltas / deltas.new_tensor(weights)
    growth = scaled[..., 2:].clamp(max=_LARGEST_GROWTH) if limit else scaled[..., 2:]
    centres, half = scaled[..., :2] * sides + centres, 0.5 * (growth.exp() * sides)
    return torch.cat([centres - half, centres + half - float(far_less_one)], -1)


def clip_boxes(boxes: Tensor, height: float, width: float, inclusive: bool = False) -> Tensor:
    """Boxes [..., 4] cut to the image, last pixel included or not."""
    edge = boxes.new_tensor([width, height, width, height]) - float(inclusive)
    return boxes.clamp(min=0).minimum(edge)


class RpnHead(nn.Module):
    """Per map [B, C, h, w]: (scores [B, A or 2A, h, w], deltas [B, 4A, h, w])."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        out, into, side, _ = state[f"{name}.conv.weight"].shape
        self.conv = nn.Conv2d(into, out, side, padding=side // 2)
        self.objectness_logits = nn.Conv2d(out, len(state[f"{name}.objectness_logits.weight"]), 1)
        self.anchor_deltas = nn.Conv2d(out, len(state[f"{name}.anchor_deltas.weight"]), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu_(self.conv(x))
        return self.objectness_logits(x), self.anchor_deltas(x)


class Predictor(nn.Module):
    """[R, D] -> class logits [R, C+1], deltas [R, 4C or 4(C+1)], attribute logits [R, A+1] or None."""

    def __init__(self, state: Mapping[str, Tensor], name: str, foreground_named: bool) -> None:
        super().__init__()

        def linear(part: str) -> nn.Linear:
            out, into = state[f"{name}.{part}.weight"].shape
            return nn.Linear(into, out)

        self.cls_score, self.bbox_pred = linear("cls_score"), linear("bbox_pred")
        self.first_named = int(foreground_named)
        self.attributes = f"{name}.attr_score.weight" in state
        if self.attributes:
            self.cls_embedding = nn.Embedding(*state[f"{name}.cls_embedding.weight"].shape)
            self.fc_attr, self.attr_score = linear("fc_attr"), linear("attr_score")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = self.cls_score(x)
        attributes = None
        if self.attributes:
            # The likeliest of all classes, the background among them (fast_rcnn.py of both ports, ArgMax in Caffe);
            # VinVL's head is told the detection's label.
            named = self.cls_embedding(logits[:, self.first_named :].argmax(1) + self.first_named)
            attributes = self.attr_score(F.relu_(self.fc_attr(torch.cat([x, named], 1))))
        return logits, self.bbox_pred(x), attributes


class BoxHead(nn.Module):
    """Two fully connected layers over pooled cells: [R, C, 7, 7] -> [R, D]."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        for part in ("fc1", "fc2"):
            out, into = state[f"{name}.{part}.weight"].shape
            self.add_module(part, nn.Linear(into, out))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.get_submodule("fc1")(x.flatten(1)))
        return F.relu_(self.get_submodule("fc2")(x))


@dataclass(frozen=True)
class Described:
    """R boxes of one image as the network leaves them.

    features [R, D]; logits [R, C+1]; deltas [R, K, 4], K = C or C+1; attribute_logits [R, A+1] or None. The background
    stands where the rules say.
    """

    features: Tensor
    logits: Tensor
    deltas: Tensor
    attribute_logits: Tensor | None


class FasterRcnn(nn.Module):
    """A C4 or FPN detector whose parameters have detectron2's names. Boxes are in pixels of the network's input."""

    def __init__(self, state: Mapping[str, Tensor], rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.kind = "FPN" if "backbone.fpn_lateral2.weight" in state else "C4"
        build = Pyramid if self.kind == "FPN" else LastMap
        self.backbone = build(state, "backbone", rules.caffe_pool)
        self.strides = (4, 8, 16, 32, 64) if self.kind == "FPN" else (16,)
        self.proposal_generator = nn.ModuleDict({"rpn_head": RpnHead(state, "proposal_generator.rpn_head")})
        make = caffe_cell_anchors if rules.caffe_anchors else cell_anchors
        for i, sizes in enumerate(rules.anchor_sizes):
            stored = state.get(f"{ANCHORS}{i}")  # a file that brings its anchors knows better
            self.register_buffer(
                f"cell_anchors_{i}", make(sizes) if stored is None else stored.float(), persistent=False
            )
        predictor = Predictor(state, "roi_heads.box_predictor", rules.foreground_named)
        heads: dict[str, nn.Module] = {"box_predictor": predictor}
        if self.kind == "FPN":
            heads["box_head"] = BoxHead(state, "roi_heads.box_head")
        else:
            dilated = rules.last_stage == "dilated"
            heads["res5"] = stage(state, "roi_heads.res5", *((1, 2) if dilated else (2, 1)))
        self.roi_heads = nn.ModuleDict(heads)

    @property
    def feature_dim(self) -> int:
        """D of a box's feature."""
        return self.roi_heads["box_predictor"].cls_score.in_features

    def fold(self) -> FasterRcnn:
        """Readies filled weights for use: no normalisations, channels last in the backbone; both are faster."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        self.backbone.to(memory_format=torch.channels_last)
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of [B, 3, H, W], pixels less the mean, blue green red. An FPN's sides must divide by 32."""
        return self.backbone(images)

    def rpn(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(scores, deltas) of every map, as the head gives them."""
        return [self.proposal_generator["rpn_head"](x) for x in maps]

    def candidates(self, scores: Tensor, deltas: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """One image's anchors of one map, moved but not clipped: boxes [N, 4] and their scores [N].

        scores [A or 2A, h, w]: logits, or background's and foreground's, of which the foreground's share is taken.
        """
        height, width = deltas.shape[1:]
        cell = self.get_buffer(f"cell_anchors_{level}")
        anchors = grid_anchors(cell, height, width, self.strides[level])
        flat = deltas.reshape(len(cell), 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)
        if len(scores) == 2 * len(cell):
            scores = scores.view(2, len(cell), height, width).softmax(0)[1]
        boxes = self.decode(flat, anchors, (1.0, 1.0, 1.0, 1.0))
        return boxes, scores.permute(1, 2, 0).flatten()

    def decode(self, deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
        """`decode` by the rules."""
        rules = self.rules
        counting = {"inclusive": rules.inclusive, "far_less_one": rules.far_less_one}
        return decode(deltas, boxes, weights, limit=rules.limit_growth, **counting)

    def proposals(
        self, found: Sequence[tuple[Tensor, Tensor]], size: tuple[int, int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """One image's proposals [R, 4], best first, and their scores [R].

        found   `candidates` of every map
        size    (height, width) of the image in the network's input, px
        scale   what the image was enlarged by
        """
        rules = self.rules
        boxes, scores, levels = [], [], []
        for level, (at, score) in enumerate(found):
            if rules.clip_first:
                at, score = self._sound(at, score, size, scale)
            order = score.sort(descending=True, stable=True).indices[: rules.before_nms]
            at, score = at[order], score[order]
            if not rules.clip_first:
                at, score = self._sound(at, score, size, scale)
            boxes.append(at)
            scores.append(score)
            levels.append(torch.full_like(score, level))
        at, score = torch.cat(boxes), torch.cat(scores)
        # One more pixel at the far sides gives the widths of boxes that include their last pixel.
        grown = at + at.new_tensor([0.0, 0.0, 1.0, 1.0]) if rules.inclusive and not rules.far_less_one else at
        if len(found) > 1:
            kept = batched_nms(grown, score, torch.cat(levels), _RPN_OVERLAP)
        else:
            kept = nms(grown, score, _RPN_OVERLAP)
        kept = kept[: rules.proposals]
        return at[kept], score[kept]

    def _sound(self, boxes: Tensor, scores: Tensor, size: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
        """Clipped boxes of finite numbers and sides that are long enough."""
        rules = self.rules
        finite = boxes.isfinite().all(1) & scores.isfinite()
        boxes = clip_boxes(boxes, *size, inclusive=rules.inclusive)
        least = rules.min_side * scale
        sides = boxes[:, 2:] - boxes[:, :2] + float(rules.inclusive)
        long = sides >= least if rules.min_side_itself else sides > least
        if not rules.far_less_one:
            proper = (boxes[:, 2:] >= boxes[:, :2]) if rules.inclusive else (boxes[:, 2:] > boxes[:, :2])
            long &= proper
        kept = finite & long.all(1)
        return boxes[kept], scores[kept]

    def pool(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Cells of one image's boxes [R, 4]: [R, C, 14, 14] of a C4, [R, C, 7, 7] of an FPN. maps [1, C, h, w]."""
        rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], 1)
        cells = (_CELLS[self.kind], _CELLS[self.kind])

        def pooled(x: Tensor, rows: Tensor, stride: int) -> Tensor:
            if self.rules.align:
                half = self.rules.half_pixel
                return roi_align(x, rows.to(x.dtype), cells, 1 / stride, sampling_ratio=0, aligned=half)
            return roi_pool(x, rows.to(x.dtype), cells, 1 / stride)

        if self.kind == "C4":
            return pooled(maps[0], rois, self.strides[0])
        out = maps[0].new_empty(len(boxes), maps[0].shape[1], *cells)
        levels = pyramid_level(boxes)
        for level in range(4):
            rows = (levels == level).nonzero()[:, 0]
            out[rows] = pooled(maps[level], rois[rows], self.strides[level])
        return out

    def describe(self, maps: Sequence[Tensor], boxes: Tensor) -> Described:
        """Features and predictions of one image's boxes [R, 4], R may be 0. maps [1, C, h, w]."""
        # Boxes take their maps' type: in fp16 they would move by 0.5 px.
        maps = [one.float().contiguous() for one in maps]
        parts = [self.features(self.pool(maps, rows)) for rows in boxes.split(_ROIS_AT_ONCE[self.kind])]
        features = torch.cat(parts).float()
        with torch.autocast(features.device.type, enabled=False):
            logits, deltas, attributes = self.roi_heads["box_predictor"](features)
        return Described(features, logits, deltas.view(len(boxes), -1, 4), attributes)

    def features(self, cells: Tensor) -> Tensor:
        """[R, C, 14, 14] -> the mean of res5, or [R, C, 7, 7] -> the box head: [R, D]."""
        if self.kind == "FPN":
            return self.roi_heads["box_head"](cells)
        return self.roi_heads["res5"](cells).mean((2, 3))


def pyramid_level(boxes: Tensor) -> Tensor:
    """Which of p2 to p5 a box is pooled from, 0 to 3 (Lin et al. 2017, equation 1, as detectron2 computes it)."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (4 + torch.log2(area.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).long() - 2
