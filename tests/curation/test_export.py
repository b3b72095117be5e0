"""`export dataset`: kept rows cut anew, with scores, features and tasks."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.export import export_dataset
from curation.maintenance_config import ExportDatasetConfig
from schemas.errors import PairmillError
from schemas.events import Notice, silent
from shards.dataset import Dataset
from shards.reader import read_table
from tests.atomicity import assert_atomic, tree
from tests.curation.samples import all_features, all_rows, select, whole_dataset, write_tasks
from tests.make import make_dataset

HERE = {"workers": 0}
KEEP = [0, 3, 4, 5, 6, 9, 11]


def config(**values) -> ExportDatasetConfig:
    return ExportDatasetConfig(**{**HERE, **values})


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Dataset:
    dataset = whole_dataset(tmp_path_factory.mktemp("source") / "d")
    select(dataset, KEEP)
    return dataset


@given(st.lists(st.integers(0, 11), min_size=1, unique=True).map(sorted), st.integers(1, 13))
@settings(max_examples=12, deadline=None)
def test_kept_rows_stay_aligned(source, tmp_path_factory, keep, shard_rows):
    select(source, keep, "drawn")
    out = tmp_path_factory.mktemp("out") / "new"
    finished = export_dataset(source, out, config(selection="drawn", shard_rows=shard_rows), silent)
    new = Dataset.open(out)
    assert finished.left == ()
    whole, rest = divmod(len(keep), shard_rows)
    assert new.manifest.shards == (shard_rows,) * whole + ((rest,) if rest else ())
    for path in ("pairs", "scores/size"):
        assert all_rows(new, path) == [all_rows(source, path)[k] for k in keep]
    assert all_features(new, "features/vector") == [all_features(source, "features/vector")[k] for k in keep]
    for stage in new.stages():
        assert stage.pending() == []
        assert stage.path == "pairs" or stage.sidecar() == source.stage(stage.path).sidecar()
    shutil.rmtree(out)


def test_everything_without_a_selection(source, tmp_path):
    export_dataset(source.url, tmp_path / "new", config(), silent)
    new = Dataset.open(tmp_path / "new")
    assert new.manifest.shards == source.manifest.shards
    assert all_rows(new) == all_rows(source)
    for s in range(3):
        assert new.folder.read_bytes(f"pairs/0000{s}.parquet") == source.folder.read_bytes(f"pairs/0000{s}.parquet")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_ended_at_any_call_a_rerun_completes_it(tmp_path, every):
    start = tmp_path / "start"
    dataset = whole_dataset(start / "d", shards=2, rows=3)
    write_tasks(dataset, [[(0, 0)], [(1, 1), (0, 2)]])
    select(dataset, [0, 2, 4])

    def run(root):
        export_dataset(root / "d", root / "new", config(selection="best", shard_rows=2), silent)

    calls = assert_atomic(lambda: (start, run), tmp_path, lambda root: Dataset.open(root / "d"), every=every)
    assert calls >= 40


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(tmp_path):
    source = make_dataset(tmp_path / "source", shards=3, rows=4)
    for workers in (0, 2):
        export_dataset(source, tmp_path / str(workers), config(shard_rows=5, workers=workers), silent)
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


def test_tasks_follow_their_images(tmp_path):
    dataset = whole_dataset(tmp_path / "d")
    select(dataset, KEEP)
    write_tasks(dataset, [[(0, 0)], [(0, 1)], [(1, 0), (2, 3)], [(2, 1), (0, 2)]])
    with pytest.raises(PairmillError, match=r"2 task rows refer to images that are not kept. Pass --tasks drop"):
        export_dataset(dataset, tmp_path / "no", config(selection="best"), silent)
    with pytest.raises(PairmillError, match="unfinished dataset"):
        Dataset.open(tmp_path / "no")
    events: list = []
    export_dataset(dataset, tmp_path / "new", config(selection="best", tasks="drop"), events.append)
    new = Dataset.open(tmp_path / "new")
    rows = all_rows(new, "tasks/vqa")
    assert [r["id"] for r in rows] == ["0", "2"]
    for row, old in zip(rows, ([(0, 0)], [(1, 0), (2, 3)]), strict=True):
        for ref, (shard, at) in zip(row["images"], old, strict=True):
            moved = read_table(new.folder, new.stage("pairs").file(ref["shard"]))["uid"][ref["row"]]
            assert moved == read_table(dataset.folder, dataset.stage("pairs").file(shard))["uid"][at]
    assert any(isinstance(e, Notice) and "2 rows were left out" in e.text for e in events)
    export_dataset(dataset, tmp_path / "omit", config(selection="best", tasks="omit"), silent)
    assert not (tmp_path / "omit/tasks").exists()


def test_what_is_not_computed_is_left_to_compute(tmp_path):
    dataset = whole_dataset(tmp_path / "d")
    (tmp_path / "d/scores/size/00001.parquet").unlink()
    events: list = []
    export_dataset(dataset, tmp_path / "new", config(), events.append)
    stage = Dataset.open(tmp_path / "new").stage("scores/size")
    assert (stage.done(), stage.pending()) == ({0, 2}, [1])
    assert any(
        isinstance(e, Notice) and "scores/size: 1 shards have rows that are not computed" in e.text for e in events
    )


def test_refusals(source, tmp_path):
    with pytest.raises(PairmillError, match="is the dataset itself"):
        export_dataset(source, source.url, config(), silent)
    select(source, [], "none")
    with pytest.raises(PairmillError, match=r"no row to write: .* --selection none keep none"):
        export_dataset(source, tmp_path / "x", config(selection="none"), silent)
    export_dataset(source, tmp_path / "new", config(selection="best"), silent)
    before = tree(tmp_path / "new")
    with pytest.raises(PairmillError, match="holds another dataset already"):
        export_dataset(source, tmp_path / "new", config(), silent)
    select(source, [0, 3, 4, 5, 6, 9, 10], "other")
    with pytest.raises(PairmillError, match=r"`selection` was 'best', now 'other'.*`sources` was"):
        export_dataset(source, tmp_path / "new", config(selection="other"), silent)
    assert tree(tmp_path / "new") == before
