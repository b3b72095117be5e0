"""`score clip` at ViT-B/32 over the bare model: what reading, decoding, tokenizing and writing add to the forward pass.

Random weights: the arithmetic is the same. The bare side is open_clip's own model on tensors that lie ready, in the
same batches, with the same threads. Ours is the stage, its first shard left out, in which the model is loaded.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.compare import Check, Result, medians
from benchmarks.make_pairs import make_pairs
from extractors.clip import score_clip
from extractors.clip_source import find_clip, quiet
from extractors.config import ClipScoreConfig
from schemas.events import Event, ShardDone
from shards.dataset import PAIRS, Dataset
from shards.images import decode_rgb
from shards.reader import read_table
from shards.transforms import resize_clip

MODEL = "ViT-B-32"
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "patch_size": 32, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def random_clip(folder: Path, model_cfg: dict[str, Any]) -> str:
    """An open_clip folder of that architecture with random weights; how `--model` names it."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"


@dataclass
class Ours:
    """The stage over a dataset of two shards, the first to get going; each run under another name."""

    dataset: Dataset
    model: str
    batch: int
    runs: int = 0

    def seconds(self) -> float:
        """Seconds of the second shard."""
        self.runs += 1
        found: dict[int, float] = {}

        def listen(event: Event) -> None:
            if isinstance(event, ShardDone):
                found[event.shard] = event.seconds

        name = f"run{self.runs}"
        config = ClipScoreConfig(model=self.model, batch_size=self.batch, workers=0, device="cpu", name=name)
        score_clip(self.dataset, config, listen)
        return found[1]

    def scores(self) -> np.ndarray:
        """clip_score of the last run's second shard, float32 [rows]."""
        stage = self.dataset.stage(f"scores/run{self.runs}")
        return read_table(self.dataset.folder, stage.file(1), ["clip_score"])["clip_score"].to_numpy()


class Bare:
    """The model and its tensors of the second shard: pixels [B, 3, 224, 224] fp32, tokens [B, 77] int64 a batch."""

    def __init__(self, dataset: Dataset, model: str, batch: int) -> None:
        source = find_clip(model, None)
        self.model = source.build(torch.device("cpu"))
        preprocess = open_clip.image_transform(224, is_train=False)
        normalise = preprocess.transforms[-1]
        table = read_table(dataset.folder, dataset.stage(PAIRS).file(1), ["image", "caption"])
        pixels = [resize_clip(decode_rgb(image), 224) for image in table["image"].to_pylist()]
        images = torch.stack([normalise(torch.from_numpy(p).permute(2, 0, 1).float() / 255) for p in pixels])
        tokens = source.tokenizer()(table["caption"].to_pylist())
        self.batches = list(zip(images.split(batch), tokens.split(batch), strict=True))

    def scores(self) -> Tensor:
        """Cosine of every pair, fp32 [rows]."""
        found = []
        with torch.inference_mode():
            for pixels, tokens in self.batches:
                image, text = self.model.encode_image(pixels), self.model.encode_text(tokens)
                found.append(torch.nn.functional.cosine_similarity(image, text))
        return torch.cat(found)

    def seconds(self) -> float:
        start = time.perf_counter()
        self.scores()
        return time.perf_counter() - start


def check_equal(ours: Sequence[float] | np.ndarray, bare: Tensor) -> None:
    """The same cosines, up to float32's last digits."""
    np.testing.assert_allclose(ours, bare.numpy(), atol=2e-6)


def run(rounds: int, quick: bool) -> Result:
    """ViT-B/32, or a tiny one when quick."""
    rows, batch, rounds = (8, 4, 1) if quick else (256, 16, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_clip(folder / "clip", TINY if quick else open_clip.get_model_config(MODEL))
        dataset = make_pairs(folder / "dataset", [batch, rows])
        ours, bare = Ours(dataset, model, batch), Bare(dataset, model, batch)
        ours.seconds()
        check_equal(ours.scores(), bare.scores())
        middle = medians({"ours": ours.seconds, "bare": bare.seconds}, rounds)
    rates = {name: rows / seconds for name, seconds in middle.items()}
    return Result(
        "clip_score",
        f"score clip over the bare forward pass of {'a tiny model' if quick else MODEL} on CPU",
        rounds,
        {"pairs": rows, "batch": batch, "threads": torch.get_num_threads(), "images": "512x384 JPEG"},
        {"score clip, pairs/s": rates["ours"], "bare forward, pairs/s": rates["bare"]},
        [Check("share of the bare forward's speed", rates["ours"] / rates["bare"], 0.95)],
        ["pairmill", "torch", "open_clip_torch"],
        ["Random weights. The model's loading is left out on both sides."],
    )
