"""Datasets with scores for the tests of filter and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.config import StageConfig
from schemas.features import SCORES, VERSION, scores_schema
from schemas.pairs import pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_pairs, write_table

Row = Mapping[str, Any]


def uid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def write_dataset(path: str | Path, shards: Sequence[Sequence[Row]], carried: Sequence[pa.Field] = ()) -> Dataset:
    """Pairs from row dicts; a row's status defaults to success and its uid to its number."""
    folder = open_folder(path)
    dataset = Dataset(folder, new_manifest(max(map(len, shards)), [len(s) for s in shards]))
    stage = dataset.stage("pairs")
    stage.begin(make_sidecar("import", "pairs", ("pairs", 1), StageConfig()), "")
    number = 0
    for shard, rows in enumerate(shards):
        with write_pairs(folder, stage.file(shard), pairs_schema(carried)) as writer:
            for row in rows:
                writer.append({"uid": uid(number), "status": "success", **row})
                number += 1
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def write_scores(
    dataset: Dataset,
    name: str,
    columns: Mapping[str, Sequence[Any]],
    kind: pa.DataType | None = None,
    shards: Sequence[int] | None = None,
    model: str = "ViT-L-14",
) -> None:
    """A score set from columns over the whole dataset; `shards` writes only some of them."""
    fields = [pa.field(c, kind or pa.float32()) for c in columns]
    stage = dataset.stage(f"scores/{name}")
    config, schema = StageConfig(), scores_schema(fields)
    stage.begin(make_sidecar("score clip", name, (SCORES, VERSION), config, {"model": model}), "")
    start = 0
    for shard, rows in enumerate(dataset.manifest.shards):
        if shards is None or shard in shards:
            arrays = [
                pa.array(list(v[start : start + rows]), f.type) for v, f in zip(columns.values(), fields, strict=True)
            ]
            digest = dataset.stage("pairs").digest(shard)
            write_table(dataset.folder, stage.file(shard), pa.Table.from_arrays(arrays, schema=schema), {}, digest)
        start += rows


def numbered(rows: int, shards: int = 2, **columns: Sequence[Any]) -> list[list[Row]]:
    """`rows` rows in `shards` shards, with the given values of pair columns."""
    made = [{name: values[i] for name, values in columns.items()} for i in range(rows)]
    each = -(-rows // shards)
    return [made[i : i + each] for i in range(0, rows, each)]
