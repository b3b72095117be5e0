"""Semantic deduplication of a million embeddings from disk: our k-means and FAISS's, and the whole rule.

512 numbers in fp16, in mapped feature shards of 10 000 rows; k = rows / 1000, centroids fitted on 256 points each, 20
steps. Both sides read the same files, end with the nearest centroid of every row, and are asked for the mean cosine of
a row to it: the objective of spherical k-means. Each runs in a process of its own, whose memory is sampled.

The vectors are made: themes of very unequal size, in each of them pictures that differ, and every fourth row nearly
equal to an earlier one (cosine about 0.98) or equal to it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.compare import Check, Result, peak_memory, python
from curation.embeddings import COLUMN, Embeddings
from schemas.config import StageConfig
from schemas.features import FEATURES, features_schema
from schemas.pairs import pairs_digest, pairs_schema
from schemas.sidecars import make_sidecar
from schemas.tensors import fixed_tensor
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_features, write_table

ROWS, SHARD_ROWS, DIM = 1_000_000, 10_000, 512
EPS, STEPS, PER_CENTROID = 0.05, 20, 256
BLOCK = 1 << 16  # rows that FAISS is given at a time
PACKAGES = ("pairmill", "torch", "faiss-cpu", "numpy", "pyarrow")


def generate(path: Path, rows: int) -> Dataset:
    """A dataset of pairs without images and their embeddings."""
    folder, count = open_folder(path), -(-rows // SHARD_ROWS)
    sizes = [min(SHARD_ROWS, rows - SHARD_ROWS * s) for s in range(count)]
    dataset = Dataset(folder, new_manifest(SHARD_ROWS, sizes))
    pairs, features = dataset.stage("pairs"), dataset.stage("features/clip")
    pairs.begin(make_sidecar("import", "pairs", ("pairs", 1), StageConfig()), "")
    features.begin(make_sidecar("score clip", "clip", (FEATURES, 1), StageConfig()), "")
    schema = features_schema([fixed_tensor(COLUMN, DIM)], {"model": "made"})
    rng = np.random.default_rng(0)
    themes = rng.normal(size=(max(1, rows // 300), DIM)).astype(np.float32)
    weight = 1 / np.arange(1, len(themes) + 1) ** 0.7
    for shard, size in enumerate(sizes):
        table = _pairs(size, rng)
        digest = pairs_digest(table["status"].combine_chunks(), pa.nulls(size))
        write_table(folder, pairs.file(shard), table, {}, digest)
        with write_features(folder, features.file(shard), schema, digest) as writer:
            for vector in _vectors(rng, themes, weight / weight.sum(), size):
                writer.append({"state": "ok", COLUMN: vector})
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def _pairs(rows: int, rng: np.random.Generator) -> pa.Table:
    """Successes with random uids and nothing else."""
    uid = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))])
    made = {"uid": uid, "status": pa.array(["success"] * rows)}
    schema = pairs_schema()
    return pa.Table.from_arrays([made.get(f.name, pa.nulls(rows, f.type)) for f in schema], schema=schema)


def _vectors(rng: np.random.Generator, themes: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    made = themes[rng.choice(len(themes), size, p=weight)] + 1.2 * rng.normal(size=(size, DIM)).astype(np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    again = np.flatnonzero(rng.random(size) < 0.25)
    noise = rng.normal(size=(len(again), DIM)).astype(np.float32) * rng.choice([0, 0.2 / DIM**0.5], (len(again), 1))
    made[again] = made[rng.integers(size, size=len(again))] + noise
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


def clusters(rows: int) -> int:
    return max(1, rows // 1000)


def pairmill(dataset: Dataset) -> dict[str, Any]:
    """Fit and assign by `curation.kmeans`."""
    from curation.kmeans import fit, nearest

    vectors, rows = Embeddings(dataset, "clip"), np.arange(len(dataset))
    start = time.perf_counter()
    centroids = fit(vectors, rows, clusters(len(rows)), per_centroid=PER_CENTROID, iterations=STEPS, seed=0)
    fitted = time.perf_counter()
    _, cosines = nearest(vectors, rows, centroids)
    return _told(start, fitted, float(cosines.mean(dtype=np.float64)))


def faiss(dataset: Dataset) -> dict[str, Any]:
    """Fit and assign by FAISS: the points it is fitted on lie in memory, as its k-means wants them."""
    import faiss as library

    vectors, rows = Embeddings(dataset, "clip"), np.arange(len(dataset))
    k = clusters(len(rows))
    start = time.perf_counter()
    sample = np.sort(np.random.default_rng(0).choice(rows, min(len(rows), PER_CENTROID * k), replace=False))
    points = vectors.read(sample).astype(np.float32)
    library.normalize_L2(points)
    kmeans = library.Kmeans(DIM, k, niter=STEPS, seed=0, spherical=True, max_points_per_centroid=PER_CENTROID)
    kmeans.train(points)
    fitted = time.perf_counter()
    total = 0.0
    for begin in range(0, len(rows), BLOCK):
        block = vectors.read(rows[begin : begin + BLOCK]).astype(np.float32)
        library.normalize_L2(block)
        cosines, _ = kmeans.index.search(block, 1)
        total += float(cosines.sum(dtype=np.float64))
    return _told(start, fitted, total / len(rows))


def _told(start: float, fitted: float, mean: float) -> dict[str, Any]:
    end = time.perf_counter()
    return {"fit": fitted - start, "assign": end - fitted, "whole": end - start, "mean cosine": mean}


def rule(dataset: Dataset) -> dict[str, Any]:
    """`dedup_semantic` as `filter` runs it."""
    from curation.filter import apply_rules

    start = time.perf_counter()
    recipe = {"eps": EPS, "iterations": STEPS, "clusters": clusters(len(dataset))}
    _, _, ledger, _ = apply_rules(dataset, [{"dedup_semantic": recipe}])
    whole = time.perf_counter() - start
    return {"whole": whole, "cpu": time.process_time(), "kept": int(ledger.kept.sum())}


SIDES: dict[str, Callable[[Dataset], dict[str, Any]]] = {"pairmill": pairmill, "faiss": faiss, "rule": rule}


def measure(data: Path, side: str) -> dict[str, Any]:
    """What the side tells, and the most memory its process held, GiB (mapped pages included)."""
    out = data / f"{side}.json"
    peak = peak_memory(python("-m", "benchmarks.semantic_dedup", side, str(data / "dataset"), str(out)))
    return {**json.loads(out.read_text()), "peak": peak["pss"] / 2**30, "anonymous": peak["anonymous"] / 2**30}


def compare(rows: int) -> tuple[dict[str, float], list[Check]]:
    """Medians and checks at a size."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch) / "dataset", rows)
        ours, peer, whole = (measure(Path(scratch), side) for side in ("pairmill", "faiss", "rule"))
    both = {"pairmill": ours, "faiss": peer}
    told = {f"{step}, {name}, s": one[step] for step in ("fit", "assign") for name, one in both.items()}
    told |= {f"k-means, {name}, peak GiB": one["peak"] for name, one in both.items()}
    told |= {f"mean cosine, {name}": one["mean cosine"] for name, one in both.items()}
    told |= {"rule, rows kept": whole["kept"], "rule, s of all cores": whole["cpu"]}
    told |= {"rule, peak GiB without mapped files": whole["anonymous"]}
    return told, [
        Check("dedup_semantic, s", whole["whole"], 600, at_least=False),
        Check("dedup_semantic, peak GiB", whole["peak"], 3, at_least=False),
        Check("k-means, times as fast as FAISS", peer["whole"] / ours["whole"]),
        Check("k-means, peak memory over FAISS's", ours["peak"] / peer["peak"]),
        Check("k-means, mean cosine over FAISS's", ours["mean cosine"] / peer["mean cosine"]),
    ]


def run(rounds: int, quick: bool) -> Result:
    """One round: a run takes minutes."""
    rows = 3000 if quick else ROWS
    told, checks = compare(rows)
    return Result(
        "semantic_dedup",
        "SemDeDup on embeddings from disk; its k-means against FAISS's on the same files",
        1,
        {"rows": rows, "width": DIM, "clusters": clusters(rows), "steps": STEPS, "eps": EPS},
        told,
        checks,
        PACKAGES,
    )


if __name__ == "__main__":
    name, dataset, out = sys.argv[1:]
    Path(out).write_text(json.dumps(SIDES[name](Dataset.open(dataset))))
