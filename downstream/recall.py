"""Recall at k of image-text retrieval, both ways, from blocks of scores.

Scores come as row blocks [b, M]: rows are queries in order, columns all candidates. Nothing larger than a
block is kept, so 25,010 captions against 5,000 images need neither the whole score matrix nor pairs of
features in memory. An image may have several captions; a query finds its target when any own candidate is
in the top k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from schemas.errors import PairmillError

Ties = Literal["pessimistic", "albef"]
KS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Percent of queries that find an own candidate in the top k; {k: percent} each way."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    num_images: int
    num_texts: int

    @property
    def rsum(self) -> float:
        """Sum of all recalls of both directions (600 is perfect for k = 1, 5, 10)."""
        return sum(self.image_to_text.values()) + sum(self.text_to_image.values())

    @property
    def mean(self) -> float:
        """Mean over both directions and all k: what ALBEF selects models by."""
        return self.rsum / (len(self.image_to_text) + len(self.text_to_image))


def score_blocks(queries: np.ndarray, candidates: np.ndarray, rows: int = 1024) -> Iterator[np.ndarray]:
    """Dot products of embeddings, `rows` queries at a time: [Q, D], [M, D] -> blocks [<= rows, M] float32."""
    columns = np.asarray(candidates, dtype=np.float32).T
    for start in range(0, len(queries), rows):
        yield np.asarray(queries[start : start + rows], dtype=np.float32) @ columns


def ranks(
    blocks: Iterable[np.ndarray],
    query_image: np.ndarray,
    candidate_image: np.ndarray,
    *,
    ties: Ties = "pessimistic",
    num_folds: int = 1,
) -> np.ndarray:
    """Place of the best own candidate of every query, 0 = first.

    blocks           [b, M] each, Q rows together; higher is better; -inf is allowed, NaN is not
    query_image      [Q] int, image of each query, 0 to num_images - 1
    candidate_image  [M] int, image of each candidate; own = the same image
    ties             "pessimistic": a foreign candidate with the same score comes first, so that a scorer that
                     knows nothing gets nothing. "albef": the order of numpy.argsort(row)[::-1], as in ALBEF's
                     Retrieval.py; that sort is not stable and orders equal scores otherwise on another
                     kind of CPU.
    num_folds        a query meets only the candidates of its own fold; folds are equal runs of images
    -> [Q] int64

    Raises PairmillError: a NaN score, blocks that do not fit, a query without an own candidate.
    """
    if ties not in ("pessimistic", "albef"):
        raise PairmillError(f"`ties` must be `pessimistic` or `albef`, got `{ties}`.")
    query_image, candidate_image = np.asarray(query_image), np.asarray(candidate_image)
    fold_size = _fold_size(query_image, candidate_image, num_folds)
    found: list[np.ndarray] = [np.empty(0, np.int64)]
    start = 0
    for block in blocks:
        scores = np.asarray(block)
        images = query_image[start : start + len(scores)]
        _check_block(scores, start, len(images), len(candidate_image))
        own = candidate_image == images[:, None]
        near = candidate_image // fold_size == (images // fold_size)[:, None]
        found.append(_block_ranks(scores, own, near, start, ties))
        start += len(scores)
    if start != len(query_image):
        raise PairmillError(f"The scores have {start:,} rows, there are {len(query_image):,} queries.")
    return np.concatenate(found)


def _fold_size(query_image: np.ndarray, candidate_image: np.ndarray, num_folds: int) -> int:
    num_images = int(max(query_image.max(initial=-1), candidate_image.max(initial=-1))) + 1
    if num_folds < 1 or num_images % num_folds:
        raise PairmillError(f"{num_images:,} images cannot be cut into {num_folds} equal folds.")
    return max(num_images // num_folds, 1)


def _check_block(scores: np.ndarray, start: int, num_rows: int, num_candidates: int) -> None:
    if scores.shape != (num_rows, num_candidates):
        raise PairmillError(
            f"Scores from query {start:,} on have shape {list(scores.shape)}, want {num_rows:,} x {num_candidates:,}."
        )
    bad = np.isnan(scores).any(axis=1)
    if bad.any():
        raise PairmillError(
            f"The score of query {start + int(bad.argmax()):,} is NaN ({int(bad.sum()):,} such rows in this "
            "block). A rank among NaNs means nothing: look at the checkpoint's training log."
        )


def _block_ranks(scores: np.ndarray, own: np.ndarray, near: np.ndarray, start: int, ties: Ties) -> np.ndarray:
    without = ~own.any(axis=1)
    if without.any():
        raise PairmillError(f"Query {start + int(without.argmax()):,} has no candidate of its own image.")
    ahead = _ahead_by_argsort(scores, own) if ties == "albef" else _ahead_pessimistic(scores, own)
    return (ahead & near).sum(axis=1)


def _ahead_pessimistic(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """[b, M] bool: foreign candidates that score no less than the best own one."""
    floor = -np.inf if scores.dtype.kind == "f" else np.iinfo(scores.dtype).min
    best = np.where(own, scores, floor).max(axis=1, keepdims=True)
    return (scores >= best) & ~own


def _ahead_by_argsort(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """[b, M] bool: candidates before the first own one in numpy.argsort(row)[::-1]."""
    order = np.argsort(scores, axis=1)[:, ::-1]
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(scores.shape[1])[None], axis=1)
    return place < np.where(own, place, scores.shape[1]).min(axis=1, keepdims=True)


def retrieval_recall(
    image_blocks: Iterable[np.ndarray],
    text_blocks: Iterable[np.ndarray],
    text_image: np.ndarray,
    *,
    ties: Ties = "pessimistic",
    num_folds: int = 1,
    ks: tuple[int, ...] = KS,
) -> Recall:
    """Recall of both directions.

    image_blocks  [b, num_texts] each: image queries against all texts
    text_blocks   [b, num_images] each: text queries against all images
    text_image    [num_texts] int, image of each text; every image from 0 on has at least one
    num_folds     5 for COCO's 1K protocol: the mean of the recalls of five runs of images (and their texts);
                  1 for everything at once

    Raises PairmillError as `ranks` does.
    """
    text_image = np.asarray(text_image)
    if not len(text_image):
        raise PairmillError("There are no captions to retrieve.")
    images = np.arange(int(text_image.max()) + 1)
    of_images = ranks(image_blocks, images, text_image, ties=ties, num_folds=num_folds)
    of_texts = ranks(text_blocks, text_image, images, ties=ties, num_folds=num_folds)
    fold_size = len(images) // num_folds
    return Recall(
        image_to_text=_recall_at(of_images, images // fold_size, num_folds, ks),
        text_to_image=_recall_at(of_texts, text_image // fold_size, num_folds, ks),
        num_images=len(images),
        num_texts=len(text_image),
    )


def _recall_at(found: np.ndarray, fold: np.ndarray, num_folds: int, ks: tuple[int, ...]) -> dict[int, float]:
    queries = np.bincount(fold, minlength=num_folds)
    return {k: float(np.mean(np.bincount(fold, found < k, num_folds) / queries) * 100) for k in ks}


def matrix_recall(
    scores: np.ndarray,
    text_image: np.ndarray,
    text_scores: np.ndarray | None = None,
    *,
    ties: Ties = "pessimistic",
    num_folds: int = 1,
) -> Recall:
    """Recall from whole matrices: scores [num_images, num_texts], text_scores [num_texts, num_images].

    Without `text_scores` the transpose of `scores` is used. Raises PairmillError as `ranks` does.
    """
    scores = np.asarray(scores)
    texts = scores.T if text_scores is None else np.asarray(text_scores)
    return retrieval_recall([scores], [texts], text_image, ties=ties, num_folds=num_folds)
