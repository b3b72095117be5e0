"""Images and captions into embeddings or scores of pairs, each distinct image and caption once.

Equal images and equal captions are computed once and looked up: their scores are then equal to the last bit for any
batch size, and a tie stays a tie.

Shape letters: B batch, T text tokens, D width, U distinct captions, V distinct images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from downstream.base import Subject
from schemas.errors import PairmillError
from training.batch import Batch
from training.data import Sample, image_fields
from training.models.vilt import ImageTokens
from training.text import Tokenizer

CHUNK = 4096  # captions tokenized at once
PAIR_HEADS = ("ranking", "matching")
Done = Callable[[int], None]


@dataclass(frozen=True)
class Distinct:
    """Things that occur once or several times.

    first   [U] int64, where each distinct one occurs first
    number  [n] int64, which distinct one each thing is
    """

    first: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def distinct(keys: Iterable[Hashable]) -> Distinct:
    """In order of first occurrence."""
    seen: dict[Hashable, int] = {}
    number = np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
    return Distinct(np.unique(number, return_index=True)[1], number)


class Texts:
    """The distinct captions as token ids, shortest first, so that a batch of neighbours has little padding.

    number  [captions] int64, which distinct caption each one is
    cut     how many distinct captions lost their end
    """

    def __init__(self, captions: Sequence[str], tokenizer: Tokenizer, max_length: int) -> None:
        found = distinct(captions)
        chosen = [captions[i] for i in found.first]
        rows: list[Tensor] = []
        self.cut = 0
        for start in range(0, len(chosen), CHUNK):
            ids, mask, cut = tokenizer.encode_counted(chosen[start : start + CHUNK], max_length)
            rows += [row[:length] for row, length in zip(ids, mask.sum(1).tolist(), strict=True)]
            self.cut += cut
        order = np.argsort([len(row) for row in rows], kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.number = place[found.number]
        self._rows = [rows[i] for i in order]
        self._pad = tokenizer.pad_id

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, which: Sequence[int] | np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """(input_ids [B, T] int64, mask [B, T] bool) of these distinct captions."""
        rows = [self._rows[i] for i in which]
        lengths = torch.tensor([len(row) for row in rows])
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(device), mask.to(device)


def is_dual_encoder(subject: Subject) -> bool:
    """Whether images and captions are embedded apart, and a score is a dot product."""
    return hasattr(subject.model, "encode_image")


def image_batch(pictures: Sequence[np.ndarray], device: torch.device) -> Batch:
    """uint8 [H, W, 3] each -> a batch with image fields only."""
    samples = [Sample((0, 0), "", pixels=one) for one in pictures]
    return Batch(**image_fields(samples)).to(device)


def embed_images(
    subject: Subject, pictures: Iterable[np.ndarray], device: torch.device, batch_size: int, done: Done
) -> np.ndarray:
    """Unit vectors of a dual encoder: uint8 [H, W, 3] each -> [n, D] float32. `done` is told each batch's size."""
    parts: list[np.ndarray] = []
    waiting: list[np.ndarray] = []

    def flush() -> None:
        pixel_values = image_batch(waiting, device).pixel_values
        parts.append(_vectors(subject.model.encode_image(pixel_values)))
        done(len(waiting))
        waiting.clear()

    for picture in pictures:
        waiting.append(picture)
        if len(waiting) == batch_size:
            flush()
    if waiting:
        flush()
    return np.concatenate(parts)


def embed_texts(subject: Subject, texts: Texts, device: torch.device, batch_size: int, done: Done) -> np.ndarray:
    """Unit vectors of a dual encoder's distinct captions: [U, D] float32."""
    parts = []
    for start in range(0, len(texts), batch_size):
        which = range(start, min(start + batch_size, len(texts)))
        parts.append(_vectors(subject.model.encode_text(texts.batch(which, device)[0])))
        done(len(which))
    return np.concatenate(parts)


def _vectors(features: Tensor) -> np.ndarray:
    """Unit length in float32, whatever the model computed in."""
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


class PairScorer:
    """Scores of pairs from a single-stream model's head; the image is embedded once for all its captions.

    The score is the ranking head's, or the logit of "belongs together" of the matching head (ALBEF, METER; the
    ranking head of ViLT starts as a copy of it).
    """

    def __init__(self, subject: Subject, head: str, texts: Texts, device: torch.device, batch_size: int) -> None:
        """Raises PairmillError: the model cannot score pairs, or has no such head."""
        routes = [name for name in PAIR_HEADS if name in subject.model.routes]
        if head == "auto" and routes:
            head = routes[0]
        if head not in routes:
            has = f"It has {', '.join(routes)}." if routes else "Train it with the objective matching or ranking."
            raise PairmillError(f"{subject.name}: this {subject.family} has no {_named(head)} head. {has}")
        self.model, self.head, self.texts = subject.model, head, texts
        self.device, self.batch_size = device, batch_size

    def embed(self, picture: np.ndarray) -> ImageTokens:
        """uint8 [H, W, 3] -> the tokens of one image."""
        return self.model.embed_image(image_batch([picture], self.device))

    def scores(self, image: ImageTokens, which: np.ndarray, done: Done) -> np.ndarray:
        """One image with the distinct captions `which` -> [len(which)] float32."""
        parts: list[np.ndarray] = [np.empty(0, np.float32)]
        for start in range(0, len(which), self.batch_size):
            some = which[start : start + self.batch_size]
            parts.append(self.one_batch(image, some))
            done(len(some))
        return np.concatenate(parts)

    def one_batch(self, image: ImageTokens, which: np.ndarray) -> np.ndarray:
        """One image with at most a batch of distinct captions -> [B] float32."""
        ids, mask = self.texts.batch(which, self.device)
        B = len(ids)
        repeated = ImageTokens(image.tokens.expand(B, -1, -1), image.mask.expand(B, -1), image.place.expand(B, -1, -1))
        outputs = self.model.fuse(self.model.embed_text(ids), mask, repeated)
        logits = self.model.heads[self.head](outputs.need("pooled"))
        return logits[:, 0 if self.head == "ranking" else 1].float().cpu().numpy()


def _named(head: str) -> str:
    return "matching or ranking" if head == "auto" else head
