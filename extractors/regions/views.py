"""What each model reads of a stored row of regions: no second copy on disk.

N boxes of a row, sorted by confidence, as `shards.reader.MappedShard.row` gives them; W and H are the stored image's.
A view takes the first n of them, so that any other column (`obj_id`, `attr_id`) is cut with [:n]. Features stay
float16, to be widened on the device; geometry is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from extractors.regions.selection import uniter_num_boxes
from schemas.errors import PairmillError

Array = np.ndarray
Row = Mapping[str, Any]

LXMERT_BOXES, VINVL_BOXES, VISUALBERT_BOXES = 36, 50, 100
VL_BERT_WAVES = 256
_SHARE, _LONGEST_WAVE = 100.0, 1000.0
_NOT_ZERO = 1e-5


def stored_boxes(row: Row) -> Array:
    """x1 y1 x2 y2, pixels of the stored image: float32 [N, 4], N may be 0."""
    return np.asarray(row["boxes"], np.float32).reshape(-1, 4)


def corners(boxes: Array, size: tuple[int, int]) -> Array:
    """x1/W, y1/H, x2/W, y2/H of boxes [n, 4] px: float32 [n, 4] (LXMERT, src/pretrain/lxmert_data.py).

    size  (height, width), px
    """
    height, width = size
    return boxes / np.array([width, height, width, height], np.float32)


def corners_and_sides(boxes: Array, size: tuple[int, int]) -> Array:
    """x1/W, y1/H, x2/W, y2/H, w/W, h/H with w = x2 - x1: float32 [n, 6].

    BUTD-UNITER-NLVR2, tools/generate_npz.py; UNITER stored it as float16. size (height, width), px.
    """
    whole = np.array([size[1], size[0]], np.float32)
    start, sides = boxes[:, :2] / whole, (boxes[:, 2:] - boxes[:, :2]) / whole
    return np.concatenate([start, start + sides, sides], 1)


def with_area(geometry: Array) -> Array:
    """`corners_and_sides` [n, 6] and w/W times h/H: float32 [n, 7] (UNITER, data/data.py _get_img_feat)."""
    geometry = geometry.astype(np.float32)
    return np.concatenate([geometry, geometry[:, 4:5] * geometry[:, 5:6]], 1)


def position_waves(boxes: Array, waves: int = VL_BERT_WAVES) -> Array:
    """Sines and cosines of where boxes lie: float32 [n, 8 x waves] (VL-BERT, common/utils/bbox.py).

    boxes  [n, 6]: x1 y1 x2 y2 W H, px
    For each of centre x, centre y, width and height, in percent of the image's, first `waves` sines, then as many
    cosines of value / 1000^(i / waves).
    """
    boxes = boxes.astype(np.float32)
    whole = np.concatenate([boxes[:, 4:], boxes[:, 4:]], 1)
    centres, sides = (boxes[:, :2] + boxes[:, 2:4]) / 2, boxes[:, 2:4] - boxes[:, :2]
    percent = np.concatenate([centres, sides], 1) / whole * np.float32(_SHARE)
    lengths = np.float32(_LONGEST_WAVE) ** (np.arange(waves, dtype=np.float32) / np.float32(waves))
    angles = percent[:, :, None] / lengths
    return np.concatenate([np.sin(angles), np.cos(angles)], 2).reshape(len(boxes), 8 * waves)


def vl_bert_resized(boxes: Array, size: tuple[int, int], shorter: int = 600, longer: int = 1000) -> tuple[Array, Array]:
    """(float32 [n, 4] in pixels of the image that VL-BERT sees, [W, H, its ratio across, its ratio down] float32).

    pretrain/data/transforms/transforms.py Resize: sides are cut down to whole pixels, so that the ratios differ.
    """
    height, width = size
    short = shorter
    if max(size) / min(size) * shorter > longer:
        short = int(longer * min(size) / max(size))
    new = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    ratios = (new[0] / width, new[1] / height)
    return boxes * np.array(ratios * 2, np.float32), np.array([*new, *ratios], np.float32)


def mirrored(boxes: Array, width: float) -> Array:
    """Boxes [n, 4] of the mirrored image, whose columns are 0 to width - 1 (VL-BERT, RandomHorizontalFlip)."""
    return np.stack([width - 1 - boxes[:, 2], boxes[:, 1], width - 1 - boxes[:, 0], boxes[:, 3]], 1)


def class_probs(row: Row, classes: int) -> Array:
    """Probabilities of the background and `classes` foreground classes: float32 [N, classes + 1].

    Where only the best K were stored, what is left of 1 is spread evenly over the others.
    Raises PairmillError: the row has none.
    """
    if "cls_probs" in row:
        return np.asarray(row["cls_probs"], np.float32)
    if "cls_topk_p" not in row:
        raise PairmillError(
            "These regions have no class probabilities, which the objective needs. Run `extract regions` with "
            "--cls-probs full or topk:K under another --name."
        )
    best = np.asarray(row["cls_topk_p"], np.float32)
    background = np.asarray(row["bg_p"], np.float32)
    left = (1 - background - best.sum(1)).clip(0)
    out: Array = np.repeat((left / max(classes - best.shape[1], 1))[:, None], classes + 1, 1)
    out[:, 0] = background
    np.put_along_axis(out, np.asarray(row["cls_topk_idx"], np.int64) + 1, best, 1)
    return out


def _confidence(row: Row) -> Array:
    """float32 [N]; all of an imported set that has none count as sure."""
    conf = row["det_conf"]
    return np.ones(row["num_boxes"], np.float32) if conf is None else np.asarray(conf, np.float32)


def uniter(
    row: Row, size: tuple[int, int], conf: float = 0.2, min_boxes: int = 10, max_boxes: int = 100
) -> tuple[Array, Array]:
    """UNITER: (features float16 [n, D], geometry float32 [n, 7]), n boxes with confidence > conf, within limits."""
    boxes = stored_boxes(row)
    count = uniter_num_boxes(_confidence(row), conf, min_boxes, max_boxes)
    return row["features"][:count], with_area(corners_and_sides(boxes[:count], size))


def visualbert(row: Row, max_boxes: int = VISUALBERT_BOXES) -> Array:
    """VisualBERT: features float16 [n, D] of the first max_boxes: 100 for VQA, 144 an image for NLVR2."""
    features: Array = row["features"]
    return features[:max_boxes]


def with_geometry(row: Row, size: tuple[int, int], max_boxes: int = VINVL_BOXES) -> Array:
    """VinVL and Oscar, and VisualBERT on Flickr30k: features and `corners_and_sides`, float32 [n, D + 6].

    The first max_boxes: 50 for VQA, 40 for NLVR2 (Oscar).
    """
    features = row["features"][:max_boxes].astype(np.float32)
    return np.concatenate([features, corners_and_sides(stored_boxes(row)[:max_boxes], size)], 1)


def lxmert(row: Row, size: tuple[int, int], boxes: int = LXMERT_BOXES) -> tuple[Array, Array, Array]:
    """LXMERT: (features float16 [boxes, D], `corners` float32 [boxes, 4], mask bool [boxes], False = padding of 0)."""
    given: Array = row["features"][:boxes]
    count = len(given)
    features: Array = np.zeros((boxes, given.shape[1]), given.dtype)
    geometry: Array = np.zeros((boxes, 4), np.float32)
    features[:count], geometry[:count] = given, corners(stored_boxes(row)[:count], size)
    return features, geometry, np.arange(boxes) < count


def vl_bert(
    row: Row,
    size: tuple[int, int],
    conf: float = 0.2,
    min_boxes: int = 10,
    max_boxes: int = 100,
    *,
    masked: Array | None = None,
    stored_image: bool = False,
) -> tuple[Array, Array]:
    """VL-BERT: (features float32 [n + 1, D], boxes float32 [n + 1, 6]: x1 y1 x2 y2 W H, px, for `position_waves`).

    The whole image, 0 0 W-1 H-1, comes first, and boxes are cut to it (pretrain/data/datasets/conceptual_captions.py).
    Its feature is the mean of the n that are not `masked`, bool [n], with 1e-5 in the divisor, or with stored_image
    the detector's own (`image_feat`). n as UNITER's.
    """
    height, width = size
    count = uniter_num_boxes(_confidence(row), conf, min_boxes, max_boxes)
    features = row["features"][:count].astype(np.float32)
    if stored_image:
        image = row["image_feat"].astype(np.float32)
    else:
        seen = features if masked is None else features[~masked]
        image = seen.sum(0) / np.float32(len(seen) + _NOT_ZERO)
    whole = np.array([width - 1, height - 1, width - 1, height - 1], np.float32)
    boxes = np.concatenate([np.array([[0, 0, *whole[2:]]], np.float32), stored_boxes(row)[:count].clip(0, whole)])
    sizes: Array = np.full((len(boxes), 2), (width, height), np.float32)
    return np.concatenate([image[None], features]), np.concatenate([boxes, sizes], 1)
