"""Small datasets for tests, written with the core's own writers. Equal arguments give equal bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from schemas.config import StageConfig
from schemas.pairs import PAIRS, VERSION, pair_uid, pairs_schema
from schemas.sidecars import make_sidecar
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_pairs

At = tuple[int, int]  # (shard, row)
# (width, height) in px
SIZES: tuple[tuple[int, int], ...] = (
    (64, 48),
    (48, 64),
    (80, 60),
    (64, 64),
    (100, 40),
)  # (width, height) in px
COLOURS = {"red": (200, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 210), "yellow": (220, 200, 40)}


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: a coloured block on a noisy ground; the block's colour is `colour_name(seed)`."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 150, (height, width, 3)).astype(np.uint8)
    top, left = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
    pixels[top : top + height // 2, left : left + width // 2] = COLOURS[colour_name(seed)]
    return pixels


def colour_name(seed: int) -> str:
    return list(COLOURS)[seed % len(COLOURS)]


def encode(pixels: np.ndarray, kind: str = "jpeg") -> bytes:
    """The pixels as a JPEG, PNG or WebP file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind.upper())
    return out.getvalue()


def make_dataset(
    path: str | Path,
    shards: int = 2,
    rows: int = 8,
    fail: Mapping[At, str] | None = None,
    corrupt: Collection[At] = (),
    no_caption: Collection[At] = (),
    captions: Mapping[At, Sequence[str]] | None = None,
    image: Callable[[int, int], np.ndarray] | None = None,
    kind: str = "jpeg",
    carried: Sequence[pa.Field] = (),
    carry: Callable[[int, int], Mapping[str, Any]] | None = None,
) -> Dataset:
    """A dataset of `shards` x `rows` pairs with pictures of several sizes.

    fail        (shard, row) -> status: the row has no image
    corrupt     stored bytes that are no image, though the row's status is success
    no_caption  rows without a caption
    captions    rows with several captions
    image       (shard, row) -> uint8 [H, W, 3] instead of `picture`
    carried     fields of the user's own columns, `carry(shard, row)` their values
    """
    fail, captions = fail or {}, captions or {}
    folder = open_folder(path)
    dataset = Dataset(folder, new_manifest(rows, [rows] * shards))
    stage = dataset.stage(PAIRS)
    stage.begin(make_sidecar("import", PAIRS, (PAIRS, VERSION), StageConfig()), "")
    for shard in range(shards):
        with write_pairs(folder, stage.file(shard), pairs_schema(carried)) as writer:
            for row in range(rows):
                at = (shard, row)
                seed = shard * rows + row
                texts = captions.get(at)
                caption = (
                    None if at in no_caption else texts[0] if texts else f"a {colour_name(seed)} block, number {seed}"
                )
                one = _row(f"http://example.com/{seed}.jpg", caption, texts, fail.get(at))
                if at not in fail:
                    pixels = image(shard, row) if image else picture(*SIZES[seed % len(SIZES)], seed)
                    data = b"\xff\xd8\xff no image" + bytes(40) if at in corrupt else encode(pixels, kind)
                    one |= _image(data, pixels, kind)
                writer.append(one | dict(carry(shard, row) if carry else {}))
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def _row(url: str, caption: str | None, captions: Sequence[str] | None, status: str | None) -> dict[str, Any]:
    return {
        "uid": pair_uid(url, caption),
        "url": None if status == NO_IMAGE else url,
        "caption": caption,
        "captions": list(captions) if captions else None,
        "status": status or SUCCESS,
        "error": f"test: {status}" if status else None,
        "attempts": 1,
    }


def _image(data: bytes, pixels: np.ndarray, kind: str) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(data).digest()
    size = {"width": width, "height": height, "original_width": width, "original_height": height}
    return {"image": data, "format": kind, "sha256": digest, "stored_sha256": digest, **size}
