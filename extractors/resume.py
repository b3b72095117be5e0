"""What stands of a shard already, and what is to be done with each of its rows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from schemas.config import fingerprint
from schemas.status import SKIPPED, SUCCESS
from shards.dataset import PAIRS, Dataset, Stage
from shards.reader import MappedShard, read_table
from shards.select import Selection, read_selection, selection_about

# Schema metadata of a feature shard: four bytes a row, which tell whether that row's pair is still the same.
MARKS = b"pairmill.marks"
_MARK_BYTES = 4
COMPUTE, COPY = "compute", "copy"


def row_marks(status: Sequence[str], sha256: Sequence[bytes | None]) -> np.ndarray:
    """uint32 [rows]: a hash of each pair's status and image."""
    marks = (
        hashlib.blake2b(one.encode() + b"\0" + (image or b""), digest_size=_MARK_BYTES).digest()
        for one, image in zip(status, sha256, strict=True)
    )
    return np.frombuffer(b"".join(marks), np.uint32)


def marks_metadata(marks: np.ndarray) -> dict[bytes, bytes]:
    """`MARKS` for the schema of a feature shard."""
    return {MARKS: base64.b85encode(marks.tobytes())}


@dataclass(frozen=True)
class Outputs:
    """The files that one extractor writes for a shard: features, scores, or both, features first.

    `state_column` is the scores' column that tells each row's state.
    """

    dataset: Dataset
    features: str | None
    scores: str | None = None
    state_column: str = "state"

    @property
    def stages(self) -> list[Stage]:
        return [self.dataset.stage(path) for path in (self.features, self.scores) if path]

    def done(self) -> set[int]:
        """Shards of which every file stands, made from the pairs that stand now, and all in one go."""
        done = set.intersection(*(stage.done() for stage in self.stages))
        return {shard for shard in done if self.agree(shard)}

    def agree(self, shard: int) -> bool:
        """Whether the files tell of the same rows: a kill between two renames leaves a newer and an older one."""
        first, *rest = [(stage.digest(shard), stage.counts(shard)) for stage in self.stages]
        return all(first == other for other in rest)

    def states(self, shard: int) -> list[str]:
        """Each row's state, from the files that stand."""
        if self.scores:
            table = read_table(self.dataset.folder, self.dataset.stage(self.scores).file(shard), [self.state_column])
            return table[self.state_column].to_pylist()
        return self._mapped(shard).states()

    def _mapped(self, shard: int) -> MappedShard:
        return MappedShard(self.dataset.folder, self.dataset.stage(self.features or "").file(shard))

    def old(self, shard: int) -> OldRows | None:
        """The rows of the files that stand, or None where nothing of them can be kept."""
        if not all(shard in stage.standing() for stage in self.stages) or not self.agree(shard):
            return None
        features = self._mapped(shard) if self.features else None
        scores = None
        if self.scores:
            scores = read_table(self.dataset.folder, self.dataset.stage(self.scores).file(shard)).to_pylist()
        return OldRows(self.stages[0].digest(shard), self.states(shard), features, scores)

    def pending(self, want: Wanted) -> list[int]:
        """Shards to write: those not done, and those with rows that are wanted now and were skipped before."""
        done = self.done()
        return [s for s in range(self.dataset.num_shards) if s not in done or self._wants_more(s, want)]

    def _wants_more(self, shard: int, want: Wanted) -> bool:
        if not self.stages[0].counts(shard).get(SKIPPED):
            return False
        skipped = np.array([state == SKIPPED for state in self.states(shard)])
        return bool((skipped & want.mask(shard, len(skipped))).any())


@dataclass(frozen=True)
class OldRows:
    """A shard's rows as they were written last."""

    digest: str
    states: list[str]
    features: MappedShard | None
    scores: list[dict[str, Any]] | None

    def row(self, row: int) -> dict[str, Any]:
        """All columns, features and scores together."""
        found = self.features.row(row) if self.features else {"state": self.states[row]}
        return found | self.scores[row] if self.scores else found

    def unchanged(self, digest: str, marks: np.ndarray) -> np.ndarray:
        """bool [rows]: the pair is still the one that the row was made from."""
        if digest == self.digest:
            return np.ones(len(marks), bool)
        kept = (self.features.schema.metadata or {}).get(MARKS) if self.features else None
        if kept is None:
            return np.zeros(len(marks), bool)
        return np.frombuffer(base64.b85decode(kept), np.uint32) == marks


@dataclass(frozen=True)
class Plan:
    """What becomes of each row of a shard: COMPUTE, COPY, or the state it gets without being looked at."""

    digest: str
    marks: np.ndarray
    todo: list[str]
    old: OldRows | None

    def compute(self) -> np.ndarray:
        """bool [rows]."""
        return np.array([one == COMPUTE for one in self.todo], bool)


def plan_shard(outputs: Outputs, shard: int, want: Wanted, crashed: frozenset[int]) -> Plan:
    """Reads the pairs' statuses and what stands of the shard."""
    dataset = outputs.dataset
    pairs = dataset.stage(PAIRS)
    table = read_table(dataset.folder, pairs.file(shard), ["status", "sha256"])
    status = table["status"].to_pylist()
    marks = row_marks(status, table["sha256"].to_pylist())
    digest = pairs.digest(shard)
    old = outputs.old(shard)
    kept = old.unchanged(digest, marks) if old else np.zeros(len(status), bool)
    selected = want.mask(shard, len(status))

    def decide(row: int) -> str:
        if status[row] != SUCCESS:
            return status[row]
        if old and kept[row] and old.states[row] != SKIPPED:
            return COPY
        if row in crashed:
            return "decoder_crash"
        return COMPUTE if selected[row] else SKIPPED

    return Plan(digest, marks, [decide(row) for row in range(len(status))], old)


@dataclass(frozen=True)
class Wanted:
    """Which rows a run is to compute: what a selection keeps, or all.

    `stamp` tells one selection from another that was made later under the same name.
    """

    url: str
    selection: str | None = None
    stamp: str = ""

    def mask(self, shard: int, rows: int) -> np.ndarray:
        """bool [rows of the shard]. Raises PairmillError where the selection is older than its pairs."""
        return np.ones(rows, bool) if self.selection is None else _read(self).mask(shard)


def wanted(dataset: Dataset, selection: str | None) -> Wanted:
    """Raises PairmillError: no such selection, or one made before the pairs or scores changed."""
    if selection is None:
        return Wanted(dataset.url)
    return Wanted(dataset.url, selection, fingerprint(selection_about(dataset, selection)))


@lru_cache(maxsize=1)
def _read(rows: Wanted) -> Selection:
    return read_selection(Dataset.open(rows.url), rows.selection or "")
