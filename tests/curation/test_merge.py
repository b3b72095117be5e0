"""`merge`: rows in order, columns united, sets kept where all have them."""

from __future__ import annotations

import pyarrow as pa
import pytest

from curation.maintenance_config import MergeConfig
from curation.merge import merge
from schemas.errors import PairmillError
from schemas.events import Notice, silent
from shards.dataset import Dataset
from tests.atomicity import assert_atomic
from tests.curation.samples import all_features, all_rows, whole_dataset, write_tasks
from tests.make import make_dataset
from tests.shards.toy import ToyConfig, size_scores

HERE = MergeConfig(workers=0)


def one_row(path, name: str, kind: pa.DataType, value) -> Dataset:
    return make_dataset(path, shards=1, rows=1, carried=[pa.field(name, kind)], carry=lambda s, r: {name: value})


def test_rows_scores_features_and_tasks_are_joined(tmp_path):
    a = whole_dataset(tmp_path / "a", shards=2, rows=3)
    b = whole_dataset(tmp_path / "b", shards=2, rows=4, fail={(1, 1): "timeout"})
    write_tasks(a, [[(0, 1)]])
    write_tasks(b, [[(1, 3), (0, 0)]])
    finished = merge([a, tmp_path / "b"], tmp_path / "c", HERE, silent)
    c = Dataset.open(tmp_path / "c")
    assert finished.left == ()
    assert c.manifest.shards == (3, 3, 3, 3, 2)
    renamed = [{("license" if k == "License" else k): v for k, v in row.items()} for row in all_rows(a) + all_rows(b)]
    assert all_rows(c) == renamed
    assert all_rows(c, "scores/size") == all_rows(a, "scores/size") + all_rows(b, "scores/size")
    joined = all_features(a, "features/vector") + all_features(b, "features/vector")
    assert all_features(c, "features/vector") == joined
    assert [s.pending() for s in c.stages() if s.kind != "tasks"] == [[], [], []]
    refs = [[(i["shard"], i["row"]) for i in row["images"]] for row in all_rows(c, "tasks/vqa")]
    assert refs == [[(0, 1)], [divmod(6 + 7, 3), divmod(6, 3)]]


def test_sets_that_differ_are_dropped_with_a_notice(tmp_path):
    a, b = (make_dataset(tmp_path / n, shards=1, rows=2) for n in "ab")
    size_scores(a, ToyConfig(workers=0), silent)
    size_scores(b, ToyConfig(workers=0, factor=2), silent)
    events: list = []
    merge([a, b], tmp_path / "c", HERE, events.append)
    assert [s.path for s in Dataset.open(tmp_path / "c").stages()] == ["pairs"]
    assert "scores/size is dropped: the datasets made it with different settings." in texts(events)
    only = make_dataset(tmp_path / "o", shards=1, rows=2)
    merge([a, only], tmp_path / "d", HERE, events.append)
    assert "scores/size is dropped: only 1 of 2 datasets have it." in texts(events)


def texts(events) -> list[str]:
    return [e.text for e in events if isinstance(e, Notice)]


def test_attribution_columns_become_one(tmp_path):
    columns = [("a", "licence", "A"), ("b", "license", "B"), ("c", "page_url", "p")]
    a, b, c = (one_row(tmp_path / place, name, pa.string(), value) for place, name, value in columns)
    merge([a, b, c], tmp_path / "d", HERE, silent)
    rows = all_rows(Dataset.open(tmp_path / "d"))
    assert [(r["license"], r["source_url"]) for r in rows] == [("A", None), ("B", None), (None, "p")]


def test_types_unite_or_the_error_names_them(tmp_path):
    kinds = [("a", pa.int32(), 1), ("b", pa.int64(), 2**40), ("c", pa.string(), "x")]
    a, b, c = (one_row(tmp_path / place, "n", kind, value) for place, kind, value in kinds)
    merge([a, b], tmp_path / "d", HERE, silent)
    assert [r["n"] for r in all_rows(Dataset.open(tmp_path / "d"))] == [1, 2**40]
    with pytest.raises(PairmillError, match="Column `n` is int64 in the datasets before and string in"):
        merge([b, c], tmp_path / "e", HERE, silent)
    with pytest.raises(PairmillError, match="two datasets or more"):
        merge([a], tmp_path / "e", HERE, silent)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_ended_at_any_call_a_rerun_completes_it(tmp_path, every):
    start = tmp_path / "start"
    whole_dataset(start / "a", shards=1, rows=3, fail={})
    whole_dataset(start / "b", shards=1, rows=2, fail={})

    def run(root):
        merge([root / "a", root / "b"], root / "c", HERE, silent)

    assert assert_atomic(lambda: (start, run), tmp_path, every=every) >= 30
