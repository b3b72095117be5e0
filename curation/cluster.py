"""`cluster`: DataComp's image-based rule. Rows stay whose nearest centroid is also that of something in a target set.

Gadre and others, DataComp, 2023, https://arxiv.org/abs/2304.14108; mlfoundations/datacomp,
baselines/image_based_clustering.py. There: centroids by FAISS's L2 k-means, rows by the largest dot product. Ours are
spherical, so that both mean the same; centroids from a file are taken as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from curation.decontaminate import open_other
from curation.embeddings import Embeddings
from curation.kmeans import PER_CENTROID, Vectors, fit, nearest
from curation.outside import check_fingerprint, file_hash
from curation.rules import Rule
from curation.semantic_config import ClusterConfig
from curation.telling import Steps
from schemas.config import fingerprint
from schemas.errors import PairmillError
from schemas.events import Notice

ROWS_PER_CLUSTER = 1000


class Cluster(Rule[ClusterConfig]):
    """Keeps rows whose cluster a target set reaches. A row without an embedding is null."""

    kind, config_class, shorthand = "cluster", ClusterConfig, "against"

    def prepare(self) -> None:
        config = self.config
        self.embeddings = Embeddings(self.table.dataset, config.embeddings)
        self.features = frozenset({config.embeddings})
        self.target, self.target_rows = self._target()
        self.given = None if config.centroids is None else NpyVectors(config.centroids)
        for file in (self.given, self.target):
            if file is not None and file.dim != self.embeddings.dim:
                ours = self.embeddings
                raise PairmillError(
                    f"{file} holds vectors of {file.dim} numbers, {ours.stage.path} of {ours.dim}: they are of another "
                    f"CLIP than {ours.model}. Make them with that one, such as by `pairmill score clip TARGET "
                    f"--name {self.config.embeddings} --model MODEL` and `against: TARGET`."
                )

        self.fingerprint = self._fingerprint()
        check_fingerprint(config.against, self.fingerprint, config.fingerprint)

    def _target(self) -> tuple[Vectors, np.ndarray]:
        config = self.config
        if config.against.endswith(".npy"):
            file = NpyVectors(config.against)
            return file, np.arange(len(file.array))
        other = open_other(config.against, self.table.dataset)
        found = Embeddings(other, config.embeddings, like=self.embeddings)
        rows = np.arange(len(other))
        rows = rows[found.present(rows)]
        if not len(rows):
            raise PairmillError(f"{other.url} has no row with an embedding in {found.stage.path}.")
        return found, rows

    def _fingerprint(self) -> str:
        if isinstance(self.target, Embeddings):
            stage = self.target.stage
            sidecar, shards = stage.sidecar(), range(stage.dataset.num_shards)
            against: object = [stage.digests(shards), sidecar.fingerprint if sidecar else None]
        else:
            against = file_hash(self.config.against)
        centroids = self.config.centroids
        return fingerprint({"against": against, "centroids": None if centroids is None else file_hash(centroids)})

    @property
    def name(self) -> str:
        """What the target set is called wherever it lies."""
        where = self.target.dataset.url if isinstance(self.target, Embeddings) else self.config.against
        return where.rstrip("/").rpartition("/")[2]

    @property
    def label(self) -> str:
        return self.config.name or f"cluster {self.name}"

    def recorded(self) -> dict[str, Any]:
        """Target set and centroids by name and fingerprint."""
        made = super().recorded() | {"against": self.name, "fingerprint": self.fingerprint}
        return made | ({"centroids": Path(self.config.centroids).name} if self.config.centroids else {})

    def inputs(self) -> dict[str, pl.Expr]:
        return {}

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        rows = np.flatnonzero(seen.to_numpy())
        has = self.embeddings.present(rows)
        verdict: np.ndarray = np.ones(len(seen), bool)
        known: np.ndarray = np.ones(len(seen), bool)
        known[rows[~has]] = False
        rows = rows[has]
        if len(rows):
            verdict[rows] = self._reached(rows, np.flatnonzero(successes.to_numpy()))
        return pl.select(pl.when(pl.Series(known)).then(pl.Series(verdict))).to_series()

    def _reached(self, rows: np.ndarray, successes: np.ndarray) -> np.ndarray:
        """bool [n]: whether the row's cluster is one of the target's."""
        tell = Steps(self.emit, self.label)
        centroids = self._centroids(rows, successes, tell)
        targets, _ = nearest(self.target, self.target_rows, centroids, tell("target set", len(self.target_rows)))
        reached: np.ndarray = np.zeros(len(centroids), bool)
        reached[targets] = True
        self.emit(Notice(f"{self.label}: the target set reaches {reached.sum():,} of {len(centroids):,} clusters."))
        labels, _ = nearest(self.embeddings, rows, centroids, tell("nearest centroid", len(rows)))
        return reached[labels]

    def _centroids(self, rows: np.ndarray, successes: np.ndarray, tell: Steps) -> np.ndarray:
        config = self.config
        if self.given is not None:
            return self.given.read(np.arange(len(self.given.array)))
        if config.of == "all":
            rows = successes[self.embeddings.present(successes)]
        k = min(config.clusters or max(1, round(len(rows) / ROWS_PER_CLUSTER)), len(rows))
        step = tell(f"fit {k:,} centroids", min(len(rows), PER_CENTROID * k) * config.iterations)
        return fit(self.embeddings, rows, k, iterations=config.iterations, seed=config.seed, tell=step)


class NpyVectors:
    """`Vectors` of an .npy file [rows, width] of floats, mapped."""

    def __init__(self, path: str) -> None:
        """Raises PairmillError: no such file, not .npy, another shape or type."""
        try:
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise PairmillError(f"{path} cannot be read as .npy: {error}.") from None
        self.path = path
        if self.array.ndim != 2 or self.array.dtype.kind != "f" or 0 in self.array.shape:
            raise PairmillError(
                f"{path} holds {self.array.dtype} {list(self.array.shape)}: floats [rows, width] are expected."
            )
        self.dim = int(self.array.shape[1])

    def __str__(self) -> str:
        return self.path

    def read(self, rows: np.ndarray) -> np.ndarray:
        """fp32 [len(rows), dim]. Raises PairmillError for NaN and infinite numbers."""
        out = np.ascontiguousarray(self.array[rows], np.float32)
        if not np.isfinite(out).all():
            raise PairmillError(f"{self.path} holds NaN or infinite numbers.")
        return out
