"""Anonymous memory of each stage at 10 and at 100 shards of equal size: it must not grow with the dataset.

Anonymous memory is what no file backs: mapped shards and libraries are left out. Each stage runs in one process of its
own (`--workers 0`; with workers each of them is such a process) over data made beforehand, and is sampled from outside.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.compare import Check, Result, peak_memory, python

FEW, MANY = 10, 100
ROWS = 16  # of a shard with images
GROWTH = 1.1
LISTED = {"filter": 44}  # bytes a row that a stage may take: docs/scale.md
WIDTH, HEIGHT = 320, 240
BATCH = 8
# Stages name what they import themselves: a process must hold nothing else.


def download(data: Path, shards: int) -> None:
    """A list, served by the parent."""
    from curation.config import DownloadConfig
    from curation.download import download

    config = DownloadConfig(
        workers=0, size=192, per_host=8, connections=8, shard_rows=ROWS, allow_private=("127.0.0.1",)
    )
    found = download([str(data / f"list-{shards * ROWS}.parquet")], data / "fetched", config)
    assert found.counts == {"success": shards * ROWS}, found.counts


def score_clip(data: Path, shards: int) -> None:
    """A CLIP of some thousand parameters."""
    from extractors.clip import score_clip
    from extractors.config import ClipScoreConfig

    config = ClipScoreConfig(model=str(data.parent / "clip"), device="cpu", workers=0, batch_size=BATCH)
    assert score_clip(data / "pairs", config).done == shards


def extract_patches(data: Path, shards: int) -> None:
    """ViLT's patches at 192 px."""
    from extractors.config import PatchesConfig
    from extractors.patches import extract_patches

    assert extract_patches(data / "pairs", PatchesConfig(size=192, workers=0)).done == shards


def extract_grid(data: Path, shards: int) -> None:
    """The image tower of that CLIP."""
    from extractors.config import GridConfig
    from extractors.grid import extract_grid

    config = GridConfig(backbone=f"clip:local-dir:{data.parent / 'clip'}", device="cpu", workers=0, batch_size=BATCH)
    assert extract_grid(data / "pairs", config).done == shards


def extract_regions(data: Path, shards: int) -> None:
    """The tiny detector."""
    from extractors.regions.config import RegionsConfig
    from extractors.regions.extractor import extract_regions

    config = RegionsConfig(device="cpu", workers=0, batch_size=BATCH)
    assert extract_regions(data / "pairs", config).done == shards


def filter_pairs(data: Path, shards: int) -> None:
    """Thresholds and a best share, over shards of 10 000 rows without images."""
    from curation.filter import filter_dataset
    from curation.filter_config import FilterConfig

    config = FilterConfig(output="best", where=("bench.a >= 0.24",), top=0.3, by="bench.d")
    assert filter_dataset(data / "scored", config).rows % shards == 0


def train_input(data: Path, shards: int) -> None:
    """One epoch of decoded batches."""
    from benchmarks.training_input import Ours, drain_batches
    from shards.dataset import Dataset

    assert drain_batches(Ours(Dataset.open(data / "pairs"), 2, ROWS)) >= shards * ROWS


STAGES: dict[str, Callable[[Path, int], None]] = {
    "download": download,
    "score clip": score_clip,
    "extract patches": extract_patches,
    "extract grid": extract_grid,
    "extract regions": extract_regions,
    "filter": filter_pairs,
    "training input": train_input,
}


def prepare(folder: Path, shards: int, address: str, stages: Sequence[str]) -> None:
    """What the stages read, at that many shards."""
    from benchmarks.download import write_list
    from benchmarks.filter import SHARD_ROWS, generate
    from benchmarks.make_pairs import make_pairs

    folder.mkdir()
    write_list(folder, address, shards * ROWS)
    make_pairs(folder / "pairs", [ROWS] * shards, WIDTH, HEIGHT)
    if "filter" in stages:
        generate(folder / "scored", shards * SHARD_ROWS)


def measure(folder: Path, stage: str, shards: int, number: int) -> int:
    """Peak anonymous bytes of one stage, in a copy of the data that no run has touched."""
    data = folder / str(shards)
    fresh = folder / f"{shards}-{number}"
    shutil.copytree(data, fresh, copy_function=_link)
    try:
        return peak_memory(python("-m", "benchmarks.memory", stage, str(fresh), str(shards)))["anonymous"]
    finally:
        shutil.rmtree(fresh)


def _link(source: str, target: str) -> str:
    Path(target).hardlink_to(source)
    return target


def _growth(stage: str) -> str:
    return f"{stage}, growth of a row, bytes"


def run(rounds: int, quick: bool) -> Result:
    """Every stage at both sizes, interleaved."""
    from benchmarks.clip_score import TINY, random_clip
    from benchmarks.download import Load, server
    from benchmarks.filter import SHARD_ROWS

    few, many = (1, 2) if quick else (FEW, MANY)
    rounds = 1 if quick else min(rounds, 3)
    stages = ["download", "training input"] if quick else list(STAGES)
    peaks: dict[tuple[str, int], list[int]] = {(stage, shards): [] for stage in stages for shards in (few, many)}
    with tempfile.TemporaryDirectory() as scratch, server(Load(WIDTH, HEIGHT, ROWS, 0, 0, 0)) as address:
        folder = Path(scratch)
        random_clip(folder / "clip", TINY)
        for shards in (few, many):
            prepare(folder / str(shards), shards, address, stages)
        for number in range(rounds):
            for (stage, shards), seen in peaks.items():
                seen.append(measure(folder, stage, shards, number))
    middle = {key: statistics.median(seen) for key, seen in peaks.items()}
    found = {f"{stage}, {shards} shards, MiB": peak / 2**20 for (stage, shards), peak in middle.items()}
    for stage in stages:
        rows = (many - few) * (SHARD_ROWS if stage == "filter" else ROWS)
        found[_growth(stage)] = (middle[stage, many] - middle[stage, few]) / rows
    ratios = [Check(f"{s}, {many} shards over {few}", middle[s, many] / middle[s, few], GROWTH, False) for s in stages]
    listed = [Check(_growth(s), found[_growth(s)], most, False) for s, most in LISTED.items() if s in stages]
    sizes = {"rows of a shard": f"{ROWS} (filter: {SHARD_ROWS})", "images": f"{WIDTH}x{HEIGHT}"}
    return Result(
        "memory",
        "peak anonymous memory of each stage: it must not grow with the number of shards",
        rounds,
        {"shards": f"{few} and {many}", **sizes},
        found,
        [*ratios, *listed],
        ["pairmill", "torch", "polars", "pyarrow", "open_clip_torch"],
        ["One process, no workers, two threads of torch at most."],
    )


if __name__ == "__main__":
    STAGES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
