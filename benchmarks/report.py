"""The report of a million rows: nobody else makes one, so its seconds and the size of its page are told, not a ratio.

The dataset is made as `download` and the scorers leave one: URLs of 5 000 hosts, captions of 3 to 30 words, a JPEG in
nine rows of ten, sizes, licences; twelve scores, a language, three yes-or-no columns; two selections of three rules.
The command runs in a process of its own, start and imports included, after one run that warms the files.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.compare import Check, Result, medians, peak_memory, run_quietly, script
from benchmarks.photographs import jpegs
from curation.filter import make_selection
from schemas.config import StageConfig
from schemas.features import SCORES, scores_schema
from schemas.pairs import pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.writer import write_pairs, write_table

ROWS = 1_000_000
SHARD_ROWS = 10_000
HOSTS = 5_000
PICTURES = 16
SIDE = (64, 48)  # px of the pictures: their bytes are not what is measured
NUMBERS = ("clip_score", "aesthetic", "watermark", "nsfw", "sharpness", "entropy", "contrast", "mean")
WHOLE = ("characters", "words", "unique_words", "occurrences")
FLAGS = ("has_url", "is_filename_like", "is_grey")
LANGUAGES = ("en", "de", "fr", "es", "ru", "ja", "zh", "pt", "it", "nl", "pl", "tr", "ar", "ko", "sv", "cs")
LICENCES = ("CC BY 4.0", "CC BY-SA 4.0", "CC0 1.0", "CC BY-NC 2.0", None)
FAILURES = ("timeout", "http_error", "dns_error", "not_image", "decode_error")
WORDS = 400
SELECTIONS = {
    "best": [
        {"where": "width >= 200"},
        {"where": "bench.clip_score >= 0.22"},
        {"top": {"share": 0.3, "by": "bench.aesthetic"}},
    ],
    "large": [{"where": "width >= 600 and height >= 600"}, {"where": "NOT bench.has_url"}],
}
PACKAGES = ("pairmill", "polars", "pyarrow", "numpy", "jinja2")


def generate(path: Path, rows: int, shard_rows: int = SHARD_ROWS) -> Dataset:
    """The dataset, its score set `bench` and its selections."""
    folder = open_folder(path)
    dataset = Dataset(folder, new_manifest(shard_rows, [shard_rows] * (rows // shard_rows)))
    pairs, scores = dataset.stage("pairs"), dataset.stage("scores/bench")
    fields = [
        *(pa.field(n, pa.float32()) for n in NUMBERS),
        *(pa.field(n, pa.int32()) for n in WHOLE),
        *(pa.field(n, pa.bool_()) for n in FLAGS),
        pa.field("language", pa.string()),
    ]
    schema = pairs_schema([pa.field("license", pa.string())])
    pairs.begin(make_sidecar("import", "pairs", ("pairs", 1), StageConfig()), "")
    scores.begin(make_sidecar("score", "bench", (SCORES, 1), StageConfig()), "")
    rng = np.random.default_rng(0)
    pictures = jpegs(*SIDE, PICTURES)
    for shard in range(dataset.num_shards):
        with write_pairs(folder, pairs.file(shard), schema) as writer:
            writer.extend(_pairs(schema, shard_rows, rng, pictures))
        digest = pairs.digest(shard)
        write_table(folder, scores.file(shard), _scores(scores_schema(fields), shard_rows, rng), {}, digest)
    write_manifest(folder, dataset.manifest)
    made = Dataset.open(path)
    for name, rules in SELECTIONS.items():
        make_selection(made, name, rules)
    return made


def _pairs(schema: pa.Schema, rows: int, rng: np.random.Generator, pictures: list[bytes]) -> pa.Table:
    ok = rng.random(rows) < 0.9
    wide, tall = (np.exp(rng.normal(6.3, 0.5, (2, rows)))).astype(np.int32)
    numbers, hosts = rng.integers(0, 2**60, rows).tolist(), (HOSTS * rng.random(rows) ** 3).astype(int).tolist()
    lengths, words = rng.integers(3, 31, rows).tolist(), rng.integers(0, WORDS, 40).tolist()
    failure = np.array(FAILURES)[rng.integers(0, len(FAILURES), rows)]
    status = np.where(ok, "success", failure)
    hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(rng.bytes(32 * rows))])
    which = rng.integers(0, len(pictures), rows).tolist()
    made: dict[str, Any] = {
        "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))]),
        "url": [f"https://host{h}.example/{n:x}.jpg" for h, n in zip(hosts, numbers, strict=True)],
        "caption": [_caption(words, n, size) for n, size in zip(numbers, lengths, strict=True)],
        "image": [pictures[w] if good else None for w, good in zip(which, ok.tolist(), strict=True)],
        "format": np.where(ok, "jpeg", None),
        "width": pa.array(wide, mask=~ok),
        "height": pa.array(tall, mask=~ok),
        "original_width": pa.array(wide * 2, mask=~ok),
        "original_height": pa.array(tall * 2, mask=~ok),
        "sha256": hashes,
        "status": status,
        "error": np.where(ok, None, np.char.add(failure, ": as it was said")),
        "http_status": pa.array(np.full(rows, 404), pa.int16(), mask=status != "http_error"),
        "license": [LICENCES[n % len(LICENCES)] for n in numbers],
    }
    columns = [pa.array(made[f.name], f.type) if f.name in made else pa.nulls(rows, f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _caption(words: list[int], number: int, size: int) -> str:
    return " ".join(f"word{(words[i] + (number >> i)) % WORDS}" for i in range(size))


def _scores(schema: pa.Schema, rows: int, rng: np.random.Generator) -> pa.Table:
    missing = rng.random(rows) < 0.1
    numbers = [pa.array(rng.normal(0.25, 0.05, rows).astype(np.float32), mask=missing) for _ in NUMBERS]
    whole = [pa.array(rng.integers(1, 200, rows).astype(np.int32)) for _ in WHOLE]
    flags = [pa.array(rng.random(rows) < 0.05) for _ in FLAGS]
    language = pa.array(np.array(LANGUAGES)[(len(LANGUAGES) * rng.random(rows) ** 3).astype(int)])
    return pa.Table.from_arrays([*numbers, *whole, *flags, language], schema=schema)


def run(rounds: int, quick: bool) -> Result:
    """Seconds, memory and bytes of a report."""
    rows, shard_rows, rounds = (2_000, 500, 1) if quick else (ROWS, SHARD_ROWS, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = generate(Path(scratch) / "dataset", rows, shard_rows)
        command = [script("pairmill"), "report", dataset.url]
        run_quietly(command)
        told = json.loads(dataset.folder.read_bytes("reports/report.json"))
        assert told["totals"]["rows"] == rows
        assert all(sum(h["counts"]) == h["rows"] for h in told["histograms"])
        seconds = medians({"report": lambda: run_quietly(command)}, rounds)["report"]
        peak = peak_memory(command)["pss"]
        page = dataset.folder.size("reports/report.html")
    pictures = sum(map(len, told["pictures"].values()))
    return Result(
        "report",
        "one page on a dataset with images, twelve scores, languages and two selections",
        rounds,
        {"rows": rows, "histograms": len(told["histograms"]), "pictures": pictures},
        {"pairmill report, s": seconds, "peak memory, MiB": peak / 2**20, "page, MB": page / 1e6},
        [
            Check("pairmill report, a million rows, s", seconds, 30.0, at_least=False),
            Check("page, MB", page / 1e6, 5.0, at_least=False),
        ],
        PACKAGES,
    )
