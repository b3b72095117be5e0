"""CLIP score of every pair, and the embeddings it comes from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from extractors.clip_source import ClipSource, find_clip
from extractors.config import ClipScoreConfig
from extractors.patches import check_aspect
from extractors.protocol import Item, Row
from extractors.resume import Outputs
from extractors.runner import run_extractor
from schemas.errors import PairmillError
from schemas.events import Emit, Event, Notice, ShardDone, StageFinished, silent
from schemas.features import CLIP_SCORE_FIELDS, clip_embedding_fields
from shards.dataset import Dataset
from shards.reader import read_table
from shards.transforms import normalise, resize_clip, resize_square

STATE = "clip_state"
TRUNCATED = "clip_truncated"
_CPU_BATCH = 32
_NOT_PIXELS = ("MaybeConvertMode", "MaybeToTensor", "ToTensor", "Normalize")

Resize = Callable[[np.ndarray], np.ndarray]


def image_resize(preprocess: Mapping[str, Any]) -> Resize:
    """The geometry of an open_clip preprocessing: uint8 [H, W, 3] -> uint8 [S, S, 3], its own pixels exactly.

    The two usual ones (shortest side and crop; squash) are those of shards/transforms.py; for the rest open_clip's
    own steps are called.
    """
    size = preprocess["size"]
    square = size if isinstance(size, int) else size[0] if len(set(size)) == 1 else None
    if square and preprocess["interpolation"] == "bicubic":
        if preprocess["resize_mode"] == "shortest":
            return lambda rgb: resize_clip(rgb, square)
        if preprocess["resize_mode"] == "squash":
            return lambda rgb: resize_square(rgb, square)
    whole = open_clip.image_transform(
        size,
        is_train=False,
        resize_mode=preprocess["resize_mode"],
        interpolation=preprocess["interpolation"],
        fill_color=preprocess["fill_color"],
    )
    steps = [step for step in whole.transforms if type(step).__name__ not in _NOT_PIXELS]

    def resize(rgb: np.ndarray) -> np.ndarray:
        image = Image.fromarray(rgb)
        for step in steps:
            image = step(image)
        return np.array(image)

    return resize


class ClipTokenizer:
    """open_clip's tokenizer, one thread at a time, with the count of texts that were cut."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.length = int(tokenizer.context_length)
        self.pad = int(tokenizer([""], context_length=self.length)[0, -1])
        self._one = threading.Lock()  # a fast tokenizer of transformers may not be called from two threads

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """int32 [K, T], each cut to the context with its end token kept; how many were cut."""
        if not texts:
            return np.zeros((0, self.length), np.int32), 0
        with self._one:
            tokens = self.tokenizer(texts, context_length=self.length)
            full = [i for i, row in enumerate(tokens.tolist()) if row[-2] != self.pad]
            longer = self.tokenizer([texts[i] for i in full], context_length=self.length + 1) if full else None
        # In a longer context a text that fits has the same tokens; one that was cut has its end token later.
        cut = 0 if longer is None else int((longer[:, : self.length] != tokens[full]).any(1).sum())
        return tokens.numpy().astype(np.int32), cut


class ClipExtractor:
    """Both towers. Item: `pixels` uint8 [S, S, 3], `tokens` int32 [K, T] of the captions at `at`, of `captions`."""

    def __init__(self, model: nn.Module, tokenizer: ClipTokenizer, preprocess: Mapping[str, Any], embeddings: bool):
        self.model, self.tokenizer, self.embeddings = model, tokenizer, embeddings
        self.preprocess = preprocess
        self.resize = image_resize(preprocess)
        self.encode_image, self.encode_text = model.encode_image, model.encode_text

    def compile(self) -> None:
        """torch.compile for both towers."""
        self.encode_image = torch.compile(self.encode_image)
        self.encode_text = torch.compile(self.encode_text)

    def prepare(self, rgb: np.ndarray, row: Row) -> Item:
        """Raises ImageError: bad_aspect."""
        check_aspect(rgb)
        captions = row["captions"] or [row["caption"]]
        at = [i for i, text in enumerate(captions) if text and text.strip()]
        tokens, cut = self.tokenizer([captions[i] for i in at])
        number = len(captions) if row["captions"] or at else 0
        return {"pixels": self.resize(rgb), "tokens": tokens, "at": at, "captions": number, "cut": cut}

    def key(self, item: Item) -> Hashable:
        """Every image has the same size."""
        return None

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """pixels uint8 [B, S, S, 3], tokens int32 [K, T] of all captions, owner int64 [K]: whose caption it is."""
        owner: np.ndarray = np.repeat(np.arange(len(items)), [len(item["at"]) for item in items])
        return {
            "pixels": torch.from_numpy(np.stack([item["pixels"] for item in items])),
            "tokens": torch.from_numpy(np.concatenate([item["tokens"] for item in items])),
            "owner": torch.from_numpy(owner),
        }

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """scores fp32 [K], and the L2-normalised embeddings image [B, D], text [K, D] fp16 where they are kept."""
        pixels = normalise(batch["pixels"].permute(0, 3, 1, 2), self.preprocess["mean"], self.preprocess["std"])
        image = _unit(self.encode_image(pixels))
        parts = [_unit(self.encode_text(part.long())) for part in batch["tokens"].split(len(pixels))]
        text = torch.cat(parts) if len(batch["tokens"]) else image[:0]
        out = {"scores": (image[batch["owner"]] * text).sum(1)}
        return out | {"image": image.half(), "text": text.half()} if self.embeddings else out

    def rows(self, items: Sequence[Item], outputs: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """clip_scores has a place for each caption, null for an empty one; the best is clip_score and clip_text.

        Raises PairmillError where the model overflowed.
        """
        if not all(np.isfinite(array).all() for array in outputs.values()):
            raise PairmillError(
                "The model gives infinite or undefined numbers. In fp16 large models overflow: pass --precision bf16."
            )
        rows, start = [], 0
        for i, item in enumerate(items):
            end = start + len(item["at"])
            scores = outputs["scores"][start:end]
            best = int(scores.argmax()) if len(scores) else None
            every: list[float | None] = [None] * item["captions"]
            for at, score in zip(item["at"], scores.tolist(), strict=True):
                every[at] = score
            row = {
                "clip_score": None if best is None else float(scores[best]),
                "clip_scores": every,
                TRUNCATED: item["cut"],
            }
            if self.embeddings:
                row["clip_image"] = outputs["image"][i]
                row["clip_text"] = None if best is None else outputs["text"][start + best]
            rows.append(row)
            start = end
        return rows

    def example(self) -> Item:
        """A grey image with one caption of full length."""
        size = self.preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        tokens, _ = self.tokenizer(["a " * self.tokenizer.length])
        return {
            "pixels": np.full((height, width, 3), 128, np.uint8),
            "tokens": tokens,
            "at": [0],
            "captions": 1,
            "cut": 0,
        }


def _unit(embedding: Tensor) -> Tensor:
    """fp32, length 1."""
    return F.normalize(embedding.float(), dim=-1)


@dataclass(frozen=True)
class ClipLoader:
    """What `score clip` writes: `scores/NAME`, and `features/NAME` with the embeddings."""

    source: ClipSource
    embeddings: bool = True
    compile: bool = False
    columns: tuple[str, ...] = ("caption", "captions")
    state_column: str = STATE
    cpu_batch: int = _CPU_BATCH

    @property
    def fields(self) -> list[pa.Field]:
        return clip_embedding_fields(self.source.dim)

    @property
    def score_fields(self) -> list[pa.Field]:
        return [*CLIP_SCORE_FIELDS, pa.field(TRUNCATED, pa.int32()), pa.field(STATE, pa.string())]

    @property
    def identity(self) -> dict[str, Any]:
        return self.source.identity()

    @property
    def about(self) -> dict[str, Any]:
        return {"model": self.source.label, "weights": self.source.sha256, "normalised": True}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        length = json.loads(self.source.model_cfg).get("text_cfg", {}).get("context_length", 77)
        made = {
            "model": self.source.label,
            "weights": self.source.sha256,
            "preprocess": json.loads(self.source.preprocess),
            "truncation": f"captions cut to {length} tokens, end token kept; {TRUNCATED} counts them",
        }
        return {
            "clip_score": {"what": "maximum of clip_scores", "scale": "raw cosine", **made},
            "clip_scores": {"what": "cosine of the image with each caption", "scale": "raw cosine", **made},
            "clip_image": {"what": "image embedding, L2-normalised", **made},
            "clip_text": {"what": "embedding of the best caption, L2-normalised", **made},
        }

    @property
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "open_clip_torch": open_clip.__version__}

    @property
    def bytes_per_row(self) -> int:
        return (4 * self.source.dim if self.embeddings else 0) + 40

    def load(self, device: torch.device) -> ClipExtractor:
        tokenizer = ClipTokenizer(self.source.tokenizer())
        preprocess = json.loads(self.source.preprocess)
        extractor = ClipExtractor(self.source.build(device), tokenizer, preprocess, self.embeddings)
        if self.compile:
            extractor.compile()
        return extractor


def score_clip(dataset: Dataset | str | Path, config: ClipScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`, and with `embeddings` `features/NAME` in the same pass.

    Columns: clip_score fp32, the raw cosine, maximum over captions; clip_scores, one for each caption; clip_truncated,
    how many captions were cut; clip_state. A row without an image or without a caption has a null score.
    Raises PairmillError as `find_clip` and `run_extractor` do.
    """
    loader = ClipLoader(find_clip(config.model, config.pretrained), config.embeddings, config.compile)
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    scores = f"scores/{config.name}"
    shards: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, ShardDone):
            shards.append(event.shard)
        emit(event)

    def outputs(opened: Dataset) -> Outputs:
        return Outputs(opened, f"features/{config.name}" if config.embeddings else None, scores, STATE)

    finished = run_extractor(dataset, config, loader, outputs, "score clip", listen)
    cut = sum(_truncated(dataset, scores, shard) for shard in shards)
    if cut:
        emit(Notice(f"{cut:,} captions were longer than the text tower's context and were cut."))
    return finished


def _truncated(dataset: Dataset, scores: str, shard: int) -> int:
    table = read_table(dataset.folder, dataset.stage(scores).file(shard), [TRUNCATED])
    return pc.sum(table[TRUNCATED]).as_py() or 0
