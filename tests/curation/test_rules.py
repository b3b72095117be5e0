import numpy as np
import pyarrow as pa
import pytest

from curation.filter import make_selection
from curation.rulebook import RULES, rule_class
from curation.rules import datacomp_threshold
from schemas import pairs as pairs_module
from schemas.errors import PairmillError
from shards.select import read_selection
from tests.curation.scored import numbered, uid, write_dataset, write_scores


def select(dataset, *items):
    make_selection(dataset, "s", list(items))
    return np.flatnonzero(read_selection(dataset, "s").keep).tolist()


def hashed(number: int) -> bytes:
    return np.random.default_rng(number).bytes(16)


def test_top_keeps_exactly_that_many_and_breaks_ties_by_uid_then_place(tmp_path):
    uids = [uid(n) for n in (5, 1, 3, 3, 2, 9)]
    dataset = write_dataset(tmp_path, numbered(6, 3, uid=uids))
    write_scores(dataset, "clip", {"clip_score": [0.5, 0.5, 0.5, 0.5, 0.5, 0.9]})
    assert select(dataset, {"top": {"count": 1, "by": "clip_score"}}) == [5]
    assert select(dataset, {"top": {"count": 3, "by": "clip_score"}}) == [1, 4, 5]
    assert select(dataset, {"top": {"count": 4, "by": "clip_score"}}) == [1, 2, 4, 5]  # equal uids: the earlier row
    assert select(dataset, {"top": {"count": 99, "by": "clip_score"}}) == [0, 1, 2, 3, 4, 5]
    assert select(dataset, {"top": {"count": 1, "by": "-clip_score"}}) == [1]


def test_a_share_is_counted_exactly(tmp_path):
    dataset = write_dataset(tmp_path, numbered(100, 2))
    write_scores(dataset, "clip", {"clip_score": list(range(100))})
    assert int(100 * 0.29) == 28  # what floating point would keep
    assert len(select(dataset, {"top": {"share": 0.29, "by": "clip_score"}})) == 29


def test_top_of_all_counts_every_success(tmp_path):
    dataset = write_dataset(tmp_path, numbered(10, 2, width=list(range(10))))
    write_scores(dataset, "clip", {"clip_score": list(range(10))})
    where = {"where": "width < 8"}
    assert select(dataset, where, {"top": {"share": 0.5, "by": "clip_score"}}) == [4, 5, 6, 7]
    assert select(dataset, where, {"top": {"share": 0.5, "by": "clip_score", "of": "all"}}) == [5, 6, 7]


def test_null_and_nan_are_never_among_the_best(tmp_path):
    dataset = write_dataset(tmp_path, numbered(3, 1))
    write_scores(dataset, "clip", {"clip_score": [None, float("nan"), -5.0]})
    result = make_selection(dataset, "s", [{"top": {"count": 3, "by": "clip_score"}}])
    assert (result.kept, result.funnel[1].nulls) == (1, 2)


def test_datacomps_threshold_keeps_one_more_and_its_ties(tmp_path):
    # apply_filter.py: n = int(10 * 0.3) = 3; -sort(-scores)[3] = 0.6; score >= 0.6 keeps five.
    scores = [0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert datacomp_threshold(np.array(scores), 10, 0.3, None) == 0.6
    dataset = write_dataset(tmp_path, numbered(10, 2))
    write_scores(dataset, "clip", {"clip_score": scores})
    top = {"share": 0.3, "by": "clip_score", "ties": "datacomp"}
    assert select(dataset, {"top": top}) == [0, 1, 2, 3, 4]
    assert select(dataset, {"top": {**top, "ties": "exact"}}) == [0, 1, 2]
    with pytest.raises(PairmillError, match=r"there are 10 scores"):
        select(dataset, {"top": {"count": 10, "by": "clip_score", "ties": "datacomp"}})


def test_sample_is_the_uids_share_whatever_the_shards(tmp_path):
    uids = [hashed(n) for n in range(200)]
    want = [i for i, u in enumerate(uids) if int.from_bytes(u[:8], "big") / 2**64 < 0.25]
    assert want == [i for i, u in enumerate(uids) if pairs_module.uid_share(u) < 0.25]
    assert 30 < len(want) < 70
    for shards in (1, 7):
        dataset = write_dataset(tmp_path / str(shards), numbered(200, shards, uid=uids))
        assert select(dataset, {"sample": 0.25}) == want


def test_a_split_has_two_parts_that_share_no_image(tmp_path):
    images = [np.random.default_rng(n % 60).bytes(32) if n % 10 else None for n in range(300)]
    uids = [hashed(n) for n in range(300)]
    dataset = write_dataset(tmp_path, numbered(300, 4, sha256=images, uid=uids))
    first = select(dataset, {"split": {"share": 0.7}})
    rest = select(dataset, {"split": {"share": 0.7, "part": "rest"}})
    assert sorted(first + rest) == list(range(300))
    assert not {images[i] for i in first} - {None} & {images[i] for i in rest} - {None}
    assert 150 < len(first) < 260
    without = [i for i in range(300) if images[i] is None]
    assert {i in first for i in without} == {True, False}  # by uid, not all on one side


@pytest.mark.parametrize("by", ["caption", "group"])
def test_a_split_by_another_column_keeps_equal_values_together(tmp_path, by):
    values = [n % 20 for n in range(100)]
    rows = numbered(100, 3, caption=[f"text {v}" for v in values], group=values, uid=[hashed(n) for n in range(100)])
    dataset = write_dataset(tmp_path, rows, [pa.field("group", pa.int64())])
    first = set(select(dataset, {"split": {"share": 0.5, "by": by}}))
    for v in range(20):
        assert len({i in first for i in range(100) if values[i] == v}) == 1
    assert 0 < len(first) < 100


def test_a_split_by_a_float_is_refused(tmp_path):
    dataset = write_dataset(tmp_path, numbered(2, 1))
    write_scores(dataset, "clip", {"clip_score": [0.1, 0.2]})
    with pytest.raises(PairmillError, match=r"split cannot go by `clip.clip_score`"):
        select(dataset, {"split": {"share": 0.5, "by": "clip_score"}})


def test_where_sees_the_whole_dataset_though_a_rule_before_dropped_rows(tmp_path):
    dataset = write_dataset(tmp_path, numbered(4, 2, width=[1, 2, 3, 100]))
    assert select(dataset, {"where": "width < 50"}, {"where": "width < avg(width)"}) == [0, 1, 2]


def test_the_table_of_rules_is_open_and_named_by_kind():
    assert {kind: rule_class(kind, "here").kind for kind in RULES} == {k: k for k in RULES}
    assert {"where", "top", "sample", "split"} <= set(RULES)
