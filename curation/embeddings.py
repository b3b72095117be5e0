"""CLIP image embeddings of a dataset, mapped: only the rows that are asked for are read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.errors import PairmillError
from schemas.features import about
from schemas.status import SKIPPED
from schemas.tensors import fixed_view
from shards.dataset import Dataset, Stage
from shards.reader import MappedShard, arrow_schema
from shards.scan import starts

COLUMN = "clip_image"
OPEN_SHARDS = 4096  # maps that are kept; a map costs address space, not memory
_SPACE = ("weights", "architecture", "preprocess")  # what of the sidecar decides an embedding, beside the precision


class Embeddings:
    """Rows of `clip_image` in `features/NAME`, fp16 [dim]."""

    def __init__(self, dataset: Dataset, name: str, like: Embeddings | None = None) -> None:
        """`like`: embeddings these are to be compared with.

        Raises PairmillError that names the command: none of that name, shards missing or older than their pairs, no
        image embeddings in it, another CLIP than that of `like`.
        """
        self.dataset, self.stage = dataset, dataset.stage(f"features/{name}")
        self.command = _command(dataset, name, like)
        self._check(like)
        self.starts = starts(dataset)
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        self.dim = self._shard(0).dim if dataset.num_shards else 0
        if like is not None and like.dim != self.dim:
            raise PairmillError(self._other_clip(like))

    def _check(self, like: Embeddings | None) -> None:
        dataset, path = self.dataset, self.stage.path
        sidecar = self.stage.sidecar()
        if sidecar is None:
            have = [s.path for s in dataset.stages() if s.kind == "features"]
            raise PairmillError(
                f"{dataset.url} has no embeddings {path} (it has: {', '.join(have) or 'no features'}). "
                f"Make them: {self.command}"
            )
        late = self.stage.pending()
        if late:
            raise PairmillError(
                f"{dataset.url}/{path} lacks {len(late)} of {dataset.num_shards} shards (the first: {late[0]}), or "
                f"they were made before the pairs changed. Finish them: {self.command}"
            )
        if like is not None and self.space() != like.space():
            raise PairmillError(self._other_clip(like))

    def _other_clip(self, like: Embeddings) -> str:
        return (
            f"{self.dataset.url}/{self.stage.path} was made by another CLIP ({self.model}) than "
            f"{like.dataset.url}/{like.stage.path} ({like.model}), or nothing tells that it is the same: cosines of "
            f"two CLIPs mean nothing. Make both with one, under a new name: {_command(self.dataset, 'NAME', like)}"
        )

    def space(self) -> dict[str, Any]:
        """What two embeddings must share to be compared. Imported ones know their model's name, not its weights."""
        sidecar = self.stage.sidecar()
        identity = sidecar.identity if sidecar else {}
        known = _SPACE if "weights" in identity else ("model",)
        return {key: identity.get(key) for key in known}

    @property
    def model(self) -> str:
        """What the features say of their CLIP."""
        return _model(self.stage)

    def present(self, rows: np.ndarray) -> np.ndarray:
        """bool [len(rows)]: which of these rows (ascending numbers in the dataset) have an embedding.

        Raises PairmillError where one is still to be computed.
        """
        out: list[np.ndarray] = [np.empty(0, bool)]
        for shard, local in self._by_shard(rows):
            valid = self._shard(shard).valid()[local]
            if not valid.all():
                self._check_skipped(shard, local[~valid])
            out.append(valid)
        return np.concatenate(out)

    def _check_skipped(self, shard: int, local: np.ndarray) -> None:
        states = self._shard(shard).mapped.states()
        row = next((int(r) for r in local if states[r] == SKIPPED), None)
        if row is not None:
            raise PairmillError(
                f"Row {shard}:{row} has no embedding yet: {self.stage.path} was computed for a selection only. "
                f"Compute the rest: {self.command}"
            )

    def read(self, rows: np.ndarray) -> np.ndarray:
        """fp16 [len(rows), dim] of ascending row numbers, copied out of the map; of an absent row anything."""
        out: np.ndarray = np.empty((len(rows), self.dim), np.float16)
        done = 0
        for shard, local in self._by_shard(rows):
            self._shard(shard).read_into(local, out[done : done + len(local)])
            done += len(local)
        return out

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, rows in it) of ascending numbers."""
        cuts = np.asarray(np.searchsorted(rows, self.starts))
        for shard in np.flatnonzero(np.diff(cuts)):
            yield int(shard), rows[cuts[shard] : cuts[shard + 1]] - self.starts[shard]

    def _open(self, shard: int) -> _Shard:
        file = self.stage.file(shard)
        found = _Shard(MappedShard(self.stage.folder, file), f"{self.dataset.url}/{file}", self.command)
        if shard and found.dim != self.dim:
            raise PairmillError(f"{found.where} holds embeddings of {found.dim} numbers, shard 0 of {self.dim}.")
        return found


class _Shard:
    """One mapped file, its batches as arrays in place."""

    def __init__(self, mapped: MappedShard, where: str, command: str) -> None:
        self.mapped, self.where = mapped, where
        names = mapped.schema.names
        if COLUMN not in names or not isinstance(mapped.schema.field(COLUMN).type, pa.FixedShapeTensorType):
            raise PairmillError(
                f"{where} holds no image embeddings `{COLUMN}` (it holds: {', '.join(names)}). Make them: {command}"
            )
        self.dim = int(mapped.schema.field(COLUMN).type.shape[0])
        self.parts = [fixed_view(batch.column(COLUMN)) for batch in mapped.batches]
        self.ends = np.array(mapped.ends, np.int64)

    def valid(self) -> np.ndarray:
        parts = [np.asarray(batch.column(COLUMN).storage.is_valid()) for batch in self.mapped.batches]
        return np.concatenate([np.empty(0, bool), *parts])

    def read_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        cuts = np.asarray(np.searchsorted(rows, np.concatenate([[0], self.ends])))
        for part in np.flatnonzero(np.diff(cuts)):
            mine = slice(cuts[part], cuts[part + 1])
            begin = self.ends[part - 1] if part else 0
            # `clip`: numpy writes to `out` at once; no row lies outside.
            np.take(self.parts[part], rows[mine] - begin, axis=0, out=out[mine], mode="clip")


def _model(stage: Stage) -> str:
    standing = sorted(stage.standing())
    told = about(pa.schema([], arrow_schema(stage.folder, stage.file(standing[0])))) if standing else {}
    return str(told.get("model", "not told"))


def _command(dataset: Dataset, name: str, like: Embeddings | None) -> str:
    command = f"pairmill score clip {dataset.url} --name {name}"
    if like is None:
        return command
    return f"{command} --model MODEL, where MODEL made {like.dataset.url}/{like.stage.path}: {like.model}"
