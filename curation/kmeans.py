"""Spherical k-means on mapped embeddings: memory does not grow with the rows, and no number of threads changes a bit.

Every block of rows has a fixed size and is computed by one thread; results are added up in the blocks' order. On
machines of one kind the centroids are the same, bit for bit, on every run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
import torch

from schemas.errors import PairmillError

BLOCK = 2048  # rows a thread holds at a time
TILE = 4096  # centroids a block is compared with at a time
PER_CENTROID = 256  # points a centroid is fitted on, as FAISS does

A = TypeVar("A")
B = TypeVar("B")
Tell = Callable[[int], None]  # called with the rows done since the last call


class Vectors(Protocol):
    """Rows that are read when they are needed."""

    dim: int

    def read(self, rows: np.ndarray) -> np.ndarray:
        """fp16 or fp32 [len(rows), dim] of ascending row numbers. Called from several threads."""


def no_progress(rows: int) -> None:
    """A `Tell` that tells nobody."""


def unit(vectors: np.ndarray) -> torch.Tensor:
    """fp32 [n, dim], each of length 1; a row of zeros stays one. Raises PairmillError for NaN and infinite numbers."""
    # Copied into torch's own memory: aligned, so that the bits of a product depend on nothing but shapes.
    x = torch.from_numpy(vectors).to(torch.float32, copy=True)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not bool(torch.isfinite(length).all()):
        raise PairmillError(
            "The embeddings hold NaN or infinite numbers: `pairmill check` tells which shard is damaged."
        )
    return x.div_(length.clamp_min_(1e-12))


def fit(
    vectors: Vectors,
    rows: np.ndarray,
    k: int,
    *,
    per_centroid: int = PER_CENTROID,
    iterations: int = 20,
    seed: int = 0,
    tell: Tell = no_progress,
) -> np.ndarray:
    """fp32 [k, dim]: centroids of length 1, by Lloyd's steps on at most `per_centroid` x k of the rows.

    rows  int64 [n], ascending, n >= k

    Starts from k rows drawn by `seed`. A centroid that no row is nearest to moves to the row that lies farthest from
    its own. Ends early when no row changes its centroid.
    """
    rng = np.random.default_rng(seed)
    size = min(len(rows), k * per_centroid)
    sample = rows if size == len(rows) else np.sort(rng.choice(rows, size, replace=False))
    start = np.sort(rng.choice(sample, k, replace=False))
    centroids = unit(vectors.read(start))
    before: np.ndarray | None = None
    for _ in range(iterations):
        labels: np.ndarray = np.empty(size, np.int32)
        cosines: np.ndarray = np.empty(size, np.float32)
        sums = torch.zeros(k, vectors.dim)
        for begin, block, label, cosine in _blocks(vectors, sample, centroids):
            labels[begin : begin + len(label)], cosines[begin : begin + len(label)] = label, cosine
            sums.index_add_(0, torch.from_numpy(label).long(), block)
            tell(len(label))
        if before is not None and np.array_equal(labels, before):
            break
        centroids = _moved(vectors, sample, labels, cosines, sums)
        before = labels
    return centroids.numpy()


def _moved(
    vectors: Vectors, sample: np.ndarray, labels: np.ndarray, cosines: np.ndarray, sums: torch.Tensor
) -> torch.Tensor:
    """The next centroids."""
    centroids = unit(sums.numpy())
    empty = np.flatnonzero(np.bincount(labels, minlength=len(sums)) == 0)
    if len(empty):
        far = np.sort(np.argsort(cosines, kind="stable")[: len(empty)])
        centroids[torch.from_numpy(empty)] = unit(vectors.read(sample[far]))
    return centroids


def nearest(
    vectors: Vectors, rows: np.ndarray, centroids: np.ndarray, tell: Tell = no_progress
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the centroid with the largest dot product (the first of equal ones): int32 [n], float32 [n].

    rows       int64 [n], ascending; their vectors are taken at length 1
    centroids  fp32 [k, dim], as they are
    """
    labels: np.ndarray = np.empty(len(rows), np.int32)
    products: np.ndarray = np.empty(len(rows), np.float32)
    for begin, _, label, product in _blocks(vectors, rows, torch.from_numpy(centroids).clone()):
        labels[begin : begin + len(label)], products[begin : begin + len(label)] = label, product
        tell(len(label))
    return labels, products


Block = tuple[int, torch.Tensor, np.ndarray, np.ndarray]  # first row, vectors, centroid of each, product with it


def _blocks(vectors: Vectors, rows: np.ndarray, centroids: torch.Tensor) -> Iterator[Block]:
    tiles = centroids.split(TILE)

    def work(begin: int) -> Block:
        x = unit(vectors.read(rows[begin : begin + BLOCK]))
        label: np.ndarray = np.zeros(len(x), np.int32)
        best: np.ndarray = np.full(len(x), -np.inf, np.float32)
        for number, tile in enumerate(tiles):
            products = (x @ tile.T).numpy()
            found = products.argmax(1)
            value = np.take_along_axis(products, found[:, None], 1)[:, 0]
            better = value > best
            label[better] = found[better] + number * TILE
            best[better] = value[better]
        return begin, x, label, best

    return in_order(work, range(0, len(rows), BLOCK))


def in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`work(item)` of each, in order, on as many threads as torch has; each of them computes with one thread."""
    threads = torch.get_num_threads()
    waiting: deque[Future[B]] = deque()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
