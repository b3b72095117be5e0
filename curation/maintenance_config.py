"""Configurations of check, history, show, import, export and merge. Only pydantic is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from schemas.config import ShardStage, StageConfig, execution, identity

SHARD_ROWS = 10_000


class CheckConfig(StageConfig):
    """How a dataset is read back."""

    threads: PositiveInt = execution(4, "shards read at once", le=256)
    most: PositiveInt = execution(1000, "findings told before the rest is only counted")
    reproduce: int = execution(0, "rows of every score set to compute again and compare, such as 20", ge=0)
    weights: tuple[Path, ...] = execution(
        (), "with --reproduce: a model's file or folder, found by its hash; may be repeated"
    )


class RemoveConfig(StageConfig):
    """What is taken out of a dataset."""

    list: str = identity(..., "a list with a column `uid` or `url`, or a .txt with one of both a line")


class ShowConfig(StageConfig):
    """Which rows are shown, and how."""

    rows: tuple[str, ...] = execution((), "rows: N counted over the dataset, or SHARD:ROW; may be repeated")
    selection: str | None = execution(None, "show rows of this selection")
    dropped: bool = execution(False, "with --selection: rows it dropped, with their reasons")
    status: str | None = execution(None, "show rows of this status")
    count: PositiveInt = execution(12, "rows sampled where none are named", le=10_000)
    seed: int = execution(0, "seed of the sample")
    columns: tuple[str, ...] = execution((), "columns to show, such as caption or clip.clip_score [default: all]")
    output: Path | None = execution(None, "write a contact sheet, a PNG, to this file")
    thumbnail: int = execution(192, "side of a thumbnail on the contact sheet, px", ge=32, le=1024)


class ImportConfig(StageConfig):
    """How pairs that somebody already has become a dataset."""

    caption_key: tuple[str, ...] = identity(
        (), "key or column of the caption; several make several captions [default: captions, caption, txt or text]"
    )
    uid_key: str | None = identity(None, "key or column that holds an id [default: uid]")
    shard_rows: PositiveInt = identity(SHARD_ROWS, "rows a shard")
    max_bytes: PositiveInt = identity(32 * 1024 * 1024, "largest image taken, bytes")
    max_pixels: PositiveInt = identity(64 * 1024 * 1024, "largest image taken, px")


class ImagesImportConfig(ImportConfig):
    """How pairs whose images are named in a list become a dataset."""

    images: tuple[str, ...] = execution(
        (), "folder of the images, may be repeated: tried in order [default: beside the list]"
    )


class CsvImportConfig(ImagesImportConfig):
    """How a csv of image names and captions becomes a dataset."""

    image_key: str | None = identity(None, "column of the image's name [default: filepath, or a usual name]")


class ExportConfig(StageConfig):
    """Which pairs are copied into another tool's format."""

    selection: str | None = identity(None, "copy what this selection keeps [default: every success]")
    shard_rows: PositiveInt = identity(SHARD_ROWS, "samples a file")


class HuggingFaceImportConfig(ImportConfig):
    """How Hugging Face Parquet becomes a dataset."""

    image_key: str | None = identity(None, "column of the image [default: the one of type Image]")


class ArrowExportConfig(ExportConfig):
    """Under which of their names pairs are written for ViLT, METER and VLMo."""

    layout: Literal["conceptual", "coco", "f30k", "sbu", "vg", "wikibk"] = identity(
        "conceptual", "the data set whose file names and columns are used"
    )
    split: str | None = identity(
        None, "split of every pair, such as train or val [default: the column `split`, else train]"
    )
    shard_rows: PositiveInt = identity(100_000, "samples a file, where the names allow several")


class ExportDatasetConfig(ShardStage):
    """How a dataset is cut anew into a smaller one."""

    selection: str | None = identity(None, "keep what this selection keeps [default: every row, failures included]")
    shard_rows: int | None = identity(None, "rows a shard [default: as the dataset has]", gt=0)
    tasks: Literal["refuse", "drop", "omit"] = identity(
        "refuse",
        "task rows whose image is not kept: refuse the export; drop those rows; omit all task sets",
    )


class MergeConfig(ShardStage):
    """How datasets are joined."""

    shard_rows: int | None = identity(None, "rows a shard [default: as the first dataset has]", gt=0)
