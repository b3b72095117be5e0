"""The page with everything in it, as text and in a browser."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from curation import report as report_module
from curation.filter_config import ReportConfig
from curation.report import report
from curation.report_matches import chosen_matches
from tests.curation.reported import EVIL, put_duplicates, rich_dataset, write_run
from tests.make import make_dataset

SECTIONS = [
    "selections",
    "matches",
    "scores",
    "captions",
    "images",
    "licences",
    "regions",
    "training",
    "rows",
    "stages",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    dataset = rich_dataset(folder / "ds")
    put_duplicates(dataset)
    run = write_run(folder / "run")
    report(dataset, ReportConfig(run=(str(run),)))
    return folder / "ds" / "reports"


@pytest.fixture(scope="module")
def numbers(made):
    return json.loads((made / "report.json").read_text())


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.handlers = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.links += [v for k, v in attrs if k == "href"]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def test_every_part_has_its_place_and_link(made):
    page = Page((made / "report.html").read_text())
    assert [i for i in page.ids if i != "top"] == SECTIONS
    assert sorted(page.links) == sorted(f"#{s}" for s in ["top", *SECTIONS])


def test_empty_parts_vanish(tmp_path):
    report(make_dataset(tmp_path, shards=1, rows=2))
    page = Page((tmp_path / "reports/report.html").read_text())
    assert [i for i in page.ids if i != "top"] == ["captions", "images", "rows", "stages"]
    assert sorted(page.links) == sorted(f"#{i}" for i in page.ids)


def test_nothing_a_stranger_wrote_is_markup(made):
    text = (made / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "object", "iframe", "link", "form"}
    assert page.handlers == []
    assert EVIL not in text
    assert text.count("&lt;script&gt;") > 8  # caption, licence, language, class, rule, name of a target set


def test_regions_are_counted_and_shown(numbers):
    (one,) = numbers["regions"]
    assert (one["set"], one["rows"], one["boxes"]) == ("regions", 19, {"minimum": 3, "median": 3, "maximum": 3})
    assert [p["boxes"] for p in one["pictures"]] == [2] * 6


def test_duplicates_stand_beside_the_row_that_stays(numbers):
    assert numbers["matches"]["best"]["dedup near"] == [
        {"rows": 3, "stays": "0:2", "dropped": [{"row": "0:4", "value": 1.0}, {"row": "0:5", "value": 3.0}]},
        {"rows": 2, "stays": "0:7", "dropped": [{"row": "0:8", "value": 0.0}]},
    ]
    contaminated = numbers["matches"]["best"]["decontaminate"]
    assert [(g["stays"], g["dropped"][0]["row"]) for g in contaminated] == [
        (f"coco {EVIL} 0:17", "0:9"),
        ("coco 0:18", "0:11"),
    ]


def test_matches_keep_to_their_pictures_and_row_groups(tmp_path):
    dataset = rich_dataset(tmp_path)
    put_duplicates(dataset)
    assert chosen_matches(dataset, "best", 60, 12).keys() == {"dedup near", "decontaminate"}
    few = chosen_matches(dataset, "best", 8, 12)
    assert [sum(len(g) + 1 for g in groups) for groups in few.values()] == [3, 4]
    assert chosen_matches(dataset, "best", 60, 0) == {}


def test_a_page_of_noise_gives_up_pictures_before_it_grows(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    dataset = make_dataset(
        tmp_path, shards=1, rows=30, image=lambda s, r: rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    )
    monkeypatch.setattr(report_module, "MOST_BYTES", 90_000)
    report(dataset, ReportConfig(thumbnails=60))
    assert len((tmp_path / "reports/report.html").read_bytes()) <= 90_000
    assert 0 < len(json.loads((tmp_path / "reports/report.json").read_text())["pictures"][""]) < 24


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_renders_in_a_browser(chromium, made, tmp_path, width, dark):
    page = chromium.page(width=width, height=800, dark=dark, mobile=width < 500)
    page.goto((made / "report.html").as_uri())
    assert page.errors == []
    assert [u for u in page.requests if not u.startswith(("file:", "data:"))] == []
    pictures = page.js("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(pictures) > 60
    assert all(pictures)
    assert page.js("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert page.js("document.title") == "ds · pairmill report"
    assert page.text("h1") == "ds"
    assert page.text(".lead").startswith("30 of 60 pairs are kept by best.")
    shown = page.js("getComputedStyle(document.querySelector('.river')).display !== 'none'")
    assert shown == (width > 640)
    page.screenshot(tmp_path / "page.png")
    ground = np.asarray(Image.open(tmp_path / "page.png").convert("L"))[-5:, :5].mean()
    assert (ground < 60) if dark else (ground > 200)
    page.click("details summary")
    assert page.js("document.querySelector('details').open")
    assert "clip_score >= 0.2" in page.text("details pre")
    page.click("nav a[href='#stages']")
    assert page.js("document.querySelector('#stages').getBoundingClientRect().top") < 800
    page.close()
