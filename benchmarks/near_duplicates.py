"""`dedup near` on 5 million image hashes: all pairs within 4 bits, against seconds and memory that are asked for.

The hashes lean as real ones do: a third share most of 24 bits (one thing on a white ground), a fifth are copies that
differ in 0 to 6 bits, 1 % are one placeholder, 1 % are flat. It is a filter with that one rule, in a process of
its own, from Parquet files to the written selection; the search alone is timed in it, too. Before, on a part of the
hashes, the groups are compared with those that comparing all with all gives.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.compare import Check, PeakMemory, Result, python, run_quietly
from curation import hamming
from curation.groups import rich
from curation.hamming import groups, unite
from schemas.config import StageConfig
from schemas.features import SCORES, scores_schema
from schemas.pairs import pairs_digest
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_table

ROWS, SHARD_ROWS = 5_000_000, 10_000
PART = 20_000
BITS = 4
PACKAGES = ("pairmill", "numpy", "polars", "pyarrow")


def hashes(rows: int, seed: int = 0) -> np.ndarray:
    """uint64 [rows], in any order."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 2**64, rows, dtype=np.uint64)
    third = made[: rows // 3]
    common = rng.integers(0, 2**64, dtype=np.uint64)
    for bit in rng.permutation(64)[:24]:
        mask = np.uint64(1) << np.uint64(bit)
        third[:] = np.where(rng.random(len(third)) < 0.9, (third & ~mask) | (common & mask), third)
    copies = made[-(rows // 5) :]
    copies[:] = made[: rows // 5]
    for _ in range(6):
        turned = (rng.random(len(copies)) < 0.4).astype(np.uint64)
        copies ^= turned << rng.integers(0, 64, len(copies)).astype(np.uint64)
    made[rows // 2 : rows // 2 + rows // 100] = made[0]
    made[rows // 2 + rows // 100 : rows // 2 + rows // 50] = 0
    return rng.permutation(made)


def all_with_all(distinct: np.ndarray, bits: int) -> np.ndarray:
    """What `groups` shall give, by n times n comparisons."""
    parent: np.ndarray = np.arange(len(distinct), dtype=np.int32)
    for i in range(len(distinct)):
        near: np.ndarray = np.flatnonzero(np.bitwise_count(distinct ^ distinct[i]) <= bits).astype(np.int32)
        unite(parent, np.full(len(near), i, np.int32), near)
    return hamming._roots(parent, parent)


def check_equal(rows: int) -> int:
    """The number of groups of a part of the hashes. Raises AssertionError where the two ways differ."""
    distinct = np.unique(hashes(rows))
    found = groups(distinct, BITS)
    assert np.array_equal(found, all_with_all(distinct, BITS)), "the groups are not those of all pairs"
    return len(np.unique(found))


def generate(path: Path, rows: int) -> Dataset:
    """A dataset of pairs without images, and `scores/hash` with their hashes."""
    from benchmarks.filter import pairs_without_images  # pandas and DuckDB, which the measured process must not hold

    folder, count = open_folder(path), rows // SHARD_ROWS
    dataset = Dataset(folder, new_manifest(SHARD_ROWS, [SHARD_ROWS] * count))
    pairs, scores = dataset.stage("pairs"), dataset.stage("scores/hash")
    schema = scores_schema([pa.field("phash", pa.uint64())])
    pairs.begin(make_sidecar("import", "pairs", ("pairs", 1), StageConfig()), "")
    scores.begin(make_sidecar("score hash", "hash", (SCORES, 1), StageConfig()), "")
    rng = np.random.default_rng(0)
    status = pa.array(["success"] * SHARD_ROWS)
    digest = pairs_digest(status, pa.nulls(SHARD_ROWS))
    every = hashes(rows)
    for shard in range(count):
        part = every[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        write_table(folder, pairs.file(shard), pairs_without_images(status, rng), {}, digest)
        write_table(folder, scores.file(shard), pa.table([pa.array(part)], schema=schema), {}, digest)
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def one(path: str) -> None:
    """The measured process: prints seconds as JSON."""
    from curation.filter import make_selection
    from curation.table import Table

    start, used = time.perf_counter(), time.process_time()
    dataset = Dataset.open(path)
    result = make_selection(dataset, "near", [{"dedup": {"near": "hash.phash", "bits": BITS}}])
    seconds = {"filter": time.perf_counter() - start, "processor": time.process_time() - used, "kept": result.kept}
    distinct = np.sort(Table(dataset).frame(["hash.phash"]).collect()["hash.phash"].to_numpy())
    distinct = distinct[np.append(True, distinct[1:] != distinct[:-1]) & rich(distinct, 8)]
    start, used = time.perf_counter(), time.process_time()
    groups(distinct, BITS)
    seconds |= {"search": time.perf_counter() - start, "search processor": time.process_time() - used}
    Path(path, "seconds.json").write_text(json.dumps(seconds))


def run(rounds: int, quick: bool) -> Result:
    """Seconds and memory of the filter; each round is a process."""
    rows, part, rounds = (2 * SHARD_ROWS, 2000, 1) if quick else (ROWS, PART, min(rounds, 3))
    found = check_equal(part)
    told, peaks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "dataset"
        generate(path, rows)
        for _ in range(rounds):
            memory = PeakMemory()
            run_quietly(python("-m", "benchmarks.near_duplicates", str(path)), watch=memory.watch)
            told.append(json.loads((path / "seconds.json").read_text()))
            peaks.append(memory.peak)
    middle = {name: statistics.median(t[name] for t in told) for name in told[0]}
    peak = statistics.median(p["pss"] for p in peaks)
    return Result(
        "near_duplicates",
        "one row of each group of nearly equal image hashes, all pairs within 4 bits, from Parquet to the selection",
        rounds,
        {"rows": rows, "kept": told[0]["kept"], "compared with all pairs": part, "groups there": found},
        {
            "filter, s": middle["filter"],
            "filter, processor s": middle["processor"],
            "search alone, s": middle["search"],
            "search alone, processor s": middle["search processor"],
            "peak memory, MB": peak / 1e6,
        },
        [
            Check("filter of 5 million hashes, s", middle["filter"], 60, at_least=False),
            Check("the same, seconds of both cores together", middle["processor"], 60, at_least=False),
            Check("peak memory, GB", peak / 1e9, 1.0, at_least=False),
        ],
        PACKAGES,
    )


if __name__ == "__main__":
    one(sys.argv[1])
