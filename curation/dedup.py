"""`dedup`: of rows that are the same, or whose image hashes are nearly equal, one stays."""

from __future__ import annotations

import numpy as np
import polars as pl

from curation.duplicate_config import DedupConfig
from curation.expressions import Compiled, compile_value
from curation.groups import duplicates, equal_groups, hash_column, hash_values, key_exprs, rich
from curation.hamming import groups
from curation.rules import Rule


class Dedup(Rule[DedupConfig]):
    """Drops all rows of a group but one. A group: equal values of `by`; or hashes of `near` that are joined by steps of
    at most `bits` bits (connected components of the graph of all such pairs; equal hashes are one node).
    """

    kind, config_class, shorthand = "dedup", DedupConfig, "by"

    def prepare(self) -> None:
        config, table = self.config, self.table
        if config.near is not None:
            full, values = hash_values(table, config.near, "dedup")
            self.names, self.exprs = [full], {"hash": values}
        else:
            given = [config.by] if isinstance(config.by, str) else list(config.by or ())
            self.names = [hash_column(table, name) for name in given]
            self.exprs = key_exprs(table, self.names, "dedup")
        self.keep: Compiled | None = None if config.keep is None else compile_value(config.keep, table)
        self.columns = frozenset({*self.names, "uid"}) | (self.keep.columns if self.keep else frozenset())

    @property
    def label(self) -> str:
        if self.config.name:
            return self.config.name
        names = ", ".join(self.names)
        return f"dedup {names}" if self.config.near is None else f"dedup near {names}, {self.config.bits} bits"

    def inputs(self) -> dict[str, pl.Expr]:
        return self.exprs | ({"keep": self.keep.expr} if self.keep else {})

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        rows, group, hashes = self._exact(values, seen) if self.config.near is None else self._near(values, seen)
        keep = values["keep"].gather(rows) if self.keep else None
        gone, self.matches = duplicates(self.table, rows, group, keep, hashes)
        verdict: np.ndarray = np.ones(len(seen), bool)
        verdict[gone] = False
        return pl.Series(verdict)

    def _exact(self, values: pl.DataFrame, seen: pl.Series) -> tuple[np.ndarray, np.ndarray, None]:
        part = seen & values["key0"].is_not_null()
        rows = np.flatnonzero(part.to_numpy())
        places, group = equal_groups([values[k].filter(part).to_numpy() for k in ("key0", "key1")])
        return rows[places], group, None

    def _near(self, values: pl.DataFrame, seen: pl.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = seen & values["hash"].is_not_null()
        rows = np.flatnonzero(part.to_numpy())
        hashes = values["hash"].filter(part).to_numpy()
        some = rich(hashes, self.config.flat)
        rows, hashes = rows[some], hashes[some]
        node = np.sort(hashes)
        node = node[np.concatenate([[True], node[1:] != node[:-1]])] if len(node) else node
        group = groups(node, self.config.bits)[np.searchsorted(node, hashes)]
        several = np.bincount(group, minlength=1)[group] > 1
        return rows[several], group[several].astype(np.int64), hashes[several]
