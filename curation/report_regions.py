"""A few pictures with the regions that a detector found in them, for a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from curation.thumbnails import MAX_CAPTION, groups_of, jpeg, stored_rows
from extractors.regions.draw import draw_regions, row_regions
from schemas.features import about
from schemas.status import OK
from shards.dataset import Dataset, Stage
from shards.images import ImageError, decode_rgb
from shards.reader import MappedShard
from shards.scan import starts

PICTURES = 6  # of a set
TRIED = 48  # rows
SIDE, MOST_BYTES = 400, 60_000
CONFIDENT = 0.5
MAX_SETS = 2


def region_pictures(dataset: Dataset, seed: int, most: int, row_groups: int) -> list[dict[str, Any]]:
    """Of each region set (two at most): boxes in the rows looked at, and pictures of its first shard that stands.

    At most `most` and six pictures a set, from at most so many `row_groups`; those with several boxes of confidence 0.5
    or more first. `data` is a JPEG in base64.
    """
    found: list[dict[str, Any]] = []
    for stage in dataset.stages():
        if stage.kind == "features" and len(found) < MAX_SETS and (done := sorted(stage.done())):
            one = _of_set(dataset, stage, done[0], seed, min(most, PICTURES), row_groups)
            if one is not None:
                found.append(one)
    return found


def _of_set(dataset: Dataset, stage: Stage, shard: int, seed: int, most: int, row_groups: int) -> dict[str, Any] | None:
    mapped = MappedShard(dataset.folder, stage.file(shard))
    if "boxes" not in mapped.schema.names:
        return None
    good = np.flatnonzero(np.array(mapped.states()) == OK)
    if not good.size or mapped.row(int(good[0]), ["boxes"])["boxes"] is None:
        return None
    boxes = np.array([mapped.row(r, ["num_boxes"])["num_boxes"] for r in good.tolist()])
    tried = np.random.default_rng(seed).permutation(good)[:TRIED].tolist()
    sure = {r: int((_confidences(mapped, r) >= CONFIDENT).sum()) for r in tried}
    ranked = sorted((r for r in tried if sure[r]), key=lambda r: sure[r] < 2)  # the seeded order stays in each half
    ranked = _near_each_other(dataset, shard, ranked, row_groups)[:most]
    return {
        "set": stage.name,
        "shard": shard,
        "rows": int(good.size),
        "boxes": {"minimum": int(boxes.min()), "median": float(np.median(boxes)), "maximum": int(boxes.max())},
        "pictures": [{**p, "boxes": sure[p["row"]]} for p in _pictures(dataset, mapped, shard, ranked)],
    }


def _near_each_other(dataset: Dataset, shard: int, rows: Sequence[int], most: int) -> list[int]:
    """The rows that lie in the first `most` row groups met, in order."""
    first = int(starts(dataset)[shard])
    groups = list(groups_of(dataset, [first + r for r in rows]).values())[:most]
    allowed = {n - first for group in groups for n in group}
    return [r for r in rows if r in allowed]


def _pictures(dataset: Dataset, mapped: MappedShard, shard: int, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """`shard`, `row`, `caption` and `data` of each row whose image decodes, in the dataset's order."""
    said = about(mapped.schema)
    for row, image, caption in stored_rows(dataset, shard, rows):
        boxes, labels, confidence = row_regions(mapped.row(row), said)
        try:
            rgb = decode_rgb(image)
        except ImageError:
            continue
        drawn = draw_regions(rgb, boxes, labels, confidence.tolist(), min_confidence=CONFIDENT, side_px=SIDE)
        data = jpeg(drawn, SIDE, MOST_BYTES)
        yield {"shard": shard, "row": row, "caption": (caption or "")[:MAX_CAPTION], "data": data}


def _confidences(mapped: MappedShard, row: int) -> np.ndarray:
    return row_regions(mapped.row(row, ["boxes", "det_conf"]), {})[2]
