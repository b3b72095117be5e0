"""Configuration of the scorers that need no CLIP. Imports only pydantic and schemas."""

from __future__ import annotations

from pathlib import Path

from extractors.config import NAME, DeviceConfig, ExtractorConfig
from schemas.config import ShardStage, StageConfig, execution, identity


class TextScoreConfig(StageConfig):
    """`pairmill score text`. Its workers share a file of this machine, so that there is no `scheduler`."""

    name: str = execution("text", "name of the scores", pattern=NAME)
    workers: int | None = execution(None, "worker processes; 0 runs in this process [default: the cores]", ge=0)


class ImageScoreConfig(ExtractorConfig):
    """`pairmill score image`."""

    name: str = execution("image", "name of the scores", pattern=NAME)


class HashScoreConfig(ExtractorConfig):
    """`pairmill score hash`."""

    name: str = execution("hash", "name of the scores", pattern=NAME)


class ExprScoreConfig(StageConfig):
    """`pairmill score expr`."""

    expr: str = identity(..., "the new column's value, in Polars SQL over columns of pairs and scores")
    column: str = identity(..., "name of the new column", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    name: str = execution("expr", "name of the scores", pattern=NAME)


class LanguageScoreConfig(ShardStage):
    """`pairmill score language`. What the model is is identity by its hash; where it lies is not."""

    name: str = execution("language", "name of the scores", pattern=NAME)
    weights: Path | None = execution(
        None, "a fastText language model, such as lid.176.bin [default: lid.176.ftz, which comes along]"
    )


class HeadScoreConfig(ShardStage):
    """A head on stored CLIP embeddings. What head and CLIP are is identity by their hashes; names are not."""

    weights: Path = execution(..., "the head's file: safetensors, or a torch file")
    features: str = execution("clip", "features that hold the embeddings, in column clip_image", pattern=NAME)
    made_for: str | None = execution(
        None,
        "the CLIP the head was made for, as the features name it, or its sha256 [default: known by width and name]",
    )


class AestheticScoreConfig(HeadScoreConfig):
    """`pairmill score aesthetic`."""

    name: str = execution("aesthetic", "name of the scores", pattern=NAME)


class SafetyScoreConfig(HeadScoreConfig):
    """`pairmill score safety`."""

    name: str = execution("safety", "name of the scores", pattern=NAME)


class WatermarkScoreConfig(DeviceConfig):
    """`pairmill score watermark`. What the weights are is identity by their hash; where they lie is not."""

    name: str = execution("watermark", "name of the scores", pattern=NAME)
    weights: Path = execution(..., "the detector's file, such as LAION's watermark_model_v1.pt")
    watermark_class: int = identity(0, "which of the detector's two classes is watermark: 0 in LAION's", ge=0, le=1)


class UserScoreConfig(ShardStage):
    """`pairmill score SCORER` of an installed package."""

    name: str | None = execution(None, "name of the scores [default: the scorer's]", pattern=NAME)
    set_: tuple[str, ...] = identity((), "KEY=VALUE, an argument of the scorer; repeatable")
    batch_size: int = execution(32, "pairs a call", ge=1)
