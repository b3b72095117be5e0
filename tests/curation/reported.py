"""A dataset with everything a report can show: scores of every kind, licences, regions, duplicates, a run beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.filter import make_selection
from curation.matches import put_matches
from curation.rules import Match
from schemas.config import StageConfig
from schemas.features import FEATURES, features_schema, region_fields
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset
from shards.select import read_selection, write_selection
from shards.writer import write_features
from tests.curation.scored import write_scores
from tests.make import encode, make_dataset, picture

SHARDS, ROWS = 3, 20
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
FAIL = {(0, 1): "timeout", (1, 3): "timeout", (2, 0): "not_image"}


def rich_dataset(path: str | Path) -> Dataset:
    """60 rows, all the optional parts, `EVIL` in every text that a stranger can choose."""
    made = make_dataset(
        path,
        shards=SHARDS,
        rows=ROWS,
        fail=FAIL,
        captions={(0, 0): [EVIL], (2, 2): ["b", "c"]},
        carried=[pa.field("license", pa.string())],
        carry=lambda s, r: {"license": [None, "CC BY 4.0", "CC0", EVIL][(s + r) % 4]},
    )
    numbers = range(SHARDS * ROWS)
    write_scores(made, "clip", {"clip_score": [i / 100 for i in numbers]})
    write_scores(made, "language", {"language": [("en", "de", EVIL)[i % 3] for i in numbers]}, pa.string())
    write_scores(made, "text", {"has_url": [i % 4 == 0 for i in numbers]}, pa.bool_())
    write_scores(made, "hash", {"phash": [i * 2**50 for i in numbers]}, pa.uint64())
    write_regions(made)
    make_selection(made, "best", [{"where": "clip_score >= 0.2"}, {"where": {"expr": "width > 50", "name": EVIL}}])
    return made


def write_regions(dataset: Dataset, classes: tuple[str, ...] = ("cat", EVIL)) -> None:
    """Three boxes a row, two of them sure, in every row with an image."""
    fields = region_fields(4, len(classes), "none")
    schema = features_schema(fields, {"classes": list(classes), "attributes": []})
    stage = dataset.stage("features/regions")
    stage.begin(make_sidecar("extract regions", "regions", (FEATURES, 1), StageConfig()), "")
    for shard in range(SHARDS):
        digest = dataset.stage("pairs").digest(shard)
        with write_features(dataset.folder, stage.file(shard), schema, digest) as writer:
            for row in range(ROWS):
                ok = (shard, row) not in FAIL
                writer.append({"state": "ok" if ok else FAIL[shard, row], **(_boxes() if ok else {})})


def _boxes() -> dict[str, Any]:
    return {
        "num_boxes": 3,
        "boxes": [[2, 2, 20, 20], [10, 10, 40, 40], [0, 0, 5, 5]],
        "features": np.zeros((3, 4), np.float16),
        "det_conf": [0.9, 0.6, 0.1],
        "obj_id": [0, 1, 0],
        "obj_conf": [0.9, 0.6, 0.1],
        "image_feat": np.zeros(4, np.float16),
    }


def put_duplicates(dataset: Dataset, name: str = "best") -> dict[str, tuple[Match, ...]]:
    """Gives a selection the matches of two rules, as `filter` writes them."""
    import pyarrow.parquet as pq

    found = {
        "dedup near": (
            Match(4, like=2, value=1.0, group=3),
            Match(5, like=2, value=3.0, group=3),
            Match(8, like=7, value=0.0, group=2),
        ),
        "decontaminate": (
            Match(9, other=f"coco {EVIL} 0:17", value=0.97, image=encode(picture(40, 30)), caption=EVIL),
            Match(11, other="coco 0:18", value=0.96, image=b"no picture", caption=None),
        ),
    }
    about = read_selection(dataset, name).about
    table = pq.read_table(dataset.folder.local / f"selections/{name}.parquet")
    keep = table["keep"].to_numpy()
    put = put_matches(dataset, name, found)
    results = {k: about[k] for k in ("funnel", "thresholds")} | {"matches": put}
    reasons = table["reason"].combine_chunks()
    write_selection(dataset, name, keep, reasons, about["recipe"], about["made_from"], results)
    return found


def write_run(folder: Path, steps: int = 50, name: str = "retrieval", **identity: Any) -> Path:
    """A training run with one evaluation, as JSON files."""
    (folder / "evaluations" / "x").mkdir(parents=True)
    lines = [{"step": i, "loss": 3 - i / 100, "itm_accuracy": 0.5 + i / 1000, "lr": 1e-3} for i in range(1, steps + 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 51, "lo'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "identity.json").write_text(json.dumps({"family": "vilt", **identity}))
    result = {"version": 1, "task": name, "split": "test", "dataset": {"name": "flickr"}, "metric": {"rsum": steps}}
    (folder / "evaluations" / "x" / "results.json").write_text(json.dumps(result))
    return folder
