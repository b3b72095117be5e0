"""The frame of scorers that read stored embeddings: `score aesthetic` and `score safety`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from curation.scores.columns import MEND
from curation.scores.config import AestheticScoreConfig, HeadScoreConfig, SafetyScoreConfig
from curation.scores.heads import Head, Kind, read_head
from curation.scores.made_for import COLUMN, check_clip
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, StageFinished, silent
from schemas.features import FEATURES, SCORES, VERSION, scores_schema
from schemas.sidecars import Sidecar, make_sidecar
from shards.dataset import PAIRS, Dataset, Stage
from shards.files import hash_file
from shards.hand import RowInHand
from shards.parallel import run_stage
from shards.reader import MappedShard, read_table
from shards.weights import checkpoint_file
from shards.writer import write_table

_BYTES_PER_ROW = 8


def score_aesthetic(dataset: Dataset | str | Path, config: AestheticScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: `aesthetic` fp32 and `aesthetic_state`, from the stored CLIP embeddings.

    Raises PairmillError as `score_embeddings` does.
    """
    return score_embeddings(dataset, config, "aesthetic", "aesthetic", emit)


def score_safety(dataset: Dataset | str | Path, config: SafetyScoreConfig, emit: Emit = silent) -> StageFinished:
    """Writes `scores/NAME`: `punsafe` fp32 and `punsafe_state`, from the stored CLIP embeddings.

    Raises PairmillError as `score_embeddings` does.
    """
    return score_embeddings(dataset, config, "safety", "punsafe", emit)


def score_embeddings(
    dataset: Dataset | str | Path,
    config: AestheticScoreConfig | SafetyScoreConfig,
    kind: Kind,
    column: str,
    emit: Emit,
) -> StageFinished:
    """A row's state is that of its embedding: skipped rows stay skipped until `score clip` has computed them.

    Raises PairmillError: no such features or none finished; a damaged head, or one of another kind or another CLIP;
    scores of other settings under that name.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    dataset.require(PAIRS)
    head = read_head(config.weights, kind)
    features = _features(dataset, config.features)
    sidecar = features.sidecar()
    assert sidecar is not None, "`require` raises where there is none"
    where = f"{dataset.url}/{features.path}"
    label = check_clip(sidecar, kind, head.dim, config.weights.name, config.made_for, where)
    path = checkpoint_file(config.weights).absolute()
    digest = hash_file(path)
    stage = dataset.stage(f"{SCORES}/{config.name}")
    work = EmbeddingWork(stage, features, str(path), digest, kind, column)
    stage.begin(_sidecar(stage, config, kind, column, head, digest, sidecar, label), MEND)
    ready = features.done()
    if not ready:
        raise PairmillError(f"{where} has no finished shard. Run `pairmill score clip` again, it goes on.")
    done = stage.done()
    pending = [s for s in sorted(ready) if s not in done or work.late(s)]
    late = sorted(set(range(dataset.num_shards)) - ready)
    if late:
        emit(Notice(f"{where}: {len(late)} shards are not computed yet: run `pairmill score clip` first.", True))
    finished = run_stage(
        stage,
        work,
        pending=pending,
        workers=config.workers,
        scheduler=config.scheduler,
        emit=emit,
        bytes_per_row=_BYTES_PER_ROW,
    )
    return replace(finished, left=tuple(sorted({*finished.left, *late})))


def _features(dataset: Dataset, name: str) -> Stage:
    try:
        return dataset.require(f"{FEATURES}/{name}")
    except PairmillError as error:
        raise PairmillError(
            f"{error} A head reads embeddings: run `pairmill score clip` first, or pass --features NAME."
        ) from None


def _sidecar(
    stage: Stage,
    config: HeadScoreConfig,
    kind: Kind,
    column: str,
    head: Head,
    digest: str,
    features: Sidecar,
    label: str,
) -> Sidecar:
    identity = {"weights": digest, "head": head.layout.name, "embeddings": features.fingerprint}
    told = {
        "what": f"{kind} head, {head.layout.name}, on {COLUMN}",
        "scale": head.layout.scale,
        "model": config.weights.name,
        "weights": digest,
        "clip": label,
        "clip_weights": features.columns[COLUMN]["weights"],
        "preprocess": "embedding L2-normalised in fp32",
        "precision": "fp32",
    }
    columns: dict[str, dict[str, Any]] = {column: told, state_column(column): {"what": "state of the embedding"}}
    versions = {"torch": torch.__version__}
    return make_sidecar(f"score {kind}", stage.name, (SCORES, VERSION), config, identity, columns, versions)


def state_column(column: str) -> str:
    """The column that tells each row's state."""
    return f"{column}_state"


@dataclass(frozen=True)
class EmbeddingWork:
    """Makes the file of one shard. Picklable; a process keeps the head from shard to shard."""

    scores: Stage
    features: Stage
    weights: str
    sha256: str
    kind: Kind
    column: str

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]:
        mapped = MappedShard(self.features.folder, self.features.file(shard))
        vectors = mapped.column(COLUMN)
        states = mapped.states()
        values = self.head()(torch.from_numpy(np.ascontiguousarray(vectors))).numpy()
        null = np.isnan(vectors[:, 0])
        schema = scores_schema([pa.field(self.column, pa.float32()), pa.field(state_column(self.column), pa.string())])
        table = pa.table([pa.array(values, mask=null), pa.array(states)], schema=schema)
        counts = Counter(states)
        write_table(self.scores.folder, self.scores.file(shard), table, counts, self.features.digest(shard))
        return counts

    def head(self) -> Head:
        return _head(self.weights, self.kind, self.sha256)

    def late(self, shard: int) -> bool:
        """Whether rows of other states stand than the embeddings have: pairs are the same, more may be computed."""
        mapped = MappedShard(self.features.folder, self.features.file(shard))
        table = read_table(self.scores.folder, self.scores.file(shard), [state_column(self.column)])
        return bool(table[0].to_pylist() != mapped.states())


@lru_cache(maxsize=2)
def _head(path: str, kind: Kind, sha256: str) -> Head:
    if hash_file(path) != sha256:
        raise PairmillError(f"{path} has changed since this run began. Run the command again.")
    return read_head(path, kind)
