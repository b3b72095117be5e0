"""The datasets a run reads: which rows take part, and the bytes of one row."""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.errors import PairmillError
from schemas.status import OK, SKIPPED, SUCCESS
from shards.dataset import PAIRS, Dataset
from shards.reader import MappedShard, open_parquet
from shards.select import Selection, read_selection
from training.order import Group

IMAGES = "images"
_CACHED_GROUPS = 24  # a window and a half of row groups of about 16 MiB
_CACHED_SHARDS = 64


@dataclass(frozen=True)
class SourceSpec:
    """`DATASET[@SELECTION][:WEIGHT]` taken apart."""

    url: str
    selection: str | None
    weight: float | None


def parse_source(text: str) -> SourceSpec:
    """Raises PairmillError for a weight that is not a positive number."""
    url, weight = text, None
    head, colon, tail = text.rpartition(":")
    if colon and head and "/" not in tail and "@" not in tail:
        try:
            weight = float(tail)
        except ValueError:
            raise PairmillError(f"`{text}`: `{tail}` is no weight. Give DATASET[@SELECTION][:WEIGHT].") from None
        if weight <= 0:
            raise PairmillError(f"`{text}`: a weight must be above 0.")
        url = head
    url, at, selection = url.rpartition("@") if "@" in url else (url, "", "")
    return SourceSpec(url, selection if at else None, weight)


class Source:
    """One dataset of a run, its selection and its input: the images, or a feature set."""

    def __init__(self, number: int, spec: SourceSpec, input_name: str = IMAGES, need_text: bool = True) -> None:
        self.number, self.spec, self.input = number, spec, input_name
        self.dataset = Dataset.open(spec.url)
        self.need_text = need_text
        self.selection: Selection | None = read_selection(self.dataset, spec.selection) if spec.selection else None
        if input_name != IMAGES:
            self.features = self.dataset.require(f"features/{input_name}")
        self._lock = Lock()
        self._groups: OrderedDict[tuple[int, int], dict[str, pa.Array]] = OrderedDict()
        self._shards: OrderedDict[int, MappedShard] = OrderedDict()
        self._starts: dict[int, list[int]] = {}

    def groups(self) -> list[Group]:
        """Every row group with the rows that take part: selected, with an image (or features), with a caption.

        Raises PairmillError: selected rows whose features were skipped; nothing left.
        """
        out: list[Group] = []
        for shard in range(self.dataset.num_shards):
            starts, usable = self._usable(shard)
            self._starts[shard] = starts.tolist()
            for index in range(len(starts) - 1):
                rows = np.flatnonzero(usable[starts[index] : starts[index + 1]]) + starts[index]
                if len(rows):
                    out.append(Group(self.number, shard, index, rows.astype(np.int32)))
        if not out:
            chosen = f" selected by `{self.spec.selection}`" if self.spec.selection else ""
            raise PairmillError(f"{self.dataset.url} has no row{chosen} to train on: no image with a caption is left.")
        return out

    def _usable(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(first row of each row group and the end, bool [rows])."""
        with open_parquet(self.dataset.folder, self.dataset.stage(PAIRS).file(shard)) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            columns = ["status", "caption"] if self.need_text else ["status"]
            table = file.read(columns=columns)
        usable = np.array([s == SUCCESS for s in table["status"].to_pylist()], dtype=bool)
        if self.need_text:
            usable &= ~table["caption"].is_null().to_numpy()
        if self.selection is not None:
            usable &= self.selection.mask(shard)
        if self.input != IMAGES:
            usable &= self._computed(shard, usable)
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), usable

    def _computed(self, shard: int, wanted: np.ndarray) -> np.ndarray:
        name = self.features.name
        if shard in self.features.standing():
            states = np.array(self._shard(shard).states())
            skipped = int((wanted & (states == SKIPPED)).sum())
            if not skipped:
                return states == OK
            missing = f"{skipped:,} selected rows of shard {shard} are skipped"
        else:
            missing = f"shard {shard} has no features yet"
        which = f" --selection {self.spec.selection}" if self.spec.selection else ""
        kind = self.features.sidecar().stage.split(" ")[-1]  # type: ignore[union-attr]
        raise PairmillError(
            f"{self.dataset.url} features/{name}: {missing}. "
            f"Run: pairmill extract {kind} {self.spec.url} --name {name}{which}"
        )

    def text(self, shard: int, row: int) -> tuple[bytes, str | None, list[str] | None]:
        """(uid, caption, captions) of a row."""
        columns, at = self._group(shard, row)
        return columns["uid"][at].as_py(), columns["caption"][at].as_py(), columns["captions"][at].as_py()

    def image(self, shard: int, row: int) -> bytes:
        """The encoded image of a row."""
        columns, at = self._group(shard, row)
        return columns["image"][at].as_py()

    def feature(self, shard: int, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """Feature columns of a row: read-only views of the mapped file."""
        return self._shard(shard).row(row, columns)

    def fingerprint(self) -> dict[str, Any]:
        """What of this source decides the run: selection, features and pairs, by hash."""
        digests = "".join(self.dataset.stage(PAIRS).digests(range(self.dataset.num_shards)))
        out: dict[str, Any] = {
            "pairs": hashlib.blake2b(digests.encode(), digest_size=16).hexdigest(),
            "selection": self.spec.selection,
            "weight": self.spec.weight,
        }
        if self.selection is not None:
            out["kept"] = hashlib.blake2b(self.selection.keep.tobytes(), digest_size=16).hexdigest()
        if self.input != IMAGES:
            out["features"] = self.features.sidecar().fingerprint  # type: ignore[union-attr]
        return out

    def _group(self, shard: int, row: int) -> tuple[dict[str, pa.Array], int]:
        """The columns of the row's group, and the row's place in them."""
        starts = self._starts[shard]
        index = bisect.bisect_right(starts, row) - 1
        key = (shard, index)
        with self._lock:
            columns = self._groups.get(key)
            if columns is None:
                columns = self._groups[key] = self._read_group(shard, index)
                while len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end(key)
        return columns, row - starts[index]

    def _read_group(self, shard: int, index: int) -> dict[str, pa.Array]:
        names = ["uid", "caption", "captions"] + (["image"] if self.input == IMAGES else [])
        with open_parquet(self.dataset.folder, self.dataset.stage(PAIRS).file(shard)) as file:
            table = file.read_row_group(index, columns=names).combine_chunks()
        return {name: table[name].chunk(0) for name in names}

    def _shard(self, shard: int) -> MappedShard:
        with self._lock:
            found = self._shards.get(shard)
            if found is None:
                found = self._shards[shard] = MappedShard(self.dataset.folder, self.features.file(shard))
                while len(self._shards) > _CACHED_SHARDS:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(shard)
        return found


def choose_caption(caption: str | None, captions: Sequence[str] | None, seed: int, epoch: int, uid: bytes) -> str:
    """The caption of this epoch: drawn from (seed, epoch, uid), so the same on every machine."""
    if not captions or len(captions) == 1:
        return caption or ""
    draw = hashlib.blake2b(uid + f"|{seed}|{epoch}".encode(), digest_size=8).digest()
    return captions[int.from_bytes(draw, "big") % len(captions)]
