"""Task rows: questions and statements that refer to images of pairs by (shard, row)."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from schemas.tables import VERSIONS, table_schema

TASKS = "tasks"
VERSION = VERSIONS[TASKS]

IMAGE_REF = pa.struct([pa.field("shard", pa.int32(), nullable=False), pa.field("row", pa.int32(), nullable=False)])

TASK_FIELDS: tuple[pa.Field, ...] = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("images", pa.list_(IMAGE_REF), nullable=False),
    pa.field("text", pa.string()),
)


def tasks_schema(fields: Sequence[pa.Field] = ()) -> pa.Schema:
    """Schema of `tasks/NAME/NNNNN.parquet`: id, split, images, text and the task's own targets."""
    return table_schema(TASKS, VERSION, [*TASK_FIELDS, *fields])
