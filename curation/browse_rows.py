"""Single rows for looking: pictures in a bounded size, every column, boxes."""

from __future__ import annotations

import datetime
import threading
from typing import Any

import numpy as np

from curation.browse_columns import Memory
from curation.maintenance_config import ShowConfig
from curation.show import show
from extractors.regions.draw import row_regions
from schemas.features import about
from schemas.pairs import PAIRS
from schemas.status import OK
from shards.dataset import Dataset, Stage
from shards.images import ImageError, decode_rgb, encode
from shards.reader import MappedShard, group_rows, row_groups
from shards.transforms import resize

THUMBNAIL = 320  # longer side, px: a card on a screen of two pixels a point
LARGE = 1600  # longer side of a picture shown alone, px
THUMBNAIL_BYTES = 64 << 20
GROUPS_BYTES = 96 << 20  # row groups with images, about 16 MiB each
_THREADS = 2  # pictures decoded at once
MAX_LIST = 200  # values of a list that are told
_EXACT = 1 << 53  # JavaScript holds whole numbers up to here


class Pictures:
    """The images of a dataset as JPEGs of bounded size. What a stranger sent is decoded and encoded anew, never passed
    on.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._made = Memory(THUMBNAIL_BYTES)
        self._groups = Memory(GROUPS_BYTES)
        self._busy = threading.BoundedSemaphore(_THREADS)

    def thumbnail(self, row: int) -> bytes | None:
        """JPEG of at most 320 px; None where the row has no image that decodes. Kept in memory, at most 64 MiB."""
        return self._made.get(row, lambda: self._picture(row, THUMBNAIL, 80), lambda data: 64 + len(data or b""))

    def large(self, row: int) -> bytes | None:
        """JPEG of at most 1600 px; None where the row has no image that decodes."""
        return self._picture(row, LARGE, 90)

    def _picture(self, row: int, side: int, quality: int) -> bytes | None:
        with self._busy:
            data = self._stored(*self.dataset.locate(str(row)))
            return None if data is None else small_jpeg(data, side, quality)

    def _stored(self, shard: int, row: int) -> bytes | None:
        """The bytes of one image; reads its row group and holds a few of these."""
        folder, name = self.dataset.folder, self.dataset.stage(PAIRS).file(shard)
        sizes = self._groups.get(("sizes", shard), lambda: group_rows(folder, name), lambda s: 64 + 32 * len(s))
        ends = np.cumsum(sizes)
        group = int(np.searchsorted(ends, row, side="right"))

        def read() -> Any:
            return next(table for _, table in row_groups(folder, name, ["image"], [group]))["image"]

        column = self._groups.get((shard, group), read, lambda c: int(c.nbytes))
        return column[row - int(ends[group]) + sizes[group]].as_py()


def small_jpeg(data: bytes, side: int, quality: int) -> bytes | None:
    """The image with its longer side at most `side` px, never enlarged; None where it does not decode."""
    try:
        rgb = decode_rgb(data, shrink_to=(side, side))
    except ImageError:
        return None
    height, width = rgb.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        rgb = resize(rgb, max(1, round(width * scale)), max(1, round(height * scale)))
    return encode(rgb, "jpeg", quality)


def row_values(dataset: Dataset, row: int) -> dict[str, Any]:
    """Every column of the row but its image, scores and plain features beside, as values that JSON holds."""
    (found,) = show(dataset, ShowConfig(rows=(str(row),)))
    return {name: plain(value) for name, value in found.values.items()}


def plain(value: Any) -> Any:
    """A value for JSON: bytes in hex, times in ISO form, no NaN, long lists cut, great integers as text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, bytes):
        return value[:MAX_LIST].hex()
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, int):
        return value if abs(value) < _EXACT else str(value)
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in list(value)[:MAX_LIST]]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


def region_sets(dataset: Dataset) -> list[Stage]:
    """Feature sets that hold boxes."""
    found = []
    for stage in dataset.stages():
        standing = stage.standing() if stage.kind == "features" else set()
        if standing and "boxes" in MappedShard(stage.folder, stage.file(min(standing))).schema.names:
            found.append(stage)
    return found


def row_boxes(stages: list[Stage], row: int) -> list[dict[str, Any]]:
    """Boxes of the row in each set that has some: {"set": name, "boxes": [{"box", "label", "confidence"}]}.

    Boxes are x1 y1 x2 y2 in px of the stored image, exclusive maximum, the most confident first.
    """
    out = []
    for stage in stages:
        shard, at = stage.dataset.locate(str(row))
        if shard not in stage.standing():
            continue
        mapped = MappedShard(stage.folder, stage.file(shard))
        wanted = [n for n in ("state", "boxes", "det_conf", "obj_id", "attr_id") if n in mapped.schema.names]
        found = mapped.row(at, wanted)
        if found["state"] != OK:
            continue
        boxes, labels, conf = row_regions(found, about(mapped.schema))
        rows = zip(boxes.tolist(), labels, conf.tolist(), strict=True)
        listed = [{"box": box, "label": label, "confidence": c} for box, label, c in rows]
        out.append({"set": stage.name, "boxes": listed})
    return out
