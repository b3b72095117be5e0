import itertools

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.distributions import BINS, _histogram, categories, histograms, sizes
from curation.table import Table
from tests.curation.scored import numbered, write_dataset, write_scores


def histogram(values, keep=None):
    return _histogram("t", "t", pl.LazyFrame({"value": values}, schema={"value": pl.Float64}), keep)


@given(st.lists(st.none() | st.floats(), max_size=80), st.randoms(use_true_random=False))
def test_a_histogram_counts_every_number_once(values, random):
    keep = np.array([random.random() < 0.5 for _ in values], bool)
    made = histogram(values, keep)
    good = [v is not None and abs(v) <= 1e300 for v in values]
    assert made["rows"] == sum(good) == sum(made["counts"])
    assert made["rows"] + made["nulls"] == len(values)
    if made["rows"]:
        assert sum(made["kept"]) == sum(g and k for g, k in zip(good, keep.tolist(), strict=True))
        assert len(made["edges"]) == len(made["counts"]) + 1 <= BINS + 1
        assert made["edges"] == sorted(made["edges"])


@given(st.lists(st.integers(-500, 500), min_size=2, max_size=200))
def test_bins_of_whole_numbers_hold_equally_many(values):
    edges = histogram(values)["edges"]
    widths = {round(b - a, 9) for a, b in itertools.pairwise(edges)}
    assert len(widths) == 1
    assert all((e - 0.5).is_integer() for e in edges)


def test_shares_are_no_whole_numbers_though_their_ends_are():
    assert len(histogram([0.0, 0.3, 0.7, 1.0] * 50)["counts"]) == BINS


def test_a_long_tail_is_cut_and_said_to_be():
    values = [*np.linspace(0, 1, 2000).tolist(), 1e6]
    made = histogram(values)
    assert made["cut"]
    assert made["edges"][-1] < 1.01
    assert sum(made["counts"]) == 2001
    assert (made["minimum"], made["maximum"]) == (0, 1e6)


def test_what_counts_are_and_how_many_of_them_are_kept(tmp_path):
    licence = pa.field("rights", pa.string())
    rows = numbered(8, rights=["a", "a", "b", None] * 2, format=["jpeg"] * 6 + ["png"] * 2)
    made = write_dataset(tmp_path, rows, [licence])
    write_scores(made, "language", {"language": ["en"] * 5 + ["de"] * 3}, pa.string())
    write_scores(made, "text", {"has_url": [True, False] * 4}, pa.bool_())
    write_scores(made, "new", {"caption": [f"text {i}" for i in range(8)], "new_state": ["ok"] * 8}, pa.string())
    keep: np.ndarray = np.arange(8) < 4
    found = {c["title"]: c for c in categories(Table(made), keep)}
    assert {t: c["role"] for t, c in found.items()} == {
        "language.language": "language",
        "text.has_url": "score",
        "new.caption": "score",
        "format": "format",
        "rights": "licence",
    }
    assert found["language.language"]["values"] == [
        {"value": "en", "rows": 5, "kept": 4},
        {"value": "de", "rows": 3, "kept": 0},
    ]
    assert found["text.has_url"]["values"][0] == {"value": "false", "rows": 4, "kept": 2}
    assert (found["rights"]["rows"], found["rights"]["nulls"], found["rights"]["distinct"]) == (6, 2, 2)


def test_text_of_many_values_is_no_category_and_many_categories_are_put_together(tmp_path, monkeypatch):
    made = write_dataset(tmp_path, numbered(60))
    write_scores(made, "a", {"caption": [f"text {i}" for i in range(60)]}, pa.string())
    (one,) = categories(Table(made), np.arange(60) < 30)
    assert (len(one["values"]), one["distinct"], one["rest"]) == (12, 60, {"rows": 48, "kept": 18})
    monkeypatch.setattr("curation.distributions.MOST_IN_A_SHARD", 20)
    assert categories(Table(made), None) == []


def test_hashes_have_no_histogram_and_columns_tell_their_scale(tmp_path):
    made = write_dataset(tmp_path, numbered(4))
    write_scores(made, "hash", {"phash": [1, 2, 3, 2**60]}, pa.uint64())
    write_scores(made, "clip", {"clip_score": [0.1, 0.2, 0.3, 0.4]})
    assert [h["title"] for h in histograms(Table(made), None)] == ["clip.clip_score"]


def test_the_map_of_sizes_counts_every_image_once(tmp_path):
    wide = [(100, 50)] * 5 + [(50, 100)] * 3 + [(800, 800)] * 2
    rows = numbered(12, width=[w for w, _ in wide] + [None, None], height=[h for _, h in wide] + [None, None])
    rows[0][0] |= {"original_width": 1000, "original_height": 500}
    came, stored = sizes(Table(write_dataset(tmp_path, rows)), np.arange(12) % 2 == 0)
    assert (came["title"], came["rows"], came["only"]) == ("as they came", 1, [1000, 500])
    assert (stored["rows"], sum(c[2] for c in stored["cells"]), sum(c[3] for c in stored["cells"])) == (10, 10, 5)
    top = max(stored["cells"], key=lambda c: c[2])
    assert top[2] == 5
    assert stored["edges"][top[0]] <= 100 <= stored["edges"][top[0] + 1] * 1.0001
    assert stored["edges"][top[1]] <= 50 <= stored["edges"][top[1] + 1]


@pytest.mark.parametrize("kept", [None, np.array([True, False])])
def test_sizes_that_are_all_one_need_no_map(tmp_path, kept):
    rows = numbered(2, width=[64, 64], height=[48, 48], original_width=[64, 64], original_height=[48, 48])
    (one,) = sizes(Table(write_dataset(tmp_path, rows)), kept)
    assert (one["only"], one["cells"], one["rows"]) == ([64, 48], [], 2)
