"""Filtering 10 million rows of scores: pairmill, pandas and DuckDB on the same Parquet files.

The recipe: status, three thresholds over four columns, then the best 30 % by a fifth. All three answer with a mask over
all rows; the rows kept are compared before anything is timed. pandas is written as its users write it: read_parquet of
the needed columns, boolean masks. Ours also checks that every score shard was made from the pairs that stand, keeps the
reason and the rows that each rule alone drops. The second table adds writing the decision as Parquet.
"""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.compare import Check, Result, medians, timed
from curation.filter import apply_rules, make_selection
from schemas.config import StageConfig
from schemas.features import SCORES, scores_schema
from schemas.pairs import pairs_digest, pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_table

ROWS = 10_000_000
SHARD_ROWS = 10_000
COLUMNS = "abcde"
STATUSES = ("success", "timeout")
RULES = (
    {"where": "bench.a >= 0.24 and bench.b <= 0.3"},
    {"where": "bench.c > 0.2"},
    {"top": {"share": 0.3, "by": "bench.d"}},
)
PACKAGES = ("pairmill", "polars", "pandas", "duckdb", "pyarrow", "numpy")


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
        write_table(folder, pairs.file(shard), pairs_without_images(status, rng), {}, digest)
        write_table(folder, scores.file(shard), _scores(schema, rng), {}, digest)
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def pairs_without_images(status: pa.Array, rng: np.random.Generator) -> pa.Table:
    """Rows of pairs that hold a random uid and a status."""
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
        kept: np.ndarray = np.zeros(len(scores), bool)
        kept[best] = True
        return [first.to_numpy(), second.to_numpy(), third.to_numpy(), kept]

    def duckdb(self) -> np.ndarray:
        good = "p.status IN ('success', 'no_image') AND a >= 0.24::FLOAT AND b <= 0.3::FLOAT AND c > 0.2::FLOAT"
        with duckdb.connect() as db:
            source = f"read_parquet({self.scores!r}) s POSITIONAL JOIN read_parquet({self.pairs!r}) p"
            db.execute(f"CREATE TEMP TABLE t AS SELECT d, coalesce({good}, false) AS good FROM {source}")
            (count,) = db.execute("SELECT count(*) FROM t WHERE good").fetchall()[0]
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
        place: np.ndarray = np.arange(len(steps[0]), dtype=np.int32)
        columns = {"shard": place // SHARD_ROWS, "row": place % SHARD_ROWS, "keep": steps[-1], "reason": reason}
        pd.DataFrame(columns).to_parquet(self.scratch / "pandas.parquet", compression="zstd")
        return int(steps[-1].sum())


def check_equal(peers: Peers) -> int:
    """The warm-up. Ties at the cut may fall on other rows: the counts without them must be the same rows."""
    ours, theirs, ducks = peers.pairmill(), peers.pandas(), peers.duckdb()
    assert ours.sum() == theirs.sum(), (ours.sum(), theirs.sum())
    assert (ours ^ theirs).sum() <= 20, "more than ties differ from pandas"
    assert (ours ^ ducks).sum() <= 20, "more than ties differ from DuckDB"
    return int(ours.sum())


def run(rounds: int, quick: bool) -> Result:
    """Deciding, and deciding and writing."""
    rows, rounds = (10 * SHARD_ROWS, 1) if quick else (ROWS, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        peers = Peers(generate(Path(scratch) / "dataset", rows), Path(scratch))
        kept = check_equal(peers)
        runs = {name: timed(getattr(peers, name)) for name in ("pairmill", "pandas", "duckdb")}
        decide = medians(runs, rounds)
        write = medians({"pairmill": timed(peers.write_pairmill), "pandas": timed(peers.write_pandas)}, rounds)
    ours = decide["pairmill"]
    return Result(
        "filter",
        "thresholds and a best 30 % over rows of scores, against pandas and DuckDB on the same Parquet",
        rounds,
        {"rows": rows, "kept": kept},
        {f"decide, {n}, s": s for n, s in decide.items()} | {f"decide and write, {n}, s": s for n, s in write.items()},
        [
            Check("decide, times as fast as pandas", decide["pandas"] / ours, 3.0),
            Check("decide, times as fast as DuckDB", decide["duckdb"] / ours),
            Check("decide and write, times as fast as pandas", write["pandas"] / write["pairmill"]),
        ],
        PACKAGES,
    )
