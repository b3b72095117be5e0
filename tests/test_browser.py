"""The driver sees what goes wrong in a page, and reaches what is on it."""

import pytest

from tests.browser import BrowserError

PAGE = """<!doctype html><title>t</title>
<style>@media (prefers-color-scheme: dark) { body { background: #000 } }</style>
<button id="b" onclick="document.title = 'clicked'">b</button><input id="i" oninput="document.title = this.value">
<input id="r" type="range" min="0" max="10" value="5"><p style="height: 3000px">tall</p>"""


@pytest.fixture
def page_file(tmp_path):
    def write(more=""):
        path = tmp_path / "page.html"
        path.write_text(PAGE + more)
        return path.as_uri()

    return write


def test_click_type_press_and_look(chromium, page_file, tmp_path):
    page = chromium.page(width=400, height=300, dark=True)
    page.goto(page_file())
    page.click("#b")
    assert page.js("document.title") == "clicked"
    page.click("#i")
    page.type("häuser 犬")
    assert page.js("document.title") == "häuser 犬"
    page.js("document.getElementById('r').focus()")
    page.press("ArrowRight", 2)
    assert page.js("document.getElementById('r').value") == "7"
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(0, 0, 0)"
    page.screenshot(tmp_path / "view.png")
    page.screenshot(tmp_path / "whole.png", whole=True)
    from PIL import Image

    assert Image.open(tmp_path / "view.png").size == (400, 300)
    assert Image.open(tmp_path / "whole.png").size[1] > 3000
    assert page.errors == []
    page.close()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("<script>console.error('oh')</script>", "oh"),
        ("<script>null.x</script>", "TypeError"),
        ("<img src='missing.png'>", "missing.png"),
        ("<img src='http://example.com/a.png'>", "example.com"),
    ],
)
def test_faults_are_seen(chromium, page_file, more, said):
    page = chromium.page()
    page.goto(page_file(more))
    assert any(said in e for e in page.errors)
    page.close()


def test_waiting_ends_and_covered_buttons_are_told(chromium, page_file):
    page = chromium.page()
    page.goto(page_file("<div style='position: fixed; inset: 0'></div>"))
    with pytest.raises(BrowserError, match="still false"):
        page.wait("false", timeout=0.1)
    with pytest.raises(BrowserError, match="lies over it"):
        page.click("#b")
    with pytest.raises(BrowserError, match="Error: no"):
        page.js("(() => { throw Error('no') })()")
    page.close()
