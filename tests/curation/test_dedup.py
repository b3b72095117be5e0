import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from curation.filter import filter_dataset, make_selection
from curation.filter_config import FilterConfig
from curation.matches import read_matches
from schemas.errors import PairmillError
from shards.select import read_selection
from tests.curation.scored import numbered, uid, write_dataset, write_scores
from tests.curation.test_hamming import all_pairs

HALF = 0x00000000FFFFFFFF  # half of its bits set: an image that is not flat


def select(dataset, *items):
    make_selection(dataset, "s", list(items))
    return np.flatnonzero(read_selection(dataset, "s").keep).tolist()


def hashed(path, hashes, shards=3, **columns):
    """A dataset with `scores/hash`, written by hand; None has no hash."""
    dataset = write_dataset(path, numbered(len(hashes), shards, **columns))
    write_scores(dataset, "hash", {"phash": hashes}, pa.uint64())
    return dataset


def test_of_equal_values_the_smallest_uid_stays(tmp_path):
    urls = ["a", "b", "a", None, "c", "a", None, "b"]
    uids = [uid(n) for n in (5, 9, 2, 3, 4, 8, 7, 1)]
    dataset = write_dataset(tmp_path, numbered(8, 3, url=urls, uid=uids))
    assert select(dataset, {"dedup": "url"}) == [2, 3, 4, 6, 7]  # two rows without a url are not the same
    about = read_selection(dataset, "s").about
    assert about["recipe"]["rules"] == [{"dedup": {"by": "url"}}]
    assert about["funnel"][1] | {"alone": 0} == {
        "rule": "dedup url", "rows_in": 8, "dropped": 3, "nulls": 0, "left": 5, "alone": 0,
    }  # fmt: skip
    matches = read_matches(dataset, "s")["dedup url"]
    assert [(m.row, m.like, m.group, m.value) for m in matches] == [(0, 2, 3, None), (1, 7, 2, None), (5, 2, 3, None)]


def test_which_row_stays_is_said_by_keep(tmp_path):
    dataset = write_dataset(tmp_path, numbered(6, 2, caption=["x"] * 5 + ["y"], width=[1, 9, 9, None, 3, 1]))
    write_scores(dataset, "clip", {"clip_score": [0.5, 0.2, 0.1, 0.9, float("nan"), 0.0]})
    assert select(dataset, {"dedup": {"by": "caption", "keep": "width"}}) == [1, 5]
    assert select(dataset, {"dedup": {"by": "caption", "keep": "-width"}}) == [0, 5]
    assert select(dataset, {"dedup": {"by": "caption", "keep": "clip_score"}}) == [3, 5]
    assert select(dataset, {"dedup": {"by": "caption", "keep": "-clip_score * width"}}) == [0, 5]


def test_the_row_that_stays_does_not_hang_on_the_order_of_arrival(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(uid(int(n)), f"u{n % 20}", int(n % 3)) for n in rng.permutation(100)]
    kept = []
    for shards, order in ((1, rng.permutation(100)), (7, rng.permutation(100))):
        chosen = [rows[i] for i in order]
        columns = {"uid": [r[0] for r in chosen], "url": [r[1] for r in chosen], "width": [r[2] for r in chosen]}
        dataset = write_dataset(tmp_path / str(shards), numbered(100, shards, **columns))
        kept.append({chosen[i][0] for i in select(dataset, {"dedup": {"by": "url", "keep": "width"}})})
    assert kept[0] == kept[1]
    assert len(kept[0]) == 20


def test_a_rule_sees_only_what_earlier_rules_kept(tmp_path):
    dataset = write_dataset(
        tmp_path, numbered(4, 1, url=["a"] * 4, width=[1, 5, 6, 7], status=["success"] * 3 + ["timeout"])
    )
    assert select(dataset, {"where": "width > 1"}, {"dedup": "url"}) == [1]
    assert select(dataset, {"where": "width > 5"}, {"dedup": "url"}) == [2]


def test_several_columns_must_all_be_equal(tmp_path):
    dataset = hashed(tmp_path, [7, 7, 7, 7, None], caption=["a", "b", "a", None, "a"])
    assert select(dataset, {"dedup": {"by": ["hash.phash", "caption"]}}) == [0, 1, 3, 4]


def test_pixels_are_the_hash_of_the_decoded_image(tmp_path):
    dataset = write_dataset(tmp_path, numbered(3, 1))
    with pytest.raises(PairmillError, match=r"has no hashes `pixels` yet\. Make them: pairmill score hash"):
        select(dataset, {"dedup": "pixels"})
    write_scores(dataset, "hash", {"pixel_sha256": [b"x" * 32, b"y" * 32, b"x" * 32]}, pa.binary(32))
    assert select(dataset, {"dedup": "pixels"}) == [0, 1]


def test_near_duplicates_are_the_groups_of_all_pairs(tmp_path):
    rng = np.random.default_rng(1)
    hashes = np.repeat(rng.integers(0, 2**64, 40, dtype=np.uint64), 8)
    for _ in range(3):
        turned = rng.integers(0, 2, len(hashes)).astype(np.uint64)
        hashes = hashes ^ (turned << rng.integers(0, 64, len(hashes)).astype(np.uint64))
    hashes = rng.permutation(hashes)
    dataset = hashed(tmp_path, hashes.tolist())
    for bits in (0, 2, 4):
        name = all_pairs(hashes, bits)
        want = sorted({name.index(n) for n in name})  # uids ascend: the first of each group
        assert select(dataset, {"dedup": {"near": "hash.phash", "bits": bits}}) == want
        for m in read_matches(dataset, "s")[f"dedup near hash.phash, {bits} bits"]:
            assert name[m.row] == name[m.like]
            assert m.group == name.count(name[m.row])
            assert m.value == int(hashes[m.row] ^ hashes[m.like]).bit_count()


def test_a_chain_of_near_hashes_is_one_group(tmp_path):
    steps = [HALF, HALF ^ 0xF << 40, HALF ^ 0xFF << 40, HALF ^ 0xFFF << 40]
    assert select(hashed(tmp_path, steps), {"dedup": {"near": "phash"}}) == [0]
    assert select(hashed(tmp_path / "b", [steps[0], steps[2]]), {"dedup": {"near": "phash"}}) == [0, 1]


def test_flat_images_and_rows_without_a_hash_stay(tmp_path):
    flat = [0, 0, 1, 2**64 - 1, 2**64 - 1, None, None, HALF, HALF]
    assert select(hashed(tmp_path, flat), {"dedup": {"near": "hash.phash"}}) == list(range(8))
    assert select(hashed(tmp_path / "b", flat), {"dedup": {"near": "phash", "flat": 0, "bits": 0}}) == list(range(8))
    assert select(hashed(tmp_path / "c", flat), {"dedup": "hash.phash"}) == [0, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give `by` .* or `near`"),
        ({"by": "url", "near": "hash.phash"}, "one of the two"),
        ({"by": "url", "bits": 3}, "`bits` goes with `near`"),
        ({"near": "hash.phash", "bits": 17}, "bits"),
        ({"near": "width"}, "cannot compare the bits of `width`, which is Int32"),
        ({"by": "captions"}, "dedup cannot go by `captions`, which is List"),
        ({"by": "url", "keep": "caption"}, "a ranking needs a number"),
        ({"by": "urk"}, r"no column `urk`\. Did you mean `url`"),
        ({"near": "hash.phash2"}, "no column `hash.phash2`"),
    ],
)
def test_settings_that_do_not_fit_are_told(tmp_path, settings, message):
    dataset = hashed(tmp_path, [1, 2])
    with pytest.raises(PairmillError, match=message):
        select(dataset, {"dedup": settings})
    assert dataset.folder.names("selections") == []


def test_flags_make_the_same_rules(tmp_path):
    dataset = hashed(tmp_path, [HALF, HALF ^ 1, 2**63, None], url=["a", "b", "c", "c"], width=[1, 2, 3, 4])
    config = FilterConfig(output="s", where=("width > 0",), dedup=("url", "near"), keep="width")
    filter_dataset(dataset, config)
    selection = read_selection(dataset, "s")
    assert np.flatnonzero(selection.keep).tolist() == [1, 3]
    assert [list(r) for r in selection.about["recipe"]["rules"]] == [["where"], ["dedup"], ["dedup"]]
    with pytest.raises(ValidationError, match="--keep goes with --dedup"):
        FilterConfig(output="s", keep="width")
    with pytest.raises(ValidationError, match="--rules holds the whole recipe"):
        FilterConfig(output="s", dedup=("url",), rules="r.yaml")
