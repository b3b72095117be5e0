"""Which proposals are kept, and the columns that are stored of them.

The rule is that of bottom-up attention (tools/generate_tsv.py, get_detections_from_im): a box's confidence is
the highest foreground score with which it survives non-maximum suppression among all boxes of that class.
Beside it stand the rules of other public forms, for reproducing their files: airsplay's two, UNITER's and
VisualBERT's row counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from extractors.regions.config import RegionsConfig
from extractors.regions.protocol import Proposals

Array = np.ndarray

# Pairs of box and class are sorted band by band: most images never need the lower ones.
_BANDS = (1e-2, 1e-4, 0.0)


def overlaps(boxes: Array, inclusive: bool = False) -> Array:
    """Intersection over union of each two of boxes [R, 4] px: float64 [R, R]; inclusive: widths are x2 - x1 + 1."""
    x1, y1, x2, y2 = boxes.astype(np.float64).T
    if inclusive:
        x2, y2 = x2 + 1, y2 + 1
    area = (x2 - x1) * (y2 - y1)
    width = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
    height = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
    shared = width.clip(0) * height.clip(0)
    # Divided, as the originals do: at exact equality a product rounds to the other side.
    found: Array = shared / np.maximum(area[:, None] + area - shared, np.finfo(np.float64).tiny)
    return found


def _suppressed(boxes: Array, nms: float, inclusive: bool, suppress_equal: bool) -> list[int]:
    """Per box a bit mask of the boxes that it suppresses, itself among them."""
    iou = overlaps(boxes, inclusive)
    over = iou >= nms if suppress_equal else iou > nms
    np.fill_diagonal(over, True)
    packed = np.packbits(over, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _descending(scores: Array) -> Iterator[tuple[int, int, float]]:
    """(box, class, score) of float32 [R, C] from the highest score down, scores of 0 left out."""
    above = np.inf
    for floor in _BANDS:
        rows, classes = np.nonzero((scores < above) & (scores >= floor) & (scores > 0))
        values = scores[rows, classes]
        order = np.argsort(-values, kind="stable")
        yield from zip(rows[order].tolist(), classes[order].tolist(), values[order].tolist(), strict=True)
        above = floor


def max_confidence(
    boxes: Array,
    class_probs: Array,
    nms: float = 0.3,
    *,
    inclusive: bool = False,
    suppress_equal: bool = False,
    conf: float = 0.0,
    min_boxes: int | None = None,
    max_boxes: int | None = None,
) -> Array:
    """Highest foreground score with which each box survives its class's suppression, float32 [R]; 0: never.

    boxes           [R, 4] px
    class_probs     [R, C+1], background first
    inclusive       widths are x2 - x1 + 1 (Caffe's)
    suppress_equal  an overlap of exactly `nms` suppresses too (Caffe's cpu_nms; py_cpu_nms and torchvision: not)

    Given `min_boxes` and `max_boxes` it stops as soon as `keep_boxes` with the same limits has its answer:
    confidences come out in descending order, so the boxes not reached yet could not change it.
    """
    count = len(boxes)
    found: Array = np.zeros(count, np.float32)
    low = count if min_boxes is None else min(min_boxes, count)
    high = count if max_boxes is None else min(max_boxes, count)
    masks = _suppressed(boxes, nms, inclusive, suppress_equal)
    dead: dict[int, int] = {}
    reached = 0
    for box, label, score in _descending(class_probs[:, 1:]):
        if reached >= high or (reached >= low and score < conf):
            break
        gone = dead.get(label, 0)
        if gone >> box & 1:
            continue
        dead[label] = gone | masks[box]
        if found[box] == 0:
            found[box] = score
            reached += 1
    return found


def keep_boxes(
    confidence: Array, conf: float = 0.2, min_boxes: int = 10, max_boxes: int = 100, *, by_confidence: bool = True
) -> Array:
    """Indices int64 of the boxes to keep.

    Those with confidence >= conf; where they are fewer than min_boxes, the most confident min_boxes; where
    more than max_boxes, the most confident max_boxes. Sorted by confidence, ties in proposal order, which is
    what every consumer that truncates needs; with by_confidence=False in the original's order: by confidence
    only where a limit was hit, else in proposal order.
    """
    order = np.argsort(-confidence, kind="stable")
    passed = int((confidence >= conf).sum())
    if passed < min_boxes:
        return order[:min_boxes]
    if passed > max_boxes:
        return order[:max_boxes]
    return order[:passed] if by_confidence else np.flatnonzero(confidence >= conf)


def best_class_boxes(regressed: Array, class_probs: Array, image_size: tuple[int, int]) -> tuple[Array, Array]:
    """Each proposal's box for its best foreground class, clipped: ([R, 4] px, class int64 [R], 0-based).

    regressed   [R, C*4], foreground classes only
    image_size  (height, width), px
    """
    labels = class_probs[:, 1:].argmax(1)
    boxes = regressed.reshape(len(regressed), -1, 4)[np.arange(len(regressed)), labels]
    return clip(boxes, image_size), labels


def clip(boxes: Array, image_size: tuple[int, int]) -> Array:
    """Boxes [..., 4] cut to 0..width and 0..height."""
    height, width = image_size
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


def max_nms(boxes: Array, scores: Array, min_boxes: int = 36, max_boxes: int = 36) -> tuple[Array, float]:
    """airsplay's "maxnms" (demo/detectron2_mscoco_proposal_maxnms.py): (kept indices, the overlap it took).

    One suppression over all classes, at 0.3, then 0.4, ... 0.9 until min_boxes are left; the first max_boxes
    by score. boxes [R, 4] px and scores [R] of each proposal's best class.
    """
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    threshold = 0.0
    for threshold in np.arange(0.3, 1.0, 0.1).tolist():
        masks = _suppressed(boxes, threshold, False, False)
        kept, dead = [], 0
        for box in order.tolist():
            if not dead >> box & 1:
                kept.append(box)
                dead |= masks[box]
        if len(kept) >= min_boxes:
            break
    return np.array(kept[:max_boxes], np.int64), threshold


def per_class_detections(
    regressed: Array,
    class_probs: Array,
    image_size: tuple[int, int],
    max_boxes: int,
    conf: float = 0.2,
    nms: float = 0.5,
) -> tuple[Array, Array, Array]:
    """airsplay's notebook rule (detectron2 fast_rcnn_inference_single_image): (proposal, class, score), each [K].

    Pairs of box and class with score > conf, suppressed per class, the max_boxes highest scores; a proposal
    may come several times. regressed [R, C*4] px, class_probs [R, C+1].
    """
    boxes = clip(regressed.reshape(len(regressed), -1, 4), image_size)
    rows, labels = np.nonzero(class_probs[:, 1:] > conf)
    scores = class_probs[rows, labels + 1]
    kept = batched_nms(torch.from_numpy(boxes[rows, labels]), torch.from_numpy(scores), torch.from_numpy(labels), nms)[
        :max_boxes
    ].numpy()
    return rows[kept], labels[kept], scores[kept]


def uniter_num_boxes(confidence: Array, conf: float = 0.2, min_boxes: int = 10, max_boxes: int = 100) -> int:
    """How many rows UNITER reads (data/data.py compute_num_bb): those with confidence > conf, within limits."""
    return int(min(max_boxes, max(min_boxes, (confidence > conf).sum())))


def visualbert_rows(
    confidence: Array, confidence_cap: float | None = None, min_cap: int | None = None, max_cap: int | None = None
) -> Array:
    """The rows that VisualBERT keeps (bert_data_utils.py screen_feature), int64.

    Rows with confidence >= confidence_cap; the first min_cap of all rows where fewer are left, the first
    max_cap of all rows where more are: right only for rows sorted by confidence.
    """
    rows = np.arange(len(confidence))
    kept = rows if confidence_cap is None else rows[confidence >= confidence_cap]
    if min_cap is not None and len(kept) < min_cap:
        kept = rows[:min_cap]
    return rows[:max_cap] if max_cap is not None and len(kept) > max_cap else kept


def rows_from_proposals(
    proposals: Proposals, config: RegionsConfig, *, given: bool = False, inclusive: bool = False
) -> dict[str, Any]:
    """One image's stored columns, N boxes sorted by confidence (`given` boxes: all, in the given order).

    num_boxes N; boxes float32 [N, 4]; features float16 [N, D]; det_conf float32 [N]; obj_id int32 [N], 0-based
    foreground; obj_conf float32 [N]; where the detector knows attributes attr_id int32 and attr_conf float32
    [N]; cls_probs float16 [N, C+1], or cls_topk_idx int32 and cls_topk_p float16 [N, K] (0-based foreground) with
    bg_p float32 [N], or none of them; image_feat float16 [D]. `inclusive` boxes overlap as Caffe counts them.
    """
    boxes = proposals.boxes
    if config.box_source == "regressed" and proposals.regressed is not None:
        boxes = proposals.regressed
    probs = proposals.class_probs.float().cpu().numpy()
    at = boxes.float().cpu().numpy()
    if given:
        kept, confidence = np.arange(len(at)), probs[:, 1:].max(1, initial=0)
    else:
        conf, low, high = config.conf, config.min_boxes, config.max_boxes
        counting = {"inclusive": inclusive, "suppress_equal": inclusive}
        confidence = max_confidence(at, probs, config.nms, **counting, conf=conf, min_boxes=low, max_boxes=high)
        kept = keep_boxes(confidence, conf, low, high)
    rows: dict[str, Any] = {
        "num_boxes": len(kept),
        "boxes": at[kept],
        "features": _half(proposals.features, kept),
        "det_conf": confidence[kept],
        "image_feat": proposals.image_feature.cpu().numpy().astype(np.float16),
    }
    foreground = probs[kept, 1:]
    rows |= {"obj_id": foreground.argmax(1).astype(np.int32), "obj_conf": foreground.max(1, initial=0)}
    if proposals.attribute_probs is not None:
        attributes = proposals.attribute_probs.float().cpu().numpy()[kept, 1:]
        rows |= {"attr_id": attributes.argmax(1).astype(np.int32), "attr_conf": attributes.max(1, initial=0)}
    return rows | _stored_probs(probs[kept], config)


def _half(tensor: Tensor, kept: Array) -> Array:
    return tensor[torch.from_numpy(kept).to(tensor.device)].half().cpu().numpy()


def _stored_probs(probs: Array, config: RegionsConfig) -> dict[str, Any]:
    if config.cls_probs == "full":
        return {"cls_probs": probs.astype(np.float16)}
    if not config.top_classes:
        return {}
    top = np.argsort(-probs[:, 1:], axis=1, kind="stable")[:, : config.top_classes]
    return {
        "cls_topk_idx": top.astype(np.int32),
        "cls_topk_p": np.take_along_axis(probs[:, 1:], top, 1).astype(np.float16),
        "bg_p": probs[:, 0],
    }
