import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.groups import equal_groups, normalised, rich, stays
from curation.table import Table
from tests.curation.scored import numbered, uid, write_dataset


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_rows_are_grouped_where_both_keys_are_equal(keys):
    both = [np.array([k[i] for k in keys], np.uint64) for i in range(2)]
    places, group = equal_groups(both)
    assert places.tolist() == [i for i, k in enumerate(keys) if keys.count(k) > 1]
    of = dict(zip(places.tolist(), group.tolist(), strict=True))
    assert all((of[i] == of[j]) == (keys[i] == keys[j]) for i in of for j in of)
    assert sorted(set(of.values())) == list(range(len(set(of.values()))))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30)
)
def test_the_row_that_stays_is_the_same_in_any_order(tmp_path_factory, made):
    dataset = write_dataset(tmp_path_factory.mktemp("ds"), numbered(len(made), 2, uid=[uid(m[2]) for m in made]))
    rows = np.arange(len(made))
    keep = pl.Series([m[1] for m in made], dtype=pl.Float64)
    found = stays(Table(dataset), rows, np.array([m[0] for m in made]), keep)
    for i, (group, _, _) in enumerate(made):
        mine = [j for j, m in enumerate(made) if m[0] == group]
        best = min(mine, key=lambda j: (made[j][1] is None, -(made[j][1] or 0), made[j][2], j))
        assert found[i] == best


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("  A Man, riding\ta horse. ", "a man riding a horse"),
        ("Ａ café — 2", "a café 2"),
        ("cafe\u0301", "café"),
        ("...", None),
        (None, None),
        ("हिन्दी।", "हिन्दी"),
    ],
)
def test_captions_are_compared_without_case_and_punctuation(text, want):
    assert pl.DataFrame({"t": [text]}, schema={"t": pl.String}).select(normalised(pl.col("t")))["t"][0] == want


def test_a_flat_hash_has_few_bits_set_or_few_not_set():
    hashes = np.array([0, 2**8 - 1, 2**9 - 1, 2**64 - 2**8, 2**64 - 2**9, 2**64 - 1], np.uint64)
    assert rich(hashes, 8).tolist() == [False, False, True, False, True, False]
