import pytest

from curation.filter import FilterConfig, filter_dataset, make_selection
from curation.presets import PRESETS, preset
from schemas.errors import PairmillError
from schemas.events import Notice
from tests.curation.scored import numbered, write_dataset, write_scores


@pytest.fixture
def dataset(tmp_path):
    captions = ["one two three", "one two", "a b c", "five5", "4444", None, "\u3000wide  space text ", "x " * 300]
    width = [640, 640, 640, 199, 640, 640, 600, 640]
    height = [480, 480, 200, 199, 480, 480, 200, 480]
    made = write_dataset(tmp_path, numbered(8, 2, caption=captions, original_width=width, original_height=height))
    write_scores(made, "clip", {"clip_score": [0.31, 0.3, 0.29, 0.28, 0.27, 0.5, 0.2, None]})
    return made


def rows(dataset, name):
    return make_selection(dataset, None, [{"preset": name}], dry_run=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_has_a_source(dataset, name):
    known = preset(name)
    assert known.source
    assert known.comparisons
    assert len(rows(dataset, name).funnel) == 1 + len(known.rules)


def test_datacomp_clip_takes_the_threshold_of_all_successes(dataset):
    # int(8 * 0.3) = 2: the third highest score, 0.3, is the threshold.
    assert rows(dataset, "datacomp-clip-l14-30").kept == 3


def test_datacomp_basic_size_as_coded(dataset):
    captions = ["one two three", "one two", "a b c", "five5", "4444", None, "\u3000wide  space text ", "x " * 300]
    sizes = [(640, 480), (640, 480), (640, 200), (199, 199), (640, 480), (640, 480), (600, 200), (640, 480)]
    want = [
        c is not None and len(c.split()) > 2 and len(c) > 5 and min(s) >= 200 and max(s) / min(s) <= 3.0
        for c, s in zip(captions, sizes, strict=True)
    ]
    assert rows(dataset, "datacomp-basic-size").kept == sum(want) == 3


def test_what_a_preset_lacks_is_said(dataset):
    seen = []
    make_selection(dataset, None, [{"preset": "laion400m-clip"}], seen.append, dry_run=True)
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
    with pytest.raises(PairmillError, match=r"There are: datacomp-clip-l14-30"):
        preset("nothing like it")
