"""A dataset with everything on it, for the tests of commands that copy, check and tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.config import StageConfig
from schemas.events import silent
from schemas.sidecars import make_sidecar
from schemas.tasks import TASKS, VERSION, tasks_schema
from shards.dataset import Dataset
from shards.select import made_from, write_selection
from shards.writer import write_table
from tests.make import make_dataset
from tests.shards.toy import ToyConfig, size_scores, vectors

HERE = ToyConfig(workers=0)
CARRIED = [pa.field("License", pa.string()), pa.field("site.rank", pa.int64())]


def whole_dataset(path: Path | str, shards: int = 3, rows: int = 4, **options) -> Dataset:
    """Pairs with failures, several captions and carried columns; scores/size, features/vector; selection `best`."""
    options.setdefault("fail", {(0, 1): "timeout", (2, 0): "http_error"})
    options.setdefault("captions", {(1, 2): ["one", "two", "ünï\ncode"]})
    options.setdefault("carried", CARRIED)
    options.setdefault("carry", lambda s, r: {"License": "CC-BY" if r % 2 else None, "site.rank": s * 100 + r})
    dataset = make_dataset(path, shards=shards, rows=rows, **options)
    size_scores(dataset, HERE, silent)
    vectors(dataset, HERE, silent)
    return dataset


def select(dataset: Dataset, keep: list[int], name: str = "best") -> np.ndarray:
    """A selection that keeps these rows, counted over the dataset, and was made from scores/size."""
    mask = np.isin(np.arange(len(dataset)), keep)
    reasons = pa.array([None if k else "too small" for k in mask], pa.string())
    recipe = {
        "rules": [{"where": "size > 100"}],
        "funnel": [{"rule": "size > 100", "in": len(mask), "left": len(keep)}],
    }
    write_selection(dataset, name, mask, reasons, recipe, made_from(dataset, ["size"]))
    return mask


def write_tasks(dataset: Dataset, refs: list[list[tuple[int, int]]], name: str = "vqa") -> None:
    """A task set with one row for each list of (shard, row)."""
    stage = dataset.stage(f"tasks/{name}")
    stage.begin(make_sidecar("task import", name, (TASKS, VERSION), StageConfig()), "")
    rows = [
        {"id": str(i), "split": "train", "images": [{"shard": s, "row": r} for s, r in images], "text": f"what is {i}?"}
        for i, images in enumerate(refs)
    ]
    write_table(dataset.folder, stage.file(0), pa.Table.from_pylist(rows, schema=tasks_schema()), {"rows": len(rows)})


def all_rows(dataset: Dataset, path: str = "pairs") -> list[dict]:
    """Every row of a Parquet stage, in order."""
    from shards.reader import read_table

    stage = dataset.stage(path)
    return [row for s in sorted(stage.standing()) for row in read_table(dataset.folder, stage.file(s)).to_pylist()]


def all_features(dataset: Dataset, path: str) -> list[dict]:
    """Every row of a feature stage, in order, tensors as lists."""
    from shards.reader import MappedShard

    stage = dataset.stage(path)
    shards = [MappedShard(dataset.folder, stage.file(s)) for s in range(dataset.num_shards)]
    rows = [shard.row(i) for shard in shards for i in range(len(shard))]
    return [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]
