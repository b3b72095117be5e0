"""The page in a real browser: load, search, slide, open, save; nothing from outside, no error in the console."""

import threading

import pytest
import uvicorn

from cli.demo.scenes import generate_scene
from cli.web.browse import create_app
from cli.web.server import listen, page_address
from curation.browse_config import BrowseConfig
from curation.filter import make_selection
from curation.scores.config import HashScoreConfig
from curation.scores.hashes import score_hash
from extractors.clip import score_clip
from extractors.config import ClipScoreConfig
from extractors.regions.config import RegionsConfig
from extractors.regions.extractor import extract_regions
from shards.select import read_selection, selections
from tests.extractors.tiny_clip import save_clip
from tests.make import make_dataset

ROWS = 40
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(dataset, address) of a running server: pictures, hashes, embeddings with their model, boxes, one selection."""
    folder = tmp_path_factory.mktemp("page")
    scenes = {i: generate_scene(i if i != 7 else 6, 96) for i in range(ROWS)}  # row 7 shows the picture of row 6
    texts = {(i // 20, i % 20): [EVIL if i == 3 else f"number {i}: {s.captions[0]}"] for i, s in scenes.items()}
    dataset = make_dataset(
        folder / "ds",
        shards=2,
        rows=20,
        fail={(1, 4): "timeout"},
        corrupt=[(0, 5)],
        captions=texts,
        image=lambda shard, row: scenes[20 * shard + row].image,
        kind="png",
    )
    clip = save_clip(folder / "clip")
    score_clip(dataset, ClipScoreConfig(model=str(clip), workers=0))
    score_hash(dataset, HashScoreConfig(workers=0))
    make_selection(dataset, "few", [{"sample": 0.3}])
    extract_regions(dataset, RegionsConfig(detector="torchvision:tiny", workers=0))
    config = BrowseConfig(model=str(clip))
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(dataset.url, config), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield dataset, page_address(listening)
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def page(chromium, served):
    one = chromium.page()
    yield one
    errors = one.errors
    asked = {url for url in one.requests if not url.startswith(served[1])}
    one.close()
    assert errors == []
    assert asked == set()


def open_page(page, served, address=""):
    page.goto(served[1] + address)
    page.wait("document.querySelectorAll('.cell').length > 0 && document.querySelector('main.waiting') === null")


def count(page, said):
    page.wait(f"document.getElementById('count').textContent === {said!r}")


def test_load_search_slide_open_save(page, served):
    dataset, _ = served
    open_page(page, served)
    count(page, "40 rows")
    page.wait("[...document.querySelectorAll('.cell img')].slice(0, 8).every(i => i.complete && i.naturalWidth > 0)")
    assert page.js("document.title") == "ds · pairmill browse"
    assert page.text("[data-row='24'] .status") == "timeout"

    page.press("/")
    page.type('"number 1"')
    count(page, "11 of 40 rows")  # 1 and 10 to 19
    assert page.js("location.search") == "?q=%22number+1%22"

    slider = "input[aria-label='clip.clip_score, least']"
    page.js(f"document.querySelector({slider!r}).focus()")
    page.press("ArrowRight", 60)
    page.wait("location.search.includes('range=clip.clip_score') && document.querySelector('main.waiting') === null")
    least = page.js("Number(new URLSearchParams(location.search).get('range').split(':')[1])")
    total = int(page.text("#count").split()[0])
    assert 0 < total < 11

    page.click("#recipe-button")
    page.wait("document.getElementById('recipe').open")
    recipe = page.js("document.getElementById('yaml').value")
    assert f"clip.clip_score >= {least}" in recipe
    page.press("Escape")
    page.wait("!document.getElementById('recipe').open")

    page.click("#save-button")
    page.type("mine")
    page.press("Enter")
    page.wait("!document.getElementById('saved').hidden")
    assert page.text("#saved") == f"Saved mine: {total} of 40 rows."
    assert "mine" in selections(dataset)
    assert len(read_selection(dataset, "mine")) == total
    page.click("#save .close")
    page.click("#selection-group summary")
    assert "mine" in page.js("[...document.getElementById('selection').options].map(o => o.value)")


def test_a_name_that_is_taken_can_be_replaced(page, served):
    open_page(page, served, "?q=number+2")
    for _ in range(2):
        page.click("#save-button")
        page.js("document.getElementById('save-name').value = 'twice'")
        page.press("Enter")
        page.wait("!document.getElementById('saved').hidden || !document.getElementById('save-error').hidden")
        if not page.js("document.getElementById('saved').hidden"):
            page.click("#save .close")
    assert "already" in page.text("#save-error")
    page.click("#replace")
    page.click("#save-go")
    page.wait("!document.getElementById('saved').hidden")
    page._errors = [e for e in page._errors if "400" not in e]  # Chromium tells every answer that is no success


def test_a_row_with_its_columns_boxes_and_twins(page, served):
    open_page(page, served, "?q=number")
    page.click("[data-row='6']")
    page.wait("document.getElementById('detail').open && document.getElementById('large').naturalWidth > 0")
    assert "row=6" in page.js("location.search")
    page.wait("document.querySelectorAll('#boxes rect').length > 0")
    assert page.js("document.getElementById('boxes').viewBox.baseVal.width") == 96
    facts = page.text("#columns")
    assert "clip_score" in facts
    assert "pixel_sha256" in facts
    page.wait("!document.getElementById('twins').hidden")
    assert "Show all" in page.text("#show-twins")
    page.press("ArrowRight")
    page.wait("document.getElementById('detail-title').textContent.startsWith('row 7')")
    page.press("Escape")
    page.wait("!document.getElementById('detail').open")
    assert "row" not in page.js("location.search")
    assert page.js("document.activeElement.dataset.row") == "7"


def test_likeness_by_row_and_by_words(page, served):
    open_page(page, served, "?row=6")
    page.click("#like")
    page.wait("document.querySelector('.cell .badge') !== null")
    assert page.js("document.querySelector('.cell').dataset.row") == "6"
    assert page.text(".cell .badge").startswith(("1", "0.99"))
    page.wait("!document.getElementById('see').hidden", timeout=60)
    page.click("#see")
    page.type("a red circle")
    page.wait("location.search.includes('see=a+red+circle') && !location.search.includes('like')")
    page.wait(
        "document.querySelector('main.waiting') === null && document.querySelectorAll('.cell .badge').length > 30"
    )
    assert page.js("document.getElementById('sort').disabled")


def test_an_address_brings_everything_back(page, served):
    open_page(
        page, served, "?q=number&range=width:90:&only=status:success&selection=few&reason=kept&sort=-clip.clip_score"
    )
    chips = page.js("[...document.querySelectorAll('#chips button')].map(b => b.textContent)")
    assert chips[:4] == ["words: number×", "width ≥ 90×", "status: success×", "few: kept×"]
    assert page.js("document.getElementById('q').value") == "number"
    assert page.js("document.getElementById('sort').value") == "-clip.clip_score"
    before = page.text("#count")
    page.click("#chips button")
    page.wait("!location.search.includes('q=')")
    assert before.endswith("of 40 rows")
    page.click("#chips .clear")
    count(page, "40 rows")


def test_facets_and_keys(page, served):
    open_page(page, served)
    page.click("[data-facet='status'] [data-value='timeout'] input")
    count(page, "1 of 40 rows")
    page.click("[data-facet='status'] [data-value='timeout'] input")
    count(page, "40 rows")
    page.js("document.querySelector('.cell').focus()")
    page.press("ArrowRight", 2)
    assert page.js("document.activeElement.dataset.row") == "2"
    page.press("ArrowDown")
    page.press("ArrowUp")
    assert page.js("document.activeElement.dataset.row") == "2"
    page.press("Enter")
    page.wait("document.getElementById('detail-title').textContent.startsWith('row 2')")
    page.press("Escape")
    page.press("?")
    page.wait("document.getElementById('help').open")


def test_a_strangers_caption_is_text(page, served):
    open_page(page, served, "?row=3")
    page.wait("document.getElementById('detail').open")
    assert page.text("#caption") == EVIL
    assert page.js('document.querySelectorAll(\'main img[src="x"], #detail img[src="x"], main script\').length') == 0
    assert page.js("document.title") == "ds · pairmill browse"


def test_the_policy_stops_what_is_written_into_the_page(chromium, served):
    page = chromium.page()
    open_page(page, served)
    page.js(
        "document.body.insertAdjacentHTML('beforeend', '<b id=evil onclick=\"document.title=1\" style=\"color: red\">')"
    )
    page.js("document.getElementById('evil').click()")
    page.js("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 2'}))")
    page.js("(() => { const i = new Image(); i.src = 'http://example.com/a.png'; document.body.append(i) })()")
    assert page.js("document.title") == "ds · pairmill browse"
    said = " ".join(page.errors)
    for stopped in ("inline event handler", "inline style", "inline script", "http://example.com/a.png"):
        assert stopped in said
    page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone(chromium, served, dark):
    page = chromium.page(width=390, height=800, mobile=True, dark=dark)
    open_page(page, served, "?q=number")
    assert page.js("document.documentElement.scrollWidth") == 390
    assert not page.js("document.getElementById('filters').checkVisibility()")
    page.click("#filters-button")
    assert page.js("document.getElementById('filters').checkVisibility()")
    assert page.js("document.getElementById('filters-button').ariaExpanded") == "true"
    page.click("#filters-button")
    page.click("[data-row='6']")
    page.wait("document.getElementById('detail').open && document.getElementById('large').naturalWidth > 0")
    assert page.js("document.getElementById('detail').scrollWidth") <= 390
    paper = page.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(251, 250, 247)")
    assert page.errors == []
    page.close()
