"""Hypothesis strategies for every table of a dataset: rows as the writers take them."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from schemas.features import features_schema, grid_fields, patch_fields, region_fields
from schemas.pairs import RESERVED
from schemas.status import OK, STATES, STATUSES, SUCCESS
from schemas.tensors import blob_tensor, fixed_tensor

# Everything UTF-8 can hold: captions come in every script, with zero bytes and line ends.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
captions = st.none() | texts
times = st.none() | st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1)).map(
    lambda t: t.replace(microsecond=t.microsecond // 1000 * 1000, tzinfo=dt.UTC)
)
_TYPES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): texts,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.list_(pa.string()): st.lists(texts, max_size=3),
    pa.struct([("a", pa.int32()), ("b", pa.string())]): st.fixed_dictionaries(
        {"a": st.integers(-5, 5), "b": st.none() | texts}
    ),
}


@st.composite
def carried_fields(draw: st.DrawFn) -> list[pa.Field]:
    """Columns of a user's list: any name that is not ours, dots and spaces included."""
    names = draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6).filter(
                lambda n: n not in RESERVED
            ),
            max_size=3,
            unique=True,
        )
    )
    return [pa.field(name, draw(st.sampled_from(list(_TYPES)))) for name in names]


def values(field: pa.Field) -> st.SearchStrategy[Any]:
    """What a nullable column of one of the types above may hold."""
    return st.none() | _TYPES[field.type]


@st.composite
def pair_rows(draw: st.DrawFn, carried: list[pa.Field], max_size: int = 8) -> list[dict[str, Any]]:
    """Rows of `pairs/`: successes with bytes, failures with a place and no image."""
    return [draw(_pair_row(carried)) for _ in range(draw(st.integers(0, max_size)))]


@st.composite
def _pair_row(draw: st.DrawFn, carried: list[pa.Field]) -> dict[str, Any]:
    status = draw(st.sampled_from((SUCCESS, SUCCESS, *STATUSES)))
    image = draw(st.binary(max_size=40)) if status == SUCCESS else None
    several = draw(st.none() | st.lists(texts, min_size=1, max_size=3))
    sides = st.none() | st.integers(1, 2**31 - 1)
    return {
        "uid": draw(st.binary(min_size=16, max_size=16)),
        "input_uid": draw(captions),
        "url": draw(captions),
        "caption": several[0] if several else draw(captions),
        "captions": several,
        "image": image,
        "format": "jpeg" if image is not None else None,
        "width": draw(sides),
        "height": draw(sides),
        "original_width": draw(sides),
        "original_height": draw(sides),
        "sha256": draw(st.none() | st.binary(min_size=32, max_size=32)),
        "stored_sha256": draw(st.none() | st.binary(min_size=32, max_size=32)),
        "status": status,
        "error": draw(captions),
        "http_status": draw(st.none() | st.integers(100, 599)),
        "attempts": draw(st.none() | st.integers(0, 9)),
        "fetched_at": draw(times),
        **{field.name: draw(values(field)) for field in carried},
    }


FEATURE_SCHEMA = features_schema(
    [
        fixed_tensor("clip_image", 3),
        *region_fields(4, 5, attributes=2),
        *(f for f in patch_fields(2)),
        *(f for f in grid_fields(5, class_token=True) if f.name not in ("rows", "cols")),  # the patches' own
        blob_tensor("strip", "float32", [2, "rows"]),
    ],
    {"classes": ["a", "b"]},
)


def _array(draw: st.DrawFn, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


@st.composite
def feature_rows(draw: st.DrawFn, max_size: int = 8) -> list[dict[str, Any]]:
    """Rows of `FEATURE_SCHEMA`: computed ones with 0 to 3 boxes and a ragged patch grid, others with a state only."""
    rows: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, max_size))):
        state = draw(st.sampled_from((OK, OK, *STATES)))
        rows.append({"state": state} | (_features(draw) if state == OK else {}))
    return rows


def _features(draw: st.DrawFn) -> dict[str, Any]:
    boxes, tall, wide = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "clip_image": draw(st.none() | st.just(_array(draw, "float16", (3,)))),
        "num_boxes": boxes,
        "boxes": _array(draw, "float32", (boxes, 4)),
        "features": _array(draw, "float16", (boxes, 4)),
        "det_conf": _array(draw, "float32", (boxes,)),
        "obj_id": _array(draw, "int32", (boxes,)),
        "obj_conf": _array(draw, "float32", (boxes,)),
        "attr_id": _array(draw, "int32", (boxes,)),
        "attr_conf": _array(draw, "float32", (boxes,)),
        "cls_probs": _array(draw, "float16", (boxes, 6)),
        "image_feat": _array(draw, "float16", (4,)),
        "rows": tall,
        "cols": wide,
        "num_patches": tall * wide,
        "patches": _array(draw, "uint8", (tall * wide, 12)),
        "num_cells": tall * wide,
        "grid": _array(draw, "float16", (tall, wide, 5)),
        "class_token": draw(st.none() | st.just(_array(draw, "float16", (5,)))),
        "strip": draw(st.none() | st.just(_array(draw, "float32", (2, tall)))),
    }


score_tables = st.lists(
    st.fixed_dictionaries(
        {
            "clip_score": st.none() | st.floats(width=32, allow_nan=False),
            "clip_scores": st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=3),
        }
    ),
    max_size=8,
)

_image_refs = st.fixed_dictionaries({"shard": st.integers(0, 99), "row": st.integers(0, 9999)})
task_rows = st.lists(
    st.fixed_dictionaries(
        {
            "id": texts,
            "split": st.sampled_from(["train", "val", "test"]),
            "images": st.lists(
                st.fixed_dictionaries({"shard": st.integers(0, 99), "row": st.integers(0, 9999)}),
                min_size=1,
                max_size=2,
            ),
            "text": captions,
            "answers": st.none() | st.lists(texts, max_size=3),
        }
    ),
    max_size=8,
)
