import pyarrow as pa
import pytest

from curation.filter import FilterConfig, filter_dataset, make_selection
from curation.presets import PRESETS, preset
from schemas.config import build_config
from schemas.errors import PairmillError
from schemas.events import Notice
from tests.curation.scored import numbered, write_dataset, write_scores

LANGUAGES = ["en", "en", "de", "en", "en", None, "en", "en"]


@pytest.fixture
def dataset(tmp_path):
    captions = ["one two three", "one two", "a b c", "five5", "4444", None, "\u3000wide  space text ", "x " * 300]
    width = [640, 640, 640, 199, 640, 640, 600, 640]
    height = [480, 480, 200, 199, 480, 480, 200, 480]
    made = write_dataset(tmp_path, numbered(8, 2, caption=captions, original_width=width, original_height=height))
    write_scores(made, "clip", {"clip_score": [0.31, 0.3, 0.29, 0.28, 0.27, 0.5, 0.2, None]})
    write_scores(made, "language", {"language": LANGUAGES}, pa.string())
    write_scores(made, "hash", {"phash": [1, 2, 3, 4, 5, 6, 7, 8]}, pa.uint64())
    write_scores(made, "text", {n: [3] * 8 for n in ("words", "unique_words", "caption_count")}, pa.uint32())
    return made


def rows(dataset, name):
    return make_selection(dataset, None, [{"preset": name}], dry_run=True)


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if not p.targeted])
def test_every_preset_runs_and_has_a_source(dataset, name):
    known = preset(name)
    assert known.source
    assert known.comparisons
    assert len(rows(dataset, name).funnel) == 1 + len(known.rules)


def test_datacomp_clip_takes_the_threshold_of_all_successes(dataset):
    # int(8 * 0.3) = 2: the third highest score, 0.3, is the threshold.
    assert rows(dataset, "datacomp-clip-l14-30").kept == 3


def test_datacomp_basic_as_coded(dataset):
    captions = ["one two three", "one two", "a b c", "five5", "4444", None, "\u3000wide  space text ", "x " * 300]
    sizes = [(640, 480), (640, 480), (640, 200), (199, 199), (640, 480), (640, 480), (600, 200), (640, 480)]
    want = [
        la == "en" and c is not None and len(c.split()) > 2 and len(c) > 5 and min(s) >= 200 and max(s) / min(s) <= 3.0
        for c, s, la in zip(captions, sizes, LANGUAGES, strict=True)
    ]
    assert rows(dataset, "datacomp-basic").kept == sum(want) == 3


@pytest.mark.parametrize(("unique", "kept"), [(3, 1), (2, 0)])
def test_repeated_words_of_cc12m(tmp_path, unique, kept):
    sides = {"original_width": [500], "original_height": [401], "caption": ["a b c"]}
    made = write_dataset(tmp_path, numbered(1, 1, **sides))
    write_scores(made, "text", {"words": [3], "unique_words": [unique]}, pa.uint32())
    assert rows(made, "cc12m-like").kept == kept


def test_a_target_set_is_asked_for_and_goes_into_the_rules(dataset):
    with pytest.raises(PairmillError, match="compares with a target set: --against DATASET"):
        rows(dataset, "datacomp-image")
    with pytest.raises(PairmillError, match="compares with no target set"):
        make_selection(dataset, None, [{"preset": {"name": "coyo", "against": "x"}}], dry_run=True)
    last = preset("datacomp-image").resolved("imagenet.npy", "datacomp-image")[-1]
    assert last["cluster"]["against"] == "imagenet.npy"
    with pytest.raises(PairmillError, match="--against goes with --preset"):
        build_config(FilterConfig, {"against": "x"}, "filter")


def test_what_a_preset_lacks_is_said(dataset):
    seen = []
    make_selection(dataset, None, [{"preset": "laion400m"}], seen.append, dry_run=True)
    texts = [e.text for e in seen if isinstance(e, Notice)]
    assert any("leaves out: files under 5 KB" in t for t in texts)
    assert any("is made for ViT-B-32" in t for t in texts)  # the scores are ViT-L-14's
    seen.clear()
    make_selection(dataset, None, [{"preset": "datacomp-clip-l14-30"}], seen.append, dry_run=True)
    assert seen == []


def test_a_preset_without_its_score_names_the_command(tmp_path):
    dataset = write_dataset(tmp_path, numbered(2, 1))
    with pytest.raises(PairmillError, match=r"needs `clip_score`.*pairmill score clip"):
        filter_dataset(dataset, FilterConfig(output="x", preset="datacomp-clip-l14-30"))


def test_an_unknown_preset_lists_them():
    with pytest.raises(PairmillError, match=r"There are: datacomp-basic"):
        preset("nothing like it")
