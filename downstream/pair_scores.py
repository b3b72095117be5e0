"""Scores of pairs from a single-stream model: of every pair, or only of those a dual encoder puts forward.

All scores are one float32 matrix of distinct images by distinct captions (COCO 5K: 0.5 GB). They are computed block
by block, each block saved as a whole file, so that an evaluation of hours can be killed and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from downstream.base import Subject, evaluating, pixels
from downstream.encode import Distinct, PairScorer, Texts
from downstream.results import Blocks
from downstream.retrieval_set import RetrievalSet
from downstream.scores import Machine, Reporter, Scores, chunks, distinct_images, duration, tell_cut, top
from schemas.events import Emit, Notice
from training.models.vilt import ImageTokens

PAIRS_PER_BLOCK = 1 << 16
Block = tuple[int, int]  # distinct images [start, stop)


@dataclass(frozen=True)
class Candidates:
    """A dual encoder's choice: the best captions of each image and the best images of each caption.

    texts   [images, k] int64, captions
    images  [captions, k'] int64, images
    """

    texts: np.ndarray
    images: np.ndarray


def choose(scores: Scores, data: RetrievalSet, top_k: int, num_folds: int = 1) -> Candidates:
    """The `top_k` best of each query (all where there are fewer), of its own fold first; of equals the first."""
    fold = data.image_fold(num_folds)
    caption_fold = fold[data.caption_image]

    def best(rows: Callable[[np.ndarray], np.ndarray], own: np.ndarray, other: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.empty((len(own), min(top_k, len(other))), np.int64)
        for queries in chunks(len(own)):
            for query, row in zip(queries, rows(queries), strict=True):
                near = row if num_folds == 1 else np.where(other == own[query], row, -np.inf)
                found[query] = top(near, top_k)
        return found

    return Candidates(best(scores.of_images, fold, caption_fold), best(scores.of_texts, caption_fold, fold))


@dataclass(frozen=True)
class Plan:
    """Which pairs a single-stream model is given: of distinct image v the distinct captions `texts[v]`, ascending.

    Cut into blocks [start, stop) of images with about PAIRS_PER_BLOCK pairs, each saved as one file.
    """

    texts: Sequence[np.ndarray]
    blocks: Sequence[Block]

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.texts))

    def pairs_in(self, block: Block) -> int:
        return sum(len(self.texts[v]) for v in range(*block))


def make_plan(
    data: RetrievalSet, images: Distinct, texts: Texts, candidates: Candidates | None, num_folds: int = 1
) -> Plan:
    """Every pair of a fold, or the candidates' pairs of both directions, each once."""
    if candidates is None:
        wanted = _pairs_of_folds(data, images, texts, num_folds)
    else:
        wanted = _pairs_of_candidates(images, texts, candidates)
    blocks, start, count = [], 0, 0
    for image, which in enumerate(wanted):
        if count and count + len(which) > PAIRS_PER_BLOCK:
            blocks.append((start, image))
            start, count = image, 0
        count += len(which)
    return Plan(wanted, [*blocks, (start, len(wanted))])


def _pairs_of_folds(data: RetrievalSet, images: Distinct, texts: Texts, num_folds: int) -> list[np.ndarray]:
    fold = data.image_fold(num_folds)
    of_fold = [np.unique(texts.number[fold[data.caption_image] == f]) for f in range(num_folds)]
    folds: list[set[int]] = [set() for _ in range(len(images))]
    for image, number in enumerate(images.number):
        folds[number].add(int(fold[image]))
    # Almost always one fold: the array is shared, not copied.
    return [
        of_fold[next(iter(f))] if len(f) == 1 else np.unique(np.concatenate([of_fold[i] for i in sorted(f)]))
        for f in folds
    ]


def _pairs_of_candidates(images: Distinct, texts: Texts, candidates: Candidates) -> list[np.ndarray]:
    width = len(texts)
    of_images = images.number[:, None] * width + texts.number[candidates.texts]
    of_texts = images.number[candidates.images] * width + texts.number[:, None]
    codes = np.unique(np.concatenate([of_images.ravel(), of_texts.ravel()]))
    edges: np.ndarray = np.asarray(np.searchsorted(codes, np.arange(len(images) + 1) * width))
    return [codes[a:b] - v * width for v, (a, b) in enumerate(pairwise(edges.tolist()))]


@dataclass(frozen=True)
class PairScores:
    """Scores of a single-stream model, with the candidates they are limited to.

    matrix  [V, U] float32, distinct images by distinct captions; -inf where a pair was not scored
    """

    matrix: np.ndarray
    image_number: np.ndarray
    text_number: np.ndarray
    candidates: Candidates | None = None

    def of_images(self, images: np.ndarray) -> np.ndarray:
        scores = self.matrix[self.image_number[images]][:, self.text_number]
        return scores if self.candidates is None else _only(scores, self.candidates.texts[images])

    def of_texts(self, texts: np.ndarray) -> np.ndarray:
        scores = self.matrix[:, self.text_number[texts]].T[:, self.image_number]
        return scores if self.candidates is None else _only(scores, self.candidates.images[texts])


def _only(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[b, M] with -inf everywhere but in the columns `kept` [b, k]: unranked pairs come after all ranked ones."""
    out: np.ndarray = np.full_like(scores, -np.inf)
    np.put_along_axis(out, kept, np.take_along_axis(scores, kept, axis=1), axis=1)
    return out


def score_pairs(
    subject: Subject,
    data: RetrievalSet,
    machine: Machine,
    emit: Emit,
    *,
    head: str = "auto",
    candidates: Candidates | None = None,
    num_folds: int = 1,
    store: Blocks | None = None,
) -> PairScores:
    """Every pair of the plan through the model. Blocks that stand in `store` are read, the others written there.

    Tells the cost before it starts. Raises PairmillError: a model that cannot score pairs.
    """
    images = distinct_images(data)
    texts = Texts(data.captions, subject.tokenizer, subject.view.max_text_len)
    scorer = PairScorer(subject, head, texts, machine.device, machine.batch_size)
    tell_cut(texts, subject, emit)
    work = _Work(scorer, make_plan(data, images, texts, candidates, num_folds), store)
    left = work.read()
    places = [data.images[images.first[image]] for _, block in left for image in range(*block)]
    if left:
        with evaluating(machine.device, machine.precision):
            work.score(left, pixels(data.dataset, places, subject.view, machine.threads), emit)
    return PairScores(work.matrix, images.number, texts.number, candidates)


class _Work:
    """A plan on its way to a matrix [V, U]."""

    def __init__(self, scorer: PairScorer, plan: Plan, store: Blocks | None) -> None:
        self.scorer, self.plan, self.store = scorer, plan, store
        self.matrix: np.ndarray = np.full((len(plan.texts), len(scorer.texts)), -np.inf, dtype=np.float32)

    def read(self) -> list[tuple[int, Block]]:
        """Takes the blocks that stand; returns (number, block) of those that are left."""
        left = []
        for number, block in enumerate(self.plan.blocks):
            values = self.store.load(f"{number:05}", (self.plan.pairs_in(block),)) if self.store else None
            if values is None:
                left.append((number, block))
            else:
                self._place(block, values)
        return left

    def _place(self, block: Block, values: np.ndarray) -> None:
        start = 0
        for image in range(*block):
            which = self.plan.texts[image]
            self.matrix[image, which] = values[start : start + len(which)]
            start += len(which)

    def score(self, left: Sequence[tuple[int, Block]], pictures: Iterator[np.ndarray], emit: Emit) -> None:
        """The blocks that are left, their images' pixels in order."""
        embedded = map(self.scorer.embed, pictures)
        first = next(embedded)
        pairs = sum(self.plan.pairs_in(block) for _, block in left)
        self._tell_cost(first, self.plan.texts[left[0][1][0]], pairs, emit)
        report = Reporter(emit, pairs, len(left), len(self.plan.blocks) - len(left))
        waiting = chain([first], embedded)
        for number, block in left:
            values = np.concatenate(
                [self.scorer.scores(next(waiting), self.plan.texts[image], report) for image in range(*block)]
            )
            if self.store:
                self.store.save(f"{number:05}", values)
            self._place(block, values)
        report.finish()

    def _tell_cost(self, image: ImageTokens, which: np.ndarray, pairs: int, emit: Emit) -> None:
        """Pair passes and about how long they take, measured on a batch from the middle of the first block."""
        some = which[len(which) // 2 :][: self.scorer.batch_size]
        self.scorer.one_batch(image, some)  # the first pass also allocates
        start = time.perf_counter()
        self.scorer.one_batch(image, some)
        rate = len(some) / max(time.perf_counter() - start, 1e-9)
        whole = f" of {self.plan.num_pairs:,}" if pairs < self.plan.num_pairs else ""
        emit(
            Notice(
                f"{pairs:,}{whole} pair passes lie ahead: about {duration(pairs / rate)} at {rate:,.0f} a second "
                f"on {self.scorer.device}."
            )
        )
