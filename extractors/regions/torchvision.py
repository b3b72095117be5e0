"""Region detectors from torchvision: `torchvision:NAME`, and `torchvision:tiny`, which brings its weights."""

from __future__ import annotations

import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import clip_boxes_to_image

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Proposals
from extractors.regions.tiny import TRAINED_PX, build_tiny
from extractors.regions.weights import fill, require, vocabulary
from schemas.errors import PairmillError, suggest
from shards.files import hash_file
from shards.weights import read_checkpoint

NAMES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
)
TINY = "tiny"
_TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")
# What region features are pooled from in the field (bottom-up attention): 300 proposals, 600 x 1000 px.
_PROPOSALS, _SHORTER_PX = 300, 600


class TorchvisionDetector:
    """A torchvision Faster R-CNN as a `protocol.Detector`.

    The network is run part by part (transform, backbone, rpn, box_roi_pool, box_head, box_predictor) because
    its own forward pass does not say which proposal a detection came from (pytorch/vision#4309). Images are
    batched with images of the same padded size only: torchvision pads to the largest of a batch, and what is
    padded leaks into the borders.

    Raises PairmillError: an unknown NAME, weights that are missing, unreadable or of another architecture.
    """

    attributes: tuple[str, ...] = ()
    inclusive = False

    def __init__(self, config: RegionsConfig) -> None:
        name = config.detector.removeprefix("torchvision:")
        if name not in (TINY, *NAMES):
            raise PairmillError(
                f"`--detector {config.detector}`: torchvision has no region detector of that name."
                f"{suggest(name, (TINY, *NAMES))} Known: {', '.join((TINY, *NAMES))}."
            )
        path = weights_file(name, config.weights)
        digest = hash_file(path)
        self.model = _load(name, path, digest, config).eval()
        self.classes = _class_names(self.model, path)
        with torch.inference_mode():
            pooled = self._fix_scales()
        self.feature_dim = int(pooled.shape[1])
        (shorter,), longer = self.model.transform.min_size, self.model.transform.max_size
        proposals = self.model.rpn.post_nms_top_n()
        self.fingerprint = f"{config.detector}:{digest}:{shorter}x{longer}:{proposals}"

    def to(self, device: torch.device | str) -> TorchvisionDetector:
        """Move the weights; returns self."""
        self.model.to(device)
        return self

    def prepare(self, rgb: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> uint8 [3, H, W]: torchvision resizes on the device."""
        return torch.from_numpy(rgb.transpose(2, 0, 1).copy("C"))

    def propose(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Proposals]:
        """Boxes of the region proposal network. images: uint8 [3, H, W] RGB, any sizes."""
        return self._run(images, None)

    def describe(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Proposals]:
        """Features and probabilities of given boxes, fp32 [R, 4] px per image; `regressed` is None."""
        return self._run(images, boxes)

    @torch.inference_mode()
    def _run(self, images: Sequence[Tensor], boxes: Sequence[Tensor] | None) -> list[Proposals]:
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(self.key(*image.shape[-2:]), []).append(i)
        found: dict[int, Proposals] = {}
        for members in groups.values():
            prepared = [self._prepare(images[i]) for i in members]
            tensors = torch.cat([padded for padded, _ in prepared])
            sizes = [size for _, size in prepared]
            given = None if boxes is None else [boxes[i] for i in members]
            originals = [(int(images[i].shape[1]), int(images[i].shape[2])) for i in members]
            found |= dict(zip(members, self._run_group(tensors, sizes, originals, given), strict=True))
        return [found[i] for i in range(len(images))]

    def _prepare(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [3, H, W] -> normalised, resized, padded [1, 3, h, w] and its (height, width) unpadded.

        GeneralizedRCNNTransform's arithmetic; its own resize fails where a side would come out as 0 px.
        """
        transform = self.model.transform
        device = next(self.model.parameters()).device
        normal = transform.normalize(image.to(device, torch.float32) / 255)
        size = self._size(*image.shape[-2:])
        resized = F.interpolate(normal[None], size=size, mode="bilinear", align_corners=False)
        return transform.batch_images([resized[0]], transform.size_divisible), size

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in px at which an image of that size is seen."""
        shortest, longest = self.model.transform.min_size[-1], self.model.transform.max_size
        scale = min(shortest / min(height, width), longest / max(height, width))
        return max(1, int(height * scale)), max(1, int(width * scale))

    def key(self, height: int, width: int) -> tuple[int, int]:
        """The padded size at which an image of that size is seen, (height, width) in px."""
        step = self.model.transform.size_divisible
        seen = self._size(height, width)
        return -(-seen[0] // step) * step, -(-seen[1] // step) * step

    def _run_group(
        self,
        tensors: Tensor,
        sizes: list[tuple[int, int]],
        originals: list[tuple[int, int]],
        given: list[Tensor] | None,
    ) -> list[Proposals]:
        """One padded batch [B, 3, h, w]; sizes and originals are (height, width) as seen and as given."""
        features = _maps(self.model.backbone(tensors))
        if given is None:
            at, _ = self.model.rpn(ImageList(tensors, sizes), features, None)
        else:
            at = [
                resize_boxes(b.to(tensors.device, torch.float32), o, s)
                for b, o, s in zip(given, originals, sizes, strict=True)
            ]
        whole = [torch.tensor([[0.0, 0.0, w, h]], device=tensors.device) for h, w in sizes]
        rois = [torch.cat([boxes.float(), box]) for boxes, box in zip(at, whole, strict=True)]
        pooled = self.model.roi_heads.box_head(self.model.roi_heads.box_roi_pool(features, rois, sizes)).float()
        logits, deltas = self.model.roi_heads.box_predictor(pooled)
        probs = logits.float().softmax(-1)
        refined = self._refine(deltas.float(), rois, probs)
        counts = [len(r) for r in rois]
        parts = zip(rois, pooled.split(counts), probs.split(counts), refined.split(counts), strict=True)
        return [
            _proposals(*part, size, original, given is None)
            for part, size, original in zip(parts, sizes, originals, strict=True)
        ]

    def _refine(self, deltas: Tensor, rois: list[Tensor], probs: Tensor) -> Tensor:
        """Every RoI's box regressed for its best foreground class, [sum R, 4], pixels as seen."""
        boxes = self.model.roi_heads.box_coder.decode(deltas, rois)
        best = probs[:, 1:].argmax(1) + 1
        return boxes[torch.arange(len(boxes), device=boxes.device), best]

    def _fix_scales(self) -> Tensor:
        """Pool one box of a square image; its feature, [1, D].

        The pooler infers its maps' strides from the first image it sees: a very narrow one would mislead it.
        """
        features = _maps(self.model.backbone(torch.zeros(1, 3, 64, 64)))
        box = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
        return self.model.roi_heads.box_head(self.model.roi_heads.box_roi_pool(features, [box], [(64, 64)]))


def _maps(features: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else features


def _proposals(
    rois: Tensor,
    pooled: Tensor,
    probs: Tensor,
    refined: Tensor,
    size: tuple[int, int],
    original: tuple[int, int],
    proposed: bool,
) -> Proposals:
    """Take the last row, the whole image, apart; boxes back to pixels of the image that was given."""
    refined = clip_boxes_to_image(resize_boxes(refined[:-1], size, original), original)
    boxes = resize_boxes(rois[:-1], size, original)
    return Proposals(
        boxes=clip_boxes_to_image(boxes, original) if proposed else boxes,
        features=pooled[:-1],
        class_probs=probs[:-1],
        image_feature=pooled[-1],
        regressed=refined if proposed else None,
    )


def weights_file(name: str, weights: str | None) -> Path:
    """The file that `--weights` means for `torchvision:name`.

    DEFAULT is torchvision's own file, from torch.hub's cache, else downloaded there.
    Raises PairmillError: none given, no such file, or no network to fetch it.
    """
    if name == TINY and weights in (None, "DEFAULT"):
        return _TINY_WEIGHTS
    if weights is None:
        raise PairmillError(
            f"`torchvision:{name}` needs weights. Pass --weights FILE, or --weights DEFAULT for torchvision's own."
        )
    if weights == "DEFAULT":
        return _hub_file(name)
    path = Path(weights)
    if not path.is_file():
        raise PairmillError(f"`--weights {weights}`: no such file. Pass a .safetensors, .pth or .pt file.")
    return path


def _hub_file(name: str) -> Path:
    url = get_model_weights(name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_hub_hash(url), progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise PairmillError(
            f"`--weights DEFAULT`: {url} could not be fetched ({error}). "
            f"Fetch it on a machine with a network and pass --weights FILE, or put it at {path}."
        ) from None
    return path


def _hub_hash(url: str) -> str:
    """The first digits of the file's sha256, which torchvision's file names end in."""
    return Path(url).stem.rsplit("-", 1)[1]


def _load(name: str, path: Path, digest: str, config: RegionsConfig) -> FasterRCNN:
    state = {k: v.float() if v.is_floating_point() else v for k, v in read_checkpoint(path).tensors.items()}
    model = _build_tiny(path, state, config) if name == TINY else _build(name, path, state, config)
    fill(model, state, f"torchvision:{name}", path)
    if _is_first_coco_file(name, digest):
        _set_epsilon(model, 0.0)
    return model


def _is_first_coco_file(name: str, digest: str) -> bool:
    """Whether the file is one of the two that torchvision itself runs with a batch norm epsilon of 0."""
    if name not in ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"):
        return False
    return digest.startswith(_hub_hash(get_model_weights(name).COCO_V1.url))


def _set_epsilon(model: FasterRCNN, epsilon: float) -> None:
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = epsilon


def _build(name: str, path: Path, state: Mapping[str, Tensor], config: RegionsConfig) -> FasterRCNN:
    classes = len(require(state, "roi_heads.box_predictor.cls_score.weight", f"torchvision:{name}", path))
    shorter = config.size or _SHORTER_PX
    return get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=classes,
        min_size=shorter,
        max_size=5 * shorter // 3,
        rpn_post_nms_top_n_test=config.proposals or _PROPOSALS,
    )


def _build_tiny(path: Path, state: Mapping[str, Tensor], config: RegionsConfig) -> FasterRCNN:
    shapes = len(require(state, "roi_heads.box_predictor.shape.weight", f"torchvision:{TINY}", path)) - 1
    colours = len(require(state, "roi_heads.box_predictor.colour.weight", f"torchvision:{TINY}", path))
    return build_tiny(shapes, colours, config.size or TRAINED_PX, config.proposals or 100)


def _class_names(model: FasterRCNN, path: Path) -> tuple[str, ...]:
    """From `classes` of the JSON file beside the weights; COCO's for its 90; else class_0, class_1, ..."""
    with torch.inference_mode():
        count = model.roi_heads.box_predictor(torch.zeros(1, _head_width(model)))[0].shape[1] - 1
    named = vocabulary(path, "classes", count)
    if named is not None:
        return named
    coco = get_model_weights(NAMES[0]).DEFAULT.meta["categories"][1:]
    return tuple(coco) if count == len(coco) else tuple(f"class_{i}" for i in range(count))


def _head_width(model: FasterRCNN) -> int:
    return next(m.in_features for m in model.roi_heads.box_predictor.modules() if hasattr(m, "in_features"))
