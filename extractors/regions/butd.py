"""Bottom-up attention (Anderson et al. 2018): the R101-C4 Faster R-CNN of 1600 objects and 400 attributes.

Three public forms of one network exist. They differ in how a picture is resized, in pooling, anchors and boxes, and in
where the background stands; each is here as a set of `Rules`, and every file loads under its own names. Without
detectron2 and without compiling: the operations are torchvision's.

    caffe          peteanderson80/bottom-up-attention, .caffemodel
    milvlg         MILVLG/bottom-up-attention.pytorch, bua-caffe-frcn-r101*.pth
    airsplay       airsplay/py-bottom-up-attention, faster_rcnn_from_caffe*.pkl with the *_caffemaxpool.yaml settings
    airsplay-pad1  the same file with faster_rcnn_R_101_C4_caffe.yaml, whose stem pools as the weights were not trained
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from extractors.regions.caffemodel import read_caffemodel
from extractors.regions.config import RegionsConfig
from extractors.regions.rcnn import ANCHORS, Rules
from extractors.regions.rcnn_detector import RcnnDetector
from extractors.regions.weights import given_file, require
from schemas.errors import PairmillError, suggest
from shards.weights import read_checkpoint

_MEAN = (102.9801, 115.9465, 122.7717)
_SOURCE = (
    "bua-caffe-frcn-r101*.pth (MILVLG), faster_rcnn_from_caffe*.pkl (airsplay) or *.caffemodel (peteanderson80); "
    "objects_vocab.txt and attributes_vocab.txt beside it give the names."
)
_OBJECTNESS = "proposal_generator.rpn_head.objectness_logits"
_DELTAS = "proposal_generator.rpn_head.anchor_deltas"
_PREDICTOR = "roi_heads.box_predictor"
# MILVLG's names of the attribute head -> airsplay's, which `FasterRcnn` has.
_ATTRIBUTE_NAMES = {"cls_embed": "cls_embedding", "attr_linear1": "fc_attr", "attr_linear2": "attr_score"}
_AIRSPLAY_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

CAFFE = Rules(
    mean=_MEAN,
    resize="opencv",
    anchor_sizes=((4, 8, 16, 32),),
    caffe_anchors=True,
    caffe_pool=True,
    inclusive=True,
    limit_growth=False,
    min_side=16.0,
    min_side_itself=True,
    clip_first=True,
    align=False,
    last_stage="dilated",
    box_weights=(1.0, 1.0, 1.0, 1.0),
    background_first=True,
)
MILVLG = replace(CAFFE, limit_growth=True, min_side_itself=False)
AIRSPLAY = Rules(
    mean=_MEAN,
    resize="pillow",
    anchor_sizes=((64, 128, 256, 512),),
    caffe_pool=True,
    align=False,
    last_stage="dilated",
    box_weights=_AIRSPLAY_WEIGHTS,
)
FORMS = {
    "caffe": CAFFE,
    "milvlg": MILVLG,
    "airsplay": AIRSPLAY,
    "airsplay-pad1": replace(AIRSPLAY, caffe_pool=False),
}


def butd_detector(config: RegionsConfig) -> RcnnDetector:
    """`butd`, in the form that the weights are of, or `butd:FORM`.

    Raises PairmillError: an unknown form, no weights, weights of another network, airsplay's weights for a Caffe form.
    """
    _, _, form = config.detector.partition(":")
    if form and form not in FORMS:
        raise PairmillError(
            f"`--detector {config.detector}`: bottom-up attention has no such form.{suggest(form, FORMS)} "
            f"Known: {', '.join(FORMS)}."
        )
    path = given_file(config.detector, config.weights, _SOURCE)
    kind, state = read_butd(path, config.detector)
    form = form or kind
    if FORMS[form].inclusive and kind == "airsplay":
        raise PairmillError(
            f"`--detector butd:{form}`: `{path}` holds airsplay's weights, whose anchors and boxes are detectron2's. "
            "Pass butd:airsplay, or Caffe's or MILVLG's file."
        )
    if not FORMS[form].inclusive and kind != "airsplay":
        state = to_airsplay(state)
    return RcnnDetector(config, state, FORMS[form], path)


def read_butd(path: Path, name: str) -> tuple[str, dict[str, Tensor]]:
    """(the form that the file was published in, its tensors under `FasterRcnn`'s names, fp32).

    Raises PairmillError: unreadable, or weights of another network.
    """
    if path.suffix == ".caffemodel":
        return "caffe", from_caffe(read_caffemodel(path), name, path)
    state = {k: v.float() for k, v in read_checkpoint(path).tensors.items() if not k.startswith("pixel_")}
    for theirs, ours in _ATTRIBUTE_NAMES.items():
        for key in [k for k in state if k.startswith(f"{_PREDICTOR}.{theirs}.")]:
            state[key.replace(f".{theirs}.", f".{ours}.")] = state.pop(key)
    scores = require(state, f"{_OBJECTNESS}.weight", name, path)
    anchors = len(require(state, f"{_DELTAS}.weight", name, path)) // 4
    return ("milvlg" if len(scores) == 2 * anchors else "airsplay"), with_statistics(state)


def with_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Normalisation without its own mean and variance has 0 and 1 (A layers/batch_norm.py of airsplay's fork)."""
    for key in [k for k in state if k.endswith(".norm.weight")]:
        norm = key.removesuffix("weight")
        state.setdefault(f"{norm}running_mean", torch.zeros_like(state[key]))
        state.setdefault(f"{norm}running_var", torch.ones_like(state[key]))
    return state


def to_airsplay(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe's or MILVLG's tensors for airsplay's form: the same numbers but for rounding, at detectron2's anchors.

    Foreground less background gives one score; anchors go from ratio-major to size-major; background rows go to the
    end, and its box is dropped; refinements are multiplied by what airsplay divides them by.
    """
    out = {k: v for k, v in state.items() if not k.startswith(ANCHORS)}
    sizes = len(state[f"{_DELTAS}.weight"]) // 12
    order = torch.tensor([ratio * sizes + size for size in range(sizes) for ratio in range(3)])
    for part in ("weight", "bias"):
        scores, deltas = state[f"{_OBJECTNESS}.{part}"], state[f"{_DELTAS}.{part}"]
        background, foreground = scores.chunk(2)
        out[f"{_OBJECTNESS}.{part}"] = (foreground - background)[order]
        out[f"{_DELTAS}.{part}"] = deltas.unflatten(0, (-1, 4))[order].flatten(0, 1)
        boxes = state[f"{_PREDICTOR}.bbox_pred.{part}"][4:].unflatten(0, (-1, 4))
        factors = boxes.new_tensor(_AIRSPLAY_WEIGHTS).reshape(4, *[1] * (boxes.dim() - 2))
        out[f"{_PREDICTOR}.bbox_pred.{part}"] = (boxes * factors).flatten(0, 1)
    for name in ("cls_score.weight", "cls_score.bias", "cls_embedding.weight", "attr_score.weight", "attr_score.bias"):
        if f"{_PREDICTOR}.{name}" in state:
            out[f"{_PREDICTOR}.{name}"] = state[f"{_PREDICTOR}.{name}"].roll(-1, 0)
    return out


def from_caffe(layers: Mapping[str, list[Tensor]], name: str, path: Path) -> dict[str, Tensor]:
    """A .caffemodel's blobs under `FasterRcnn`'s names (models/vg/ResNet-101/faster_rcnn_end2end_final/test.prototxt).

    Caffe's BatchNorm stores sums and their weight; its Scale layer has the factors.
    Raises PairmillError: a layer of the network is missing.
    """
    out: dict[str, Tensor] = {}

    def blobs(layer: str, count: int) -> list[Tensor]:
        found = layers.get(layer, [])
        if len(found) < count:
            raise PairmillError(f"`{path}` does not fit `{name}`: layer `{layer}` has {len(found)} of {count} blobs.")
        return found

    def convolution(layer: str, suffix: str, target: str) -> None:
        out[f"{target}.weight"] = blobs(layer, 1)[0]
        mean, variance, weight = blobs(f"bn{suffix}", 3)[:3]
        total = float(weight.flatten()[0])
        factor = 1 / total if total else 0.0
        out[f"{target}.norm.running_mean"] = mean.flatten() * factor
        out[f"{target}.norm.running_var"] = variance.flatten() * factor
        scale, shift = blobs(f"scale{suffix}", 2)[:2]
        out[f"{target}.norm.weight"], out[f"{target}.norm.bias"] = scale.flatten(), shift.flatten()

    convolution("conv1", "_conv1", "backbone.stem.conv1")
    for stage in range(2, 6):
        whole = "roi_heads.res5" if stage == 5 else f"backbone.res{stage}"
        for i, block in enumerate(_caffe_blocks(layers, stage)):
            parts = {"branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
            if i == 0:
                parts["branch1"] = "shortcut"
            for branch, part in parts.items():
                convolution(f"res{block}_{branch}", f"{block}_{branch}", f"{whole}.{i}.{part}")
    for layer, target in (
        ("rpn_conv/3x3", "proposal_generator.rpn_head.conv"),
        ("rpn_cls_score", _OBJECTNESS),
        ("rpn_bbox_pred", _DELTAS),
        ("cls_score", f"{_PREDICTOR}.cls_score"),
        ("bbox_pred", f"{_PREDICTOR}.bbox_pred"),
        ("fc_attr", f"{_PREDICTOR}.fc_attr"),
        ("attr_score", f"{_PREDICTOR}.attr_score"),
    ):
        if layer in layers or "attr" not in layer:
            out[f"{target}.weight"], out[f"{target}.bias"] = blobs(layer, 2)[:2]
    if "cls_embedding" in layers:
        out[f"{_PREDICTOR}.cls_embedding.weight"] = layers["cls_embedding"][0]
    return {k: _of_its_rank(k, v) for k, v in out.items()}


def _caffe_blocks(layers: Mapping[str, list[Tensor]], stage: int) -> list[str]:
    """A stage's blocks as Caffe names them: 2a 2b 2c, or 4a 4b1 4b2 ..."""
    letters = [f"{stage}{letter}" for letter in "abcdefgh"]
    numbered = [f"{stage}a", *(f"{stage}b{n}" for n in range(1, 100))]
    names = numbered if f"res{stage}b1_branch2a" in layers else letters
    found = [n for n in names if f"res{n}_branch2a" in layers]
    return found or names[:1]


def _of_its_rank(name: str, tensor: Tensor) -> Tensor:
    """Old files store every blob with four sides: vectors and matrices lose those of 1 in front."""
    linear = name.startswith(_PREDICTOR)
    rank = 1 if name.endswith("bias") else 2 if linear else tensor.dim()
    return tensor.reshape(tensor.shape[-rank:]) if tensor.dim() > rank else tensor
