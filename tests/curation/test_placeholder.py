import numpy as np
import pyarrow as pa
import pytest

from curation.filter import make_selection
from curation.matches import read_matches
from schemas.errors import PairmillError
from shards.select import read_selection
from tests.curation.scored import numbered, write_dataset, write_scores

WORDS = ["harbour", "violin", "tractor", "cinnamon", "glacier", "notebook", "pigeon", "velvet", "compass", "orchard"]
OTHERS = ["morning", "kitchen", "yellow", "garden", "winter", "letter", "market", "silver", "bridge", "thunder"]
UNRELATED = [f"{a} {b}" for a, b in zip(WORDS, OTHERS, strict=True)]


def image(number):
    return bytes([number]) * 32


def made(path, captions, urls=None, images=None):
    """Ten rows of image 1 by default, each at its own address of one host, and two of another image."""
    rows = len(captions)
    urls = urls or [f"http://a.example/{i}.jpg" for i in range(rows)]
    images = images or [image(1)] * rows
    columns = {"caption": [*captions, "x", "y"], "url": [*urls, "http://b/1", "http://b/2"]}
    return write_dataset(path, numbered(rows + 2, 3, sha256=[*images, image(2), image(2)], **columns))


def dropped(dataset, settings):
    make_selection(dataset, "s", [{"placeholder": settings}])
    return np.flatnonzero(~read_selection(dataset, "s").keep).tolist()


def test_one_image_under_many_urls_with_unrelated_captions_goes_whole(tmp_path):
    dataset = made(tmp_path, UNRELATED)
    assert dropped(dataset, {}) == list(range(10))
    assert read_selection(dataset, "s").about["funnel"][1]["rule"] == "placeholder sha256"
    matches = read_matches(dataset, "s")["placeholder sha256"]
    assert [(m.row, m.like, m.group) for m in matches] == [(i, None, 10) for i in range(10)]
    assert dropped(dataset, {"urls": 11}) == []


@pytest.mark.parametrize(
    ("captions", "goes"),
    [
        (["the same logo"] * 10, False),  # a picture that many pages show
        (["The same logo.", "the same  LOGO"] * 5, False),  # the same when compared
        (UNRELATED[:5] * 2, True),  # half of them differ
        (UNRELATED[:4] * 2 + UNRELATED[:2], False),
        ([f"{c} violin" for c in UNRELATED[:6]] + UNRELATED[6:], False),  # one thing, told in many words
        ([f"{c} violin" for c in UNRELATED[2:6]] + UNRELATED[:2] + UNRELATED[6:], True),
        ([f"{c} a of" for c in UNRELATED], True),  # short words tell nothing
        ([None] * 10, False),
    ],
)
def test_what_unrelated_means(tmp_path, captions, goes):
    assert dropped(made(tmp_path, captions), {}) == (list(range(10)) if goes else [])


def test_urls_count_once_and_hosts_may_count_instead(tmp_path):
    same = made(tmp_path / "a", UNRELATED, urls=["http://a.example/1.jpg"] * 10)
    assert dropped(same, {}) == []
    hosts = [f"https://user@H{i % 4}.example:80/{i}?q" for i in range(10)]
    dataset = made(tmp_path / "b", UNRELATED, urls=hosts)
    assert dropped(dataset, {"urls": None, "hosts": 5}) == []
    assert dropped(dataset, {"urls": None, "hosts": 4}) == list(range(10))
    assert dropped(dataset, {"urls": 99, "hosts": 4}) == list(range(10))


def test_rows_that_an_earlier_rule_dropped_do_not_count(tmp_path):
    dataset = made(tmp_path, UNRELATED)
    make_selection(dataset, "s", [{"where": "caption <> 'violin kitchen'"}, {"placeholder": {}}])
    assert int(read_selection(dataset, "s").keep.sum()) == 11


def test_images_may_be_told_by_another_hash(tmp_path):
    dataset = made(tmp_path, UNRELATED, images=[image(i + 10) for i in range(10)])
    assert dropped(dataset, {}) == []
    with pytest.raises(PairmillError, match="Make them: pairmill score hash"):
        dropped(dataset, "hash.phash")
    write_scores(dataset, "hash", {"phash": [5] * 10 + [None, None]}, pa.uint64())
    assert dropped(dataset, "hash.phash") == list(range(10))


def test_a_rule_without_a_count_is_refused(tmp_path):
    with pytest.raises(PairmillError, match="give `urls` or `hosts`"):
        dropped(made(tmp_path, UNRELATED), {"urls": None})
