"""Which row comes when: a pure function of seed and epoch, with random access.

Row groups are permuted, then rows are shuffled inside a window of 16 groups. Position p of the stream is row
p % length of epoch p // length: what is left at the end of an epoch starts the next, nothing is dropped or doubled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WINDOW = 16


@dataclass(frozen=True)
class Group:
    """A row group of one shard and which of its rows take part.

    rows  int32, row numbers inside the shard
    """

    source: int
    shard: int
    index: int
    rows: np.ndarray


@dataclass(frozen=True)
class Place:
    """One sample of the stream."""

    source: int
    shard: int
    row: int
    epoch: int


@dataclass
class Order:
    """The order of one set of row groups. Holds one window of one epoch in memory."""

    groups: Sequence[Group]
    seed: int
    _epoch: int = -1
    _permuted: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    _window: int = -1
    _rows: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))

    def __post_init__(self) -> None:
        self.length = sum(len(g.rows) for g in self.groups)

    def place(self, position: int) -> Place:
        """The sample at `position` of the endless stream."""
        epoch, index = divmod(position, self.length)
        self._enter(epoch)
        window = int(self._ends.searchsorted(index, "right"))
        self._open(window)
        start = int(self._ends[window - 1]) if window else 0
        source, shard, row = self._rows[index - start].tolist()
        return Place(source, shard, row, epoch)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._permuted = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        sizes = np.array([len(self.groups[g].rows) for g in self._permuted])
        self._ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), WINDOW)))
        self._epoch, self._window = epoch, -1

    def _open(self, window: int) -> None:
        if window == self._window:
            return
        chosen = [self.groups[g] for g in self._permuted[window * WINDOW : (window + 1) * WINDOW]]
        parts = [
            np.stack([np.full(len(g.rows), g.source), np.full(len(g.rows), g.shard), g.rows], axis=1) for g in chosen
        ]
        rows = np.concatenate(parts)
        self._rows = rows[np.random.default_rng([self.seed, self._epoch, window]).permutation(len(rows))]
        self._window = window


class Mixture:
    """Several orders by weight, deterministically: a fixed schedule of 1000 places, repeated.

    Each order goes through its own epochs. With random access, as an order has.
    """

    PERIOD = 1000

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]) -> None:
        self.orders = orders
        share = np.array(weights, dtype=float) / sum(weights)
        due = np.zeros(len(orders))
        schedule: np.ndarray = np.empty(self.PERIOD, np.int64)
        for place in range(self.PERIOD):  # the order furthest behind its share comes next
            due += share
            schedule[place] = int(np.argmax(due))
            due[schedule[place]] -= 1
        self.schedule = schedule
        taken = schedule[:, None] == np.arange(len(orders))[None, :]
        self._before = np.concatenate([np.zeros((1, len(orders)), np.int64), np.cumsum(taken, axis=0)])
        self.length = sum(o.length for o in orders)

    def place(self, position: int) -> Place:
        """The sample at `position` of the mixed stream."""
        period, at = divmod(position, self.PERIOD)
        which = int(self.schedule[at])
        own = period * int(self._before[-1, which]) + int(self._before[at, which])
        return self.orders[which].place(own)


def make_order(groups_of: Sequence[Sequence[Group]], weights: Sequence[float | None], seed: int) -> Order | Mixture:
    """One order over all groups where no weight is given, else a mixture by weight (1 where none is given)."""
    if len(groups_of) == 1 or all(w is None for w in weights):
        return Order([g for groups in groups_of for g in groups], seed)
    orders = [Order(list(groups), seed + 1000003 * i) for i, groups in enumerate(groups_of)]
    return Mixture(orders, [1.0 if w is None else w for w in weights])
