"""Scores of images against captions, as rows [b, candidates] for the queries asked for: the metric never needs more
than a block. Here those of a dual encoder; pair_scores.py has those of a single-stream model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from downstream.base import Subject, evaluating, pixels
from downstream.encode import Distinct, Texts, distinct, embed_images, embed_texts
from downstream.retrieval_set import RetrievalSet
from schemas.events import Emit, Notice, Progress, StageFinished, StageStarted

STAGE = "evaluate retrieval"
QUERIES = 256  # rows of a block
REPORT_S = 0.5


class Scores(Protocol):
    """Higher is better; -inf marks a pair that was not ranked."""

    def of_images(self, images: np.ndarray) -> np.ndarray:
        """Image queries [b] int64 against all captions: [b, captions] float32."""
        ...

    def of_texts(self, texts: np.ndarray) -> np.ndarray:
        """Caption queries [b] int64 against all images: [b, images] float32."""
        ...


@dataclass(frozen=True)
class Machine:
    """Where and how a model computes."""

    device: torch.device
    precision: str = "fp32"
    batch_size: int = 64
    threads: int | None = None


def distinct_images(data: RetrievalSet) -> Distinct:
    """Images with equal bytes are one."""
    return distinct(data.image_hashes)


@dataclass(frozen=True)
class DotProducts:
    """Scores of a dual encoder.

    images  [V, D] float32, unit vectors of the distinct images; image_number [images]: which one each is
    texts   [U, D] float32, of the distinct captions; text_number [captions]
    """

    images: np.ndarray
    image_number: np.ndarray
    texts: np.ndarray
    text_number: np.ndarray

    def of_images(self, images: np.ndarray) -> np.ndarray:
        return (self.images[self.image_number[images]] @ self.texts.T)[:, self.text_number]

    def of_texts(self, texts: np.ndarray) -> np.ndarray:
        return (self.texts[self.text_number[texts]] @ self.images.T)[:, self.image_number]


def embed(subject: Subject, data: RetrievalSet, machine: Machine, emit: Emit) -> DotProducts:
    """All images and captions through the two towers."""
    images = distinct_images(data)
    texts = Texts(data.captions, subject.tokenizer, subject.view.max_text_len)
    tell_cut(texts, subject, emit)
    report = Reporter(emit, len(images) + len(texts))
    places = [data.images[i] for i in images.first]
    with evaluating(machine.device, machine.precision):
        pictures = pixels(data.dataset, places, subject.view, machine.threads)
        of_images = embed_images(subject, pictures, machine.device, machine.batch_size, report)
        of_texts = embed_texts(subject, texts, machine.device, machine.batch_size, report)
    report.finish()
    return DotProducts(of_images, images.number, of_texts, texts.number)


def tell_cut(texts: Texts, subject: Subject, emit: Emit) -> None:
    """Captions that are longer than the model reads are part of the number: say so."""
    if texts.cut:
        most = subject.view.max_text_len
        emit(Notice(f"{texts.cut:,} of {len(texts):,} captions are cut to the {most} tokens the model reads."))


class Reporter:
    """Counts what is done and shows it, at most twice a second."""

    def __init__(self, emit: Emit, total: int, blocks: int = 1, standing: int = 0, note: str = "") -> None:
        self.emit, self.total, self.blocks, self.note = emit, total, blocks, note
        self.done = 0
        self.start = time.monotonic()
        self._next = self.start
        emit(StageStarted(STAGE, blocks, standing, total))

    def __call__(self, count: int) -> None:
        self.done += count
        if time.monotonic() >= self._next:
            self.emit(Progress(STAGE, self.done, 0, self.note))
            self._next = time.monotonic() + REPORT_S

    def finish(self) -> None:
        self.emit(Progress(STAGE, self.done, 0, self.note))
        self.emit(StageFinished(STAGE, self.blocks, (), time.monotonic() - self.start, {"scored": self.done}))


def chunks(count: int, size: int = QUERIES) -> Iterator[np.ndarray]:
    """0 .. count-1 in runs of `size`."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def top(row: np.ndarray, count: int) -> np.ndarray:
    """The `count` best columns of [M], best first; of equal ones the first. All where there are fewer."""
    if count < len(row):
        least = np.partition(row, -count)[-count]
        ahead = np.flatnonzero(row >= least)
    else:
        ahead = np.arange(len(row))
    return ahead[np.argsort(-row[ahead], kind="stable")][:count]


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `7.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
