"""A toy stage: the length of every stored image as a score, and two vectors of it as features."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.config import ShardStage, identity
from schemas.errors import PairmillError
from schemas.features import FEATURES, SCORES, VERSION, features_schema, scores_schema
from schemas.sidecars import make_sidecar
from schemas.status import OK, SUCCESS
from schemas.tensors import blob_tensor, fixed_tensor
from shards.dataset import Dataset
from shards.hand import RowInHand
from shards.parallel import run_stage
from shards.reader import row_groups
from shards.writer import write_features, write_table

SCORE_SCHEMA = scores_schema([pa.field("size", pa.float32())])
FEATURE_SCHEMA = features_schema(
    [fixed_tensor("vector", 2), pa.field("n", pa.int32()), blob_tensor("bytes", "uint8", ["n"])]
)


class ToyConfig(ShardStage):
    factor: float = identity(1.0, "what sizes are multiplied by")


@dataclass(frozen=True)
class SizeWork:
    """Scores. `trouble` maps a row (counted in its shard) of shard 0 to what goes wrong there, `once` a flag file."""

    dataset: Dataset
    factor: float
    trouble: str = ""
    row: int = -1
    once: str = ""
    pause: float = 0.0

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        pairs, out = self.dataset.stage("pairs"), self.dataset.stage("scores/size")
        sizes: list[float | None] = []
        for start, table in row_groups(self.dataset.folder, pairs.file(shard), ["image"]):
            for i, image in enumerate(table["image"].to_pylist(), start):
                if i in hand.crashed or image is None:
                    sizes.append(None)
                else:
                    with hand.hold(i):
                        self._meet(shard, i)
                        sizes.append(len(image) * self.factor)
                hand.progress(i + 1, sizes.count(None))
        counts = {OK: len(sizes) - sizes.count(None), "decoder_crash": len(hand.crashed)}
        table = pa.table({"size": pa.array(sizes, pa.float32())}).cast(SCORE_SCHEMA)
        write_table(self.dataset.folder, out.file(shard), table, counts, pairs.digest(shard))
        return counts

    def _meet(self, shard: int, row: int) -> None:
        time.sleep(self.pause)
        if shard != 0 or row != self.row:
            return
        if self.once:
            try:
                Path(self.once).touch(exist_ok=False)
            except FileExistsError:
                return
        if self.trouble == "exit":
            os._exit(11)
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "mend":
            raise PairmillError("the user can mend this")
        if self.trouble == "bug":
            raise RuntimeError("a bad shard")


def size_scores(dataset: Dataset, config: ToyConfig, emit, **trouble) -> object:
    stage = dataset.stage("scores/size")
    stage.begin(make_sidecar("score size", "size", (SCORES, VERSION), config), "Pass --name.")
    work = SizeWork(dataset, config.factor, **trouble)
    return run_stage(stage, work, pending=stage.pending(), workers=config.workers, emit=emit)


@dataclass(frozen=True)
class VectorWork:
    dataset: Dataset

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        pairs, out = self.dataset.stage("pairs"), self.dataset.stage("features/vector")
        digest = pairs.digest(shard)
        with write_features(self.dataset.folder, out.file(shard), FEATURE_SCHEMA, digest) as writer:
            for _, table in row_groups(self.dataset.folder, pairs.file(shard), ["image", "status"]):
                for status, image in zip(table["status"].to_pylist(), table["image"].to_pylist(), strict=True):
                    data = np.frombuffer(image or b"", np.uint8)
                    some = {"vector": np.full(2, len(data) % 100, np.float16), "n": len(data), "bytes": data}
                    writer.append({"state": OK, **some} if status == SUCCESS else {"state": status})
        return dict(writer.counts)


def vectors(dataset: Dataset, config: ToyConfig, emit) -> object:
    stage = dataset.stage("features/vector")
    stage.begin(make_sidecar("extract vector", "vector", (FEATURES, VERSION), config), "Pass --name.")
    return run_stage(stage, VectorWork(dataset), pending=stage.pending(), workers=config.workers, emit=emit)
