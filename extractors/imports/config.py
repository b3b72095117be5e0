"""Configuration of `pairmill import-features` and `export-features`. Imports only pydantic and schemas."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from extractors.config import NAME
from schemas.config import StageConfig, execution, identity

FORMATS = ("tsv", "uniter-lmdb", "mmf-lmdb", "npy", "npz")
EXPORTS = ("tsv", "uniter-lmdb")


class ImportFeaturesConfig(StageConfig):
    """`pairmill import-features`. What the file is, is identity by its hash; where it lies is not."""

    name: str = execution("regions", "name of the feature set", pattern=NAME)
    key: str | None = identity(None, "column of pairs that names the image [default: the file name in url]")
    new: bool = execution(False, "make DATASET: one row without an image for each entry")
    allow_missing: bool = execution(False, "go on where under 99 % of the rows are matched, or a key list is missing")
    fields: str | None = identity(None, "tsv: its columns in order, by commas [default: told by their number]")
    dtype: Literal["float32", "float16"] = identity("float32", "tsv: the numbers behind base64")
    background: Literal["auto", "first", "last", "none"] = identity(
        "auto", "the background's column of class probabilities; auto: first where rows sum to 1, else none"
    )
    classes: str | None = execution(None, "file of class names, one a line (objects_vocab.txt)")
    attributes: str | None = execution(None, "file of attribute names, one a line")
    shard_rows: PositiveInt = execution(10_000, "with --new: rows a shard")
    workers: int | None = execution(None, "worker processes; 0 runs in this process [default: the cores]", ge=0)


class ExportFeaturesConfig(StageConfig):
    """`pairmill export-features`."""

    name: str = identity("regions", "name of the feature set", pattern=NAME)
    key: str | None = identity(None, "column of pairs that names the image [default: the file name in url, else key]")
    fields: Literal["lxmert", "butd"] = identity("lxmert", "tsv: LXMERT's ten columns, or bottom-up attention's six")
    compress: bool = identity(True, "uniter-lmdb: npz; else msgpack")
