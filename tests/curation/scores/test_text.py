"""`score text`: every column beside a plain Python reference, counts beside a Counter, growth and retries."""

import json
import unicodedata
from collections import Counter

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.filter import make_selection
from curation.scores.config import TextScoreConfig
from curation.scores.text import NGRAM, score_text, text_statistics
from schemas.errors import PairmillError
from schemas.pairs import pairs_schema
from shards.dataset import Dataset, write_manifest
from shards.scan import scan
from shards.writer import write_pairs
from tests.curation.scored import uid, write_dataset

CONFIG = TextScoreConfig(workers=0)
CAPTIONS = st.text(st.sampled_from("aAbB é9٣½ \t\x1c-!😀ǅİ漢"), max_size=40) | st.text(max_size=30)


def simple_lower(text):
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def reference(text):
    """The definitions of docs/formats.md, a character at a time."""
    categories = [unicodedata.category(c) for c in text]
    lower = simple_lower(text)
    runs = Counter(lower[i : i + NGRAM] for i in range(len(text) - NGRAM + 1))
    words = text.split()

    def share(count):
        return count / len(text) if text else 0.0

    return {
        "characters": len(text),
        "words": len(words),
        "unique_words": len(set(lower.split())),
        "mean_word_length": sum(map(len, words)) / len(words) if words else 0.0,
        "digit_share": share(sum(c == "Nd" for c in categories)),
        "upper_share": share(sum(c == "Lu" for c in categories)),
        "symbol_share": share(
            sum(c[0] not in "LMN" and not t.isspace() for c, t in zip(categories, text, strict=True))
        ),
        "ascii_share": share(sum(c.isascii() for c in text)),
        "repeated_ngram_share": sum(n for n in runs.values() if n > 1) / sum(runs.values()) if runs else 0.0,
    }


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | CAPTIONS, max_size=12))
def test_every_caption_has_the_numbers_of_the_plain_definitions(captions):
    found = text_statistics(pa.array(captions, pa.string()))
    for row, text in enumerate(captions):
        for name, value in reference(text or "").items():
            assert found[name][row] == pytest.approx(value, abs=1e-6), (name, text)


def flags(text):
    found = text_statistics(pa.array([text]))
    return {name for name in ("has_url", "is_filename_like", "starts_with_number") if found[name][0]}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("IMG_1234.jpg", {"is_filename_like"}),
        ("IMG_1234", {"is_filename_like"}),
        ("dsc 00042 (1)", {"is_filename_like"}),
        ("P1030478", {"is_filename_like"}),
        ("20140312_123456.JPG", {"is_filename_like", "starts_with_number"}),
        ("my dog in spain.jpeg", {"is_filename_like"}),
        ("images/banner-02.webp ", {"is_filename_like"}),
        ("a file that somebody saved as dog.jpg", set()),
        ("dog.jpg on a shelf", set()),
        ("image 5 of a series", set()),
        ("Photograph", set()),
        ("see https://example.org now", {"has_url"}),
        ("WWW.example.org", {"has_url"}),
        ("http:// is a scheme", set()),
        ("awww.", set()),
        (" 3 dogs", {"starts_with_number"}),
        ("٣ dogs", {"starts_with_number"}),
        ("½ a dog", set()),
        ("", set()),
    ],
)
def test_flags(text, want):
    assert flags(text) == want


def rows(captions, status="success"):
    return [{"caption": c, "status": status} for c in captions]


def scores(dataset, name="text"):
    return scan(dataset.stage(f"scores/{name}")).collect()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.none() | st.sampled_from(["", "a", "A", "a ", "dog", "é", "é"]), min_size=1, max_size=30))
def test_counts_are_those_of_a_counter(tmp_path_factory, captions):
    cut = max(1, len(captions) // 2)
    shards = [part for part in (rows(captions[:cut]), rows(captions[cut:])) if part]
    dataset = write_dataset(tmp_path_factory.mktemp("text") / "data", shards)
    score_text(dataset, CONFIG)
    many = Counter(captions)
    assert scores(dataset)["caption_count"].to_list() == [None if c is None else many[c] for c in captions]


def test_rows_without_a_caption_are_null_and_failed_ones_are_scored(tmp_path):
    dataset = write_dataset(tmp_path / "data", [[*rows(["a dog", None]), *rows(["a dog"], "timeout")]])
    finished = score_text(dataset, CONFIG)
    found = scores(dataset)
    assert found["words"].to_list() == [2, None, 2]
    assert found["caption_count"].to_list() == [2, None, 2]
    assert found.row(1) == (None,) * len(found.columns)
    assert finished.counts == {"ok": 2, "null": 1}
    columns = json.loads((tmp_path / "data/scores/text/sidecar.json").read_text())["columns"]
    assert set(columns) == set(found.columns)
    assert all("scale" in columns[n] for n, kind in found.schema.items() if kind != pl.Boolean)


def test_workers_give_the_same_bytes(tmp_path):
    shards = [rows([f"a dog {i % 3}" for i in range(5)]), rows(["a dog 1", "x"])]
    one, two = write_dataset(tmp_path / "one", shards), write_dataset(tmp_path / "two", shards)
    score_text(one, CONFIG)
    score_text(two, TextScoreConfig(workers=2))
    for shard in range(2):
        name = f"scores/text/0000{shard}.parquet"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def extend(dataset, captions):
    """One shard more, as `download --extend` ends."""
    shard = dataset.num_shards
    with write_pairs(dataset.folder, dataset.stage("pairs").file(shard), pairs_schema()) as writer:
        for number, caption in enumerate(captions):
            writer.append({"uid": uid(1000 + number), "status": "success", "caption": caption})
    sizes = (*dataset.manifest.shards, len(captions))
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"shards": sizes}))
    return Dataset.open(dataset.url)


def test_a_grown_dataset_is_counted_anew(tmp_path):
    dataset = write_dataset(tmp_path / "data", [rows(["a", "b", "a"]), rows(["b", "c"])])
    score_text(dataset, CONFIG)
    assert score_text(dataset, CONFIG).done == 0
    make_selection(dataset, "s", [{"where": "caption_count = 1"}])
    grown = extend(dataset, ["c", "d", None])
    assert grown.stage("scores/text").done() == set()
    with pytest.raises(PairmillError, match="scores/text lacks"):
        make_selection(grown, "s", [{"where": "caption_count = 1"}])
    # A run that was killed behind the new shard leaves the old ones to do.
    assert score_text(grown, CONFIG).done == 3
    assert scores(grown)["caption_count"].to_list() == [2, 2, 2, 2, 2, 2, 1, None]
    assert make_selection(grown, "s", [{"where": "caption_count = 1"}]).kept == 1


def test_a_retried_shard_makes_all_of_them_be_counted_again(tmp_path):
    dataset = write_dataset(tmp_path / "data", [rows(["a", "b"]), rows(["b"], "timeout")])
    score_text(dataset, CONFIG)
    with write_pairs(dataset.folder, dataset.stage("pairs").file(1), pairs_schema()) as writer:
        writer.append({"uid": uid(2), "status": "success", "caption": "b", "sha256": b"1" * 32})
    assert dataset.stage("scores/text").pending() == [0, 1]
    assert score_text(dataset, CONFIG).done == 2
    assert dataset.stage("scores/text").pending() == []


def test_pairs_that_are_not_all_there(tmp_path):
    dataset = write_dataset(tmp_path / "data", [rows(["a", "b"]), rows(["b"])])
    (tmp_path / "data/pairs/00001.parquet").unlink()
    with pytest.raises(PairmillError, match=r"pairs/00001.parquet is missing"):
        score_text(dataset, CONFIG)
    assert dataset.stage("scores/text").standing() == set()
