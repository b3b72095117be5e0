"""Datasets for benchmarks, written as `import` and `download` write them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.photographs import jpegs
from schemas.config import StageConfig
from schemas.pairs import PAIRS, VERSION, pair_uid, pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_pairs

WIDTH, HEIGHT = 512, 384


def caption_of(number: int) -> str:
    """Nine words, one of them different."""
    return f"a picture of many shapes on a ground, number {number}"


def make_pairs(path: Path, sizes: Sequence[int], width: int = WIDTH, height: int = HEIGHT) -> Dataset:
    """Shards of `sizes` pairs with photograph-like JPEGs, 24 of them in turn, and captions that differ."""
    pictures = jpegs(width, height, min(24, sum(sizes)))
    folder = open_folder(path)
    dataset = Dataset(folder, new_manifest(max(sizes), list(sizes)))
    stage = dataset.stage(PAIRS)
    stage.begin(make_sidecar("import", PAIRS, (PAIRS, VERSION), StageConfig()), "")
    size = {"width": width, "height": height, "original_width": width, "original_height": height}
    hashes = [hashlib.sha256(picture).digest() for picture in pictures]
    for shard, rows in enumerate(sizes):
        first = sum(sizes[:shard])
        with write_pairs(folder, stage.file(shard), pairs_schema()) as writer:
            for number in range(first, first + rows):
                url, caption, which = f"http://example.com/{number}.jpg", caption_of(number), number % len(pictures)
                row = {"uid": pair_uid(url, caption), "url": url, "caption": caption, "attempts": 1}
                same = {"sha256": hashes[which], "stored_sha256": hashes[which]}
                writer.append({**row, "status": "success", "image": pictures[which], "format": "jpeg", **size, **same})
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)
