"""The small web misbehaves as told; the noisy list records the truth."""

import asyncio
import http.client
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest

from cli.demo.foreign import LANGUAGES
from cli.demo.noise import LABELS, SHARES, plant_noise, scene_seed
from cli.demo.scenes import encode, generate_scene
from cli.demo.web import Page, SmallWeb
from schemas.errors import PairmillError

JPEG = encode(generate_scene(1, 128).image)


def _get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status, answer.headers["content-type"], answer.read()


def test_answers_redirects_and_odd_types():
    pages = {
        "/a.jpg": Page(JPEG),
        "/text.jpg": Page(JPEG, content_type="text/plain"),
        "/moved.jpg": Page(status=301, location="/a.jpg"),
        "/slow.jpg": Page(JPEG, behaviour="slow"),
    }
    with SmallWeb(pages, slow_s=0.06) as web:
        assert _get(web.url + "/a.jpg?size=2") == (200, "image/jpeg", JPEG)
        assert _get(web.url + "/text.jpg") == (200, "text/plain", JPEG)
        assert _get(web.url + "/moved.jpg") == (200, "image/jpeg", JPEG)
        start = time.perf_counter()
        assert _get(web.url + "/slow.jpg")[2] == JPEG
        assert time.perf_counter() - start > 0.04
        assert web.requests == 5


@pytest.mark.parametrize("status", [404, 410, 500])
def test_error_statuses(status):
    with SmallWeb({"/x": Page(b"no", status, "text/html")}) as web:
        with pytest.raises(urllib.error.HTTPError) as caught:
            _get(web.url + "/x")
    assert caught.value.code == status


def test_unknown_path_is_404():
    with SmallWeb({}) as web, pytest.raises(urllib.error.HTTPError, match="404"):
        _get(web.url + "/nowhere")


def test_cut_reset_and_stall():
    pages = {name: Page(JPEG, behaviour=name[1:]) for name in ("/cut", "/reset", "/stall")}
    with SmallWeb(pages, stall_s=0.2) as web:
        with pytest.raises(http.client.IncompleteRead):
            _get(web.url + "/cut")
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            _get(web.url + "/reset")
        start = time.perf_counter()
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            _get(web.url + "/stall")
        assert 0.15 < time.perf_counter() - start < 3


def test_keep_alive_head_and_bad_requests():
    with SmallWeb({"/a": Page(JPEG), "/b": Page(JPEG, behaviour="slow")}, slow_s=0.05) as web:
        link = http.client.HTTPConnection("127.0.0.1", web.port, timeout=5)
        for method, size in (("GET", len(JPEG)), ("HEAD", 0), ("GET", len(JPEG))):
            link.request(method, "/a")
            answer = link.getresponse()
            assert int(answer.headers["content-length"]) == len(JPEG)
            assert len(answer.read()) == size
        link.request("POST", "/a")
        assert link.getresponse().status == 400
        link.close()


def test_pipelined_requests_are_answered_in_order():
    async def ask(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow HTTP/1.1\r\n\r\nGET /fast HTTP/1.1\r\n\r\n")
        heads = []
        for _ in range(2):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            await reader.readexactly(4)
        writer.close()
        return heads

    pages = {"/slow": Page(b"1234", content_type="a/slow", behaviour="slow"), "/fast": Page(b"5678")}
    with SmallWeb(pages, slow_s=0.05) as web:
        heads = asyncio.run(ask(web.port))
    assert b"a/slow" in heads[0]
    assert b"image/jpeg" in heads[1]


def test_taken_port_is_named():
    with SmallWeb({}) as web, pytest.raises(PairmillError, match=str(web.port)):
        SmallWeb({}, port=web.port)


def test_the_port_is_free_again_afterwards():
    with SmallWeb({"/a": Page(b"x")}) as web:
        _get(web.url + "/a")
    with SmallWeb({"/a": Page(b"y")}, port=web.port) as again:
        assert _get(again.url + "/a")[2] == b"y"


def test_many_requests_a_second():
    """Serves over 1000 a second; the floor here leaves room for a busy machine."""

    async def one(port, n):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(n):
            writer.write(b"GET /a HTTP/1.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(len(JPEG))) == len(JPEG)
        writer.close()

    async def many(port):
        await asyncio.gather(*(one(port, 100) for _ in range(8)))

    with SmallWeb({"/a": Page(JPEG)}) as web:
        start = time.perf_counter()
        asyncio.run(many(web.port))
        rate = 800 / (time.perf_counter() - start)
    assert rate > 300


NOISY = plant_noise(400, seed=3, size=64)


def test_shares_are_as_asked():
    counts = {name: sum(p.truth == name for p in NOISY.pairs) for name in LABELS}
    assert {name: counts[name] for name in SHARES} == {n: round(s * 400) for n, s in SHARES.items()}
    assert counts["clean"] == 400 - sum(round(s * 400) for s in SHARES.values())
    only = plant_noise(40, size=64, shares={"filename": 0.5})
    assert sum(p.truth == "filename" for p in only.pairs) == 20
    assert sum(p.truth == "clean" for p in only.pairs) == 20


def test_captions_fit_exactly_where_the_truth_says_so():
    for pair in NOISY.pairs:
        scene = generate_scene(pair.scene, 64)
        if pair.truth == "wrong_caption":
            assert pair.caption not in scene.captions
        elif pair.truth == "filename":
            assert pair.caption.rsplit(".", 1)[1].lower() in ("jpg", "jpeg", "png", "psd")
        elif pair.truth != "language":
            assert pair.caption in scene.captions


def test_wrong_captions_are_false():
    scenes = [generate_scene(p.scene, 64) for p in NOISY.pairs]
    drawn = [generate_scene(scene_seed(3, row), 64) for row in range(len(scenes))]
    claims = {c.text: c for scene in drawn for c in scene.described}
    wrong = [(p, s) for p, s in zip(NOISY.pairs, scenes, strict=True) if p.truth == "wrong_caption"]
    assert wrong
    for pair, scene in wrong:
        assert not scene.fits(claims[pair.caption])


def test_duplicates_point_to_their_original():
    for pair in NOISY.pairs:
        if pair.truth in ("duplicate", "reencoded"):
            original = NOISY.pairs[pair.of]
            assert original.truth == "clean"
            assert original.scene == pair.scene
            same = NOISY.pages[pair.path].body == _body(original.path)
            assert same == (pair.truth == "duplicate")
        else:
            assert pair.of == -1


def _body(path):
    page = NOISY.pages[path]
    return _body(page.location) if page.location else page.body


def _decode(body):
    return cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR) if body else None


def test_images_are_what_the_truth_says():
    for pair in NOISY.pairs:
        page = NOISY.pages[pair.path]
        if pair.truth == "dead_link":
            assert page.status >= 300 or page.behaviour in ("reset", "stall")
        elif pair.truth == "tiny":
            assert max(_decode(page.body).shape[:2]) < 40
        elif pair.truth == "corrupt" and pair.detail in ("html", "empty"):
            assert _decode(page.body) is None
        elif pair.truth == "corrupt":
            assert page.body.startswith(b"\xff\xd8")
        else:
            assert min(_decode(_body(pair.path)).shape[:2]) >= 56


def test_every_variety_occurs_in_a_larger_list():
    many = plant_noise(600, seed=1, size=32, shares={"dead_link": 0.3, "corrupt": 0.2, "language": 0.3})
    details = {(p.truth, p.detail) for p in many.pairs}
    assert {d for t, d in details if t == "language"} == set(LANGUAGES)
    assert {d for t, d in details if t == "dead_link"} >= {"404", "410", "500", "reset", "stall"}
    assert {d for t, d in details if t == "corrupt"} == {"truncated", "html", "garbage", "empty"}


def test_same_arguments_same_list_with_workers():
    one, other = plant_noise(70, seed=5, size=48), plant_noise(70, seed=5, size=48, workers=2)
    assert one.pairs == other.pairs
    assert one.pages == other.pages
    assert plant_noise(70, seed=6, size=48).pairs != one.pairs


def test_table_has_every_row():
    table = NOISY.table("http://127.0.0.1:9")
    assert table.column_names == ["url", "caption", "truth", "truth_detail", "truth_scene", "truth_of"]
    assert table.num_rows == 400
    assert table["url"][7].as_py() == "http://127.0.0.1:9" + NOISY.pairs[7].path


@pytest.mark.parametrize(
    ("shares", "message"),
    [({"dead_lnk": 0.1}, "dead_link"), ({"tiny": 0.6, "corrupt": 0.6}, "at most 1"), ({"tiny": -1}, "0 or")],
)
def test_bad_shares_are_named(shares, message):
    with pytest.raises(PairmillError, match=message):
        plant_noise(10, shares=shares)


def test_a_list_without_clean_rows_has_no_duplicates():
    noisy = plant_noise(10, size=48, shares={"filename": 0.5, "duplicate": 0.5})
    assert sorted({p.truth for p in noisy.pairs}) == ["clean", "filename"]
