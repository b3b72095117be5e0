"""Configurations of the downstream commands. Imports pydantic and schemas only: `--help` must stay fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt, field_validator

from schemas.config import StageConfig, execution, identity


class RetrievalImportConfig(StageConfig):
    """How a Karpathy split file and its images become a dataset with a retrieval task."""

    karpathy: Path = execution(..., "dataset_coco.json or dataset_flickr30k.json")
    images: Path = execution(..., "folder of the images, under their official names")
    name: str = execution("retrieval", "name of the task set")
    split: tuple[str, ...] = identity((), "import only this split (train, val, test), may be repeated [default: all]")
    shard_rows: PositiveInt = identity(10_000, "images in a shard")
    allow_missing: bool = execution(False, "import without the images that are not there")
    threads: int | None = execution(None, "threads that read images [default: the cores]", gt=0)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not value or value.startswith(".") or not set(value).isdisjoint("/\\\0"):
            raise ValueError("must be the name of a folder")
        return value

    @field_validator("split")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))


class RetrievalConfig(StageConfig):
    """How retrieval is evaluated."""

    split: str = identity("test", "split of the task set; choose models on val, report test")
    task: str = identity("retrieval", "name of the task set in the dataset")
    ties: Literal["pessimistic", "albef"] = identity(
        "pessimistic", "equal scores: a foreign candidate comes first, or ALBEF's order (argsort, reversed)"
    )
    folds: PositiveInt = identity(1, "mean over this many equal runs of images: 5 is COCO's 1K protocol")
    head: Literal["auto", "matching", "ranking"] = identity(
        "auto", "head that scores a pair in a single-stream model [auto: ranking where there is one]"
    )
    candidates: str | None = identity(None, "run or checkpoint of a dual encoder; only its top k are scored")
    top_k: PositiveInt = identity(128, "with --candidates: candidates of each image and of each caption")
    tokenizer: str | None = identity(None, "tokenizer of a published checkpoint: a folder, or a hub name")
    activation: Literal["gelu", "quick_gelu"] | None = identity(
        None, "of a published CLIP that does not tell: open_clip's plain names are gelu, -quickgelu quick_gelu"
    )
    precision: Literal["fp32", "bf16", "fp16"] = identity("fp32", "of the model's arithmetic")
    device: str = execution("auto", "auto, cpu, cuda or cuda:N")
    batch_size: PositiveInt = execution(64, "images, captions or pairs the model is given at once")
    threads: int | None = execution(None, "threads that decode images [default: the cores]", gt=0)
