"""One shard of each stage, ended at its calls. Each function runs in a clean process and returns the last call tried.

`folder` is a scratch place; `every` as in `assert_atomic`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from curation.config import DownloadConfig
from curation.download import download
from curation.filter import filter_dataset
from curation.filter_config import FilterConfig
from curation.maintenance_config import RemoveConfig
from curation.remove import remove
from extractors.clip import score_clip
from extractors.config import ClipScoreConfig, PatchesConfig
from extractors.patches import extract_patches
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from schemas.events import silent
from schemas.pairs import TIMING_COLUMNS
from shards.dataset import MANIFEST, Dataset
from shards.reader import read_table
from tests.atomicity import assert_atomic, tree
from tests.extractors.tiny_clip import save_clip
from tests.make import make_dataset
from training.checkpoint import METRICS, Run
from training.config import resolve
from training.loop import Validation
from training.train import train

TINY_CLIP = {
    "family": "clip",
    "tokenizer": "clip",
    "model": {"embed": 8, "image_size": 32, "patch": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2,
              "context": 16, "text_width": 16, "text_layers": 1, "text_heads": 2},
    "image_size": 32, "patch": 16, "max_text_len": 16, "augmentation": "none", "objectives": [{"name": "contrastive"}],
    "batch_size": 2, "steps": 2, "lr": 1e-3, "warmup": 1, "log_every": 1, "device": "cpu", "threads": 1,
}  # fmt: skip


def _start(folder: Path, rows: int = 4) -> Path:
    torch.set_num_threads(1)  # no pool before the fork; a child makes its own
    make_dataset(folder / "start", shards=1, rows=rows, fail={(0, 1): "timeout"})
    return folder / "start"


def _stage(folder: Path, every: int, run: Callable[[Dataset], Any]) -> int:
    start = folder / "start"
    return assert_atomic(lambda: (start, lambda root: run(Dataset.open(root))), folder, Dataset.open, every=every)


def clip_scores(folder: Path, every: int) -> int:
    _start(folder)
    config = ClipScoreConfig(model=f"local-dir:{save_clip(folder / 'clip')}", workers=0, device="cpu")
    return _stage(folder, every, lambda dataset: score_clip(dataset, config))


def patches(folder: Path, every: int) -> int:
    _start(folder)
    config = PatchesConfig(size=32, patch=16, workers=0)
    return _stage(folder, every, lambda dataset: extract_patches(dataset, config))


def regions(folder: Path, every: int) -> int:
    _start(folder)
    config = RegionsConfig(size=64, workers=0, device="cpu")
    return _stage(folder, every, lambda dataset: extract_regions(dataset, config))


def selection(folder: Path, every: int) -> int:
    _start(folder)
    config = FilterConfig(output="best", where=("width >= 60",), sample=0.5)
    return _stage(folder, every, lambda dataset: filter_dataset(dataset, config))


def removal(folder: Path, every: int) -> int:
    """Pairs and patches of one shard, of which a row is taken out."""
    start = Dataset.open(_start(folder))
    extract_patches(start, PatchesConfig(size=32, patch=16, workers=0))
    (folder / "requests.txt").write_text("http://example.com/2.jpg\n")
    config = RemoveConfig(list=str(folder / "requests.txt"))
    return _stage(folder, every, lambda dataset: remove(dataset, config))


def pairs_from_web(folder: Path, every: int, base: str) -> int:
    """The list cut, and its one shard downloaded, from the web at `base`."""
    lists = folder / "list.jsonl"
    kinds = ("img", "img", "gone", "img")
    rows = ({"url": f"{base}/{kind}/{i}", "caption": f"c{i}"} for i, kind in enumerate(kinds))
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DownloadConfig(allow_private=("127.0.0.1",), workers=0, retries=0, size=16)

    def run(root: Path) -> None:
        download([str(lists)], root, config)

    def opens(root: Path) -> None:
        if (root / MANIFEST).exists():
            Dataset.open(root)

    return assert_atomic(lambda: (None, run), folder, opens, every=every, seen=untimed)


def untimed(root: Path) -> dict[str, Any]:
    """`tree`, with the rows of `pairs/` in place of their bytes and without when they were fetched."""
    folder = Dataset.open(root).folder
    files: dict[str, Any] = tree(root)
    for name in files:
        if name.startswith("pairs/") and name.endswith(".parquet"):
            files[name] = read_table(folder, name).drop_columns(list(TIMING_COLUMNS)).to_pylist()
    return files


def checkpoints(folder: Path, every: int) -> int:
    """Two checkpoints of a run as the loop writes them, the first one pruned."""

    def model(place: Path) -> None:
        (place / "model.safetensors").write_bytes(bytes(100))

    def run(root: Path) -> None:
        made = Run(root)
        made.begin({"seed": 0}, "config: {}\n")
        for step in range((made.pointer("last") or 0) + 1, 3):
            made.save(step, {"a": torch.full((3,), float(step))}, {"step": step}, model)
        made.prune(1)

    def opens(root: Path) -> None:
        last = Run(root).pointer("last")
        if last is not None:
            found = sorted(p.name for p in Run(root).folder(last).iterdir())
            assert found == ["model.safetensors", "optimizer.safetensors", "state.json"]

    return assert_atomic(lambda: (None, run), folder, opens, every=every)


def training(folder: Path, every: int) -> int:
    """A whole run that validates and saves at every step; the first step's checkpoint stays the best."""
    _start(folder, rows=5)
    preset = folder / "tiny.yaml"
    preset.write_text(yaml.safe_dump({**TINY_CLIP, "eval_every": 1, "keep": 1}))
    config = resolve(str(preset), {})

    def run(root: Path) -> None:
        out = root / "run"  # loss.png tells the folder's name
        marks = Validation("mark", lambda model: float(Run(out).metrics()[-1]["step"]))  # lower is better: step 1
        train(config, [str(folder / "start")], out, silent, marks)

    return assert_atomic(lambda: (None, run), folder, every=every, seen=_run_files)


def _run_files(root: Path) -> dict[str, Any]:
    """`tree` of a run, with its metrics in place of their bytes and without their seconds."""
    files: dict[str, Any] = tree(root)
    lines = Run(root / "run").metrics()
    files[f"run/{METRICS}"] = [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]
    return files
