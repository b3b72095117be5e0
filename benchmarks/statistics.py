"""`score text` and `score image` beside decoding alone: what the cheap numbers of a pair add to looking at it.

Decoding alone is what a reader of these shards cannot do without: the row groups of the image column, and `decode_rgb`
of each at full size, in as many threads. Ours are the whole stages, reading, threads and writing included.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.compare import Check, Result, medians, timed
from benchmarks.make_pairs import make_pairs
from curation.scores.config import ImageScoreConfig, TextScoreConfig
from curation.scores.image import score_image
from curation.scores.text import score_text
from extractors.pipeline import map_ahead
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.parallel import threads_per_worker
from shards.reader import read_table, row_groups

# The usual size of a download, and one with odd sides.
SIZES = ((512, 384), (575, 383))


@dataclass
class Stages:
    """The two stages in this process, each run under a new name, and decoding alone."""

    dataset: Dataset
    runs: int = 0

    def text(self) -> None:
        self.runs += 1
        score_text(self.dataset, TextScoreConfig(name=f"text{self.runs}", workers=0))

    def image(self) -> None:
        self.runs += 1
        score_image(self.dataset, ImageScoreConfig(name=f"image{self.runs}", workers=0))

    def both(self) -> None:
        """What the goal is about: text and image statistics of the same rows."""
        self.text()
        self.image()

    def decode(self) -> None:
        """Every image, decoded at full size and thrown away."""
        threads = threads_per_worker(0)
        pairs = self.dataset.stage(PAIRS)
        with ThreadPoolExecutor(threads) as pool:
            for shard in range(self.dataset.num_shards):
                images = (
                    value.as_py()
                    for _, table in row_groups(self.dataset.folder, pairs.file(shard), ["image"])
                    for value in table["image"]
                )
                for _ in map_ahead(pool, decode_rgb, images, 2 * threads):
                    pass

    def check(self) -> None:
        """What the stages wrote tells of the pictures."""
        stage = self.dataset.stage(f"scores/image{self.runs}")
        found = read_table(self.dataset.folder, stage.file(0), ["mean", "aspect"])
        image = read_table(self.dataset.folder, self.dataset.stage(PAIRS).file(0), ["image"])["image"][0].as_py()
        rgb = decode_rgb(image)
        luma = rgb @ np.array([0.299, 0.587, 0.114])
        assert abs(found["mean"][0].as_py() - luma.mean()) < 1
        assert abs(found["aspect"][0].as_py() - rgb.shape[1] / rgb.shape[0]) < 1e-6


def cpu_seconds(run: Callable[[], object]) -> Callable[[], float]:
    """The same, answering with the seconds of all cores that this process took: what a busy machine does not change."""

    def seconds() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return seconds


def run(rounds: int, quick: bool) -> Result:
    """One process, images in the page cache; the clock, then the cores' time."""
    rows, rounds = (24, 1) if quick else (2000, rounds)
    rates: dict[str, float] = {}
    checks = []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            stages = Stages(make_pairs(Path(scratch) / "pairs", [rows // 2, rows // 2], width, height))
            stages.both()  # loads what is loaded once
            stages.check()
            runs = {"text and image": stages.both, "image": stages.image, "text": stages.text, "decode": stages.decode}
            clock = medians({name: timed(one) for name, one in runs.items()}, rounds)
            cores = medians({name: cpu_seconds(one) for name, one in runs.items()}, rounds)
        size = f"{width}x{height}"
        rates |= {f"{name}, {size}, pairs/s": rows / seconds for name, seconds in clock.items()}
        rates |= {f"{name}, {size}, CPU ms a pair": 1000 * seconds / rows for name, seconds in cores.items()}
        told = f"text and image over decode, {size}"
        checks.append(Check(told, clock["decode"] / clock["text and image"], 0.9))
        checks.append(Check(f"{told}, CPU time", cores["decode"] / cores["text and image"]))
    return Result(
        "statistics",
        "score text and score image of the same pairs over decoding their JPEGs at full size, pairs a second",
        rounds,
        {"rows": rows, "sizes": ", ".join(f"{w}x{h}" for w, h in SIZES)},
        rates,
        checks,
        ["pairmill", "opencv-python-headless", "numpy", "polars"],
        ["One process with a thread a core on all sides; JPEG quality 90."],
    )
