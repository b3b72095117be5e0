"""A random CLIP of some thousand parameters in a folder that open_clip reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_clip(folder: Path, seed: int = 0, preprocess: dict[str, Any] | None = None, **model: Any) -> Path:
    """open_clip_config.json and model.safetensors in `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL | model, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    made = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(made.state_dict(), folder / "model.safetensors")
    return folder


def save_run(run: Path, best: int | None, last: int) -> Path:
    """A run folder with a checkpoint every step up to `last`, each with other weights."""
    for step in range(1, last + 1):
        save_clip(run / "checkpoints" / f"{step:05d}", seed=step)
    (run / "last").write_text(f"{last:05d}\n")
    if best is not None:
        (run / "best").write_text(f"{best:05d}\n")
    return run
