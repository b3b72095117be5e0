"""All pairs of 64-bit hashes that differ in at most `bits` bits, exactly, without comparing all pairs.

The bits are dealt to `bits` + k blocks. Two hashes within `bits` bits agree in at least k blocks (pigeonhole), so for
each choice of k blocks the hashes are sorted by these and compared within runs of equal ones. Real hashes are not
evenly spread: bits that no hash of a run varies in are left out, and a long run is searched again by its other bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb

import numpy as np

_LONG = 1024  # a run of more hashes is searched again by its other bits
_CHUNK = 1 << 16  # hashes whose bits are moved at once: they stay in the cache
_EDGES = 1 << 21  # pairs found before they are united
_CANDIDATES = 1 << 21  # pairs compared at once
_MAX_PASSES = 3000
# Seconds, measured on one core: they only choose the number of blocks.
_SORT_S, _PAIR_S, _STEP_S, _RUN_S, _PASS_S = 8e-8, 2e-9, 1.5e-9, 5e-6, 2e-4


def groups(hashes: np.ndarray, bits: int, threads: int | None = None) -> np.ndarray:
    """Connected components of the graph whose edges are all pairs of hashes within `bits` bits.

    hashes  uint64 [n], distinct, ascending
    ->      int32 [n]: the smallest index in the component; the same for any number of threads

    Memory: about 40 bytes a hash for two threads.
    """
    parent: np.ndarray = np.arange(len(hashes), dtype=np.int32)
    if bits and len(hashes) > 1:
        _Search(hashes, parent, bits).link_all(threads or min(2, os.cpu_count() or 1))
    return _roots(parent, parent)


def nearest(queries: np.ndarray, targets: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """For each query the nearest target within `bits` bits; of equally near ones the first.

    queries  uint64 [n]
    targets  uint64 [m]
    ->       int64 [n] index of the target, -1 where none is so near; int64 [n] bits that differ, 65 there
    """
    best: np.ndarray = np.full(len(queries), (65 << 32) | 0xFFFFFFFF, np.int64)
    if len(queries) and len(targets):
        blocks = max(1, _plan(len(queries), len(targets), 64, bits))
        for chosen, rest in _choices(range(64), bits, blocks):
            _nearest_pass(queries, targets, bits, chosen, rest, best)
    index = best & 0xFFFFFFFF
    return np.where(index == 0xFFFFFFFF, -1, index), best >> 32


def _nearest_pass(
    queries: np.ndarray, targets: np.ndarray, bits: int, chosen: list[int], rest: list[int], best: np.ndarray
) -> None:
    """Lowers `best` (bits << 32 | target) by the targets that agree with a query in the chosen bits."""
    forth, _ = _permutation([*chosen, *rest])
    shift = np.uint64(64 - len(chosen))
    moved = forth(targets)
    order = np.argsort(moved, kind="stable")
    moved = moved[order]
    prefixes = moved >> shift
    for start in range(0, len(queries), 1 << 20):
        part = forth(queries[start : start + (1 << 20)])
        prefix = part >> shift
        low = np.asarray(np.searchsorted(prefixes, prefix, "left"))
        count = np.searchsorted(prefixes, prefix, "right") - low
        hit = np.flatnonzero(count)
        ends = np.cumsum(count[hit])
        cut = 0
        while cut < len(hit):
            done = ends[cut - 1] if cut else 0
            stop = max(cut + 1, int(np.searchsorted(ends, done + _CANDIDATES, "right")))
            some = hit[cut:stop]
            cut = stop
            who: np.ndarray = np.repeat(some, count[some])
            first: np.ndarray = np.repeat(np.cumsum(count[some]) - count[some], count[some])
            at = low[who] + np.arange(len(who)) - first
            apart = np.bitwise_count(part[who] ^ moved[at]).astype(np.int64)
            near = apart <= bits
            np.minimum.at(best, who[near] + start, (apart[near] << 32) | order[at[near]])


class _Search:
    """Unites in `parent` all hashes that are near."""

    def __init__(self, hashes: np.ndarray, parent: np.ndarray, bits: int) -> None:
        self.hashes, self.parent, self.bits = hashes, parent, bits
        self._one = threading.Lock()

    def link_all(self, threads: int) -> None:
        free = _varying(self.hashes)
        passes = list(_choices(free, self.bits, _plan(len(self.hashes), len(self.hashes), len(free), self.bits)))
        if not passes:
            self._link_plainly(self.hashes)
            return
        fixed = _others(free)
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(self._one_pass, self.hashes, c, r, fixed) for c, r in passes]:
                done.result()

    def _link(self, values: np.ndarray) -> None:
        """All near pairs among `values` (uint64, distinct)."""
        free = _varying(values)
        blocks = _plan(len(values), len(values), len(free), self.bits)
        if not blocks:
            self._link_plainly(values)
            return
        fixed = _others(free)
        for chosen, rest in _choices(free, self.bits, blocks):
            self._one_pass(values, chosen, rest, fixed)

    def _link_plainly(self, values: np.ndarray) -> None:
        found = _Found(self, values, lambda v: v)
        found.compare(0, len(values), 1, len(values) - 1)
        found.flush()

    def _one_pass(self, values: np.ndarray, chosen: list[int], rest: list[int], fixed: list[int]) -> None:
        """Near pairs that agree in the chosen bits."""
        forth, back = _permutation([*chosen, *rest, *fixed])
        moved = forth(values)
        moved.sort()
        prefix = moved >> np.uint64(64 - len(chosen))
        bounds: np.ndarray = np.flatnonzero(prefix[1:] != prefix[:-1]) + 1
        del prefix
        starts = np.concatenate([[0], bounds])
        lengths = np.diff(starts, append=len(moved))
        del bounds
        # All values beside those `step` places on: 60 times cheaper a pair than picking the pairs, until few runs are
        # longer than that. Pairs across runs are compared in vain.
        many = np.bincount(np.minimum(lengths, _LONG))[::-1].cumsum()[::-1]  # runs of at least so many
        steps = int(np.searchsorted(-many, -len(moved) * _STEP_S / _RUN_S, "left")) - 1
        found = _Found(self, moved, back)
        found.compare(0, len(moved), 1, steps)
        longer = np.flatnonzero(lengths > steps + 1)
        for start, length in zip(starts[longer].tolist(), lengths[longer].tolist(), strict=True):
            if length > _LONG:
                self._link(back(moved[start : start + length]))
            else:
                found.compare(start, start + length, steps + 1, length - 1)
        found.flush()

    def unite(self, one: np.ndarray, two: np.ndarray) -> None:
        """Joins hashes, given by their numbers."""
        with self._one:
            unite(self.parent, one, two)


class _Found:
    """Near pairs among sorted `values`, united a few millions at a time; `back` gives the hashes of values."""

    def __init__(self, search: _Search, values: np.ndarray, back: Callable[[np.ndarray], np.ndarray]) -> None:
        self.search, self.values, self.back = search, values, back
        self.left: list[np.ndarray] = []
        self.right: list[np.ndarray] = []
        self.size = 0

    def compare(self, start: int, end: int, first: int, last: int) -> None:
        """Each value in [start, end) with those `first` to `last` places on."""
        for begin in range(start, end - first, _CHUNK):
            for step in range(first, last + 1):
                stop = min(begin + _CHUNK, end - step)
                if stop <= begin:
                    break
                apart = np.bitwise_count(self.values[begin:stop] ^ self.values[begin + step : stop + step])
                near = np.flatnonzero(apart <= self.search.bits)
                if len(near):
                    self._add(near + begin, near + (begin + step))

    def _add(self, left: np.ndarray, right: np.ndarray) -> None:
        self.left.append(left)
        self.right.append(right)
        self.size += len(left)
        if self.size >= _EDGES:
            self.flush()

    def flush(self) -> None:
        if not self.size:
            return
        left, right = np.concatenate(self.left), np.concatenate(self.right)
        self.left, self.right, self.size = [], [], 0
        hit: np.ndarray = np.zeros(len(self.values), bool)
        hit[left] = hit[right] = True
        places = np.flatnonzero(hit)
        hashes = self.back(self.values[places])
        order = np.argsort(hashes)  # a search for sorted values is several times faster
        names: np.ndarray = np.empty(len(self.values), np.int32)
        names[places[order]] = np.searchsorted(self.search.hashes, hashes[order])
        self.search.unite(names[left], names[right])


def unite(parent: np.ndarray, one: np.ndarray, two: np.ndarray) -> None:
    """Joins the trees of one[i] and two[i]; a root is the smallest of its tree."""
    while len(one):
        one, two = _roots(parent, one), _roots(parent, two)
        apart = one != two
        one, two = one[apart], two[apart]
        np.minimum.at(parent, np.maximum(one, two), np.minimum(one, two))


def _roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node; shortens their ways."""
    root = parent[nodes]
    while True:
        above = parent[root]
        if np.array_equal(above, root):
            parent[nodes] = root
            return root
        root = parent[above]


def _varying(values: np.ndarray) -> list[int]:
    """Bits (0 the lowest) in which the values are not all equal."""
    varies = int(np.bitwise_or.reduce(values) ^ np.bitwise_and.reduce(values))
    return [b for b in range(64) if varies >> b & 1]


def _others(free: Sequence[int]) -> list[int]:
    return sorted(set(range(64)) - set(free))


def _plan(queries: int, targets: int, width: int, bits: int) -> int:
    """How many of `bits` + k blocks shall agree, for the least work; 0: compare all with all."""
    pairs = queries * targets / 2
    costs = {0: pairs * _PAIR_S}
    for k in range(1, width - bits + 1):
        passes = comb(bits + k, k)
        if passes > _MAX_PASSES:
            break
        agree = k * (width // (bits + k))  # bits of the smallest blocks
        costs[k] = passes * (_PASS_S + (queries + targets) / 2 * _SORT_S + pairs / 2.0**agree * _PAIR_S)
    return min(costs, key=lambda k: costs[k])


def _choices(free: Sequence[int], bits: int, blocks: int) -> Iterator[tuple[list[int], list[int]]]:
    """Each choice of `blocks` of `bits` + `blocks` blocks: (its bits, the other free bits). None for 0 blocks.

    Bits are dealt in turn: neighbours among the bits of an image's hash say similar things.
    """
    if not blocks:
        return
    dealt = [list(free[i :: bits + blocks]) for i in range(bits + blocks)]
    for chosen in combinations(range(bits + blocks), blocks):
        yield (
            [b for i in chosen for b in dealt[i]],
            [b for i, block in enumerate(dealt) if i not in chosen for b in block],
        )


def _permutation(order: Sequence[int]) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """Functions that move bit order[i] to place 63 - i, and back: uint64 [n] -> uint64 [n]."""
    forth: np.ndarray = np.zeros((8, 256), np.uint64)
    back: np.ndarray = np.zeros((8, 256), np.uint64)
    byte: np.ndarray = np.arange(256, dtype=np.uint64)
    for i, bit in enumerate(order):
        for table, source, target in ((forth, bit, 63 - i), (back, 63 - i, bit)):
            table[source // 8] |= (byte >> np.uint64(source % 8) & np.uint64(1)) << np.uint64(target)
    return (lambda values: _by_bytes(values, forth)), (lambda values: _by_bytes(values, back))


def _by_bytes(values: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """OR of each byte's entry in its table: uint64 [n], tables uint64 [8, 256]."""
    out = np.empty_like(values)
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        made = tables[0][(part & np.uint64(255)).astype(np.intp)]
        for byte in range(1, 8):
            made |= tables[byte][(part >> np.uint64(8 * byte) & np.uint64(255)).astype(np.intp)]
        out[start : start + _CHUNK] = made
    return out
