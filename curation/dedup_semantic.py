"""`dedup_semantic`: SemDeDup. Of rows with nearly equal image embeddings one stays; pairs are looked for in a cluster.

Abbas and others, SemDeDup, 2023, https://arxiv.org/abs/2303.09540, as facebookresearch/SemDeDup codes it: spherical
k-means; within a cluster rows in the order of `keep`; row j is dropped when max over i < j of cosine(i, j) is above
1 - eps, whether row i was dropped itself or not. No pair across clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from curation.draws import uid_draws, uid_halves
from curation.embeddings import Embeddings
from curation.expressions import Compiled, compile_value
from curation.kmeans import Vectors, fit, in_order, nearest, unit
from curation.matches import choose
from curation.rules import Match, Rule
from curation.semantic_config import DedupSemanticConfig
from curation.telling import Steps
from schemas.events import Notice

ROWS_PER_CLUSTER = 1000
GROUP_BYTES = 64 << 20  # of fp16 embeddings that a thread holds at a time; a larger cluster is held whole
TILE = 1024  # rows compared with as many
LARGE = 50  # times the mean size of a cluster that is worth a warning
_ORDERS = ("hard", "easy", "random")


@dataclass(frozen=True)
class Order:
    """Which rows come first, over the rows that take part: `key` ascending, then the uid, then the row's number.

    key  float64 or uint64 [n]; None for `hard` and `easy`, whose key is the cosine to the centroid
    """

    kind: str
    key: np.ndarray | None
    uid_hi: np.ndarray
    uid_lo: np.ndarray

    def of(self, members: np.ndarray, raw: np.ndarray, centroid: np.ndarray) -> np.ndarray:
        """The permutation of a cluster's members: int64 [m]. raw [m, dim] of the members, centroid fp32 [dim]."""
        if self.key is not None:
            key = self.key[members]
        else:
            key = exact_cosines(raw, centroid)
            key = key if self.kind == "hard" else -key
        return np.lexsort((members, self.uid_lo[members], self.uid_hi[members], key))


class DedupSemantic(Rule[DedupSemanticConfig]):
    """Drops a row whose image embedding is nearly that of another one. A row without an embedding stays."""

    kind, config_class, shorthand = "dedup_semantic", DedupSemanticConfig, "eps"

    def prepare(self) -> None:
        self.compiled: Compiled | None = None
        if self.config.keep not in _ORDERS:
            self.compiled = compile_value(self.config.keep, self.table)
        self.embeddings = Embeddings(self.table.dataset, self.config.embeddings)
        self.features = frozenset({self.config.embeddings})
        self.columns = frozenset({"uid"}) | (self.compiled.columns if self.compiled else frozenset())

    @property
    def label(self) -> str:
        return self.config.name or f"dedup_semantic {self.config.eps:g}"

    def inputs(self) -> dict[str, pl.Expr]:
        return uid_halves() | ({"by": self.compiled.expr} if self.compiled else {})

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        rows = np.flatnonzero(seen.to_numpy())
        rows = rows[self.embeddings.present(rows)]
        order = self._order(values, rows)
        like = self._like(rows, order) if len(rows) > 1 else np.full(len(rows), -1, np.int32)
        dropped = np.flatnonzero(like >= 0)
        self.matches = _matches(self.embeddings, rows, dropped, like[dropped], self.config.seed)
        keep: np.ndarray = np.ones(len(seen), bool)
        keep[rows[dropped]] = False
        return pl.Series(keep)

    def _order(self, values: pl.DataFrame, rows: np.ndarray) -> Order:
        hi, lo = (values[c].to_numpy()[rows] for c in ("uid_hi", "uid_lo"))
        key = None
        if self.compiled:
            key = -values["by"].cast(pl.Float64).fill_null(-np.inf).to_numpy()[rows]
        elif self.config.keep == "random":
            key = uid_draws(hi, lo, self.config.seed)
        return Order(self.config.keep, key, hi, lo)

    def _like(self, rows: np.ndarray, order: Order) -> np.ndarray:
        """int32 [n]: for each row the place in `rows` of the one that stays instead, -1 where it stays itself."""
        config, tell = self.config, Steps(self.emit, self.label)
        k = min(config.clusters or max(1, round(len(rows) / ROWS_PER_CLUSTER)), len(rows))
        step = tell(f"fit {k:,} centroids", min(len(rows), 256 * k) * config.iterations)
        centroids = fit(self.embeddings, rows, k, iterations=config.iterations, seed=config.seed, tell=step)
        labels, _ = nearest(self.embeddings, rows, centroids, tell("nearest centroid", len(rows)))
        self._warn_large(np.bincount(labels, minlength=k))
        step = tell("compare within clusters", len(rows))
        like: np.ndarray = np.full(len(rows), -1, np.int32)
        for members, found in find_like(self.embeddings, rows, labels, centroids, order, 1 - config.eps):
            like[members] = found
            step(len(members))
        return like

    def _warn_large(self, sizes: np.ndarray) -> None:
        if sizes.max() > LARGE * sizes.mean():
            text = f"`{self.label}`: the largest cluster has {sizes.max():,} rows, the mean {sizes.mean():,.0f}"
            self.emit(Notice(f"{text}. Its pairs take most of the time; more `clusters` help.", warning=True))


def find_like(
    vectors: Vectors, rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray, order: Order, cut: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For a few clusters at a time their members and what each is dropped for, both places in `rows`; -1: it stays.

    rows int64 [n] ascending, labels int32 [n], centroids fp32 [k, dim]
    """
    by_cluster = np.argsort(labels, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=len(centroids)))])

    def work(clusters: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        members = by_cluster[bounds[clusters[0]] : bounds[clusters[1]]]
        places = np.sort(members)
        raw = vectors.read(rows[places])
        out: np.ndarray = np.full(len(members), -1, np.int32)
        for cluster in range(*clusters):
            start, end = bounds[cluster] - bounds[clusters[0]], bounds[cluster + 1] - bounds[clusters[0]]
            if end - start > 1:
                mine = members[start:end]
                own = raw[np.searchsorted(places, mine)]
                first = order.of(mine, own, centroids[cluster])
                like = drop_like(own[first], cut)
                stays = np.where(like >= 0, mine[first][like], -1)
                out[start + first] = stays
        return members, out

    return in_order(work, _groups(bounds, GROUP_BYTES // (2 * vectors.dim)))


def _groups(bounds: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Runs of clusters [first, end) of at most `most` rows each, or of one cluster."""
    out, first = [], 0
    for end in range(1, len(bounds)):
        if end == len(bounds) - 1 or bounds[end + 1] - bounds[first] > most:
            out.append((first, end))
            first = end
    return out


def drop_like(raw: np.ndarray, cut: float) -> np.ndarray:
    """SemDeDup's rule on one cluster in order: int64 [m], the row that stays in a dropped row's place, -1 if it stays.

    raw  fp16 or fp32 [m, dim], of any length

    A product in fp32 decides only where it is farther from `cut` than its rounding; the rest is decided in fp64.
    """
    firsts, twin_of = _equal_rows(raw)
    found = _earlier(raw[firsts], cut)
    like = np.where(twin_of == np.arange(len(raw)), -1, twin_of)  # equal rows: cosine 1, above any cut
    like[firsts] = np.where(found >= 0, firsts[found], -1)
    for j in np.flatnonzero(like >= 0):  # a chain ends at the row that stays; what is before j is settled
        if like[like[j]] >= 0:
            like[j] = like[like[j]]
    return like


def _equal_rows(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that equal no earlier row, ascending; for each row the first that equals it), bit for bit."""
    flat = np.ascontiguousarray(raw)
    keys = flat.view(np.dtype((np.void, flat.shape[1] * flat.itemsize)))[:, 0]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    own = np.arange(len(raw))
    twin_of = np.where(flat.any(1), first[inverse], own)  # the cosine of zeros is 0, not 1
    return np.flatnonzero(twin_of == own), twin_of


def _earlier(raw: np.ndarray, cut: float) -> np.ndarray:
    """int64 [m]: an earlier row whose cosine is above `cut`, -1 where there is none."""
    x = unit(raw)
    doubt = x.shape[1] * 2.0**-23  # bounds the error of a product of two unit vectors in fp32
    like: np.ndarray = np.full(len(raw), -1, np.int64)
    for start in range(0, len(raw), TILE):
        left = np.arange(start, min(start + TILE, len(raw)))
        for begin in range(0, start + 1, TILE):
            products = (x[torch.from_numpy(left)] @ x[begin : begin + TILE].T).numpy()
            if begin == start:
                products[np.arange(products.shape[1]) >= (left - begin)[:, None]] = -np.inf
            best = products.argmax(1)
            top = products[np.arange(len(left)), best]
            like[left] = np.where(top > cut + doubt, begin + best, -1)
            for i in np.flatnonzero((top > cut - doubt) & (top <= cut + doubt)):
                near: np.ndarray = begin + np.flatnonzero(products[i] > cut - doubt)
                exact = exact_cosines(raw[near], raw[left[i]])
                if exact.max() > cut:
                    like[left[i]] = near[exact.argmax()]
            left = left[like[left] < 0]
            if not len(left):
                break
    return like


def exact_cosines(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """float64 [m]: cosine of each row of `many` [m, dim] with `one` [dim]; 0 for a row of zeros.

    A row's value does not depend on the other rows.
    """
    a: np.ndarray = many.astype(np.float64)
    b: np.ndarray = one.astype(np.float64)
    length = np.sqrt((a * a).sum(1) * (b * b).sum())
    return (a * b).sum(1) / np.where(length == 0, 1, length)


def _matches(
    embeddings: Embeddings, rows: np.ndarray, dropped: np.ndarray, stays: np.ndarray, seed: int
) -> tuple[Match, ...]:
    """A few dropped rows beside the ones that stay, with their cosine. dropped, stays: places in `rows`."""
    if not len(dropped):
        return ()
    sizes = np.bincount(stays)
    return tuple(
        Match(
            int(rows[j]),
            int(rows[i]),
            float(exact_cosines(embeddings.read(rows[[j]]), embeddings.read(rows[[i]])[0])[0]),
            int(sizes[i]) + 1,
        )
        for j, i in ((dropped[n], stays[n]) for n in choose(stays, seed))
    )
