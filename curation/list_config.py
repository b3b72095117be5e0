"""What a user may say about the lists a dataset is made from."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from schemas.config import ShardStage, execution

NO_COLUMN = "none"
COLUMN_TYPES = ("string", "int64", "double", "bool")
SHARD_ROWS = 10_000


class ListConfig(ShardStage):
    """How lists are read and cut into shards. dataset.json keeps what is not the default beside each list."""

    url: str | None = execution(None, "column of URLs [default: url, image_url, ... in any case]")
    caption: str | None = execution(None, "column of captions, or `none` [default: caption, TEXT, top_caption, ...]")
    uid: str | None = execution(None, "column of ids, or `none` [default: uid, else a hash of url and caption]")
    sha256: str | None = execution(
        None, "column of sha256 or md5 digests to verify against, or `none` [default: sha256, md5]"
    )
    column_types: tuple[str, ...] = execution(
        (), "type of a carried column, NAME=string|int64|double|bool; columns of csv are text otherwise"
    )
    encoding: str | None = execution(
        None, "encoding of text lists [default: UTF-8, or as the byte order mark says; odd bytes as Windows-1252]"
    )
    limit: int | None = execution(None, "take the first N rows only", gt=0)
    sample: float | None = execution(None, "take this share of the rows, chosen by uid", gt=0, le=1)
    shard_rows: int = execution(SHARD_ROWS, "rows of a shard", gt=0)
    extend: bool = execution(False, "append the lists to the dataset that stands")

    @field_validator("column_types")
    @classmethod
    def _known_types(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for text in values:
            name, _, kind = text.rpartition("=")
            if not name or kind not in COLUMN_TYPES:
                raise ValueError(f"`{text}` must be NAME=TYPE with TYPE one of {', '.join(COLUMN_TYPES)}")
        return values

    def types(self) -> dict[str, str]:
        """Column of the list -> the type the user gave it."""
        return {name: kind for name, _, kind in (text.rpartition("=") for text in self.column_types)}

    def cut_choices(self) -> dict[str, Any]:
        """What decides which rows and columns come of a list, where it is not the default."""
        names = ("url", "caption", "uid", "sha256", "column_types", "encoding", "limit", "sample")
        values = self.model_dump(mode="json", include=set(names))
        return {name: values[name] for name in names if values[name] not in (None, [])}
