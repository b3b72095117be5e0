from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import hamming
from curation.hamming import groups, nearest, unite


def all_pairs(hashes, bits):
    """Connected components by comparing all with all."""
    name = list(range(len(hashes)))
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    for i, j in np.argwhere(apart <= bits).tolist():
        old, new = max(name[i], name[j]), min(name[i], name[j])
        name = [new if n == old else n for n in name]
    return name


@st.composite
def hash_sets(draw):
    """Distinct hashes, ascending: evenly spread, copies with some bits turned, and sets with few bits that vary."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.integers(1, 150))
    centres = rng.integers(0, 2**64, max(1, size // draw(st.integers(1, 8))), dtype=np.uint64)
    made = centres[rng.integers(0, len(centres), size)]
    for _ in range(draw(st.integers(0, 10))):
        made = made ^ (np.uint64(1) << rng.integers(0, 64, size).astype(np.uint64))
    return np.unique(made & np.uint64(draw(st.sampled_from([2**64 - 1, 0x00FF00FF00000F0F, 0xF, 0]))))


@given(hash_sets(), st.integers(0, 9), st.sampled_from([1e-12, 2e-9, 1.0]), st.sampled_from([3, 1024]))
@settings(max_examples=150, deadline=None)
def test_groups_are_those_of_all_pairs(hashes, bits, pair_s, long):
    with pytest.MonkeyPatch.context() as patch:  # every plan: all with all, few blocks, many; runs searched again
        patch.setattr(hamming, "_PAIR_S", pair_s)
        patch.setattr(hamming, "_LONG", long)
        patch.setattr(hamming, "_EDGES", 7)
        assert groups(hashes, bits).tolist() == all_pairs(hashes, bits)


@given(hash_sets(), hash_sets(), st.integers(0, 9), st.sampled_from([1e-12, 2e-9, 1.0]))
@settings(max_examples=100, deadline=None)
def test_the_nearest_is_that_of_all_pairs(queries, targets, bits, pair_s):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming, "_PAIR_S", pair_s)
        patch.setattr(hamming, "_CANDIDATES", 5)
        index, apart = nearest(queries, targets, bits)
    every = np.bitwise_count(queries[:, None] ^ targets[None])
    near = every.min(1) <= bits
    assert index.tolist() == np.where(near, every.argmin(1), -1).tolist()
    assert apart[near].tolist() == every.min(1)[near].tolist()
    assert (apart[~near] == 65).all()


def test_many_hashes_that_lean_to_one_side_give_the_same_groups_by_one_thread_or_three():
    rng = np.random.default_rng(0)
    made = rng.integers(0, 2**64, 30_000, dtype=np.uint64) & np.uint64(0xFFFF0F0000FF0007)
    made[20_000:] = made[:10_000] ^ (np.uint64(1) << rng.integers(0, 64, 10_000).astype(np.uint64))
    hashes = np.unique(made)
    found = groups(hashes, 2, threads=1)
    assert (found == groups(hashes, 2, threads=3)).all()
    some = rng.choice(len(hashes), 300, replace=False)
    for i in some.tolist():  # each is in the group of all that are near it
        near = np.bitwise_count(hashes ^ hashes[i]) <= 2
        assert len(np.unique(found[near])) == 1
    assert 1000 < len(np.unique(found)) < len(hashes)


def test_no_hashes_and_one_hash():
    assert groups(np.empty(0, np.uint64), 4).tolist() == []
    assert groups(np.array([7], np.uint64), 4).tolist() == [0]
    index, apart = nearest(np.array([7], np.uint64), np.empty(0, np.uint64), 4)
    assert (index.tolist(), apart.tolist()) == ([-1], [65])


def test_a_joined_tree_has_its_smallest_node_as_root():
    parent = np.arange(6, dtype=np.int32)
    unite(parent, np.array([5, 4, 3], np.int32), np.array([4, 3, 1], np.int32))
    assert [int(hamming._roots(parent, np.array([n]))[0]) for n in range(6)] == [0, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(("bits", "blocks"), [(1, 1), (2, 3), (3, 2), (4, 1)])
def test_whatever_bits_differ_one_choice_has_none_of_them(bits, blocks):
    free = [0, 3, 4, 9, 17, 40, 41, 63]
    choices = list(hamming._choices(free, bits, blocks))
    for differ in combinations(free, bits):
        assert any(not set(differ) & set(chosen) for chosen, _ in choices)
    assert all(sorted(chosen + rest) == free for chosen, rest in choices)
