import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation import rulebook
from curation.filter import make_selection
from curation.filter_config import SampleConfig
from curation.matches import MAX_EACH, choose, read_matches
from curation.rules import Match, Rule
from schemas.errors import PairmillError
from shards.dataset import Dataset
from shards.select import selections
from tests.curation.scored import numbered, write_dataset

FOUND = (
    Match(5, like=2, value=3.0, group=2),
    Match(0, other="coco 0:17", value=0.97, image=b"\xff\xd8jpeg", caption="a <b>cat</b>"),
)


class Pick(Rule[SampleConfig]):
    """Drops the rows it has matches for."""

    kind, config_class, shorthand = "sample", SampleConfig, "share"
    found = FOUND

    def prepare(self):
        self.columns = frozenset({"uid"})

    @property
    def label(self):
        return "pick"

    def inputs(self):
        return {"keep": pl.col("uid").is_not_null()}

    def mark(self, values, seen, successes):
        self.matches = self.found
        dropped = [m.row for m in self.found]
        return pl.Series([i not in dropped for i in range(values.height)])


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(rulebook.RULES, "sample", "tests.curation.test_matches:Pick")
    return write_dataset(tmp_path, numbered(9, 3))


def test_matches_come_back_as_the_rule_left_them(dataset):
    make_selection(dataset, "s", [{"sample": 0.5}, {"sample": 0.5}])
    assert read_matches(dataset, "s") == {"pick": FOUND, "pick #2": FOUND}
    assert selections(dataset) == ["s"]
    assert json.loads(dataset.folder.read_bytes("selections/s.matches.json"))["rules"]["pick"][0]["row"] == [1, 2]


def test_matches_go_with_their_selection(dataset, monkeypatch):
    make_selection(dataset, "s", [{"sample": 0.5}])
    old = dataset.folder.read_bytes("selections/s.matches.json")
    monkeypatch.setattr(Pick, "found", FOUND[:1])
    make_selection(dataset, "s", [{"sample": 0.5}])
    assert read_matches(dataset, "s") == {"pick": FOUND[:1]}
    dataset.folder.write_bytes("selections/s.matches.json", old)  # as a kill between two runs leaves it
    assert read_matches(dataset, "s") == {}
    make_selection(dataset, "s", [{"where": "status = 'success'"}])
    assert not dataset.folder.exists("selections/s.matches.json")
    assert read_matches(dataset, "s") == {}


def test_a_dry_run_and_an_empty_result_leave_no_matches(dataset, monkeypatch):
    make_selection(dataset, None, [{"sample": 0.5}], dry_run=True)
    monkeypatch.setattr(Pick, "found", tuple(Match(i) for i in range(9)))
    with pytest.raises(PairmillError, match="No row is left"):
        make_selection(dataset, "s", [{"sample": 0.5}])
    assert dataset.folder.names("selections") == []


def test_a_selection_cannot_take_the_name_of_anothers_matches(dataset):
    with pytest.raises(PairmillError, match=r"may not end in `.matches`"):
        make_selection(dataset, "s.matches", [{"sample": 0.5}])


def test_a_damaged_file_of_matches_is_told(dataset, monkeypatch):
    monkeypatch.setattr(Pick, "found", (Match(7),))
    make_selection(dataset, "s", [{"sample": 0.5}])
    smaller = write_dataset(dataset.folder.local / "other", numbered(3, 1))
    for name in ("s.parquet", "s.json", "s.matches.json"):
        smaller.folder.write_bytes(f"selections/{name}", dataset.folder.read_bytes(f"selections/{name}"))
    with pytest.raises(PairmillError, match=r"s\.matches\.json is damaged .*no row 2:1"):
        read_matches(Dataset.open(smaller.url), "s")


def test_at_most_forty_of_a_rule_are_written(dataset, monkeypatch):
    monkeypatch.setattr(Pick, "found", tuple(Match(i % 3) for i in range(100)))
    make_selection(dataset, "s", [{"sample": 0.5}])
    assert len(read_matches(dataset, "s")["pick"]) == MAX_EACH


@given(st.lists(st.integers(0, 12), max_size=200), st.integers(1, 20), st.integers(0, 3))
def test_the_choice_covers_the_largest_groups(groups, limit, seed):
    groups = np.array(groups, np.int64)
    chosen = choose(groups, seed, limit)
    assert len(chosen) == min(limit, len(groups)) == len(set(chosen.tolist()))
    assert chosen.tolist() == choose(groups, seed, limit).tolist() == sorted(chosen.tolist())
    sizes = {g: int((groups == g).sum()) for g in groups.tolist()}
    largest = sorted(sizes, key=lambda g: (-sizes[g], g))[: limit // 2]
    assert set(largest) <= set(groups[chosen].tolist())
