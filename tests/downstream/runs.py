"""Small run folders and task sets, made without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from downstream.config import RetrievalImportConfig
from downstream.retrieval_import import import_retrieval
from schemas.events import silent
from tests.make import COLOURS, encode, picture
from training.checkpoint import Run
from training.config import resolve
from training.registry import build_model, model_config
from training.text import ClipTokenizer, train_wordpiece

SIZES = ((64, 48), (48, 64), (96, 40), (64, 64))
WORDS = ("block", "box", "square", "patch", "thing")


def captions_of(image: int, count: int = 5) -> list[str]:
    """Texts of several lengths; the first one is the same for images of one colour."""
    colour = list(COLOURS)[image % len(COLOURS)]
    first = f"a {colour} block"
    return [first, *(f"{'the very ' * j}{colour} {WORDS[j]} number {image}" for j in range(1, count))]


def make_taskset(
    folder: Path, test: int = 6, val: int = 3, train: int = 3, captions: int = 5, same: Sequence[int] = (), **config
) -> Path:
    """A dataset with a retrieval task: `test` images and so on; images listed in `same` have the first one's bytes."""
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for i, split in enumerate(splits):
        seed = same[0] if i in same else i
        (images / f"{i}.jpg").write_bytes(encode(picture(*SIZES[seed % len(SIZES)], seed=seed)))
        sentences = [{"raw": c, "imgid": i, "sentid": 100 * i + j} for j, c in enumerate(captions_of(i, captions))]
        records.append({"filename": f"{i}.jpg", "imgid": i, "split": split, "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"dataset": "test", "images": records}))
    values = {"karpathy": folder / "dataset.json", "images": images, "shard_rows": 5, "threads": 1, **config}
    import_retrieval(folder / "taskset", RetrievalImportConfig(**values), silent)
    return folder / "taskset"


def make_run(path: Path, preset: str, seed: int = 0, **model) -> Path:
    """A run folder whose one checkpoint is a model with random weights, large enough to tell images apart."""
    config = resolve(preset, {"seed": seed, "device": "cpu"})
    config = config.model_copy(update={"model": {**config.model, **model}})
    if config.family == "clip":
        tokenizer = ClipTokenizer()
    else:
        tokenizer = train_wordpiece((c for i in range(20) for c in captions_of(i)), 200)
    torch.manual_seed(seed)
    network = build_model(model_config(config.family, config.model))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    run = Run(path)
    run.begin(config.identity_fields(), yaml.safe_dump({"datasets": [], "config": config.model_dump(mode="json")}))
    tokenizer.save(path / "tokenizer")
    state = {"step": 1, "fingerprint": {"tokenizer": tokenizer.fingerprint}}
    run.save(1, {"optimizer/none": torch.zeros(1)}, state, network.save)
    return path
