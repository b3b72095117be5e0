"""Features and scores: one row per pair, in the pairs' order."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from schemas.tables import VERSIONS, table_schema
from schemas.tensors import blob_tensor, fixed_tensor

SCORES, FEATURES = "scores", "features"
VERSION = VERSIONS[FEATURES]

STATE = pa.field("state", pa.string(), nullable=False)


def scores_schema(fields: Sequence[pa.Field]) -> pa.Schema:
    """Schema of `scores/NAME/NNNNN.parquet`: the scorer's columns and nothing else."""
    return table_schema(SCORES, VERSION, fields)


def features_schema(fields: Sequence[pa.Field], about: dict[str, object] | None = None) -> pa.Schema:
    """Schema of `features/NAME/NNNNN.arrow`: `state` and the extractor's tensors.

    `about` (class names, patch side, ...) goes into the schema metadata as JSON.
    """
    return table_schema(FEATURES, VERSION, [STATE, *fields], {b"pairmill.about": json.dumps(about or {}).encode()})


def about(schema: pa.Schema) -> dict[str, object]:
    """What the extractor said about its columns."""
    return json.loads((schema.metadata or {}).get(b"pairmill.about", b"{}"))


def clip_embedding_fields(dim: int) -> list[pa.Field]:
    """`clip_image` and `clip_text` (of the best caption), fp16 [dim], L2-normalised."""
    return [fixed_tensor("clip_image", dim), fixed_tensor("clip_text", dim)]


CLIP_SCORE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("clip_score", pa.float32()),
    pa.field("clip_scores", pa.list_(pa.float32())),
)


def patch_fields(patch: int) -> list[pa.Field]:
    """uint8 [rows x cols, patch x patch x 3] in raster order, and the grid it was cut from."""
    return [
        pa.field("rows", pa.int32()),
        pa.field("cols", pa.int32()),
        pa.field("num_patches", pa.int32()),
        blob_tensor("patches", "uint8", ["num_patches", patch * patch * 3]),
    ]


def grid_fields(dim: int, class_token: bool = False) -> list[pa.Field]:
    """A feature map fp16 [rows, cols, dim], row 0 on top, col 0 left, and where the model has one its class token,
    fp16 [dim]. `num_cells` is rows x cols.
    """
    fields = [
        pa.field("rows", pa.int32()),
        pa.field("cols", pa.int32()),
        pa.field("num_cells", pa.int32()),
        blob_tensor("grid", "float16", ["rows", "cols", dim]),
    ]
    return [*fields, blob_tensor("class_token", "float16", [dim])] if class_token else fields


def region_fields(dim: int, classes: int, cls_probs: str = "full", attributes: int = 0) -> list[pa.Field]:
    """regions-v1: N boxes a row, sorted by confidence, in pixels of the stored image, exclusive maximum.

    `classes` counts the foreground classes; `cls_probs` is full, none or topk:K; background comes first.
    """
    fields = [
        pa.field("num_boxes", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        blob_tensor("features", "float16", ["num_boxes", dim]),
        pa.field("det_conf", pa.list_(pa.float32())),
        pa.field("obj_id", pa.list_(pa.int32())),
        pa.field("obj_conf", pa.list_(pa.float32())),
    ]
    if attributes:
        fields += [pa.field("attr_id", pa.list_(pa.int32())), pa.field("attr_conf", pa.list_(pa.float32()))]
    if cls_probs == "full":
        fields.append(blob_tensor("cls_probs", "float16", ["num_boxes", classes + 1]))
    elif cls_probs.startswith("topk:"):
        top = int(cls_probs.removeprefix("topk:"))
        fields += [
            blob_tensor("cls_topk_idx", "int32", ["num_boxes", top]),
            blob_tensor("cls_topk_p", "float16", ["num_boxes", top]),
            pa.field("bg_p", pa.list_(pa.float32())),
        ]
    fields.append(blob_tensor("image_feat", "float16", [dim]))
    return fields
