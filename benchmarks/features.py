"""Feature rows read in random order: our mapped shard, npz in LMDB (as UNITER stores them), base64 TSV (as Oscar does).

Two kinds of row: fp16 features and fp32 boxes, and every column of `extract regions`' schema, 1600 class probabilities
among them. Every store holds the same arrays. A row counts as read when they lie in the arrays of a batch: views of a
mapped file cost nothing until then.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import lmdb
import numpy as np

from benchmarks.compare import Check, Result, medians, timed
from schemas.features import features_schema, region_fields
from shards.files import open_folder
from shards.reader import MappedShard
from shards.writer import write_features

BOXES, DIM, CLASSES = 36, 2048, 1600
BATCH = 64
Row = dict[str, np.ndarray]
Read = Callable[[int], Row]

# Element type and shape of a row's columns, in the order of a TSV line.
FEW: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "features": ("float16", (BOXES, DIM)),
    "boxes": ("float32", (BOXES, 4)),
}
ALL = {
    **FEW,
    "det_conf": ("float32", (BOXES,)),
    "obj_id": ("int32", (BOXES,)),
    "obj_conf": ("float32", (BOXES,)),
    "cls_probs": ("float16", (BOXES, CLASSES + 1)),
    "image_feat": ("float16", (DIM,)),
}
KINDS = {"features and boxes": FEW, "all columns": ALL}
Kind = Mapping[str, tuple[str, tuple[int, ...]]]


def make_row(number: int, kind: Kind) -> Row:
    """Features as a detector's pooled activations look: not negative, half of them zero."""
    rng = np.random.default_rng(number)
    row: Row = {}
    for name, (dtype, shape) in kind.items():
        if name in ("features", "image_feat"):
            values = np.maximum(rng.standard_normal(shape, np.float32), 0)
        else:
            values = rng.random(shape, np.float32) * (500 if name in ("boxes", "obj_id") else 1)
        row[name] = values.astype(dtype)
    return row


class Shard:
    """Ours: `features/regions/00000.arrow` as `extract regions` writes it, without class probabilities where the
    kind has none.
    """

    def __init__(self, folder: Path, rows: int, kind: Kind) -> None:
        where = open_folder(folder)
        self.columns = tuple(kind)
        probs = "full" if "cls_probs" in kind else "none"
        with write_features(where, "00000.arrow", features_schema(region_fields(DIM, CLASSES, probs)), "") as writer:
            for number in range(rows):
                row = make_row(number, ALL)  # draws a kind's own columns first
                writer.append({"state": "ok", "num_boxes": BOXES, **row, "boxes": row["boxes"].tolist()})
        self.shard = MappedShard(where, "00000.arrow")

    def read(self, number: int) -> Row:
        return self.shard.row(number, self.columns)


class Lmdb:
    """UNITER's: one npz a row under its name, opened as its loader opens it."""

    def __init__(self, folder: Path, rows: int, kind: Kind, compressed: bool) -> None:
        save = np.savez_compressed if compressed else np.savez
        with lmdb.open(str(folder), map_size=2**34) as store, store.begin(write=True) as transaction:
            for number in range(rows):
                out = io.BytesIO()
                save(out, allow_pickle=False, **make_row(number, kind))
                transaction.put(str(number).encode(), out.getvalue())
        self.columns = tuple(kind)
        self.store = lmdb.open(str(folder), readonly=True, create=False, readahead=True, lock=False)
        self.transaction = self.store.begin(buffers=True)

    def read(self, number: int) -> Row:
        found = self.transaction.get(str(number).encode())
        assert found is not None
        with io.BytesIO(found) as stream:
            row = np.load(stream, allow_pickle=False)
            return {name: row[name] for name in self.columns}


class Tsv:
    """Oscar's: a line a row, arrays in base64, and the line offsets beside."""

    def __init__(self, path: Path, rows: int, kind: Kind) -> None:
        self.offsets, self.kind = [], kind
        with path.open("wb") as out:
            for number in range(rows):
                self.offsets.append(out.tell())
                parts = [base64.b64encode(array.tobytes()) for array in make_row(number, kind).values()]
                out.write(b"\t".join([str(number).encode(), str(BOXES).encode(), *parts]) + b"\n")
        self.file = path.open("rb")

    def read(self, number: int) -> Row:
        self.file.seek(self.offsets[number])
        _, count, *parts = self.file.readline().rstrip().split(b"\t")
        row: Row = {}
        for (name, (dtype, shape)), part in zip(self.kind.items(), parts, strict=True):
            lead = shape if name == "image_feat" else (int(count), *shape[1:])
            row[name] = np.frombuffer(base64.b64decode(part), dtype).reshape(lead)
        return row


def read_batches(read: Read, order: Sequence[int], kind: Kind) -> None:
    """Every row of `order` copied into the arrays of a batch."""
    batch: Row = {name: np.empty((BATCH, *shape), dtype) for name, (dtype, shape) in kind.items()}
    for i, number in enumerate(order):
        for name, value in read(number).items():
            batch[name][i % BATCH] = value


def check_equal(readers: Sequence[Read], order: Sequence[int], kind: Kind) -> None:
    """Every store answers with the arrays that were put in."""
    for number in order:
        want = make_row(number, kind)
        for read in readers:
            got = read(number)
            assert got.keys() == want.keys()
            for name, one in want.items():
                assert got[name].dtype == one.dtype
                assert np.array_equal(got[name], one)


def open_stores(folder: Path, rows: int, kind: Kind) -> dict[str, Read]:
    """Each store with the same rows."""
    folder.mkdir(parents=True)
    return {
        "pairmill": Shard(folder / "shard", rows, kind).read,
        "npz in LMDB": Lmdb(folder / "plain", rows, kind, compressed=False).read,
        "compressed npz in LMDB": Lmdb(folder / "small", rows, kind, compressed=True).read,
        "base64 TSV": Tsv(folder / "rows.tsv", rows, kind).read,
    }


def run(rounds: int, quick: bool) -> Result:
    """All stores in the page cache, one thread."""
    rows, reads, rounds = (20, 50, 1) if quick else (1000, 2000, rounds)
    order = np.random.default_rng(0).integers(0, rows, reads).tolist()
    rates: dict[str, float] = {}
    checks = []
    for told, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            readers = open_stores(Path(scratch) / "stores", rows, kind)
            check_equal(list(readers.values()), order[:100], kind)
            runs = {name: timed(partial(read_batches, read, order, kind)) for name, read in readers.items()}
            middle = medians(runs, rounds)
        rates |= {f"{name}, {told}, rows/s": reads / seconds for name, seconds in middle.items()}
        for name in ("npz in LMDB", "base64 TSV"):
            checks.append(Check(f"{told}, times the rows of {name}", middle[name] / middle["pairmill"], 5.0))
    return Result(
        "features",
        f"region rows of {BOXES} x {DIM} fp16 features, read in random order into a batch",
        rounds,
        {"rows": rows, "reads": reads, "classes, all columns": CLASSES},
        rates,
        checks,
        ["pairmill", "lmdb", "numpy", "pyarrow"],
        ["One thread, every store in the page cache."],
    )
