"""Configuration of the rules on CLIP embeddings: `dedup_semantic` and `cluster`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from schemas.config import StageConfig, identity

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class DedupSemanticConfig(StageConfig):
    """SemDeDup: within a cluster of image embeddings, drop rows that are too like an earlier one."""

    eps: float = identity(..., "a row is dropped when its cosine to an earlier row is above 1 - eps", ge=1e-6, lt=2)
    keep: str = identity(
        "hard",
        "which rows come first, and so stay: `hard` = farthest from their centroid, `easy` = nearest to it, `random`, "
        "or a column or expression, highest first; ties by uid",
    )
    embeddings: str = identity("clip", "name of the features that hold the image embeddings", pattern=_NAME)
    clusters: int | None = identity(None, "number of clusters [default: one for every 1000 rows]", ge=1)
    iterations: int = identity(20, "most steps of k-means", ge=1, le=1000)
    seed: int = identity(0, "of the clusters and of `keep: random`", ge=0)
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")


class ClusterConfig(StageConfig):
    """DataComp's image-based rule: keep rows of clusters that a target set reaches, too."""

    against: str = identity(
        ..., "the target set: a dataset with embeddings by the same CLIP, or an .npy file of them [rows, width]"
    )
    embeddings: str = identity("clip", "name of the features that hold the image embeddings", pattern=_NAME)
    centroids: str | None = identity(
        None, "an .npy file of centroids [clusters, width] [default: fitted on this dataset]"
    )
    clusters: int | None = identity(None, "number of clusters to fit [default: one for every 1000 rows]", ge=1)
    of: Literal["kept", "all"] = identity(
        "kept",
        "what centroids are fitted on: `kept` = rows earlier rules kept, `all` = every success, as DataComp does",
    )
    iterations: int = identity(20, "most steps of k-means", ge=1, le=1000)
    seed: int = identity(0, "of the clusters", ge=0)
    fingerprint: str | None = identity(
        None, "fingerprint of what lies outside the dataset; a selection's recipe holds it, and another one is an error"
    )
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")

    @model_validator(mode="after")
    def _one_source(self) -> ClusterConfig:
        if self.centroids is not None and self.clusters is not None:
            raise ValueError("`centroids` brings its clusters along: leave `clusters` out")
        return self
