"""`balance`: MetaCLIP. Every entry of a list is brought down to about t captions; captions that name none are dropped.

Xu and others, Demystifying CLIP Data, 2023, https://arxiv.org/abs/2309.16671; facebookresearch/MetaCLIP,
metaclip/metaclip1 (`spacing`, substring matching, `balance_sampling`). A row stays with probability
1 - product over its entries of (1 - t / max(t, count of the entry)), which is what the original's independent draws
come to; ours are of the uid, so that the same rows stay on every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ahocorasick_rs
import numpy as np
import polars as pl
import pyarrow as pa

from curation.balance_config import BalanceConfig
from curation.draws import as_share, uid_draws, uid_halves
from curation.outside import check_fingerprint
from curation.rules import Rule
from curation.telling import Steps
from schemas.config import fingerprint
from schemas.errors import PairmillError
from schemas.events import Notice
from shards.dataset import PAIRS
from shards.reader import open_parquet
from shards.scan import starts

MAX_ENTRIES_BYTES = 256 << 20
_SPACES = str.maketrans({**{c: f" {c} " for c in ",.;:?!`"}, **dict.fromkeys("\t\n\r", " ")})


class Balance(Rule[BalanceConfig]):
    """Keeps rows by how frequent the entries are that their caption names. A null caption is null."""

    kind, config_class, shorthand = "balance", BalanceConfig, "entries"

    def prepare(self) -> None:
        column = self.table.resolve(self.config.column)
        if self.table.columns[column] != pl.String:
            raise PairmillError(f"balance looks in text, and `{column}` is {self.table.columns[column]}.")
        group = self.table.set_of(column)
        self.stage = self.table.dataset.stage(f"scores/{group}" if group else PAIRS)
        self.source = column.rpartition(".")[2] if group else column
        self.columns = frozenset({column, "uid"})
        self.entries = read_entries(self.config.entries)
        self.fingerprint = fingerprint({"entries": self.entries})
        check_fingerprint(self.config.entries, self.fingerprint, self.config.fingerprint)

    @property
    def label(self) -> str:
        return self.config.name or f"balance {self.config.t:,}"

    def recorded(self) -> dict[str, Any]:
        """The entries by their file's name and their fingerprint."""
        name = Path(self.config.entries).name
        return super().recorded() | {"entries": name, "fingerprint": self.fingerprint}

    def inputs(self) -> dict[str, pl.Expr]:
        return uid_halves()

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        rows = np.flatnonzero(seen.to_numpy())
        parts, known = self._matched(rows)
        counts: np.ndarray = np.zeros(len(self.entries), np.int64)
        for found, _ in parts:
            counts += np.bincount(found, minlength=len(counts))
        hi, lo = (values[c].to_numpy() for c in ("uid_hi", "uid_lo"))
        stays: np.ndarray = np.empty(len(rows), bool)
        done = 0
        for found, lengths in parts:
            mine = rows[done : done + len(lengths)]
            draws = as_share(uid_draws(hi[mine], lo[mine], self.config.seed))
            stays[done : done + len(lengths)] = draws < keep_shares(found, lengths, counts, self.config.t)
            done += len(lengths)
        self._tell(counts, sum(int((lengths == 0).sum()) for _, lengths in parts), len(rows))
        keep: np.ndarray = np.ones(len(seen), bool)
        told: np.ndarray = np.ones(len(seen), bool)
        keep[rows], told[rows] = stays, known
        return pl.select(pl.when(pl.Series(told)).then(pl.Series(keep))).to_series()

    def _matched(self, rows: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """What `Matcher.match` finds, shard by shard; whether each row has a text, bool [n]."""
        matcher = Matcher(self.entries, self.config.lower)
        step = Steps(self.emit, self.label)(f"look for {len(self.entries):,} entries", len(rows))
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        known: list[np.ndarray] = [np.empty(0, bool)]
        for texts in self._texts(rows):
            parts.append(matcher.match(texts))
            known.append(np.array([text is not None for text in texts], bool))
            step(len(texts))
        return parts, np.concatenate(known)

    def _texts(self, rows: np.ndarray) -> Iterator[list[str | None]]:
        """The texts of these rows (ascending), a shard at a time."""
        begin = starts(self.table.dataset)
        cuts = np.asarray(np.searchsorted(rows, begin))
        for shard in np.flatnonzero(np.diff(cuts)):
            local = rows[cuts[shard] : cuts[shard + 1]] - begin[shard]
            with open_parquet(self.stage.folder, self.stage.file(int(shard))) as file:
                if self.source not in file.schema_arrow.names:  # a carried column that this list lacks
                    yield [None] * len(local)
                    continue
                table = file.read(columns=[self.source])
            yield table[self.source].take(pa.array(local)).to_pylist()

    def _tell(self, counts: np.ndarray, without: int, rows: int) -> None:
        over = int((counts > self.config.t).sum())
        self.emit(
            Notice(
                f"{self.label}: {int((counts > 0).sum()):,} of {len(counts):,} entries occur, {over:,} more than "
                f"{self.config.t:,} times; {without:,} of {rows:,} rows name none."
            )
        )


def spacing(text: str) -> str:
    """MetaCLIP's `spacing`: a space at both ends and around each of `, . ; : ? !` and the backtick; tabs and line ends
    become spaces.
    """
    return f" {text} ".translate(_SPACES)


class Matcher:
    """Finds every entry that stands in a text between spaces.

    By Aho and Corasick's automaton: one pass over the text, however many entries there are.
    """

    def __init__(self, entries: Iterable[str], lower: bool = False) -> None:
        self.lower = lower
        made = [f" {entry.lower() if lower else entry} " for entry in entries]
        unique = list(dict.fromkeys(made))
        number = {pattern: i for i, pattern in reversed(list(enumerate(made)))}
        self._entry = np.array([number[pattern] for pattern in unique], np.int32)  # equal in lower case: the first
        self._size = len(made)
        self._automaton = ahocorasick_rs.AhoCorasick(unique, store_patterns=False)

    def match(self, texts: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Entries of each text, ascending, once each, one text after the other, int32; how many each has, int32 [n]."""
        find = self._automaton.find_matches_as_indexes
        hits: list[int] = []
        sizes: list[int] = []
        for text in texts:
            before = len(hits)
            if text:
                spaced = spacing(text.lower() if self.lower else text)
                hits += [hit[0] for hit in find(spaced, overlapping=True)]
            sizes.append(len(hits) - before)
        row: np.ndarray = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        keys = np.unique(row * self._size + self._entry[np.array(hits, np.int64)])
        owner = keys // self._size if len(keys) else np.empty(0, np.int64)
        ids = (keys - owner * self._size).astype(np.int32)
        return ids, np.bincount(owner, minlength=len(sizes)).astype(np.int32)


def keep_shares(found: np.ndarray, lengths: np.ndarray, counts: np.ndarray, t: int) -> np.ndarray:
    """float64 [n]: the probability of each row to stay, 1 - product of (1 - t / max(t, count)); 0 without an entry.

    found    int32: entries of all rows, one row after the other
    lengths  int32 [n]: how many each row has
    counts   int64 [entries]: rows that name each
    """
    share: np.ndarray = np.zeros(len(lengths))
    some = np.flatnonzero(lengths)
    if len(some):
        miss = 1 - t / np.maximum(counts, t)
        ends = np.cumsum(lengths[some], dtype=np.int64)
        begin = np.concatenate([[0], ends[:-1]])
        share[some] = 1 - np.multiply.reduceat(miss[found], begin)
    return share


def read_entries(path: str) -> list[str]:
    """Entries of a text file (one a line) or a .json list, in order, each once; empty ones are left out.

    Raises PairmillError: cannot be read, larger than 256 MiB, not UTF-8, not a list of texts, empty.
    """
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_ENTRIES_BYTES + 1)
        if len(data) > MAX_ENTRIES_BYTES:
            raise PairmillError(f"{path} is larger than {MAX_ENTRIES_BYTES >> 20} MiB: not a list of entries.")
        text = data.decode()
        found = json.loads(text) if path.endswith(".json") else [line.rstrip("\r") for line in text.split("\n")]
    except OSError as error:
        raise PairmillError(f"The entries {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise PairmillError(f"The entries {path} are not UTF-8 text or JSON: {error}.") from None
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise PairmillError(f"{path} is not a JSON list of texts.")
    entries = [entry for entry in dict.fromkeys(found) if entry.strip() and _is_utf8(entry)]
    if not entries:
        raise PairmillError(f"{path} has no entries: write one a line.")
    return entries


def _is_utf8(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can hold and no caption does."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
