"""What a row costs: milliseconds of one core and bytes on disk, of every extractor and of training's input.

python -m benchmarks.costs    # the tables of docs/scale.md
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import open_clip

from benchmarks.clip_score import MODEL, TINY, random_clip
from benchmarks.extract import NAME, Epoch, bytes_of, random_rcnn
from benchmarks.make_pairs import make_pairs
from benchmarks.training_input import COUNT
from extractors.clip import STATE, ClipLoader
from extractors.clip_source import find_clip
from extractors.config import GridConfig, PatchesConfig
from extractors.flow import ExtractWork, Settings, forget_model
from extractors.grid import GridLoader
from extractors.patches import PatchLoader, extract_patches
from extractors.protocol import Loader
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import RegionLoader
from extractors.resume import Outputs, wanted
from shards.dataset import PAIRS, Dataset
from shards.hand import RowInHand
from shards.system import keep_freed_memory
from training.sources import IMAGES


def cost(dataset: Dataset, loader: Loader, batch: int, scores: bool = False) -> tuple[float, float]:
    """(seconds of one core, bytes) of a row of the last shard, with one thread on the CPU; the shard before loads."""
    outputs = Outputs(dataset, f"features/{NAME}", f"scores/{NAME}" if scores else None, STATE)
    work = ExtractWork(outputs, loader, Settings("cpu", "fp32", batch, 1, True), wanted(dataset, None))
    keep_freed_memory()  # as every stage does
    seconds = 0.0
    for stage in outputs.stages:  # rows that stand would be copied
        shutil.rmtree(Path(dataset.url, stage.path), ignore_errors=True)
    for shard in range(dataset.num_shards):
        start = time.process_time()
        work(shard, RowInHand(None))
        seconds = time.process_time() - start
    forget_model()
    rows = dataset.manifest.shards[-1]
    files = [Path(dataset.url, stage.file(dataset.num_shards - 1)) for stage in outputs.stages]
    return seconds / rows, sum(file.stat().st_size for file in files) / rows


def costs(folder: Path, quick: bool) -> dict[str, tuple[float, float]]:
    """`cost` of every extractor by name; the detectors of our own parts see one picture. The JPEGs have 512x384 px."""
    rows, width, model = (2, 8, TINY) if quick else (32, 64, open_clip.get_model_config(MODEL))
    few, many = make_pairs(folder / "few", [1, 1]), make_pairs(folder / "many", [1, rows])
    more = make_pairs(folder / "more", [1, 16 * rows])
    clip = random_clip(folder / "clip", model)
    found = {"score clip, ViT-B/32": cost(many, ClipLoader(find_clip(clip, None), True, False), 16, scores=True)}
    grid = GridLoader.of(GridConfig(backbone=f"clip:{clip}"))
    found["extract grid, CLIP's ViT-B/32"] = cost(many, grid, 16)
    for layout in ("vilt", "square"):
        found[f"extract patches, {layout}, 384 px"] = cost(more, PatchLoader(PatchesConfig(layout=layout)), 0)
    found["extract regions, torchvision:tiny"] = cost(many, RegionLoader.of(RegionsConfig()), 4)
    for kind in ("FPN", "C4"):
        path = str(random_rcnn(folder / "rcnn.pth", kind, width))
        config = RegionsConfig(detector=f"rcnn:{kind}", weights=path, min_boxes=36, max_boxes=36)
        found[f"extract regions, rcnn:{kind}, 36 boxes"] = cost(few, RegionLoader.of(config), 2)
    return found


def reading(folder: Path, quick: bool) -> dict[str, tuple[float, float, float]]:
    """(seconds of one core, of the clock, bytes read) of a row in ViLT's training batches at 384 px, two threads: the
    median of three epochs, everything in the page cache.
    """
    rows, batch = (4, 2) if quick else (512, 16)
    dataset = make_pairs(folder / "read", [rows])
    extract_patches(dataset, PatchesConfig(name=NAME, workers=0))
    found = {}
    for name, part in ((IMAGES, PAIRS), (NAME, f"features/{NAME}")):
        epoch, epochs = Epoch(dataset, name, batch), []
        for _ in range(3):
            start, clock = time.process_time(), time.perf_counter()
            loader = epoch.loader()
            for _ in epoch.batches(loader):
                pass
            with COUNT:
                epochs.append(
                    ((time.process_time() - start) / loader.pairs, (time.perf_counter() - clock) / loader.pairs)
                )
        core, passed = (median(values) for values in zip(*epochs, strict=True))
        found["JPEGs" if name == IMAGES else "patch tensors"] = core, passed, bytes_of(dataset, part)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, (seconds, size) in costs(Path(scratch), quick=False).items():
            print(f"{name:40}{1000 * seconds:>12,.1f} ms{size:>12,.0f} bytes")
        for name, (core, passed, size) in reading(Path(scratch), quick=False).items():
            told = f"batches of {name}"
            print(f"{told:40}{1000 * core:>12,.2f} ms{1000 * passed:>12,.2f} ms of the clock{size:>12,.0f} bytes")
