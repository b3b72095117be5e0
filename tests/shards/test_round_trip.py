"""What is written comes back: every table, every null, in order, and tensors without a copy."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.features import CLIP_SCORE_FIELDS, about, features_schema, scores_schema
from schemas.pairs import INPUT_FIELDS, PAIR_FIELDS, carried_fields, input_schema, pairs_digest, pairs_schema
from schemas.status import OK
from schemas.tables import DIGEST
from schemas.tasks import tasks_schema
from schemas.tensors import blob_tensor, fixed_to_array
from shards.files import LocalFolder
from shards.reader import (
    MappedShard,
    arrow_schema,
    group_rows,
    open_parquet,
    parquet_footer,
    read_table,
    row_groups,
    stored_counts,
)
from shards.writer import write_features, write_pairs, write_table
from tests import strategies

FEW = settings(max_examples=25, deadline=None)
IMAGE_COLUMN = next(i for i, f in enumerate(PAIR_FIELDS) if f.name == "image")


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield LocalFolder(path)


def tally(values):
    return {v: values.count(v) for v in sorted(set(values))}


@given(st.data())
@FEW
def test_pairs_come_back(folder, data):
    carried = data.draw(strategies.carried_fields())
    rows = data.draw(strategies.pair_rows(carried))
    schema = pairs_schema(carried)
    with write_pairs(folder, "pairs.parquet", schema) as writer:
        for row in rows:
            writer.append(row)
    table = read_table(folder, "pairs.parquet")
    assert table.to_pylist() == rows
    assert table.schema.equals(schema)
    assert carried_fields(table.schema) == carried
    assert stored_counts(folder, "pairs.parquet") == tally([r["status"] for r in rows])
    digest = pairs_digest(table["status"], table["sha256"])
    assert parquet_footer(folder, "pairs.parquet")[DIGEST].decode() == digest


@given(st.data())
@FEW
def test_tables_and_rows_make_the_same_file(folder, data):
    carried = data.draw(strategies.carried_fields())
    rows = data.draw(strategies.pair_rows(carried, max_size=20))
    cut = data.draw(st.integers(0, len(rows)))
    schema = pairs_schema(carried)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.writer.GROUP_BYTES", 1000)
        with write_pairs(folder, "rows.parquet", schema) as writer:
            for row in rows:
                writer.append(row)
        with write_pairs(folder, "table.parquet", schema) as writer:
            for row in rows[:cut]:
                writer.append(row)
            writer.extend(pa.Table.from_pylist(rows[cut:], schema=schema))
    assert folder.read_bytes("rows.parquet") == folder.read_bytes("table.parquet")


@given(st.lists(st.integers(0, 7), max_size=40))
@FEW
def test_row_groups_are_cut_by_bytes(folder, sizes):
    group = 1 << 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.writer.GROUP_BYTES", group)
        with write_pairs(folder, "groups.parquet", pairs_schema()) as writer:
            for i, size in enumerate(sizes):
                writer.append({"uid": i.to_bytes(16), "status": "success", "image": bytes(size << 9)})
    pieces = list(row_groups(folder, "groups.parquet", ["uid", "image"]))
    assert [u for _, t in pieces for u in t["uid"].to_pylist()] == [i.to_bytes(16) for i in range(len(sizes))]
    assert [start for start, _ in pieces] == list(np.cumsum([0, *group_rows(folder, "groups.parquet")])[:-1])
    for _, table in pieces:
        held = [len(b) + 256 for b in table["image"].to_pylist()]
        assert sum(held[:-1]) < group, "a group ends as soon as it is full"


def test_image_column_is_stored_raw(folder):
    with write_pairs(folder, "raw.parquet", pairs_schema([pa.field("a.b", pa.string())])) as writer:
        writer.append({"uid": bytes(16), "status": "success", "image": bytes(100_000), "a.b": "x"})
    with open_parquet(folder, "raw.parquet") as file:
        image = file.metadata.row_group(0).column(IMAGE_COLUMN + 1)  # `captions` is a list: its leaf is one column
        columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    image = next(c for c in columns if c.path_in_schema == "image")
    assert (image.compression, image.has_dictionary_page, image.statistics) == ("UNCOMPRESSED", False, None)
    assert {c.compression for c in columns if c.path_in_schema != "image"} == {"ZSTD"}


@given(st.data())
@FEW
def test_input_comes_back(folder, data):
    carried = data.draw(strategies.carried_fields())
    names = [f.name for f in INPUT_FIELDS if f.name != "expected_hash"]
    rows = [
        {n: r[n] for n in (*names, *(f.name for f in carried))} | {"expected_hash": None}
        for r in data.draw(strategies.pair_rows(carried))
    ]
    table = pa.Table.from_pylist(rows, schema=input_schema(carried))
    write_table(folder, "input.parquet", table, {"rows": len(rows)})
    assert read_table(folder, "input.parquet").to_pylist() == rows
    assert stored_counts(folder, "input.parquet") == {"rows": len(rows)}


@given(strategies.score_tables, strategies.task_rows)
@FEW
def test_scores_and_tasks_come_back(folder, scores, tasks):
    schema = scores_schema(CLIP_SCORE_FIELDS)
    write_table(folder, "scores.parquet", pa.Table.from_pylist(scores, schema=schema), {}, "abc")
    assert read_table(folder, "scores.parquet").to_pylist() == scores
    assert parquet_footer(folder, "scores.parquet")[DIGEST] == b"abc"
    schema = tasks_schema([pa.field("answers", pa.list_(pa.string()))])
    write_table(folder, "tasks.parquet", pa.Table.from_pylist(tasks, schema=schema), {})
    assert read_table(folder, "tasks.parquet").to_pylist() == tasks
    assert len(group_rows(folder, "tasks.parquet")) == 1


@given(strategies.feature_rows())
@FEW
def test_features_come_back(folder, rows):
    with write_features(folder, "f.arrow", strategies.FEATURE_SCHEMA, "digest") as writer:
        for row in rows:
            writer.append(row)
    shard = MappedShard(folder, "f.arrow")
    assert len(shard) == len(rows)
    assert shard.states() == [r["state"] for r in rows]
    assert stored_counts(folder, "f.arrow") == tally([r["state"] for r in rows])
    assert about(shard.schema) == {"classes": ["a", "b"]}
    assert arrow_schema(folder, "f.arrow")[DIGEST] == b"digest"
    for i, row in enumerate(rows):
        back = shard.row(i)
        for name in strategies.FEATURE_SCHEMA.names:
            want, got = row.get(name), back[name]
            if isinstance(want, np.ndarray):
                np.testing.assert_array_equal(got, want if want.size else want.reshape(np.shape(got)), err_msg=name)
            else:
                assert got == want, name


def test_feature_batches_are_bounded(folder):
    schema = features_schema([blob_tensor("x", "float32", [-1 + 1 + 1, "n"]), pa.field("n", pa.int32())])
    length = 300_000  # float16 in memory, float32 on disk: 1.2 MB a row
    with write_features(folder, "big.arrow", schema, "") as writer:
        for _ in range(40):
            writer.append({"state": OK, "n": length, "x": np.zeros((1, length), np.float16)})
        for _ in range(600):
            writer.append({"state": "skipped"})
    batches = MappedShard(folder, "big.arrow").batches
    assert max(b.num_rows for b in batches) <= 256
    assert max(b.column("x").nbytes for b in batches) <= (16 << 20) + 4096
    assert sum(b.num_rows for b in batches) == 640


def test_mapped_reads_do_not_copy(folder):
    schema = strategies.FEATURE_SCHEMA
    strip = np.arange(6, dtype=np.float32).reshape(2, 3)
    patches = np.arange(36, dtype=np.uint8).reshape(3, 12)
    row = {"state": OK, "rows": 3, "cols": 1, "num_patches": 3, "patches": patches, "strip": strip}
    with write_features(folder, "mapped.arrow", schema, "") as writer:
        for _ in range(4):
            writer.append({**row, "clip_image": np.ones(3, np.float16)})
    before = pa.total_allocated_bytes()
    shard = MappedShard(folder, "mapped.arrow")
    views = [shard.row(2, ["strip"])["strip"], shard.row(2, ["patches"])["patches"]]
    vectors = fixed_to_array(shard.batches[0].column("clip_image"))
    assert pa.total_allocated_bytes() == before
    spans = _map_spans(Path(folder.url, "mapped.arrow"))
    for array in (*views, vectors, shard.row(1, ["clip_image"])["clip_image"]):
        address = array.__array_interface__["data"][0]
        assert any(lo <= address < hi for lo, hi in spans), "the array must lie inside the mapped file"
        assert not array.flags.writeable
    np.testing.assert_array_equal(views[0], strip)


def test_lists_come_back_in_their_element_type(folder):
    boxes = [np.arange(4 * n, dtype=np.float32).reshape(n, 4) / 3 for n in (2, 0, 3)]
    fields = [pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4))), pa.field("obj_id", pa.list_(pa.int32()))]
    with write_features(folder, "lists.arrow", features_schema(fields), "") as writer:
        for one in boxes:
            writer.append({"state": OK, "boxes": one.tolist(), "obj_id": list(range(len(one)))})
        writer.append({"state": "skipped"})
    shard = MappedShard(folder, "lists.arrow")
    for i, want in enumerate(boxes):
        back = shard.row(i)
        assert back["boxes"].dtype == np.float32
        np.testing.assert_array_equal(back["boxes"], want)
        assert back["obj_id"].dtype == np.int32
        assert back["obj_id"].tolist() == list(range(len(want)))
    assert shard.row(3) == {"state": "skipped", "boxes": None, "obj_id": None}


def _map_spans(path: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in lines if line.endswith(str(path))]


def test_null_rows_of_blobs_cost_nothing(folder):
    schema = features_schema([blob_tensor("x", "float16", [100_000])])
    with write_features(folder, "null.arrow", schema, "") as writer:
        for _ in range(1000):
            writer.append({"state": "skipped"})
    assert folder.size("null.arrow") < 60_000


def test_fixed_column_has_nan_where_null(folder):
    with write_features(folder, "nan.arrow", strategies.FEATURE_SCHEMA, "") as writer:
        for i in range(300):
            writer.append({"state": OK, "clip_image": None if i % 2 else np.full(3, i, np.float16)})
    column = MappedShard(folder, "nan.arrow").column("clip_image")
    assert column.shape == (300, 3)
    assert np.isnan(column[1::2]).all()
    np.testing.assert_array_equal(column[::2, 0], np.arange(0, 300, 2).astype(np.float16))
