"""Training input: our loader over Parquet shards, webdataset over tars of the same JPEGs and captions.

Read only: encoded bytes and caption of every pair, in shuffled order, one thread on both sides. Decoded: ready batches
of uint8 pixels and token ids; ours with two threads, webdataset with two worker processes behind PyTorch's DataLoader,
both with the same decoder, resize, tokenizer and collation, so that only the way in differs.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import webdataset

from benchmarks.compare import Check, Result, medians
from benchmarks.make_pairs import make_pairs
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.reader import row_groups
from training.augment import Augmentation
from training.batch import Batch
from training.data import Loader, Sample, View, collate, resized
from training.order import Place, make_order
from training.sources import Source, SourceSpec

WORKERS = 2
BATCH = 64
SHUFFLED = 1000  # samples webdataset mixes; ours mixes 16 row groups, more than that
TEXT_LEN = 40
COUNT = Lock()
VIEW = View("clip", 224, 16, TEXT_LEN, Augmentation("none"))


class Characters:
    """A tokenizer that costs next to nothing: the input's way is what is measured."""

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids int64 [B, T], mask bool [B, T]."""
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for i, text in enumerate(texts):
            codes = torch.tensor(list(text.encode())[:max_length])
            ids[i, : len(codes)] = codes
        return ids, ids > 0


def write_tars(dataset: Dataset, folder: Path) -> list[str]:
    """A tar for each shard: KEY.jpg and KEY.txt of every pair."""
    folder.mkdir()
    paths = []
    for shard in range(dataset.num_shards):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for start, table in row_groups(dataset.folder, dataset.stage(PAIRS).file(shard), ["image", "caption"]):
                for at, row in enumerate(table.to_pylist(), start):
                    _add(tar, f"{shard:05d}{at:06d}.jpg", row["image"])
                    _add(tar, f"{shard:05d}{at:06d}.txt", row["caption"].encode())
        paths.append(str(path))
    return paths


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


class Counting(Loader):
    """Our loader, with a count of the pairs it decoded."""

    pairs = 0

    def build(self, places: Sequence[Place]) -> Batch:
        """As the loader does."""
        batch = super().build(places)
        with COUNT:
            self.pairs += len(batch)
        return batch


@dataclass
class Ours:
    """An epoch from the shards."""

    dataset: Dataset
    threads: int
    batch: int

    def loader(self) -> Counting:
        """At the beginning of an epoch; opening the dataset is part of it, as opening the tars is for the peer."""
        source = Source(0, SourceSpec(self.dataset.url, None, None))
        order = make_order([source.groups()], [None], 0)
        return Counting(order, [source], VIEW, Characters(), batch_size=self.batch, seed=0, threads=self.threads)

    def read(self) -> Iterator[tuple[bytes, str]]:
        """Every pair's image as it is stored, and its caption."""
        loader = self.loader()
        source = loader.sources[0]
        for index in range(len(self.dataset) // self.batch):
            for place in loader.places(index):
                _, caption, _ = source.text(place.shard, place.row)
                yield source.image(place.shard, place.row), caption or ""

    def batches(self, loader: Loader | None = None) -> Iterator[Batch]:
        """Every pair decoded, in batches."""
        stream = (loader or self.loader()).stream()
        try:
            for _ in range(len(self.dataset) // self.batch):
                yield next(stream).batch
        finally:
            stream.close()


@dataclass
class Tars:
    """An epoch from the tars."""

    paths: list[str]
    workers: int
    batch: int
    _loader: Any = None

    def pairs(self) -> Any:
        """webdataset's own pipeline: tars in random order, samples mixed in a buffer."""
        share = webdataset.split_by_worker
        tars = webdataset.WebDataset(self.paths, shardshuffle=len(self.paths), workersplitter=share, seed=0)
        return tars.shuffle(SHUFFLED).to_tuple("jpg", "txt")

    def read(self) -> Iterator[tuple[bytes, str]]:
        """Every pair's image and caption."""
        for image, text in self.pairs():
            yield image, text.decode()

    def batches(self) -> Iterator[Batch]:
        """Every pair decoded in the workers, in batches. The workers live on from epoch to epoch.

        They are spawned: a fork of a process with Arrow's and OpenMP's threads may hang.
        """
        if self._loader is None:
            decoded = self.pairs().map(decode).batched(self.batch, collation_fn=together)
            spawn = {"multiprocessing_context": "spawn", "persistent_workers": True} if self.workers else {}
            self._loader = webdataset.WebLoader(decoded, batch_size=None, num_workers=self.workers, **spawn)
        yield from self._loader


def decode(pair: tuple[bytes, bytes]) -> Sample:
    """As our loader does it."""
    image, text = pair
    return Sample((0, 0), text.decode(), pixels=resized(decode_rgb(image), VIEW))


def together(samples: Sequence[Sample]) -> Batch:
    """As our loader does it."""
    return collate(samples, Characters(), TEXT_LEN)


def read_counts(pairs: Iterable[tuple[bytes, str]]) -> Counter[tuple[bytes, str]]:
    """What was read (images by hash), whatever the order."""
    return Counter((hashlib.sha256(image).digest(), caption) for image, caption in pairs)


def batch_counts(batches: Iterable[Batch]) -> Counter[bytes]:
    """Hashes of the token ids and pixels of every pair, whatever the order."""
    found: Counter[bytes] = Counter()
    for batch in batches:
        assert batch.input_ids is not None
        assert batch.pixel_values is not None
        for ids, pixels in zip(batch.input_ids, batch.pixel_values, strict=True):
            found[hashlib.sha256(ids.numpy().tobytes() + pixels.numpy().tobytes()).digest()] += 1
    return found


def drain_batches(side: Ours | Tars) -> int:
    """An epoch of batches; how many pairs were decoded for it."""
    if isinstance(side, Tars):
        return sum(len(batch) for batch in side.batches())
    loader = side.loader()
    for _ in side.batches(loader):
        pass
    return loader.pairs


def read_seconds(side: Ours | Tars) -> float:
    """Of one pair, over an epoch."""
    start = time.perf_counter()
    pairs = sum(1 for _ in side.read())
    return (time.perf_counter() - start) / pairs


def batch_seconds(side: Ours | Tars) -> float:
    """Of one pair, over an epoch. Our stream has no end: the batches it had ahead when the epoch ended count, too."""
    start = time.perf_counter()
    pairs = drain_batches(side)
    return (time.perf_counter() - start) / pairs


def run(rounds: int, quick: bool) -> Result:
    """One epoch a run."""
    shards, rows, batch, rounds = (2, 8, 4, 1) if quick else (8, 512, BATCH, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = make_pairs(folder / "dataset", [rows] * shards)
        ours = Ours(dataset, WORKERS, batch)
        tars = Tars(write_tars(dataset, folder / "tars"), WORKERS, batch)
        assert read_counts(ours.read()) == read_counts(tars.read())
        assert batch_counts(ours.batches()) == batch_counts(tars.batches())
        runs = {
            "ours, read only": partial(read_seconds, ours),
            "webdataset, read only": partial(read_seconds, tars),
            "ours, decoded": partial(batch_seconds, ours),
            "webdataset, decoded": partial(batch_seconds, tars),
        }
        middle = medians(runs, rounds)
    rates = {name: 1 / seconds for name, seconds in middle.items()}
    checks = [
        Check("read only, times webdataset", rates["ours, read only"] / rates["webdataset, read only"], 3.0),
        Check("decoded, times webdataset", rates["ours, decoded"] / rates["webdataset, decoded"], 1.0),
    ]
    return Result(
        "training_input",
        "pairs a second into training, against webdataset on tars of the same JPEGs",
        rounds,
        {"pairs": shards * rows, "images": "512x384 JPEG", "batch": batch, "threads or workers, decoded": WORKERS},
        {f"{name}, pairs/s": rate for name, rate in rates.items()},
        checks,
        ["pairmill", "webdataset", "torch", "opencv-python-headless", "pyarrow"],
        ["A run is an epoch, from opening the files to the last batch; webdataset's workers stand already."],
    )
