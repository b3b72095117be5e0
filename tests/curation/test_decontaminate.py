import io

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.filter import make_selection
from curation.matches import read_matches
from curation.scores.config import HashScoreConfig
from curation.scores.hashes import score_hash
from schemas.errors import PairmillError
from shards.select import read_selection
from tests.curation.embedded import write_embeddings
from tests.curation.scored import numbered, write_dataset, write_scores

RNG = np.random.default_rng(0)
HASHES = RNG.integers(0, 2**64, 40, dtype=np.uint64)
AXES = np.eye(16, dtype=np.float16)


def near(number, bits):
    """A hash that differs in so many bits."""
    return int(number) ^ (2**bits - 1)


def turned(vector, toward, cosine):
    """A unit vector at that cosine to `vector`, in the plane of both."""
    return (cosine * vector.astype(np.float64) + np.sqrt(1 - cosine**2) * toward).astype(np.float16)


def pair(path, ours, theirs):
    """Two datasets from rows (hash, embedding, caption); `train` and `test` lie side by side."""
    out = []
    for name, rows in (("train", ours), ("test", theirs)):
        dataset = write_dataset(path / name, numbered(len(rows), 2, caption=[r[2] for r in rows]))
        write_scores(dataset, "hash", {"phash": [None if r[0] is None else int(r[0]) for r in rows]}, pa.uint64())
        write_embeddings(dataset, [r[1] for r in rows])
        out.append(dataset)
    return out


def dropped(dataset, **settings):
    make_selection(dataset, "s", [{"decontaminate": settings}])
    return np.flatnonzero(~read_selection(dataset, "s").keep).tolist()


@pytest.fixture
def both(tmp_path):
    test = [(HASHES[0], AXES[0], "A cat."), (HASHES[1], AXES[1], "two dogs"), (HASHES[2], AXES[2], None)]
    train = [
        (HASHES[9], AXES[9], "nothing like it"),
        (near(HASHES[0], 4), AXES[8], "x"),  # by hash
        (near(HASHES[0], 5), AXES[8], "x"),
        (HASHES[10], turned(AXES[1], AXES[7], 0.97), "x"),  # by embedding
        (HASHES[11], turned(AXES[1], AXES[7], 0.95), "x"),
        (HASHES[12], AXES[12], "  two DOGS!"),  # by caption
        (HASHES[1], AXES[1], "two dogs"),  # by all three
    ]
    return pair(tmp_path, train, test)


def test_rows_go_by_hash_embedding_or_caption(both):
    train, test = both
    assert dropped(train, against=test.url) == [1, 3, 5, 6]
    assert dropped(train, against=test.url, near=None) == [3, 5, 6]
    assert dropped(train, against=test.url, embeddings=None) == [1, 5, 6]
    assert dropped(train, against=test.url, captions=False) == [1, 3, 6]
    assert dropped(train, against=test.url, bits=5, cosine=0.94, captions=False) == [1, 2, 3, 4, 6]


def test_the_pairs_are_shown_side_by_side(both):
    train, test = both
    dropped(train, against=test.url)
    found = {m.row: m for m in read_matches(train, "s")["decontaminate test"]}
    assert {r: (m.other, m.caption) for r, m in found.items()} == {
        1: ("test 0:0", "A cat."),
        **dict.fromkeys((3, 5, 6), ("test 0:1", "two dogs")),
    }
    assert (found[1].value, found[5].value, found[6].value) == (4, None, 0)
    assert found[3].value == pytest.approx(0.97, abs=2e-3)


def test_the_recipe_names_the_other_dataset_by_fingerprint_and_runs_again(both, tmp_path):
    train, test = both
    dropped(train, against=test.url)
    recipe = read_selection(train, "s").about["recipe"]
    (settings,) = (r["decontaminate"] for r in recipe["rules"])
    assert settings["against"] == "test"
    assert len(settings["fingerprint"]) == 32
    assert str(tmp_path) not in (train.folder.read_bytes("selections/s.json")).decode()
    assert dropped(train, **settings) == [1, 3, 5, 6]  # found beside the dataset
    with pytest.raises(PairmillError, match=r"is not the dataset this recipe was made with"):
        dropped(train, **{**settings, "fingerprint": "0" * 32})


def test_an_image_without_hash_or_embedding_is_null_a_text_alone_is_not(tmp_path):
    train, test = pair(
        tmp_path, [(None, AXES[3], "a"), (HASHES[3], None, "b"), (HASHES[4], AXES[4], "c")], [(HASHES[0], AXES[0], "z")]
    )
    make_selection(train, "s", [{"decontaminate": {"against": test.url}}])
    assert read_selection(train, "s").about["funnel"][1]["nulls"] == 2
    texts = write_dataset(
        tmp_path / "texts",
        [[{"caption": "a", "status": "no_image"}, {"caption": "Z", "status": "no_image"}, {"caption": "q"}]],
    )
    write_scores(texts, "hash", {"phash": [None, None, int(HASHES[5])]}, pa.uint64())
    write_embeddings(texts, [None, None, AXES[5]])
    assert dropped(texts, against=test.url) == [1]


def test_flat_images_are_not_compared_by_hash(tmp_path):
    ours = [(0, AXES[3], "a"), (1, AXES[4], "b"), (0x7F, AXES[5], "c"), (0x3FF, AXES[6], "d")]
    train, test = pair(tmp_path, ours, [(0, AXES[0], "z"), (0x1FF, AXES[1], "y"), (0xFF, AXES[2], "x")])
    make_selection(train, "s", [{"decontaminate": {"against": test.url}}])
    assert read_selection(train, "s").keep.tolist() == [True, True, True, False]  # the last is near 0x1FF


def test_every_caption_of_a_row_counts_on_both_sides(tmp_path):
    write_dataset(tmp_path / "test", [[{"caption": "one", "captions": ["one", "A second."]}]])
    rows = [
        {"caption": "p", "captions": ["p", "a second"]},
        {"caption": "a  second"},
        {"caption": "q", "captions": ["q"]},
    ]
    train = write_dataset(tmp_path / "train", [rows])
    assert dropped(train, against="test", near=None, embeddings=None) == [0, 1]


def test_what_is_missing_is_told_with_the_command_that_makes_it(tmp_path):
    train = write_dataset(tmp_path / "train", numbered(2, 1))
    test = write_dataset(tmp_path / "test", numbered(2, 1))
    with pytest.raises(PairmillError, match=rf"Make them: pairmill score hash {train.url}"):
        dropped(train, against="test")
    write_scores(train, "hash", {"phash": [1, 2]}, pa.uint64())
    with pytest.raises(PairmillError, match=rf"Make them: pairmill score hash {test.url}"):
        dropped(train, against="test")
    write_scores(test, "hash", {"phash": [1, 2]}, pa.uint64())
    with pytest.raises(PairmillError, match=rf"{train.url} has no embeddings features/clip .*pairmill score clip"):
        dropped(train, against="test")
    write_embeddings(train, [AXES[0], AXES[1]])
    with pytest.raises(PairmillError, match=rf"{test.url} has no embeddings .*pairmill score clip {test.url}"):
        dropped(train, against="test")
    write_embeddings(test, [AXES[0], AXES[1]], weights="v" * 64)
    with pytest.raises(PairmillError, match="was made by another CLIP"):
        dropped(train, against="test")
    assert train.folder.names("selections") == []


def test_hashes_made_in_another_way_are_refused(tmp_path):
    train, test = (write_dataset(tmp_path / n, numbered(2, 1)) for n in ("train", "test"))
    write_scores(train, "hash", {"phash": [1, 2]}, pa.uint64())
    write_scores(test, "hash", {"phash": [1, 2]}, pa.uint64(), model="another")
    with pytest.raises(PairmillError, match="were made with other settings and cannot be compared"):
        dropped(train, against="test", embeddings=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": "train"}, "against itself says nothing"),
        ({"against": "nowhere"}, "is not a dataset"),
        ({"against": "test", "near": None, "embeddings": None, "captions": False}, "nothing is compared"),
        ({}, "against"),
    ],
)
def test_settings_that_do_not_fit_are_told(tmp_path, settings, message):
    for name in ("train", "test"):
        dataset = write_dataset(tmp_path / name, numbered(2, 1))
    with pytest.raises(PairmillError, match=message):
        dropped(write_dataset(tmp_path / "train", numbered(2, 1)), **settings)
    assert dataset.folder.names("selections") == []


def scene(seed):
    """A picture with large and small shapes, uint8 [240, 320, 3]."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        x, y, r = int(rng.integers(320)), int(rng.integers(240)), int(rng.integers(6, 40))
        cv2.circle(coarse, (x, y), r, rng.integers(0, 256, 3).tolist(), -1)
    return coarse


def encoded(rgb, size=None, **options):
    stream = io.BytesIO()
    image = Image.fromarray(rgb)
    (image.resize(size, Image.Resampling.LANCZOS) if size else image).save(stream, **options)
    return stream.getvalue()


def test_resized_and_re_encoded_copies_are_found(tmp_path):
    scenes = [scene(n) for n in range(24)]
    test = [
        {"image": encoded(s, format="PNG"), "format": "png", "caption": f"t {n}"} for n, s in enumerate(scenes[:12])
    ]
    ways = [
        {"size": (160, 120), "format": "JPEG", "quality": 90},
        {"size": (512, 384), "format": "JPEG", "quality": 60},
        {"format": "JPEG", "quality": 30},
        {"size": (224, 224), "format": "WEBP", "quality": 50},
    ]
    copies = [{"image": encoded(scenes[n], **w), "caption": f"c {n}"} for n in range(12) for w in ways]
    others = [{"image": encoded(s, format="JPEG"), "caption": f"o {n}"} for n, s in enumerate(scenes[12:])]
    datasets = [write_dataset(tmp_path / "train", [copies, others]), write_dataset(tmp_path / "test", [test])]
    for dataset in datasets:
        score_hash(dataset, HashScoreConfig(workers=0))
    assert dropped(datasets[0], against="test", embeddings=None) == list(range(len(copies)))
    match = read_matches(datasets[0], "s")["decontaminate test"][0]
    assert match.other == f"test 0:{match.row // len(ways)}"
    assert match.image.startswith(b"\xff\xd8")
