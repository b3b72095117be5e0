import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from curation import thumbnails
from curation.filter import filter_dataset, make_selection
from curation.filter_config import FilterConfig, ReportConfig
from curation.report import report
from curation.table import Table
from schemas.errors import PairmillError
from schemas.events import Notice
from shards.reader import row_groups
from tests.curation.scored import write_scores
from tests.make import make_dataset

ROWS = 12
EVIL = '</figcaption><script>alert("x")</script><img src="http://evil.test/x.png">'
FAIL = {(0, 1): "timeout", (1, 3): "timeout", (2, 0): "not_image"}


@pytest.fixture
def dataset(tmp_path):
    made = make_dataset(
        tmp_path / "ds",
        shards=3,
        rows=ROWS,
        fail=FAIL,
        corrupt={(0, 2)},
        no_caption={(1, 1)},
        captions={(0, 0): [EVIL], (2, 2): ["b", "c"]},
    )
    scores = [None if (i // ROWS, i % ROWS) in FAIL else i / 100 for i in range(3 * ROWS)]
    write_scores(made, "clip", {"clip_score": scores})
    return made


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def read(dataset, name="report"):
    folder = dataset.folder.local / "reports"
    text = (folder / f"{name}.html").read_text(encoding="utf-8")
    return text, Page(text), json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_is_one_file_that_loads_nothing_and_runs_nothing(dataset):
    filter_dataset(dataset, FilterConfig(output="best", where=("clip_score >= 0.1",)))
    assert report(dataset, ReportConfig()) == "reports/report.html"
    text, page, _ = read(dataset)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert "script" not in page.tags
    assert all(s.startswith(("data:image/jpeg;base64,", "#")) for s in page.sources)
    assert "url(" not in text
    assert "@import" not in text
    assert EVIL in "".join(page.text)  # shown as the text it is
    assert str(dataset.folder.local.parent) not in text  # no absolute path
    assert len(text) < 5 << 20
    assert not set(page.tags) & {"link", "object", "iframe", "form", "base"}


def test_the_numbers_are_those_of_the_dataset(dataset):
    filter_dataset(dataset, FilterConfig(output="best", where=("clip_score >= 0.1",), top=10, by="clip_score"))
    report(dataset, ReportConfig())
    text, _, numbers = read(dataset)
    assert numbers["totals"] == {"rows": 36, "images": 33, "text_only": 0, "failed": 3, "shards": 3}
    assert numbers["causes"] == [
        {"cause": "success", "rows": 33, "error": None},
        {"cause": "timeout", "rows": 2, "error": "test: timeout"},
        {"cause": "not_image", "rows": 1, "error": "test: not_image"},
    ]
    assert numbers["hosts"] == [{"host": "example.com", "rows": 36, "ok": 33, "failure": "timeout"}]
    (selection,) = numbers["selections"]
    assert [s["rule"] for s in selection["funnel"]] == ["status", "clip_score >= 0.1", "top 10 by clip_score"]
    by_title = {h["title"]: h for h in numbers["histograms"]}
    clip = by_title["clip.clip_score"]
    assert (clip["rows"], clip["nulls"], sum(clip["counts"]), sum(clip["kept"])) == (33, 3, 33, 10)
    assert by_title["width"]["maximum"] == 100
    assert sum(by_title["caption characters"]["counts"]) == 35
    assert "clip_score &gt;= 0.1" in text
    assert text.count('class="threshold"') == 4  # each beside its rule, both over the column
    assert (clip["cut"], clip["edges"][0], clip["edges"][-1]) == (False, 0, pytest.approx(0.35))
    (size,) = numbers["sizes"]
    assert (size["rows"], sum(c[2] for c in size["cells"]), sum(c[3] for c in size["cells"])) == (33, 33, 10)


def test_the_printed_recipe_repeats_the_selection(dataset, tmp_path):
    filter_dataset(dataset, FilterConfig(output="one", preset="laion400m", sample=0.9))
    filter_dataset(dataset, FilterConfig(output="two", from_="one", where=("width > 50",)))
    report(dataset, ReportConfig())
    _, page, numbers = read(dataset)
    recipes = [t for t in page.text if t.startswith("rules:")]
    for recipe, selection in zip(recipes, numbers["selections"], strict=True):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        again = filter_dataset(dataset, FilterConfig(rules=str(path), dry_run=True))
        assert again.kept == selection["kept"]


def test_pictures_are_of_the_right_rows_and_small(dataset):
    filter_dataset(dataset, FilterConfig(output="best", where=("clip_score >= 0.15",)))
    report(dataset, ReportConfig())
    _, page, numbers = read(dataset)
    shown = numbers["pictures"]["best"]
    images = [s for s in page.sources if s.startswith("data:")]
    assert 0 < len(images) <= len(shown) <= 200
    for p in shown:
        number = p["shard"] * ROWS + p["row"]
        assert p["value"] == (None if p["kind"] == "any" else pytest.approx(number / 100))
        assert (p["box"] == "kept" or p["kind"] in ("best", "kept")) == (number >= 15)
        assert (p["shard"], p["row"]) not in FAIL
    values = {k: [p["value"] for p in shown if p["kind"] == k] for k in ("best", "kept", "nearest", "farthest")}
    assert values["best"] == pytest.approx([0.35, 0.34, 0.33, 0.32, 0.31, 0.30])
    assert values["kept"] == pytest.approx([0.21, 0.20, 0.19, 0.18, 0.17, 0.16])  # 0.15 timed out
    assert values["nearest"] == pytest.approx([0.14, 0.13, 0.12, 0.11, 0.10, 0.09])
    assert values["farthest"] == pytest.approx([0.06, 0.05, 0.04, 0.03, 0.02, 0.0])  # 0.01 timed out
    for source in images:
        picture = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
        assert (picture.format, max(picture.size) <= 176) == ("JPEG", True)
    holes = sum((p["shard"], p["row"]) == (0, 2) for p in shown)  # stored bytes that do not decode
    assert page.text.count("no picture") == holes


def test_at_most_forty_row_groups_and_two_hundred_pictures(tmp_path, monkeypatch):
    made = make_dataset(tmp_path, shards=60, rows=3)
    write_scores(made, "clip", {"clip_score": np.linspace(0, 1, 180).tolist()})
    for n in range(6):
        make_selection(made, f"s{n}", [{"where": f"clip_score >= 0.{n}"}, {"where": "width > 48"}])
    opened = []

    def counted(folder, name, columns=None, groups=None):
        opened.extend((name, g) for g in groups)
        return row_groups(folder, name, columns, groups)

    monkeypatch.setattr(thumbnails, "row_groups", counted)
    report(made, ReportConfig())
    _, page, numbers = read(made)
    assert len(opened) == len(set(opened)) <= 40
    assert 0 < sum(s.startswith("data:") for s in page.sources) <= 200
    assert sum(map(len, numbers["pictures"].values())) <= 200


def test_the_same_seed_gives_the_same_bytes_and_another_other_pictures(tmp_path):
    made = make_dataset(tmp_path, shards=3, rows=40)
    make_selection(made, "s", [{"where": "char_length(caption) > 3"}])
    pages = []
    for seed in (0, 0, 1):
        report(made, ReportConfig(seed=seed))
        pages.append(read(made)[0])
    assert pages[0] == pages[1] != pages[2]


def test_a_dataset_without_scores_or_selections_has_a_report(tmp_path):
    made = make_dataset(tmp_path, shards=1, rows=3)
    report(made, ReportConfig(name="plain"))
    _, page, numbers = read(made, "plain")
    assert numbers["selections"] == []
    assert "What was kept" not in "".join(page.text)


def test_nothing_but_failures_has_a_report(tmp_path):
    made = make_dataset(tmp_path, shards=1, rows=2, fail={(0, 0): "timeout", (0, 1): "timeout"})
    report(made, ReportConfig())
    assert read(made)[2]["totals"]["failed"] == 2


def test_half_finished_scores_are_drawn_as_far_as_they_go(dataset):
    write_scores(dataset, "late", {"late": [0.5] * 36}, shards=[0, 2])
    report(dataset, ReportConfig())
    text, _, numbers = read(dataset)
    late = next(h for h in numbers["histograms"] if h["title"] == "late.late")
    assert (late["rows"], late["kept"], late["shards"]) == (24, None, 2)
    assert "2 of 3 shards done" in text


def test_a_stale_selection_is_told_not_drawn(dataset):
    make_selection(dataset, "old", [{"where": "clip_score >= 0.1"}])
    sidecar = dataset.folder.local / "scores/clip/sidecar.json"
    sidecar.write_text(re.sub('"fingerprint": "[^"]*"', '"fingerprint": "another"', sidecar.read_text()))
    seen = []
    report(dataset, ReportConfig(), seen.append)
    assert [e.warning for e in seen if isinstance(e, Notice)] == [True]
    text, _, numbers = read(dataset)
    assert "made from other scores/clip" in text
    assert numbers["drawn"] is None
    assert {p["box"] for p in numbers["pictures"][""]} == {"rows"}  # any rows, none said to be kept
    with pytest.raises(PairmillError, match="made from other scores"):
        report(dataset, ReportConfig(selection="old"))


def test_a_host_never_shows_what_is_secret_in_a_url(tmp_path):
    from curation.report_data import hosts
    from tests.curation.scored import write_dataset

    urls = ["https://user:pass@Example.COM:8080/a?b", "http://example.com#x", "ftp://x.test/", "no url", None]
    made = write_dataset(tmp_path, [[{"url": u, "status": "bad_url"} for u in urls]])
    found = {h["host"]: h["rows"] for h in hosts(Table(made))}
    assert found == {"example.com": 2, "x.test": 1, "(no host)": 1}


def test_an_unfinished_download_says_so(dataset):
    (dataset.folder.local / dataset.stage("pairs").file(2)).unlink()
    with pytest.raises(PairmillError, match="pairs are unfinished"):
        report(dataset, ReportConfig())


def test_values_that_are_no_number_do_not_stop_a_histogram(dataset):
    write_scores(dataset, "odd", {"odd": [float("inf"), float("nan"), -float("inf"), None] + [1.5] * 32})
    report(dataset, ReportConfig())
    odd = next(h for h in read(dataset)[2]["histograms"] if h["title"] == "odd.odd")
    assert (odd["rows"], odd["nulls"], odd["counts"]) == (32, 4, [32])
