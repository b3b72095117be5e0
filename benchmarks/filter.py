"""Filtering 10 million rows of scores: pairmill, pandas and DuckDB on the same Parquet files.

    python -m benchmarks.filter [--rows 10000000] [--rounds 5] [--out benchmarks/results/filter.json]

The recipe: status, three thresholds over four columns, then the best 30 % by a fifth. All three answer with a mask over
all rows; the rows kept are compared before anything is timed. pandas is written as its users write it: read_parquet of
the needed columns, boolean masks. Ours also checks that every score shard was made from the pairs that stand, keeps the
reason and the rows that each rule alone drops. The second table adds writing the decision as Parquet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from curation.filter import apply_rules, make_selection
from schemas.config import StageConfig
from schemas.features import SCORES, scores_schema
from schemas.pairs import pairs_digest, pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_table

SHARD_ROWS = 10_000
COLUMNS = "abcde"
STATUSES = ("success", "timeout")
RULES = (
    {"where": "bench.a >= 0.24 and bench.b <= 0.3"},
    {"where": "bench.c > 0.2"},
    {"top": {"share": 0.3, "by": "bench.d"}},
)
PACKAGES = ("polars", "pandas", "duckdb", "pyarrow", "numpy")


def generate(path: Path, rows: int) -> Dataset:
    """A dataset of pairs without images and one score set of five float32 columns, a few null, in 10 000-row files."""
    folder, count = open_folder(path), rows // SHARD_ROWS
    dataset = Dataset(folder, new_manifest(SHARD_ROWS, [SHARD_ROWS] * count))
    pairs, scores = dataset.stage("pairs"), dataset.stage("scores/bench")
    schema = scores_schema([pa.field(c, pa.float32()) for c in COLUMNS])
    pairs.begin(make_sidecar("import", "pairs", ("pairs", 1), StageConfig()), "")
    scores.begin(make_sidecar("score", "bench", (SCORES, 1), StageConfig()), "")
    rng = np.random.default_rng(0)
    status = pa.array(np.where(rng.random(SHARD_ROWS) < 0.8, *STATUSES))  # one pattern: only its digest takes time
    digest = pairs_digest(status, pa.nulls(SHARD_ROWS))
    for shard in range(count):
        write_table(folder, pairs.file(shard), _pairs(status, rng), {}, digest)
        write_table(folder, scores.file(shard), _scores(schema, rng), {}, digest)
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def _pairs(status: pa.Array, rng: np.random.Generator) -> pa.Table:
    rows = len(status)
    uid = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))])
    schema = pairs_schema()
    made = {"uid": uid, "status": status}
    return pa.Table.from_arrays([made.get(f.name, pa.nulls(rows, f.type)) for f in schema], schema=schema)


def _scores(schema: pa.Schema, rng: np.random.Generator) -> pa.Table:
    values = rng.normal(0.25, 0.05, (len(schema), SHARD_ROWS)).astype(np.float32)
    missing = rng.random((len(schema), SHARD_ROWS)) < 0.001
    return pa.Table.from_arrays([pa.array(v, mask=m) for v, m in zip(values, missing, strict=True)], schema=schema)


class Peers:
    """The same decision by three programs. Each returns bool [rows]."""

    def __init__(self, dataset: Dataset, scratch: Path) -> None:
        self.dataset, self.scratch = dataset, scratch
        root = Path(dataset.url)
        shards = range(dataset.num_shards)
        self.pairs = [str(root / dataset.stage("pairs").file(s)) for s in shards]
        self.scores = [str(root / dataset.stage("scores/bench").file(s)) for s in shards]

    def pairmill(self) -> np.ndarray:
        _, _, ledger, _ = apply_rules(self.dataset, RULES)
        ledger.steps()
        return ledger.kept.to_numpy()

    def pandas(self) -> np.ndarray:
        return self._pandas_steps()[-1]

    def _pandas_steps(self) -> list[np.ndarray]:
        status = pd.read_parquet(self.pairs, columns=["status"])["status"]
        scores = pd.read_parquet(self.scores, columns=["a", "b", "c", "d"])
        first = status.isin(["success", "no_image"])
        second = first & (scores["a"] >= 0.24) & (scores["b"] <= 0.3)
        third = second & (scores["c"] > 0.2)
        best = scores.loc[third, "d"].nlargest(int(Fraction("0.3") * int(third.sum()))).index
        kept = np.zeros(len(scores), bool)
        kept[best] = True
        return [first.to_numpy(), second.to_numpy(), third.to_numpy(), kept]

    def duckdb(self) -> np.ndarray:
        good = "p.status IN ('success', 'no_image') AND a >= 0.24::FLOAT AND b <= 0.3::FLOAT AND c > 0.2::FLOAT"
        with duckdb.connect() as db:
            source = f"read_parquet({self.scores!r}) s POSITIONAL JOIN read_parquet({self.pairs!r}) p"
            db.execute(f"CREATE TEMP TABLE t AS SELECT d, coalesce({good}, false) AS good FROM {source}")
            count = db.execute("SELECT count(*) FROM t WHERE good").fetchone()[0]
            size = int(Fraction("0.3") * count)
            cut = f"SELECT min(d) FROM (SELECT d FROM t WHERE good AND d IS NOT NULL ORDER BY d DESC LIMIT {size})"
            kept = db.execute(f"SELECT coalesce(good AND d >= ({cut}), false) AS kept FROM t").fetchnumpy()["kept"]
        return np.asarray(kept)

    def write_pairmill(self) -> int:
        return make_selection(self.dataset, "bench", RULES).kept

    def write_pandas(self) -> int:
        steps = self._pandas_steps()
        names = ["status", "a and b", "c", "top", None]
        reason = pd.Categorical.from_codes(sum(s.astype(np.int8) for s in steps), categories=[*names[:4], "kept"])
        place = np.arange(len(steps[0]), dtype=np.int32)
        columns = {"shard": place // SHARD_ROWS, "row": place % SHARD_ROWS, "keep": steps[-1], "reason": reason}
        pd.DataFrame(columns).to_parquet(self.scratch / "pandas.parquet", compression="zstd")
        return int(steps[-1].sum())


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, interleaved so that drift hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def check_equal(peers: Peers) -> int:
    """The warm-up. Ties at the cut may fall on other rows: the counts without them must be the same rows."""
    ours, theirs, ducks = peers.pairmill(), peers.pandas(), peers.duckdb()
    assert ours.sum() == theirs.sum(), (ours.sum(), theirs.sum())
    assert (ours ^ theirs).sum() <= 20, "more than ties differ from pandas"
    assert (ours ^ ducks).sum() <= 20, "more than ties differ from DuckDB"
    return int(ours.sum())


def machine() -> dict[str, object]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = round(os.getloadavg()[1], 1)  # of 5 minutes: who else was on the machine
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
        "load": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "filter.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        peers = Peers(generate(Path(scratch) / "dataset", args.rows), Path(scratch))
        rows = len(peers.dataset)
        kept = check_equal(peers)
        decide = measure({n: getattr(peers, n) for n in ("pairmill", "pandas", "duckdb")}, args.rounds)
        write = measure({"pairmill": peers.write_pairmill, "pandas": peers.write_pandas}, args.rounds)
    print(f"{rows:,} rows, {kept:,} kept, median of {args.rounds}")
    print(f"{'':24}{'seconds':>9}{'ours is':>10}")
    for title, times in (("decide", decide), ("decide and write", write)):
        for name, seconds in times.items():
            print(f"{title + ', ' + name:24}{seconds:9.2f}{seconds / times['pairmill']:9.2f}x as fast")
    result = {
        "benchmark": "filter",
        "rows": rows,
        "kept": kept,
        "rounds": args.rounds,
        "decide_s": {n: round(s, 4) for n, s in decide.items()},
        "decide_and_write_s": {n: round(s, 4) for n, s in write.items()},
        "ratio_pandas": round(decide["pandas"] / decide["pairmill"], 3),
        "ratio_duckdb": round(decide["duckdb"] / decide["pairmill"], 3),
        "ratio_pandas_with_writing": round(write["pandas"] / write["pairmill"], 3),
        "machine": machine(),
        "versions": {p: version(p) for p in PACKAGES},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
