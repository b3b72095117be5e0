"""detectron2's own models: `detectron2:CONFIG`, where CONFIG is a name of its model zoo or a .yaml file.

detectron2 is imported when such a detector is loaded, never before. Configurations are read as plain YAML and weights
by `shards.weights`: neither can execute anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Proposals
from extractors.regions.rcnn import ANCHORS, clip_boxes
from extractors.regions.weights import fill, first_names, given_file, require, vocabulary
from schemas.errors import PairmillError, suggest
from shards.files import hash_file
from shards.weights import read_checkpoint

INSTALL = "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
_ROIS_AT_ONCE = 64  # the last stage's maps of 1000 boxes would take GBs
# What a weights file may hold beside a box detector: constants of the configuration, and heads that are not run.
_LEFT_OUT = ("pixel_mean", "pixel_std", ANCHORS, "roi_heads.mask_", "roi_heads.keypoint_")
_CLASS_SCORES = "roi_heads.box_predictor.cls_score.weight"


class Detectron2Detector:
    """A detectron2 Faster or Mask R-CNN as a `protocol.Detector`; masks and keypoints are left out.

    The network is run part by part, since its own forward pass gives no features (facebookresearch/detectron2#4155):
    of a C4 (Res5ROIHeads) they are the mean of res5, of an FPN (StandardROIHeads) what the box head gives. Pictures
    are resized as `DefaultPredictor` does, to the configuration's test size or `--size`, and share a pass only where
    they are padded to one size. As many proposals as the configuration says (POST_NMS_TOPK_TEST), or `--proposals`.

    Raises PairmillError: no detectron2, an unknown or unreadable CONFIG, another kind of model, weights that are
    missing, unreadable, of another architecture or number of classes.
    """

    attributes: tuple[str, ...] = ()
    inclusive = False

    def __init__(self, config: RegionsConfig) -> None:
        require_detectron2(config.detector)
        cfg = read_config(config)
        path = given_file(config.detector, config.weights, "model_final_*.pkl of detectron2's model zoo, or your own.")
        self.model = build_network(cfg, config.detector).eval()
        load_weights(self.model, path, config.detector)
        self.classes = class_names(cfg, path)
        self.feature_dim = int(self.model.roi_heads.box_predictor.cls_score.in_features)
        self._shorter, self._longer = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._bgr = cfg.INPUT.FORMAT == "BGR"
        settings = hashlib.sha256(f"{cfg.INPUT.FORMAT}\n{cfg.MODEL.dump()}".encode()).hexdigest()[:16]
        self.fingerprint = f"{config.detector}:{hash_file(path)}:{self._shorter}x{self._longer}:{settings}"

    def to(self, device: torch.device | str) -> Detectron2Detector:
        """Move the weights; returns self."""
        self.model.to(device)
        return self

    def prepare(self, rgb: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> uint8 [3, h, w], resized by Pillow, in the configuration's order of colours."""
        from detectron2.data.transforms import ResizeTransform

        seen = self._seen(rgb.shape[0], rgb.shape[1])
        small = ResizeTransform(*rgb.shape[:2], *seen).apply_image(rgb[:, :, ::-1] if self._bgr else rgb)
        return torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))

    def key(self, height: int, width: int) -> Hashable:
        """The padded size at which an image of that size is seen, (height, width) in px."""
        return self._padded(*self._seen(height, width))

    def propose(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Proposals]:
        """Boxes of the region proposal network."""
        return self._run(images, sizes, None)

    def describe(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Proposals]:
        """Features and probabilities of given boxes, fp32 [R, 4] px of the stored image."""
        return self._run(images, sizes, boxes)

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in px after ResizeShortestEdge, at least 1; a test size of 0 leaves the image as it is."""
        from detectron2.data.transforms import ResizeShortestEdge

        if not self._shorter:
            return height, width
        new = ResizeShortestEdge.get_output_shape(height, width, self._shorter, self._longer)
        return max(1, new[0]), max(1, new[1])

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        step = max(1, self.model.backbone.size_divisibility)
        return -(-height // step) * step, -(-width // step) * step

    @torch.inference_mode()
    def _run(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor] | None
    ) -> list[Proposals]:
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(self._padded(int(image.shape[1]), int(image.shape[2])), []).append(i)
        out: dict[int, Proposals] = {}
        for members in groups.values():
            batch = self.model.preprocess_image([{"image": images[i]} for i in members])
            maps = self.model.backbone(batch.tensor)
            found = self._proposals(batch, maps) if boxes is None else []
            for at, i in enumerate(members):
                seen, stored = images[i].shape[1:], sizes[i]
                x, y = stored[1] / seen[1], stored[0] / seen[0]
                scale = torch.tensor([x, y, x, y], device=batch.tensor.device)
                rows = found[at] if boxes is None else boxes[i].to(scale.device, torch.float32) / scale
                own = {name: one[at : at + 1].float() for name, one in maps.items()}  # boxes take their maps' type
                out[i] = self._describe(own, rows, scale, (seen[0], seen[1]), stored, boxes is None)
        return [out[i] for i in range(len(images))]

    def _proposals(self, batch: Any, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """Each image's boxes [R, 4], px of the network's input, best first; in fp32: bf16 scores would tie."""
        with torch.autocast(batch.tensor.device.type, enabled=False):
            found, _ = self.model.proposal_generator(batch, {name: one.float() for name, one in maps.items()}, None)
        return [one.proposal_boxes.tensor for one in found]

    def _describe(
        self,
        maps: Mapping[str, Tensor],
        rows: Tensor,
        scale: Tensor,
        seen: tuple[int, int],
        stored: tuple[int, int],
        proposed: bool,
    ) -> Proposals:
        """One image's boxes [R, 4], px of the network's input; the image itself is described as one more."""
        rows = torch.cat([rows, rows.new_tensor([[0.0, 0.0, seen[1], seen[0]]])])
        features = torch.cat([self._features(maps, some) for some in rows.split(_ROIS_AT_ONCE)]).float()
        predictor = self.model.roi_heads.box_predictor
        with torch.autocast(features.device.type, enabled=False):
            logits, deltas = predictor(features)
        probs, rows = logits[:-1].softmax(1), rows[:-1]
        boxes, regressed = rows * scale, None
        if proposed:
            moved = predictor.box2box_transform.apply_deltas(deltas[:-1], rows).unflatten(1, (-1, 4))
            best = probs[:, :-1].argmax(1).clamp(max=moved.shape[1] - 1)  # one box for all classes, or one each
            regressed = clip_boxes(moved[torch.arange(len(rows), device=rows.device), best], *seen)
            boxes, regressed = clip_boxes(boxes, *stored), clip_boxes(regressed * scale, *stored)
        return Proposals(
            boxes=boxes,
            features=features[:-1],
            class_probs=probs.roll(1, 1),
            image_feature=features[-1],
            regressed=regressed,
        )

    def _features(self, maps: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """[R, D] of boxes [R, 4], px of the network's input."""
        from detectron2.structures import Boxes

        heads, boxes = self.model.roi_heads, [Boxes(rows)]
        if hasattr(heads, "res5"):
            return heads.res5(heads.pooler([maps[name] for name in heads.in_features], boxes)).mean((2, 3))
        return heads.box_head(heads.box_pooler([maps[name] for name in heads.box_in_features], boxes)).flatten(1)


def require_detectron2(detector: str) -> None:
    """Raises PairmillError where detectron2 is not installed, or cannot be imported."""
    try:
        import detectron2
        import detectron2.modeling  # noqa: F401
    except ImportError as error:
        why = "is not installed" if error.name == "detectron2" else f"cannot be imported ({error})"
        raise PairmillError(
            f"`--detector {detector}`: detectron2 {why}. Install it: {INSTALL}. Its plain Faster R-CNNs run without it "
            "as rcnn:C4 and rcnn:FPN."
        ) from None


def config_file(name: str) -> Path:
    """The .yaml file itself, or the model zoo's of that name. Raises PairmillError: neither is there, or a program."""
    import detectron2

    if name.endswith(".py"):
        raise PairmillError(
            f"`--detector detectron2:{name}`: such a configuration is a program, and Pairmill executes nothing that it "
            "reads. Pass a .yaml configuration."
        )
    path = Path(name)
    if path.is_file():
        return path
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    names = [str(p.relative_to(zoo)) for p in sorted(zoo.rglob("*.yaml"))]
    if name not in names:
        raise PairmillError(
            f"`--detector detectron2:{name}`: no such file, and no configuration of detectron2's model zoo."
            f"{suggest(name, names)}"
        )
    return zoo / name


def read_config(config: RegionsConfig) -> Any:
    """detectron2's settings (a CfgNode) with `--size` and `--proposals` in their place.

    Raises PairmillError as `config_file` does, and where detectron2 does not take the file.
    """
    from detectron2.config import get_cfg

    path, cfg = config_file(config.detector.removeprefix("detectron2:")), get_cfg()
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)  # its default would execute what YAML tags say
    except Exception as error:  # a stranger's file can fail in any way; none of them is our bug
        raise PairmillError(
            f"`{path}` is no configuration that detectron2 reads ({type(error).__name__}: {str(error)[:200]})."
        ) from None
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    if config.size:
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = config.size, 5 * config.size // 3
    if config.proposals:
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = config.proposals
    return cfg


def build_network(cfg: Any, detector: str) -> Any:
    """The model of the settings, unfilled. Raises PairmillError: detectron2 cannot build it, or not a C4 or FPN."""
    from detectron2.modeling import GeneralizedRCNN, build_model
    from detectron2.modeling.proposal_generator import RPN
    from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads

    try:
        model = build_model(cfg)
    except Exception as error:  # names of parts that are not registered, sizes that do not fit: the file's fault
        raise PairmillError(
            f"`--detector {detector}`: detectron2 cannot build it ({type(error).__name__}: {str(error)[:200]})."
        ) from None
    heads: Any = getattr(model, "roi_heads", None)
    plain = (
        isinstance(model, GeneralizedRCNN)
        and isinstance(model.proposal_generator, RPN)
        and type(heads) in (Res5ROIHeads, StandardROIHeads)
        and type(heads.box_predictor) is FastRCNNOutputLayers
        and not cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
    )
    if not plain:
        raise PairmillError(
            f"`--detector {detector}` is a {cfg.MODEL.META_ARCHITECTURE} with {cfg.MODEL.ROI_HEADS.NAME}. Features are "
            "taken of GeneralizedRCNN with an RPN, Res5ROIHeads or StandardROIHeads and a softmax over classes."
        )
    return model


def load_weights(model: Any, path: Path, detector: str) -> None:
    """Fills the model. Raises PairmillError: unreadable, Caffe2's names, another architecture or number of classes."""
    tensors = read_checkpoint(path).tensors
    caffe2 = [name for name in tensors if "." not in name and name.endswith(("_w", "_b"))]
    if caffe2:
        raise PairmillError(
            f"`{path}` has Caffe2's names ({first_names(caffe2)}): a backbone alone, or a model of Detectron 1, which "
            "are not read. Pass a file that detectron2 has written, model_final_*.pkl or .pth."
        )
    state = {k: v.float() for k, v in tensors.items() if not k.startswith(_LEFT_OUT)}
    found = len(require(state, _CLASS_SCORES, detector, path)) - 1
    if found != model.roi_heads.box_predictor.num_classes:
        raise PairmillError(
            f"`{path}` knows {found} classes, `{detector}` {model.roi_heads.box_predictor.num_classes}. Pass the "
            "configuration it was trained with, or a .yaml of your own: _BASE_ and MODEL.ROI_HEADS.NUM_CLASSES."
        )
    fill(model, state, detector, path)


def class_names(cfg: Any, path: Path) -> tuple[str, ...]:
    """Those beside the weights; those that detectron2 knows of the configuration's data; else class_0, class_1, ..."""
    from detectron2.data import MetadataCatalog

    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if (beside := vocabulary(path, "classes", count)) is not None:
        return beside
    for dataset in cfg.DATASETS.TEST:
        known = MetadataCatalog.get(dataset).get("thing_classes", ())
        if len(known) == count:
            return tuple(known)
    return tuple(f"class_{i}" for i in range(count))
