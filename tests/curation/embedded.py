"""Embeddings for datasets of tests, as `score clip` would write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from schemas.config import StageConfig
from schemas.features import FEATURES, VERSION, clip_embedding_fields, features_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset
from shards.writer import write_features


class InMemory:
    """`Vectors` of an array [n, dim]."""

    def __init__(self, array: Any) -> None:
        self.array = np.asarray(array)
        self.dim = self.array.shape[1]

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.array[rows]


def unit_vectors(rng: np.random.Generator, rows: int, dim: int, groups: int = 4, spread: float = 0.3) -> np.ndarray:
    """fp16 [rows, dim] around a few directions, some rows equal to others bit for bit."""
    centres = rng.normal(size=(groups, dim))
    made = centres[rng.integers(groups, size=rows)] + spread * rng.normal(size=(rows, dim))
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)
    twins = rng.random(rows) < 0.2
    made[twins] = made[rng.integers(rows, size=int(twins.sum()))]
    return made


def write_embeddings(
    dataset: Dataset,
    vectors: Sequence[np.ndarray | None],
    name: str = "clip",
    weights: str = "w" * 64,
    absent: str = "decode_error",
    shards: Sequence[int] | None = None,
    identity: dict[str, Any] | None = None,
) -> None:
    """`features/NAME` from vectors over the whole dataset; a row that is None has the state `absent`."""
    dim = next((len(v) for v in vectors if v is not None), 4)
    schema = features_schema(clip_embedding_fields(dim), {"model": "ViT-B-32", "weights": weights, "normalised": True})
    stage = dataset.stage(f"features/{name}")
    stage.begin(
        make_sidecar("score clip", name, (FEATURES, VERSION), StageConfig(), identity or {"weights": weights}), ""
    )
    start = 0
    for shard, rows in enumerate(dataset.manifest.shards):
        if shards is None or shard in shards:
            digest = dataset.stage("pairs").digest(shard)
            with write_features(dataset.folder, stage.file(shard), schema, digest) as writer:
                for vector in vectors[start : start + rows]:
                    row = {"state": absent} if vector is None else {"state": "ok", "clip_image": vector}
                    writer.append(row)
        start += rows
