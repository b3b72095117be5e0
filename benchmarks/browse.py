"""Queries of `browse` over a million rows: each as the page asks it, its rows, histograms and facets in one.

The rows are generated: captions of seven words, URLs, a score set of seven numbers, one facet, hashes, a selection, and
512-d fp16 embeddings in mapped files. No row has an image: thumbnails are made one by one, whatever the size. "First"
is the first query of its kind, which reads columns from their files; the others find them in memory, but their own
words, bound or row are new each time.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fastapi.testclient import TestClient

from benchmarks.compare import Check, Result, medians, memory_of, timed
from cli.web.browse import create_app
from curation.browse_config import BrowseConfig
from curation.filter import make_selection
from schemas.config import StageConfig
from schemas.features import FEATURES, SCORES, clip_embedding_fields, features_schema, scores_schema
from schemas.pairs import pairs_digest, pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, Stage, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_features, write_table

ROWS = 1_000_000
SHARD_ROWS = 10_000
DIM = 512
NUMBERS = ("clip_score", "aesthetic", "watermark", "sharpness", "entropy", "words", "aspect")
WORDS = 4000  # in the vocabulary of captions
PACKAGES = ("pairmill", "polars", "pyarrow", "numpy", "torch")
GOAL_S = 0.3


def generate(path: Path, rows: int, dim: int) -> Dataset:
    """A dataset without images: pairs, scores/bench, scores/hash, features/bench, selections/bench."""
    folder, count = open_folder(path), rows // SHARD_ROWS
    dataset = Dataset(folder, new_manifest(SHARD_ROWS, [SHARD_ROWS] * count))
    pairs = dataset.stage("pairs")
    pairs.begin(make_sidecar("import", "pairs", ("pairs", 1), StageConfig()), "")
    scores = _begin(dataset, "scores/bench", SCORES)
    hashes = _begin(dataset, "scores/hash", SCORES)
    embeddings = _begin(dataset, "features/bench", FEATURES, {"clip_image": {"what": "image embedding"}})
    rng = np.random.default_rng(0)
    vocabulary = np.array(["".join(rng.choice(list("aeioubdfglmnprst"), rng.integers(3, 10))) for _ in range(WORDS)])
    status = pa.array(np.where(rng.random(SHARD_ROWS) < 0.9, "success", "timeout"))
    digest = pairs_digest(status, pa.nulls(SHARD_ROWS))
    for shard in range(count):
        write_table(folder, pairs.file(shard), _pairs(shard, status, vocabulary, rng), {}, digest)
        write_table(folder, scores.file(shard), _scores(rng), {}, digest)
        write_table(folder, hashes.file(shard), _hashes(rng), {}, digest)
        _write_embeddings(embeddings, shard, dim, digest)
    write_manifest(folder, dataset.manifest)
    dataset = Dataset.open(path)
    make_selection(dataset, "bench", [{"where": "bench.clip_score >= 0.25"}, {"where": "bench.aesthetic > 0.2"}])
    return dataset


def _begin(dataset: Dataset, path: str, schema: str, columns: dict[str, dict[str, str]] | None = None) -> Stage:
    stage = dataset.stage(path)
    stage.begin(make_sidecar("benchmark", stage.name, (schema, 1), StageConfig(), columns=columns or {}), "")
    return stage


def _pairs(shard: int, status: pa.Array, vocabulary: np.ndarray, rng: np.random.Generator) -> pa.Table:
    rows = len(status)
    words = vocabulary[(WORDS * rng.random((rows, 7)) ** 2).astype(int)]  # some words are frequent, most are rare
    uid = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))])
    made = {
        "uid": uid,
        "status": status,
        "caption": pa.array([" ".join(w) for w in words]),
        "url": pa.array([f"https://host{i % 997}.example/pictures/{shard}/{i}.jpg" for i in range(rows)]),
        "width": pa.array(rng.integers(64, 2048, rows), pa.int32()),
        "height": pa.array(rng.integers(64, 2048, rows), pa.int32()),
    }
    schema = pairs_schema()
    return pa.Table.from_arrays([made.get(f.name, pa.nulls(rows, f.type)) for f in schema], schema=schema)


def _scores(rng: np.random.Generator) -> pa.Table:
    fields = [pa.field(n, pa.float32()) for n in NUMBERS] + [pa.field("language", pa.string())]
    values = rng.normal(0.25, 0.05, (len(NUMBERS), SHARD_ROWS)).astype(np.float32)
    columns = [pa.array(v, mask=rng.random(SHARD_ROWS) < 0.01) for v in values]
    columns.append(pa.array(rng.choice(["en", "de", "fr", "ja", "ru"], SHARD_ROWS)))
    return pa.Table.from_arrays(columns, schema=scores_schema(fields))


def _hashes(rng: np.random.Generator) -> pa.Table:
    fields = [pa.field("phash", pa.uint64()), pa.field("pixel_sha256", pa.binary(32))]
    phash = rng.integers(0, 2**40, SHARD_ROWS, dtype=np.uint64) << np.uint64(24)
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), SHARD_ROWS, [None, pa.py_buffer(rng.bytes(32 * SHARD_ROWS))]
    )
    return pa.Table.from_arrays([pa.array(phash), pixels], schema=scores_schema(fields))


def _write_embeddings(stage: Stage, shard: int, dim: int, digest: str) -> None:
    """The first shard's vectors again and again: what they are takes no time, how many does."""
    if shard:
        stage.folder.write_bytes(stage.file(shard), stage.folder.read_bytes(stage.file(0)))
        return
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(SHARD_ROWS, dim)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    schema = features_schema(clip_embedding_fields(dim)[:1])
    with write_features(stage.folder, stage.file(shard), schema, digest) as writer:
        for row, vector in enumerate(vectors):
            writer.append({"state": "ok", "clip_image": vector if row % 50 else None})


class Asking:
    """Asks the page's own route for rows, counts and histograms; every question is another one."""

    def __init__(self, url: str) -> None:
        app = create_app(url, BrowseConfig())
        self.client = TestClient(app, base_url="http://127.0.0.1:8765")
        self.numbers = itertools.count(1)
        self.words = self._rare_words()

    def _rare_words(self) -> Iterator[str]:
        rows = self.ask("limit=200")["rows"]
        return itertools.cycle([row["caption"].split()[3] for row in rows])

    def ask(self, query: str) -> dict[str, Any]:
        shown = "&".join(f"histogram=bench.{n}" for n in NUMBERS)
        answer = self.client.get(f"/api/rows?{query}&counts=1&{shown}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def everything(self) -> None:
        assert self.ask("")["total"] > 0

    def words_search(self) -> None:
        assert self.ask(f"q={next(self.words)}+-zzz{next(self.numbers)}")["total"] > 0

    def slide(self) -> None:
        bound = 0.2 + next(self.numbers) / 1e6
        assert self.ask(f"range=bench.clip_score:{bound}:")["total"] > 0

    def all_at_once(self) -> None:
        bound = 0.2 + next(self.numbers) / 1e6
        query = f"q={next(self.words)[:2]}&range=bench.clip_score:{bound}:&range=bench.entropy:{bound}:"
        query += "&only=bench.language:en&selection=bench&reason=kept&sort=-bench.aesthetic"
        assert self.ask(query)["total"] > 0

    def order(self) -> None:
        """The second page, by a score."""
        first = self.client.get("/api/rows?sort=-bench.clip_score").json()
        assert self.client.get(f"/api/rows?sort=-bench.clip_score&after={first['next']}").json()["rows"]

    def like(self) -> None:
        assert self.ask(f"like={50 * next(self.numbers) + 1}")["rows"]

    def twins(self) -> None:
        assert self.ask(f"twins={next(self.numbers)}")["total"] >= 1


KINDS = ("everything", "words_search", "slide", "all_at_once", "order", "like", "twins")
SAID = {
    "everything": "all rows",
    "words_search": "words nobody asked for before",
    "slide": "a slider moved",
    "all_at_once": "words, two sliders, facet, selection, order",
    "order": "first and second page by a score",
    "like": "likeness to a row, 512-d",
    "twins": "the same picture",
}


def run(rounds: int, quick: bool) -> Result:
    """Each question `rounds` times, after a first one that reads the columns."""
    rows, dim, rounds = (2 * SHARD_ROWS, 32, 1) if quick else (ROWS, DIM, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = generate(Path(scratch) / "dataset", rows, dim)
        before = memory_of(os.getpid())["anonymous"]
        asking: list[Asking] = []
        opening = timed(lambda: asking.append(Asking(dataset.url)))()
        runs = {name: timed(getattr(asking[0], name)) for name in KINDS}
        first = {name: ask() for name, ask in runs.items()}
        later = medians(runs, rounds)
        held = memory_of(os.getpid())["anonymous"] - before
    return Result(
        "browse",
        "questions of the page over rows without images, answered with 60 rows, 7 histograms and the facets",
        rounds,
        {"rows": rows, "embedding": dim},
        {"opening, s": opening}
        | {f"first, {SAID[n]}, s": s for n, s in first.items()}
        | {f"{SAID[n]}, s": s for n, s in later.items()},
        [
            *(Check(f"{SAID[n]}, s", s, GOAL_S, at_least=False) for n, s in later.items()),
            Check("memory of a row, bytes", held / rows),
        ],
        PACKAGES,
    )
