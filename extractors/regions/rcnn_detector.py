"""A `FasterRcnn` with its way of looking at pictures, as a `protocol.Detector`; `rcnn:` are detectron2's plain ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Proposals
from extractors.regions.rcnn import ANCHORS, Described, FasterRcnn, Rules, clip_boxes
from extractors.regions.weights import fill, given_file, require, vocabulary
from schemas.errors import PairmillError
from shards.files import hash_file
from shards.weights import read_checkpoint

_FPN_SIDES, _LEAST_SIDE = 32, 4  # px

# configs/Base-RCNN-C4.yaml and Base-RCNN-FPN.yaml of detectron2, at bottom-up attention's 600 x 1000 px and 300 boxes.
C4 = Rules((103.53, 116.28, 123.675), "pillow", ((32, 64, 128, 256, 512),))
FPN = replace(C4, anchor_sizes=((32,), (64,), (128,), (256,), (512,)), before_nms=1000)


class RcnnDetector:
    """A Faster R-CNN of our own parts.

    state  tensors under detectron2's names
    path   the file they came from; names of classes and attributes are looked for beside it
    names  finds them, called as `weights.vocabulary` is
    Raises PairmillError: tensors of another architecture, names of another number.
    """

    def __init__(
        self,
        config: RegionsConfig,
        state: Mapping[str, Tensor],
        rules: Rules,
        path: Path,
        names: Callable[[Path, str, int], tuple[str, ...] | None] = vocabulary,
    ) -> None:
        longer = 5 * config.size // 3 if config.size else rules.longer
        rules = replace(
            rules, shorter=config.size or rules.shorter, longer=longer, proposals=config.proposals or rules.proposals
        )
        self.rules = rules
        self.inclusive = rules.inclusive and not rules.far_less_one
        self.model = build(state, rules, config.detector, path).fold().eval()
        logits = len(state["roi_heads.box_predictor.cls_score.weight"])
        self.classes = names(path, "classes", logits - 1) or tuple(f"class_{i}" for i in range(logits - 1))
        self.attributes: tuple[str, ...] = ()
        if "roi_heads.box_predictor.attr_score.weight" in state:
            count = len(state["roi_heads.box_predictor.attr_score.weight"]) - 1
            self.attributes = names(path, "attributes", count) or tuple(f"attribute_{i}" for i in range(count))
        self.feature_dim = self.model.feature_dim
        self.fingerprint = (
            f"{config.detector}:{hash_file(path)}:{rules.shorter}x{rules.longer}:{rules.resize}:{rules.proposals}"
        )

    def to(self, device: torch.device | str) -> RcnnDetector:
        """Move the weights; returns self."""
        self.model.to(device)
        return self

    def prepare(self, rgb: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> what the network sees, [3, h, w] RGB: uint8, or fp32 where the mean goes off first."""
        return resized(rgb, self.rules)

    def key(self, height: int, width: int) -> Hashable:
        """Images of one size in the network share a pass: its convolutions see no neighbour."""
        return seen_size(height, width, self.rules)

    def propose(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Proposals]:
        """Boxes of the region proposal network."""
        return self._run(images, sizes, None)

    def describe(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Proposals]:
        """Features and probabilities of given boxes, fp32 [R, 4] px of the stored image."""
        return self._run(images, sizes, boxes)

    @torch.inference_mode()
    def _run(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor] | None
    ) -> list[Proposals]:
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault((int(image.shape[1]), int(image.shape[2])), []).append(i)
        out: dict[int, Proposals] = {}
        for seen, members in groups.items():
            maps = self.model.maps(network_input([images[i] for i in members], self.rules, self.model.kind))
            heads = self.model.rpn(maps) if boxes is None else []
            for at, i in enumerate(members):
                scale = Scale(sizes[i], seen, self.rules)
                if boxes is None:
                    found = [self.model.candidates(s[at].float(), d[at].float(), n) for n, (s, d) in enumerate(heads)]
                    rows = self.model.proposals(found, seen, scale.one)[0]
                else:
                    rows = scale.to_network(boxes[i].to(maps[0].device, torch.float32))
                out[i] = self._describe([m[at : at + 1] for m in maps], rows, scale, boxes is None)
        return [out[i] for i in range(len(images))]

    def _describe(self, maps: Sequence[Tensor], rows: Tensor, scale: Scale, proposed: bool) -> Proposals:
        """The image itself is described as one more box."""
        height, width = scale.seen
        last = float(self.rules.inclusive)
        whole = rows.new_tensor([[0.0, 0.0, width - last, height - last]])
        found = self.model.describe(maps, torch.cat([rows, whole]))
        probs = self._background_first(found.logits.softmax(1))
        attributes = None
        if found.attribute_logits is not None:
            attributes = self._background_first(found.attribute_logits.softmax(1))[:-1]
        boxes = scale.to_stored(rows)
        return Proposals(
            boxes=boxes,
            features=found.features[:-1],
            class_probs=probs[:-1],
            image_feature=found.features[-1],
            attribute_probs=attributes,
            regressed=self._refined(found, rows, probs, scale) if proposed else None,
        )

    def _background_first(self, probs: Tensor) -> Tensor:
        return probs if self.rules.background_first else probs.roll(1, 1)

    def _refined(self, found: Described, rows: Tensor, probs: Tensor, scale: Scale) -> Tensor:
        """[R, 4]: each box moved for its likeliest class but the background, px of the stored image."""
        best = probs[:-1, 1:].argmax(1) + (1 if self.rules.background_first else 0)
        deltas = found.deltas[:-1][torch.arange(len(rows), device=rows.device), best]
        rules = self.rules
        if self.inclusive:  # Caffe moves boxes that are already in the picture's own pixels
            moved = self.model.decode(deltas, scale.to_stored(rows), rules.box_weights)
        else:
            moved = self.model.decode(deltas, rows, rules.box_weights)
            moved = scale.to_stored(clip_boxes(moved, *scale.seen, inclusive=rules.inclusive))
        return clip_boxes(moved, *scale.stored, inclusive=self.inclusive)


class Scale:
    """From pixels of the stored image, (height, width), to those that the network saw, and back."""

    def __init__(self, stored: tuple[int, int], seen: tuple[int, int], rules: Rules) -> None:
        self.stored, self.seen = stored, seen
        #: What the image was enlarged by.
        self.one = enlarged_by(*stored, rules)
        one_scale = rules.resize == "opencv"
        self._x, self._y = (self.one, self.one) if one_scale else (seen[1] / stored[1], seen[0] / stored[0])

    def to_network(self, boxes: Tensor) -> Tensor:
        """[R, 4]."""
        return boxes * boxes.new_tensor([self._x, self._y, self._x, self._y])

    def to_stored(self, boxes: Tensor) -> Tensor:
        """[R, 4]."""
        return boxes / boxes.new_tensor([self._x, self._y, self._x, self._y])


def enlarged_by(height: int, width: int, rules: Rules) -> float:
    """The factor that brings the shorter side to `shorter`, or the longer to `longer` where it would exceed that."""
    shortest, longest = min(height, width), max(height, width)
    scale = rules.shorter / shortest
    over = round(scale * longest) > rules.longer if rules.resize == "opencv" else scale * longest > rules.longer
    return rules.longer / longest if over else scale


def seen_size(height: int, width: int, rules: Rules) -> tuple[int, int]:
    """(height, width) in px at which an image of that size is seen, at least 1."""
    if rules.resize == "opencv":  # as cv2.resize rounds: halves to even
        scale = enlarged_by(height, width, rules)
        return max(1, round(height * scale)), max(1, round(width * scale))
    if rules.resize == "torchvision":
        return torchvision_size(height, width, rules)
    scale = rules.shorter / min(height, width)
    new = [height * scale, width * scale]
    new[0 if height < width else 1] = float(rules.shorter)
    if max(new) > rules.longer:
        shrink = rules.longer / max(new)
        new = [side * shrink for side in new]
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def torchvision_size(height: int, width: int, rules: Rules) -> tuple[int, int]:
    """(height, width) after maskrcnn-benchmark, data/transforms/transforms.py Resize.get_size.

    The shorter side is a whole number before the longer is computed from it and cut down, so that the longer may
    exceed its limit by a little. Where the shorter would be 0 px it is 1 and the longer at its limit.
    """
    shortest, longest = min(height, width), max(height, width)
    short = rules.shorter
    if longest / shortest * short > rules.longer:
        short = round(rules.longer * shortest / longest)
    long = int(short * longest / shortest) if short else rules.longer
    short = max(short, 1)
    return (long, short) if width < height else (short, long)


def resized(rgb: np.ndarray, rules: Rules) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, h, w] RGB by Pillow, or fp32 [3, h, w] RGB less the mean by OpenCV."""
    height, width = seen_size(rgb.shape[0], rgb.shape[1], rules)
    if rules.resize != "opencv":
        small = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
        return torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))
    less = rgb.astype(np.float32) - np.array(rules.mean[::-1], np.float32)
    scale = enlarged_by(rgb.shape[0], rgb.shape[1], rules)
    if (height, width) == (round(rgb.shape[0] * scale), round(rgb.shape[1] * scale)):
        small = cv2.resize(less, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    else:  # a side that would come out as 0 px
        small = cv2.resize(less, (width, height), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))


def network_input(images: Sequence[Tensor], rules: Rules, kind: str) -> Tensor:
    """Images of one size as `resized` gives them -> [B, 3, h, w] fp32, blue green red, less the mean.

    Sides are filled with zeros below and at the right: an FPN's to multiples of 32, and where the stem pools without
    padding (Caffe) to 4, which leaves one cell.
    """
    batch = torch.stack(list(images)).flip(1)
    if not batch.is_floating_point():
        batch = batch.float() - batch.new_tensor(rules.mean, dtype=torch.float32)[:, None, None]
    height, width = batch.shape[2:]
    if kind == "FPN":
        return F.pad(batch, (0, -width % _FPN_SIDES, 0, -height % _FPN_SIDES))
    least = _LEAST_SIDE if rules.caffe_pool else 1
    return F.pad(batch, (0, max(0, least - width), 0, max(0, least - height)))


def build(state: Mapping[str, Tensor], rules: Rules, name: str, path: Path) -> FasterRcnn:
    """The network that the tensors are of, filled. Raises PairmillError where they are of no such network."""
    for key in ("proposal_generator.rpn_head.conv.weight", "roi_heads.box_predictor.cls_score.weight"):
        require(state, key, name, path)
    body = "backbone.bottom_up" if "backbone.fpn_lateral2.weight" in state else "backbone"
    for part in ("stem.conv1", "res2.0.conv1", "res3.0.conv1", "res4.0.conv1"):
        require(state, f"{body}.{part}.weight", name, path)
    try:
        model = FasterRcnn(state, rules)
    except KeyError as error:
        raise PairmillError(f"`{path}` does not fit `{name}`: it has no `{error.args[0]}`.") from None
    whole = {k: v for k, v in state.items() if not k.startswith(ANCHORS)}
    fill(model, whole, name, path)
    return model


def plain_detector(config: RegionsConfig) -> RcnnDetector:
    """`rcnn:C4` and `rcnn:FPN`: detectron2's plain Faster R-CNNs from its own weight files, without detectron2.

    Raises PairmillError: another name, no weights, weights of another architecture.
    """
    name = config.detector.removeprefix("rcnn:")
    rules = {"C4": C4, "FPN": FPN}.get(name)
    if rules is None:
        raise PairmillError(f"`--detector {config.detector}`: pass rcnn:C4 or rcnn:FPN.")
    path = given_file(config.detector, config.weights, "model_final_*.pkl of detectron2's model zoo (faster_rcnn_*).")
    state = {k: v.float() for k, v in read_checkpoint(path).tensors.items() if not k.startswith("pixel_")}
    detector = RcnnDetector(config, state, rules, path)
    if detector.model.kind != name:
        raise PairmillError(
            f"`{path}` is an {detector.model.kind} detector. Pass --detector rcnn:{detector.model.kind}."
        )
    return detector
