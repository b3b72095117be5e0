"""A shard's rows: order, images and refusals side by side, stragglers, hooks, hopelessness."""

import asyncio
import contextlib
import hashlib
import threading
import time

import pytest
from PIL import Image

from curation.config import DownloadConfig
from curation.rows import HopelessWatch, Request, fetch_rows
from schemas.status import STATUSES, is_transient
from shards.images import decode_rgb
from tests.curation.misbehaving import answer, sends, silent, web
from tests.pictures import exif_block, photograph, saved, smooth

PICTURE = photograph(320, 240, 1)
JPEG = saved(Image.fromarray(PICTURE), "JPEG")
BODIES = {
    "/a.jpg": JPEG,
    "/kept.png": saved(Image.fromarray(smooth()), "PNG"),
    "/lying.jpg": saved(Image.fromarray(smooth()), "JPEG", exif=exif_block(6)),
    "/page.jpg": b"<!doctype html><p>This image was removed",
    "/empty.jpg": b"",
    "/cut.jpg": JPEG[:-900],
    "/tiny.png": saved(Image.fromarray(smooth(8, 8)), "PNG"),
    "/long.png": saved(Image.fromarray(smooth(400, 20)), "PNG"),
    "/bomb.png": saved(Image.new("1", (3000, 3000)), "PNG"),
}


def config(**changes: object) -> DownloadConfig:
    values: dict[str, object] = {
        "allow_private": ("127.0.0.1",),
        "timeout": 2.0,
        "connect_timeout": 1.0,
        "first_byte_timeout": 0.5,
        "retries": 0,
        "size": 120,
        "min_side": 10,
        "max_aspect": 5.0,
        "max_pixels": 1_000_000,
    }
    return DownloadConfig(**{**values, **changes})


@contextlib.contextmanager
def serving(routes):
    """The loopback server in a thread of its own: `fetch_rows` runs its own loop."""
    loop = asyncio.new_event_loop()
    ready, over = threading.Event(), asyncio.Event()
    sites = []

    async def serve():
        async with web(routes) as site:
            sites.append(site)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(5)
        yield sites[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


@pytest.fixture(scope="module")
def site():
    routes = {path: sends(answer(body)) for path, body in BODIES.items()}
    with serving({**routes, "/silent": silent}) as site:
        yield site


EXPECTED = {
    "/a.jpg": "success",
    "/kept.png": "success",
    "/lying.jpg": "success",
    "/page.jpg": "not_image",
    "/empty.jpg": "not_image",
    "/cut.jpg": "decode_error",
    "/tiny.png": "too_small",
    "/long.png": "bad_aspect",
    "/bomb.png": "bomb",
    "/silent": "timeout",
    "/missing": "http_error",
}


def test_rows_come_back_in_order_with_their_statuses(site):
    paths = [*EXPECTED, *reversed(EXPECTED)]
    rows = [Request(site.base + path) for path in paths] + [Request(None), Request("x:y")]
    start = time.monotonic()
    results = fetch_rows(rows, config())
    assert time.monotonic() - start < 2.0 + 1.5, "no straggler holds a shard longer than its deadline"
    assert [result.status for result in results] == [EXPECTED[path] for path in paths] + ["bad_url"] * 2
    for path, result in zip(paths, results, strict=False):
        assert result.status in STATUSES
        assert (result.image is not None) == (result.status == "success")
        assert (result.error is None) == (result.status == "success")
        if path in BODIES:
            assert (result.received_bytes, result.http_status) == (len(BODIES[path]), 200)
        assert "://" not in (result.error or "")
        assert abs(result.fetched_at - time.time()) < 60


def test_images_are_stored_as_configured(site):
    rows = [Request(site.base + path) for path in ("/a.jpg", "/kept.png", "/lying.jpg")]
    resized, kept, turned = (result.image for result in fetch_rows(rows, config()))
    assert (resized.width, resized.height, resized.original_width) == (160, 120, 320)
    assert resized.sha256 == hashlib.sha256(JPEG).digest()
    assert decode_rgb(resized.image).shape == (120, 160, 3)
    assert kept.image == BODIES["/kept.png"]
    assert kept.format == "png"
    assert (turned.width, turned.height) == (40, 60)


def test_expected_hashes(site, tmp_path):
    good, bad = hashlib.md5(JPEG).hexdigest(), hashlib.sha256(b"other").hexdigest()
    rows = [Request(site.base + "/a.jpg", f"md5:{good}"), Request(site.base + "/a.jpg", f"sha256:{bad}")]
    assert [r.status for r in fetch_rows(rows, config())] == ["success", "hash_mismatch"]
    (tmp_path / "out").write_text(f"sha256:{hashlib.sha256(JPEG).hexdigest()}\n")
    (refused,) = fetch_rows(rows[:1], config(opt_out=tmp_path / "out"))
    assert (refused.status, refused.image) == ("disallowed", None)


def test_the_row_in_hand_is_held_while_it_is_decoded(site):
    held, calling = [], threading.current_thread()

    @contextlib.contextmanager
    def hold(row: int):
        assert threading.current_thread() is not calling
        held.append(row)
        yield

    rows = [Request(site.base + path) for path in ("/a.jpg", "/missing", "/cut.jpg")]
    fetch_rows(rows, config(decode_threads=2), hold=hold)
    assert sorted(held) == [0, 2]


def test_results_may_be_replaced_as_they_come(site):
    seen = {}

    def spill(row, result):
        seen[row] = result.status
        return row

    rows = [Request(site.base + path) for path in ("/missing", "/a.jpg", "/page.jpg")]
    assert fetch_rows(rows, config(), on_result=spill) == [0, 1, 2]
    assert seen == {0: "http_error", 1: "success", 2: "not_image"}


def test_what_a_hook_raises_stops_the_run(site):
    def stop(row, result):
        raise OSError("no space left")

    start = time.monotonic()
    with pytest.raises(OSError, match="no space left"):
        fetch_rows([Request(site.base + "/a.jpg"), Request(site.base + "/silent")], config(timeout=20), on_result=stop)
    assert time.monotonic() - start < 5


def test_no_rows():
    assert fetch_rows([], config()) == []


def test_same_rows_same_images(site):
    rows = [Request(site.base + path) for path in EXPECTED if path != "/silent"]
    first, second = (fetch_rows(rows, config(connections=n)) for n in (1, 8))
    assert [(r.status, r.image, r.error) for r in first] == [(r.status, r.image, r.error) for r in second]


def test_hopeless_when_nearly_all_fail_for_one_cause():
    watch = HopelessWatch(rows=100)
    for i in range(100):
        assert watch.cause is None
        if i < 30:
            watch.observe("dns_error", None, "dns_error: Name or service not known")
        elif i < 97:
            watch.observe("host_resting", None, "host_resting: its host failed too often in a row")
        else:
            watch.observe("success")
    assert watch.cause == "dns_error: Name or service not known"
    watch.observe("success")
    assert watch.cause is not None


@pytest.mark.parametrize(
    "statuses",
    [
        [("http_error", 403)] * 95 + [("success", 200)] * 5,
        [("http_error", 404)] * 50 + [("http_error", 403)] * 50,
        [("timeout", None)] * 50 + [("connect_error", None)] * 50,
        [("success", 200)] * 100,
        [("dns_error", None)] * 99,
    ],
)
def test_not_hopeless(statuses):
    watch = HopelessWatch(rows=100)
    for status, http_status in statuses:
        watch.observe(status, http_status)
    assert watch.cause is None


def test_hopeless_names_the_http_status():
    watch = HopelessWatch(rows=10)
    for _ in range(10):
        watch.observe("http_error", 407)
    assert watch.cause == "http_error 407"
    assert not is_transient("http_error", 407)
