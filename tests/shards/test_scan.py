import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import PairmillError
from schemas.sidecars import ListSource
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import open_folder
from shards.scan import metadata_schema, positions, rows_at, scan, starts
from shards.writer import write_table


def make(path, sizes, columns=None, lists=()):
    """Score shards whose `n` counts the rows of the dataset; `columns` gives a shard another table."""
    folder = open_folder(path)
    write_manifest(folder, new_manifest(max(sizes), sizes, lists))
    dataset = Dataset.open(path)
    begin = starts(dataset)
    for shard, rows in enumerate(sizes):
        table = pa.table(
            {"n": np.arange(begin[shard], begin[shard] + rows), "image": pa.array([b"x"] * rows, pa.large_binary())}
        )
        for name, values in (columns or {}).get(shard, {}).items():
            table = table.append_column(name, values)
        write_table(folder, dataset.stage("input").file(shard), table, {})
    return dataset


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12), store=st.booleans(), data=st.data())
def test_rows_come_in_manifest_order_from_disk_and_store(tmp_path_factory, sizes, store, data):
    path = tmp_path_factory.mktemp("scan")
    dataset = make(f"memory://{path}" if store else path, sizes)
    table = scan(dataset.stage("input")).collect(engine="streaming")
    assert table.columns == ["n"]  # never the image
    assert table["n"].to_list() == list(range(sum(sizes)))
    where = positions(dataset)
    assert where.rows() == [(s, r) for s, size in enumerate(sizes) for r in range(size)]
    chosen = sorted(data.draw(st.sets(st.integers(0, sum(sizes) - 1))))
    assert rows_at(dataset.stage("input"), np.array(chosen, np.int64), ["n"])["n"].to_list() == chosen
    some = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    want = [n for n, (s, _) in enumerate(where.rows()) if s in some]
    assert scan(dataset.stage("input"), some).select("n").collect()["n"].to_list() == want
    assert positions(dataset, some).rows() == [p for p in where.rows() if p[0] in some]
    assert starts(dataset, some)[-1] == len(want)


def test_a_column_of_a_later_list_is_null_before_it(place):
    lists = [ListSource(name=n, bytes=1, hash="", shards=k) for n, k in (("a", 2), ("b", 1))]
    dataset = make(place, [2, 2, 1], {2: {"extra": pa.array(["e"])}}, lists)
    got = scan(dataset.stage("input")).select("extra", "n").collect()
    assert got.rows() == [(None, 0), (None, 1), (None, 2), (None, 3), ("e", 4)]


def test_two_types_of_one_column_are_an_error(tmp_path):
    lists = [ListSource(name=n, bytes=1, hash="", shards=1) for n in "ab"]
    columns = {0: {"extra": pa.array([1])}, 1: {"extra": pa.array(["e"])}}
    with pytest.raises(PairmillError, match="one column in two types"):
        metadata_schema(make(tmp_path, [1, 1], columns, lists).stage("input"))


def test_a_stage_without_shards_is_an_error(tmp_path):
    dataset = make(tmp_path, [1])
    with pytest.raises(PairmillError, match="has no shards yet"):
        metadata_schema(dataset.stage("pairs"))


def test_filters_and_heads_on_a_store_are_those_of_the_disk(place):
    frame = scan(make(place, [3, 3, 3]).stage("input"))
    assert frame.filter(pl.col("n") % 2 == 0).select("n").collect()["n"].to_list() == [0, 2, 4, 6, 8]
    assert frame.head(4).collect()["n"].to_list() == [0, 1, 2, 3]
    assert frame.select(pl.len()).collect().item() == 9
