"""One row's picture with its regions, from the shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from extractors.regions.draw import draw_regions, row_regions
from schemas.errors import PairmillError
from schemas.features import about
from schemas.status import OK
from shards.dataset import PAIRS, Dataset
from shards.files import atomic_file
from shards.images import decode_rgb, encode
from shards.reader import MappedShard, read_table


def row_picture(dataset: Dataset, shard: int, row: int, name: str, min_confidence: float) -> tuple[np.ndarray, int]:
    """(the picture with its boxes, uint8 [H, W, 3]; how many boxes of at least `min_confidence` the row has).

    Raises PairmillError: no such feature set, or a row without features, with its state.
    """
    stage = dataset.require(f"features/{name}")
    mapped = MappedShard(dataset.folder, stage.file(shard))
    if "boxes" not in mapped.schema.names:
        raise PairmillError(
            f"{dataset.url} {stage.path} holds no regions. Give --name of a set that `extract regions` made."
        )
    found = mapped.row(row)
    if found["state"] != OK:
        raise PairmillError(f"{dataset.url} row {shard}:{row} has no regions: its state is {found['state']}.")
    boxes, labels, confidence = row_regions(found, about(mapped.schema))
    image = read_table(dataset.folder, dataset.stage(PAIRS).file(shard), ["image"])["image"][row].as_py()
    drawn = draw_regions(decode_rgb(image), boxes, labels, confidence.tolist(), min_confidence=min_confidence)
    return drawn, int((confidence >= min_confidence).sum())


def draw_row(url: str, row: str, name: str, output: Path, min_confidence: float) -> int:
    """Writes the picture of row `N` or `S:N` as a PNG; how many boxes are that confident."""
    dataset = Dataset.open(url)
    shard, number = dataset.locate(row)
    picture, count = row_picture(dataset, shard, number, name, min_confidence)
    with atomic_file(Path(output)) as stream:
        stream.write(encode(picture, "png", 90))
    return count
