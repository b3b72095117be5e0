"""VinVL (Zhang et al. 2021): the X152-C4 Faster R-CNN of 1594 objects and 524 attributes, without maskrcnn-benchmark.

Read from microsoft/scene_graph_benchmark@8e14944, whose file names stand beside each rule. Weights are
vinvl_vg_x152c4.pth; VG-SGG-dicts-vgoi6-clipped.json beside it gives the names.

Its boxes include their last pixel when they are moved and clipped, but neither when they suppress each other nor when
cells are pooled: layers/nms.py and layers/roi_align.py take torchvision's operations.

Two things are ours: attributes are told the likeliest foreground class, as it is stored, where theirs are told the
class in which the box was kept; and they are of the proposal, where theirs are of the refined box if that is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from extractors.regions.config import RegionsConfig
from extractors.regions.rcnn import ANCHORS, Rules
from extractors.regions.rcnn_detector import RcnnDetector
from extractors.regions.resnet import EPSILON
from extractors.regions.weights import given_file, require
from schemas.errors import PairmillError
from shards.weights import read_checkpoint, read_json

LABEL_MAP = "VG-SGG-dicts-vgoi6-clipped.json"
_SOURCE = f"vinvl_vg_x152c4.pth (microsoft/scene_graph_benchmark); {LABEL_MAP} beside it gives the names."

# sgg_configs/vgattr/vinvl_x152c4.yaml over config/defaults.py; what the others do is in `Rules`.
VINVL = Rules(
    mean=(103.53, 116.28, 123.675),
    resize="torchvision",  # data/transforms/transforms.py
    anchor_sizes=((2, 4, 8, 16, 32),),  # 32 to 512 px
    caffe_anchors=True,  # modeling/rpn/anchor_generator.py
    inclusive=True,  # structures/bounding_box.py clip_to_image
    far_less_one=True,  # modeling/box_coder.py
    half_pixel=False,  # csrc/cpu/ROIAlign_cpu.cpp, and torchvision's default
    background_first=True,  # roi_heads/box_head/inference.py
    foreground_named=True,  # scene_graph_benchmark/attribute_head/attribute_head.py
)

_HEAD, _PREDICTOR = "roi_heads.box.feature_extractor.head.layer4", "roi_heads.box.predictor"
_SHARED = "attribute.feature_extractor."
# Their names -> those of `FasterRcnn`, each once, in this order.
_NAMES = (
    (rf"^{re.escape(_HEAD)}\.", "roi_heads.res5."),
    (rf"^{re.escape(_PREDICTOR)}\.", "roi_heads.box_predictor."),
    (r"^attribute\.predictor\.", "roi_heads.box_predictor."),
    (r"^rpn\.head\.conv\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^rpn\.anchor_generator\.cell_anchors\.", ANCHORS),
    (r"^backbone\.body\.stem\.", "backbone.stem."),
    (r"^backbone\.body\.layer([123])\.", lambda found: f"backbone.res{int(found[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn([123])\.", r".conv\1.norm."),
)


def vinvl_detector(config: RegionsConfig) -> RcnnDetector:
    """`vinvl`. Raises PairmillError: no weights, weights of another network, names of another number."""
    path = given_file(config.detector, config.weights, _SOURCE)
    theirs = {k: v.float() for k, v in read_checkpoint(path).tensors.items()}
    for key in (f"{_HEAD}.0.conv1.weight", f"{_PREDICTOR}.cls_score.weight", "rpn.head.cls_logits.weight"):
        require(theirs, key, config.detector, path)
    for key in [k for k in theirs if k.startswith(_SHARED)]:
        shared = "roi_heads.box." + key.removeprefix("attribute.")
        if shared not in theirs or not torch.equal(theirs[key], theirs[shared]):
            raise PairmillError(
                f"`{path}` does not fit `{config.detector}`: its attribute head pools features of its own "
                f"(`{key}`). Pass weights of SHARE_BOX_FEATURE_EXTRACTOR: True."
            )
        del theirs[key]
    return RcnnDetector(config, from_vinvl(theirs), VINVL, path, label_map)


def from_vinvl(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under `FasterRcnn`'s names; names that nobody knows stay as they are.

    Their normalisation divides by sqrt(var), without an epsilon (layers/batch_norm.py): the factor goes into the
    weight, and the variance becomes what the epsilon makes 1.
    """
    out = {_renamed(name): tensor for name, tensor in theirs.items()}
    for key in [k for k in out if k.endswith(".norm.running_var")]:
        weight = key.replace("running_var", "weight")
        if weight in out:
            out[weight] = out[weight] * out[key].rsqrt()
            out[key] = torch.full_like(out[key], 1 - EPSILON)
    return out


def _renamed(name: str) -> str:
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def label_map(path: Path, part: str, count: int) -> tuple[str, ...] | None:
    """The names of `count` "classes" or "attributes" from the label map beside the weights, None where there is none.

    `WEIGHTS.json` or VG-SGG-dicts-vgoi6-clipped.json: `label_to_idx` and `attribute_to_idx`, from a name to its column,
    from 1 on; column 0 is the background, or no attribute.
    Raises PairmillError: other columns than the weights have.
    """
    source = next((p for p in (path.with_suffix(".json"), path.with_name(LABEL_MAP)) if p.is_file()), None)
    if source is None:
        return None
    table = {"classes": "label_to_idx", "attributes": "attribute_to_idx"}[part]
    given = read_json(source).get(table)
    if not isinstance(given, dict) or not all(isinstance(at, int) for at in given.values()):
        raise PairmillError(f"`{source}` has no `{table}` from names to numbers, as {LABEL_MAP} has.")
    names = {at: str(name) for name, at in given.items() if at != 0}
    if set(names) != set(range(1, count + 1)):
        raise PairmillError(f"`{source}` names {len(names)} {part}, `{path.name}` has {count}.")
    return tuple(names[at] for at in range(1, count + 1))
