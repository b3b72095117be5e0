"""Selections: a byte a row, checked against what they were made from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import PairmillError
from schemas.events import silent
from schemas.tables import VERSIONS
from shards.dataset import Dataset, write_manifest
from shards.reader import read_table
from shards.select import made_from, read_selection, selection_about, selections, write_selection
from tests.make import make_dataset
from tests.shards.toy import ToyConfig, size_scores

RECIPE = {"rules": [{"where": "clip_score >= 0.28"}]}


def choose(dataset: Dataset, name: str, keep: list[bool], scores: tuple[str, ...] = ()) -> None:
    reasons = pa.array([None if k else "low" for k in keep], pa.string())
    write_selection(dataset, name, np.array(keep), reasons, RECIPE, made_from(dataset, list(scores)))


@given(st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=20, deadline=None)
def test_a_selection_comes_back(tmp_path_factory, keep):
    root = tmp_path_factory.getbasetemp() / "selected"
    dataset = Dataset.open(root) if root.exists() else make_dataset(root, shards=3, rows=4)
    choose(dataset, "some", keep)
    back = read_selection(dataset, "some")
    assert [list(back.mask(s)) for s in range(3)] == [keep[i : i + 4] for i in (0, 4, 8)]
    assert (len(back), back.about["kept"], back.about["recipe"]) == (sum(keep), sum(keep), RECIPE)
    rows = read_table(dataset.folder, "selections/some.parquet").to_pylist()
    assert [(r["shard"], r["row"]) for r in rows] == [(s, r) for s in range(3) for r in range(4)]
    assert [r["reason"] for r in rows] == [None if k else "low" for k in keep]
    assert json.loads(dataset.folder.read_bytes("selections/some.json")) == back.about


def test_no_such_selection_lists_what_there_is(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1, rows=2)
    with pytest.raises(PairmillError, match=r"has no selection `best`. It has: none yet. Make one with"):
        read_selection(dataset, "best")
    choose(dataset, "bestof", [True, False])
    assert selections(dataset) == ["bestof"]
    with pytest.raises(PairmillError, match="Did you mean `bestof`"):
        selection_about(dataset, "besto")


def test_used_on_more_shards_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=3, rows=2)
    small = Dataset(dataset.folder, dataset.manifest.model_copy(update={"shards": (2, 2)}))
    choose(small, "best", [True] * 4)
    write_manifest(dataset.folder, dataset.manifest)
    with pytest.raises(PairmillError, match=r"made for 2 shards, .* has 3 now. Run the `pairmill filter`"):
        read_selection(dataset.refresh(), "best")


def test_changed_pairs_and_remade_scores_are_refused(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=2, rows=2)
    size_scores(dataset, ToyConfig(workers=0), silent)
    choose(dataset, "best", [True] * 4, ("size",))
    assert len(read_selection(dataset, "best")) == 4
    shutil.rmtree(tmp_path / "d/scores/size")
    size_scores(dataset, ToyConfig(workers=0, factor=2.0), silent)
    with pytest.raises(PairmillError, match="from other scores/size than stand now"):
        read_selection(dataset, "best")
    make_dataset(tmp_path / "e", shards=2, rows=2, fail={(1, 1): "timeout"})
    shutil.copy(tmp_path / "e/pairs/00001.parquet", tmp_path / "d/pairs/00001.parquet")
    with pytest.raises(PairmillError, match="before the pairs of shard 1 changed"):
        read_selection(dataset, "best")


def test_scores_that_are_not_there_are_named(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1, rows=2)
    with pytest.raises(PairmillError, match=r"has no scores/clip.* It has: pairs"):
        made_from(dataset, ["clip"])


def test_newer_selection_is_a_clear_error(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "d", shards=1, rows=2)
    choose(dataset, "best", [True, False])
    monkeypatch.setitem(VERSIONS, "selection", 0)
    with pytest.raises(PairmillError, match=r"selections/best\.parquet was written as selection version 1"):
        read_selection(dataset, "best")


def test_one_byte_a_row(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1, rows=8)
    choose(dataset, "best", [True] * 8)
    keep = read_selection(dataset, "best").keep
    assert (keep.dtype, keep.nbytes) == (np.bool_, 8)
