"""What a row is: uids, digests, sidecars, configurations, statuses, tensors."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import field_validator, model_validator

from schemas.config import ShardStage, StageConfig, build_config, execution, fingerprint, identity
from schemas.errors import PairmillError, suggest
from schemas.features import region_fields
from schemas.pairs import INPUT_FIELDS, PAIR_FIELDS, carried_name, given_uid, pair_uid, pairs_digest
from schemas.sidecars import check_same, make_sidecar
from schemas.status import STATES, STATUSES, is_transient
from schemas.tables import check_schema, table_schema, table_version
from schemas.tensors import (
    array_to_fixed,
    arrays_to_blobs,
    blob_tensor,
    fixed_tensor,
    fixed_to_array,
    from_blob,
    tensor_spec,
    to_blob,
)
from tests.strategies import captions, texts


@given(texts, captions)
def test_uid_is_blake2b_of_url_zero_caption(url, caption):
    want = hashlib.blake2b(url.encode() + b"\0" + (caption or "").encode(), digest_size=16).digest()
    assert pair_uid(url, caption) == want == pair_uid(url, caption, bytes(32))


def test_uid_without_a_url_is_of_the_bytes_or_the_text():
    digest = hashlib.sha256(b"image").digest()
    assert pair_uid(None, "x", digest) == hashlib.blake2b(b"sha256:" + digest, digest_size=16).digest()
    assert pair_uid(None, "x") == pair_uid("", "x") != pair_uid(None, "y")


@given(st.binary(min_size=16, max_size=16))
def test_hex_ids_stay_as_they_are(uid):
    assert given_uid(uid.hex()) == (uid, None) == given_uid(uid.hex().upper())


@given(texts)
def test_other_ids_are_hashed_and_kept(text):
    assert given_uid(text + "-") == (hashlib.blake2b(f"{text}-".encode(), digest_size=16).digest(), f"{text}-")


def test_columns_that_bear_our_names_are_renamed():
    for field in (*PAIR_FIELDS, *INPUT_FIELDS):
        assert carried_name(field.name) == f"input_{field.name}"
    assert carried_name("license") == "license"


rows = st.lists(st.tuples(st.sampled_from(STATUSES), st.none() | st.binary(min_size=32, max_size=32)), max_size=5)


@given(rows, rows)
def test_digest_tells_different_pairs_apart(a, b):
    one, other = (pairs_digest(pa.array([s for s, _ in r], pa.string()), pa.array([h for _, h in r])) for r in (a, b))
    assert (one == other) == (a == b)


def test_transient_statuses():
    assert {s for s in STATUSES if is_transient(s)} == {
        "dns_error",
        "connect_error",
        "timeout",
        "protocol_error",
        "host_resting",
        "truncated",
    }
    assert [is_transient("http_error", c) for c in (408, 425, 429, 500, 503, 599)] == [True] * 6
    assert [is_transient("http_error", c) for c in (None, 200, 404, 410, 600)] == [False] * 5
    assert is_transient("success", 503) is False
    assert STATES[:2] == ("ok", "skipped")


class Toy(ShardStage):
    model: str = identity("b32", "which model")
    size: int = identity(3, "side", ge=1)
    device: Literal["cpu", "cuda"] = execution("cpu", "where")


def test_fingerprint_hashes_identity_only():
    schema = ("scores", 1)
    base = make_sidecar("score", "clip", schema, Toy())
    assert base.identity == {"model": "b32", "size": 3}
    assert Toy().execution_fields() == {"device": "cpu", "workers": None, "scheduler": None}
    assert make_sidecar("score", "other", schema, Toy(device="cuda", workers=9)).fingerprint == base.fingerprint
    different = [
        make_sidecar("score", "clip", schema, Toy(size=4)),
        make_sidecar("score", "clip", ("scores", 2), Toy()),
        make_sidecar("extract", "clip", schema, Toy()),
        make_sidecar("score", "clip", schema, Toy(), {"weights": "abc"}),
    ]
    assert len({s.fingerprint for s in (base, *different)}) == 5


def test_fingerprint_does_not_depend_on_order():
    assert fingerprint({"a": 1, "b": [2, {"y": 1, "x": None}]}) == fingerprint({"b": [2, {"x": None, "y": 1}], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_check_same_names_every_difference():
    old = make_sidecar("score", "clip", ("scores", 1), Toy(), {"weights": "abc"})
    new = make_sidecar("score", "clip", ("scores", 1), Toy(size=4))
    check_same(old, old, "DS/scores/clip", "mend")
    with pytest.raises(PairmillError) as caught:
        check_same(old, new, "DS/scores/clip", "Pass --name to start another.")
    assert str(caught.value) == (
        "DS/scores/clip was made with other settings: `size` was 3, now 4; `weights` was 'abc', now None. "
        "Nothing written. Pass --name to start another."
    )
    newer = make_sidecar("score", "clip", ("scores", 2), Toy(), {"weights": "abc"})
    with pytest.raises(PairmillError, match="schema was scores 1, now scores 2"):
        check_same(old, newer, "x", "")


def test_wrong_configurations_say_what_is_wrong():
    with pytest.raises(PairmillError) as caught:
        build_config(Toy, {"modle": "x", "size": 0}, "recipe.yaml, stage score")
    text = str(caught.value)
    assert text.startswith("recipe.yaml, stage score: ")
    assert "unknown key `modle`. Did you mean `model`?" in text
    assert "`size`: Input should be greater than or equal to 1, got 0." in text
    assert build_config(Toy, {"size": 5}, "").size == 5
    assert issubclass(Toy, StageConfig)


class Pair(StageConfig):
    low: int = identity(0, "a number")
    high: int = identity(1, "a larger one")

    @model_validator(mode="after")
    def _in_order(self) -> Pair:
        if self.low > self.high:
            raise ValueError(f"`low` {self.low} is above `high` {self.high}")
        return self

    @field_validator("high")
    @classmethod
    def _not_seven(cls, value: int) -> int:
        if value == 7:
            raise ValueError("must not be unlucky")
        return value


class Outer(StageConfig):
    pair: Pair = identity(Pair(), "two numbers")


def test_fields_that_do_not_go_together_are_told_in_our_own_words():
    with pytest.raises(PairmillError) as caught:
        build_config(Pair, {"low": 3}, "toy")
    assert str(caught.value) == "toy: `low` 3 is above `high` 1."
    with pytest.raises(PairmillError) as caught:
        build_config(Outer, {"pair": {"low": 3}}, "toy")
    assert str(caught.value) == "toy: `pair`: `low` 3 is above `high` 1."
    with pytest.raises(PairmillError) as caught:
        build_config(Pair, {"high": 7}, "toy")
    assert str(caught.value) == "toy: `high`: must not be unlucky, got 7."


def test_suggest():
    assert suggest("clip_scor", ["clip_score", "width"]) == " Did you mean `clip_score`?"
    assert suggest("zzz", ["clip_score"]) == ""


def test_tables_say_what_they_are():
    schema = table_schema("pairs", 1, [pa.field("a", pa.int8())], {b"more": b"x"})
    assert table_version(schema.metadata) == ("pairs", 1)
    check_schema(schema, "pairs", 1, "f")
    with pytest.raises(PairmillError, match="f holds pairs, expected scores"):
        check_schema(schema, "scores", 1, "f")
    with pytest.raises(PairmillError, match="f holds no pairmill table"):
        check_schema(pa.schema([]), "scores", 1, "f")
    with pytest.raises(PairmillError, match=r"pairs version 1; this pairmill reads up to 0. Install a newer"):
        check_schema(schema, "pairs", 0, "f")
    assert table_version({b"pairmill.schema": b"\xff", b"pairmill.version": b"x"}) == ("\ufffd", 0)


def test_region_schema_variants():
    names = {p: [f.name for f in region_fields(8, 5, p)] for p in ("full", "none", "topk:3")}
    assert set(names["full"]) - set(names["none"]) == {"cls_probs"}
    assert set(names["topk:3"]) - set(names["none"]) == {"cls_topk_idx", "cls_topk_p", "bg_p"}
    spec = {f.name: tensor_spec(f) for f in region_fields(8, 5)}
    assert spec["cls_probs"] == (np.dtype("<f2"), ["num_boxes", 6])
    assert spec["boxes"] is None


@given(st.lists(st.booleans(), max_size=9), st.integers(0, 9), st.integers(0, 9))
def test_fixed_tensors_come_back_also_from_slices(valid, start, length):
    array = np.arange(len(valid) * 3, dtype=np.float16).reshape(-1, 3)
    column = array_to_fixed(array, np.array(valid, bool), 3).slice(start, length)
    want = array[start : start + length].astype(np.float32)
    want[~np.array(valid, bool)[start : start + length]] = np.nan
    np.testing.assert_array_equal(fixed_to_array(column).astype(np.float32), want)
    for pieces in ([column], [column, column], []):
        chunked = pa.chunked_array(pieces, type=column.type)
        stacked = np.concatenate([want] * len(pieces)) if pieces else np.empty((0, 3))
        np.testing.assert_array_equal(fixed_to_array(chunked).astype(np.float32), stacked)


def test_blobs_that_do_not_fit_their_shape_are_damaged():
    field = blob_tensor("x", "float16", ["n", 2])
    column = pa.array([to_blob(np.ones((3, 2)), field), None, b""], pa.large_binary())
    np.testing.assert_array_equal(from_blob(field, column, 0, {"n": 3}), np.ones((3, 2)))
    assert from_blob(field, column, 1, {"n": None}) is None
    assert from_blob(field, column, 2, {"n": 0}).shape == (0, 2)
    for n in (2, -3, None, 10**12):
        with pytest.raises(PairmillError, match=r"`x` holds 12 bytes, .* is damaged"):
            from_blob(field, column, 0, {"n": n})
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        blob_tensor("x", "float64", [1])
    with pytest.raises(ValueError, match="`y` is not a blob"):
        to_blob(np.ones(1), fixed_tensor("y", 1))
    with pytest.raises(ValueError, match="`y` is not a blob"):
        from_blob(pa.field("y", pa.large_binary()), column, 0, {})


@pytest.mark.parametrize("rows", [[], [None], [None, None], [(2, 3), None, (0, 3), (1, 3)], [(1, 3)] * 9])
@pytest.mark.parametrize(
    "stored",
    [
        lambda a: a,
        lambda a: a.astype(np.float16),
        lambda a: np.asfortranarray(a.astype(np.float16)),
        lambda a: np.repeat(a.astype(np.float16), 2, axis=0)[::2],
        lambda a: np.repeat(a.astype(np.float16), 2, axis=0).reshape(len(a), 2, 3)[:, 0, None],
    ],
    ids=["float64", "float16", "columns", "every second", "cells"],
)
def test_many_rows_make_the_column_that_single_rows_make(rows, stored):
    field = blob_tensor("x", "float16", ["n", 3])
    rng = np.random.default_rng(0)
    arrays = [None if shape is None else stored(rng.random(shape)) for shape in rows]
    column = arrays_to_blobs(arrays, field)
    column.validate(full=True)
    assert column.equals(pa.array([None if a is None else to_blob(a, field) for a in arrays], pa.large_binary()))
