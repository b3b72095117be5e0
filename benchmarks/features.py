"""Feature rows read in random order: our mapped shard, npz in LMDB (as UNITER stores them), base64 TSV (as Oscar does).

Every store holds the same fp16 features and fp32 boxes. A row counts as read when both lie in the arrays of a batch:
views of a mapped file cost nothing until then.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lmdb
import numpy as np

from benchmarks.compare import Check, Result, medians, timed
from schemas.features import features_schema, region_fields
from shards.files import open_folder
from shards.reader import MappedShard
from shards.writer import write_features

BOXES, DIM = 36, 2048
BATCH = 64
Pair = tuple[np.ndarray, np.ndarray]  # features fp16 [N, D], boxes fp32 [N, 4]
Read = Callable[[int], Pair]


def make_row(number: int) -> Pair:
    """Features as a detector's pooled activations look: not negative, half of them zero."""
    rng = np.random.default_rng(number)
    boxes = rng.random((BOXES, 4), np.float32) * 500
    return np.maximum(rng.standard_normal((BOXES, DIM), np.float32), 0).astype(np.float16), boxes


class Shard:
    """Ours: `features/regions/00000.arrow` as `extract regions` writes it."""

    def __init__(self, folder: Path, rows: int) -> None:
        where = open_folder(folder)
        with write_features(where, "00000.arrow", features_schema(region_fields(DIM, 0, "none")), "") as writer:
            for number in range(rows):
                features, boxes = make_row(number)
                writer.append({"state": "ok", **_columns(features, boxes)})
        self.shard = MappedShard(where, "00000.arrow")

    def read(self, number: int) -> Pair:
        row = self.shard.row(number, ("features", "boxes"))
        return row["features"], row["boxes"]


def _columns(features: np.ndarray, boxes: np.ndarray) -> dict[str, object]:
    count = len(boxes)
    one: np.ndarray = np.ones(count, np.float32)
    return {
        "num_boxes": count,
        "boxes": boxes.tolist(),
        "features": features,
        "det_conf": one,
        "obj_id": one.astype(np.int32),
        "obj_conf": one,
        "image_feat": features[0],
    }


class Lmdb:
    """UNITER's: one npz a row under its name, opened as its loader opens it."""

    def __init__(self, folder: Path, rows: int, compressed: bool) -> None:
        save = np.savez_compressed if compressed else np.savez
        with lmdb.open(str(folder), map_size=2**34) as store, store.begin(write=True) as transaction:
            for number in range(rows):
                features, boxes = make_row(number)
                out = io.BytesIO()
                save(out, features=features, boxes=boxes)
                transaction.put(str(number).encode(), out.getvalue())
        self.store = lmdb.open(str(folder), readonly=True, create=False, readahead=True, lock=False)
        self.transaction = self.store.begin(buffers=True)

    def read(self, number: int) -> Pair:
        found = self.transaction.get(str(number).encode())
        assert found is not None
        with io.BytesIO(found) as stream:
            row = np.load(stream, allow_pickle=False)
            return row["features"], row["boxes"]


class Tsv:
    """Oscar's: a line a row, arrays in base64, and the line offsets beside."""

    def __init__(self, path: Path, rows: int) -> None:
        self.offsets = []
        with path.open("wb") as out:
            for number in range(rows):
                self.offsets.append(out.tell())
                parts = [base64.b64encode(array.tobytes()) for array in make_row(number)]
                out.write(b"\t".join([str(number).encode(), str(BOXES).encode(), *parts]) + b"\n")
        self.file = path.open("rb")

    def read(self, number: int) -> Pair:
        self.file.seek(self.offsets[number])
        _, count, features, boxes = self.file.readline().rstrip().split(b"\t")
        shape = int(count), -1
        one = np.frombuffer(base64.b64decode(features), np.float16).reshape(shape)
        return one, np.frombuffer(base64.b64decode(boxes), np.float32).reshape(shape)


def read_batches(read: Read, order: Sequence[int]) -> None:
    """Every row of `order` copied into the arrays of a batch."""
    features: np.ndarray = np.empty((BATCH, BOXES, DIM), np.float16)
    boxes: np.ndarray = np.empty((BATCH, BOXES, 4), np.float32)
    for i, number in enumerate(order):
        features[i % BATCH], boxes[i % BATCH] = read(number)


def check_equal(readers: Sequence[Read], order: Sequence[int]) -> None:
    """Every store answers with the arrays that were put in."""
    for number in order:
        want = make_row(number)
        for read in readers:
            for got, one in zip(read(number), want, strict=True):
                assert got.dtype == one.dtype
                assert np.array_equal(got, one)


def run(rounds: int, quick: bool) -> Result:
    """All stores in the page cache, one thread."""
    rows, reads, rounds = (20, 50, 1) if quick else (1000, 2000, rounds)
    order = np.random.default_rng(0).integers(0, rows, reads).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        readers: dict[str, Read] = {
            "pairmill": Shard(folder / "shard", rows).read,
            "npz in LMDB": Lmdb(folder / "plain", rows, compressed=False).read,
            "compressed npz in LMDB": Lmdb(folder / "small", rows, compressed=True).read,
            "base64 TSV": Tsv(folder / "rows.tsv", rows).read,
        }
        check_equal(list(readers.values()), order[:100])
        middle = medians({n: timed(partial(read_batches, r, order)) for n, r in readers.items()}, rounds)
    rates = {name: reads / seconds for name, seconds in middle.items()}
    checks = [
        Check(f"times the rows of {name}", rates["pairmill"] / rates[name], 5.0)
        for name in ("npz in LMDB", "base64 TSV")
    ]
    return Result(
        "features",
        f"rows of {BOXES} x {DIM} fp16 features and their boxes, read in random order into a batch",
        rounds,
        {"rows": rows, "reads": reads},
        {f"{name}, rows/s": rate for name, rate in rates.items()},
        checks,
        ["pairmill", "lmdb", "numpy", "pyarrow"],
        ["One thread, every store in the page cache."],
    )
