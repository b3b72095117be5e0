"""Every status of the table, from a server that misbehaves that way; deadlines, manners, redirects."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import gzip
import socket
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from curation.body import FREE_BYTES, ByteBudget, Lease, unpack
from curation.config import DownloadConfig
from curation.failures import FetchError, error_text
from curation.fetch import Fetched, Fetcher, data_url, retry_after, user_agent
from schemas.errors import PairmillError
from tests.curation.misbehaving import (
    Web,
    answer,
    drips,
    endless,
    one_after_another,
    resets,
    self_signed,
    sends,
    silent,
    web,
)
from tests.pictures import saved, smooth

IMAGE = saved(Image.fromarray(smooth()), "JPEG")
OK = sends(answer(IMAGE))
BUSY = sends(answer(b"", "429 Too Many Requests", "Retry-After: 1"))
LIMIT = 200_000


def config(**changes: object) -> DownloadConfig:
    values: dict[str, object] = {
        "allow_private": ("127.0.0.1",),
        "timeout": 3.0,
        "connect_timeout": 1.0,
        "first_byte_timeout": 1.0,
        "retries": 0,
        "per_host": 100,
        "host_failures": 1000,
        "max_bytes": LIMIT,
    }
    return DownloadConfig(**{**values, **changes})


def redirect(to: str, status: str = "302 Found"):
    return sends(answer(b"", status, f"Location: {to}"))


def chunked(*lines: bytes):
    return sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"".join(lines), close=True)


def packed(body: bytes, encoding: str):
    return sends(answer(body, "200 OK", f"Content-Encoding: {encoding}"))


# path: (route, status, http_status, a word of the error)
CASES = {
    "/fine.jpg": (OK, "success", 200, None),
    "/lying-type.jpg": (sends(answer(IMAGE, "200 OK", "Content-Type: text/html")), "success", 200, None),
    "/empty": (sends(answer(b"", "204 No Content")), "success", 204, None),
    "/no-length": (sends(b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE, close=True), "success", 200, None),
    "/chunked": (chunked(b"%x\r\n" % len(IMAGE), IMAGE, b"\r\n0\r\n\r\n"), "success", 200, None),
    "/gzip-unasked": (packed(gzip.compress(IMAGE), "gzip"), "success", 200, None),
    "/deflate": (packed(zlib.compress(IMAGE), "deflate"), "success", 200, None),
    "/gzip-claimed": (packed(IMAGE, "gzip"), "success", 200, None),
    "/brotli-claimed": (packed(IMAGE, "br"), "success", 200, None),
    "/brotli": (packed(b"\x1b\x03\x00 something", "br"), "protocol_error", 200, "not asked for"),
    "/gzip-broken": (packed(b"\x1f\x8b broken", "gzip"), "protocol_error", 200, "broken data"),
    "/gzip-cut": (packed(gzip.compress(b"x" * 5000)[:-20], "gzip"), "truncated", 200, "ends early"),
    "/gzip-bomb": (packed(gzip.compress(bytes(10 * LIMIT)), "gzip"), "too_large", 200, "after gzip"),
    "/announced": (sends(answer(b"x", length=LIMIT + 1)), "too_large", 200, "announced"),
    "/endless": (endless(b"HTTP/1.1 200 OK\r\n\r\n", bytes(16384)), "too_large", 200, "more than"),
    "/endless-slow": (endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.02), "timeout", 200, "3 s"),
    "/drip": (drips(IMAGE, 0.02, answer(b"", length=len(IMAGE))), "timeout", 200, "3 s"),
    "/slow-headers": (drips(answer(IMAGE), 0.1), "timeout", None, "no answer"),
    "/endless-headers": (endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.002), "protocol_error", None, "malformed"),
    "/silent": (silent, "timeout", None, "no answer"),
    "/header-flood": (sends(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"), "protocol_error", None, "malf"),
    "/garbage": (sends(b"this is not HTTP\r\n\r\n", close=True), "protocol_error", None, "malformed"),
    "/closed": (sends(b"", close=True), "connect_error", None, "closed"),
    "/reset": (resets(b""), "connect_error", None, ""),
    "/reset-in-body": (resets(answer(IMAGE[:500], length=len(IMAGE))), "truncated", 200, "announced"),
    "/short": (sends(answer(IMAGE[:500], length=len(IMAGE)), close=True), "truncated", 200, "announced"),
    "/lying-shorter": (sends(answer(IMAGE, length=300)), "protocol_error", None, "malformed"),
    "/bad-chunks": (chunked(b"zz\r\nnot a number\r\n"), "protocol_error", 200, "malformed"),
    "/chunks-cut": (chunked(b"ffff\r\nonly this"), "truncated", 200, "announced"),
    "/two-lengths": (
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nabcdefg", close=True),
        "protocol_error", None, "malformed",
    ),
    "/gone": (sends(answer(b"", "404 Not Found")), "http_error", 404, "404"),
    "/down": (sends(answer(b"", "503 Service Unavailable")), "http_error", 503, "503"),
    "/not-modified": (sends(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "http_error", 304, "304"),
    "/loop": (redirect("/loop"), "redirect_error", 302, "loop"),
    "/loop-of-two": (redirect("/back"), "redirect_error", 302, "loop"),
    "/back": (redirect("/loop-of-two"), "redirect_error", 302, "loop"),
    "/hop5": (redirect("hop4"), "success", 200, None),
    "/hop6": (redirect("/hop5", "307 Temporary Redirect"), "redirect_error", 302, "more than 5"),
    "/no-target": (sends(answer(b"", "301 Moved Permanently")), "redirect_error", 301, "no target"),
    "/bad-target": (redirect("http://[::bad/"), "redirect_error", 302, "malformed"),
    "/to-file": (redirect("file:///etc/passwd"), "blocked", 302, "scheme"),
    "/to-data": (redirect("data:image/gif;base64,R0lGODlhAQABAAAAADs="), "blocked", 302, "scheme"),
    "/to-private": (redirect("http://10.0.0.1/x"), "blocked", 302, "not a public address"),
    "/to-metadata": (redirect("http://169.254.169.254/latest/"), "blocked", 302, "not a public"),
    "/to-mapped": (redirect("http://[::ffff:192.168.1.1]/"), "blocked", 302, "not a public"),
    "/to-inside": (redirect("http://inside.test/"), "blocked", 302, "no public address"),
    "/spaced-target": (redirect("/with space é.jpg".encode().decode("latin-1")), "success", 200, None),
    "/noai": (sends(answer(IMAGE, "200 OK", "X-Robots-Tag: noai")), "disallowed", 200, "noai"),
    "/noindex": (
        sends(answer(IMAGE, "200 OK", "X-Robots-Tag: otherbot: noarchive", "X-Robots-Tag: all, noimageindex")),
        "disallowed", 200, "noimageindex",
    ),
    "/for-us": (sends(answer(IMAGE, "200 OK", "X-Robots-Tag: Pairmill: noimageai")), "disallowed", 200, "noimageai"),
    "/for-others": (sends(answer(IMAGE, "200 OK", "X-Robots-Tag: otherbot: noai, noindex")), "success", 200, None),
    "/until": (
        sends(answer(IMAGE, "200 OK", "X-Robots-Tag: unavailable_after: 25 Jun 2040 15:00:00 PST")),
        "success", 200, None,
    ),
}  # fmt: skip
# Asked for by the cases above or below, never a case of their own.
HELPERS = {
    "/hop4": redirect("/hop3"),
    "/hop3": redirect("/hop2"),
    "/hop2": redirect("/hop1"),
    "/hop1": redirect("/fine.jpg"),
    "/with%20space%20%C3%A9.jpg": OK,
    "/a%20b/%E7%8C%AB,c.jpg": OK,
    "/kept%2Cescapes%2f": OK,
    "/100%25.jpg": OK,
}
# URL: (status, a word of the error); BASE is the server's own address.
URLS = {
    "BASE/a b/猫,c.jpg?q=1,2&r=é#part": ("success", None),
    "BASE/kept%2Cescapes%2f?sig=a%2Fb%2B": ("success", None),
    "BASE/100%.jpg": ("success", None),
    " BASE/fine.jpg\n": ("success", None),
    "HTTP://mirror.test:PORT/fine.jpg": ("success", None),
    "http://inside.test:PORT/fine.jpg": ("blocked", "no public address"),
    "http://10.1.2.3/x.jpg": ("blocked", "not a public address"),
    "http://[::1]:PORT/x.jpg": ("blocked", "not a public address"),
    "http://2130706433:PORT/fine.jpg": ("bad_url", "malformed host"),
    "http://127.1:PORT/fine.jpg": ("bad_url", "malformed host"),
    "http://0x7f000001.test:PORT/": ("blocked", "no public address"),
    "http://nowhere.invalid/secret?token=abc": ("dns_error", "not known"),
    "http://slow.test/": ("timeout", "no connection"),
    "http://127.0.0.1:CLOSED/": ("connect_error", "refused"),
    "TLS/fine.jpg": ("tls_error", "self"),
    "": ("bad_url", "missing"),
    "ftp://example.org/a.jpg": ("bad_url", "scheme"),
    "file:///etc/passwd": ("bad_url", "scheme"),
    "//example.org/a.jpg": ("bad_url", "no scheme"),
    "http:///a.jpg": ("bad_url", "no host"),
    "http://exa mple.org/a.jpg": ("bad_url", "host"),
    "http://a:99999/": ("bad_url", "malformed"),
    "http://" + "a" * 20000: ("bad_url", "longer"),
    "data:image/jpeg;base64," + base64.b64encode(IMAGE).decode(): ("success", None),
    "data:image/jpeg;base64,@@@": ("bad_url", "base64"),
    "data:nothing": ("bad_url", "comma"),
    "data:," + "x" * (LIMIT + 1): ("too_large", "more than"),
}


@contextlib.contextmanager
def names():
    """Names of our own: they lead inside, or to loopback; nobody knows one, another's servers are slow."""
    real = socket.getaddrinfo

    def lookup(host: str, *args: object, **options: object) -> list:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if host == "slow.test":
            time.sleep(2.0)
        if host.endswith(".test"):
            host = "127.0.0.1" if host == "mirror.test" else "10.9.9.9"
        return real(host, *args, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        yield


@contextlib.contextmanager
def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield str(sock.getsockname()[1])


async def run_all() -> tuple[dict[str, Fetched], dict[str, float], Web]:
    """All cases at once: the slow ones wait beside each other."""
    routes = {path: case[0] for path, case in CASES.items()} | HELPERS
    outcomes, seconds = {}, {}

    async def one(key: str, url: str) -> None:
        start = time.monotonic()
        outcomes[key] = await fetcher.fetch(url)
        seconds[key] = time.monotonic() - start

    with names(), closed_port() as closed:
        async with web(routes) as site, web({}, tls=self_signed()) as tls, Fetcher(config()) as fetcher:
            places = {"BASE": site.base, "TLS": tls.base, "PORT": site.base.rpartition(":")[2], "CLOSED": closed}
            jobs = [one(path, site.base + path) for path in CASES]
            for key in URLS:
                url = key
                for name, value in places.items():
                    url = url.replace(name, value)
                jobs.append(one(key, url))
            await asyncio.gather(*jobs)
    return outcomes, seconds, site


@pytest.fixture(scope="module")
def done():
    return asyncio.run(run_all())


@pytest.mark.parametrize("path", list(CASES))
def test_every_misbehaviour_has_its_status(done, path):
    _, status, http_status, word = CASES[path]
    got = done[0][path]
    assert (got.status, got.http_status) == (status, http_status), got
    assert (got.data is not None) == (status == "success")
    assert got.attempts == 1
    if word is None:
        assert got.error is None
    else:
        assert got.error.startswith(status + ": ")
        assert word in got.error


@pytest.mark.parametrize("url", list(URLS), ids=lambda url: url[:40])
def test_every_url_has_its_status(done, url):
    status, word = URLS[url]
    got = done[0][url]
    assert got.status == status, got
    if status == "success":
        assert got.data == IMAGE
    else:
        assert word in got.error


def test_bytes_arrive_unchanged(done):
    outcomes = done[0]
    for path in CASES:
        if outcomes[path].status == "success" and path != "/empty":
            assert outcomes[path].data == IMAGE, path
    assert outcomes["/empty"].data == b""


def test_no_row_outlives_its_deadline(done):
    assert max(done[1].values()) < 3.0 + 1.5  # the machine may be busy
    assert done[1]["/silent"] < 2.9, "the answer's head has a shorter deadline"


def test_no_error_holds_a_url(done):
    for got in done[0].values():
        assert "://" not in (got.error or "")
        assert "token" not in (got.error or "")
        assert len(got.error or "") <= 300


def test_the_server_sees_urls_as_given(done):
    asked = {request.target for request in done[2].asked}
    assert "/a%20b/%E7%8C%AB,c.jpg?q=1,2&r=%C3%A9" in asked
    assert "/kept%2Cescapes%2f?sig=a%2Fb%2B" in asked
    assert "/with%20space%20%C3%A9.jpg" in asked
    assert done[2].asked[0].headers["user-agent"].startswith("pairmill/")
    assert done[2].asked[0].headers["accept-encoding"] == "identity"
    assert "cookie" not in done[2].asked[-1].headers


def fetch_all(routes: dict, *paths: str, settings: DownloadConfig | None = None, hosts=None, together=False):
    """(outcomes, server) of `paths` fetched in turn or together."""

    async def go():
        async with web(routes) as site, Fetcher(settings or config(), hosts) as fetcher:
            calls = [fetcher.fetch(path if "://" in path else site.base + path) for path in paths]
            if together:
                return list(await asyncio.gather(*calls)), site
            return [await call for call in calls], site

    return asyncio.run(go())


def test_503_then_fine_is_retried():
    flaky = one_after_another(sends(answer(b"", "503 Service Unavailable")), OK)
    (got,), site = fetch_all({"/x": flaky}, "/x", settings=config(retries=2))
    assert (got.status, got.attempts, got.http_status) == ("success", 2, 200)
    assert site.counts["/x"] == 2


def test_429_waits_as_long_as_asked():
    start = time.monotonic()
    (got,), _ = fetch_all({"/x": one_after_another(BUSY, OK)}, "/x", settings=config(retries=2))
    assert got.status == "success"
    assert time.monotonic() - start >= 1.0


def test_429_beyond_the_deadline_is_left_as_transient():
    later = sends(answer(b"", "429 Too Many Requests", "Retry-After: 3600"))
    start = time.monotonic()
    (got,), site = fetch_all({"/x": later}, "/x", settings=config(retries=2))
    assert (got.status, got.http_status, got.attempts) == ("http_error", 429, 1)
    assert time.monotonic() - start < 1.0
    assert site.counts["/x"] == 1


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "410 Gone"])
def test_final_answers_are_never_retried(status):
    (got,), site = fetch_all({"/x": sends(answer(b"", status))}, "/x", settings=config(retries=5))
    assert (got.status, got.attempts, site.counts["/x"]) == ("http_error", 1, 1)


def test_retries_are_counted_and_end():
    short = sends(answer(IMAGE[:9], length=99), close=True)
    (got,), site = fetch_all({"/x": short}, "/x", settings=config(retries=1, timeout=5.0))
    assert (got.status, got.attempts, site.counts["/x"]) == ("truncated", 2, 2)


def test_robots_tag_is_read_before_the_body_and_can_be_ignored():
    routes = {"/x": endless(answer(b"", "200 OK", "X-Robots-Tag: noai", length=10**9), b"x", 0.01)}
    start = time.monotonic()
    (got,), _ = fetch_all(routes, "/x")
    assert (got.status, time.monotonic() - start < 1.0) == ("disallowed", True)
    tagged = {"/x": sends(answer(IMAGE, "200 OK", "X-Robots-Tag: noai"))}
    (got,), _ = fetch_all(tagged, "/x", settings=config(ignore_x_robots_tag=True))
    assert got.status == "success"


def test_robots_txt_is_obeyed_and_read_once():
    text = b"User-agent: *\nDisallow: /private/\n"
    routes = {"/robots.txt": sends(answer(text)), "/private/x": OK, "/open": OK}
    rows = ("/private/x", "/open", "/private/x")
    got, site = fetch_all(routes, *rows, settings=config(robots_txt=True), together=True)
    assert [one.status for one in got] == ["disallowed", "success", "disallowed"]
    assert site.counts == {"/robots.txt": 1, "/open": 1}


def test_missing_robots_txt_allows_and_an_unreachable_one_says_so():
    got, _ = fetch_all({"/x": OK}, "/x", settings=config(robots_txt=True))
    assert got[0].status == "success"
    down = {"/x": OK, "/robots.txt": sends(answer(b"", "500 Internal Server Error"))}
    got, site = fetch_all(down, "/x", settings=config(robots_txt=True))
    assert got[0].status == "http_error"
    assert "robots.txt" in got[0].error
    assert site.counts["/x"] == 0


def test_skip_hosts_and_opt_out(tmp_path: Path):
    (tmp_path / "skip").write_text("# comment\nExample.org\n")
    (tmp_path / "out").write_text("https://pictures.test/mine.jpg\nartist.test\nsha256:" + "a" * 64 + "\n")
    settings = config(skip_hosts=tmp_path / "skip", opt_out=tmp_path / "out")
    urls = ("http://example.org/a", "http://www.example.org/a", "http://artist.test/", "https://pictures.test/mine.jpg")
    got, _ = fetch_all({}, *urls, settings=settings)
    assert [one.status for one in got] == ["disallowed"] * 4
    assert [one.attempts for one in got] == [0] * 4
    assert Fetcher(settings).has_opted_out(b"\xaa" * 32)
    with names():
        got, _ = fetch_all({}, "http://notexample.invalid/", settings=settings)
    assert got[0].status == "dns_error"


def test_a_list_that_cannot_be_read_is_the_users_to_mend(tmp_path: Path):
    with pytest.raises(PairmillError, match="cannot read"):
        Fetcher(config(skip_hosts=tmp_path / "absent"))
    (tmp_path / "out").write_text("sha256:123\n")
    with pytest.raises(PairmillError, match="64 hex"):
        Fetcher(config(opt_out=tmp_path / "out"))


def test_a_failing_host_rests_and_gets_one_trial():
    down = sends(b"", close=True)
    settings = config(host_failures=3, host_rest=1.0)

    async def go():
        async with web({"/down": down, "/up": OK}) as site, Fetcher(settings) as fetcher:
            first = [(await fetcher.fetch(site.base + "/down")).status for _ in range(5)]
            asked = site.counts["/down"]
            assert (await fetcher.fetch(site.base + "/down")).attempts == 0
            assert site.counts["/down"] == asked
            await asyncio.sleep(1.05)
            trial = [(await fetcher.fetch(site.base + "/down")).status for _ in range(2)]
            await asyncio.sleep(1.05)
            again = await asyncio.gather(*[fetcher.fetch(site.base + "/up") for _ in range(3)])
            after = await fetcher.fetch(site.base + "/up")
            return first, trial, sorted(one.status for one in again), after.status

    first, trial, again, after = asyncio.run(go())
    assert first == ["connect_error"] * 3 + ["host_resting"] * 2
    assert trial == ["connect_error", "host_resting"]
    assert again == ["host_resting", "host_resting", "success"]
    assert after == "success"


def test_missing_pages_do_not_put_a_host_to_rest():
    got, _ = fetch_all({}, *["/gone"] * 6, settings=config(host_failures=2))
    assert {one.status for one in got} == {"http_error"}


def test_connections_per_host_are_bounded():
    async def slow(asked, writer):
        await asyncio.sleep(0.03)
        writer.write(answer(IMAGE))

    got, site = fetch_all({"/x": slow}, *["/x"] * 20, settings=config(per_host=3), together=True)
    assert {one.status for one in got} == {"success"}
    assert site.open_most == 3


def test_rows_that_redirect_to_each_others_hosts_do_not_lock_up():
    with names():

        async def go():
            routes = {"/image": OK}
            async with web(routes) as site, Fetcher(config(per_host=1)) as fetcher:
                other = site.base.replace("127.0.0.1", "mirror.test")
                routes["/there"] = redirect(other + "/image")
                routes["/here"] = redirect(site.base + "/image")
                urls = [site.base + "/there", other + "/here"] * 5
                return await asyncio.gather(*map(fetcher.fetch, urls))

        assert {one.status for one in asyncio.run(go())} == {"success"}


def test_a_name_may_be_allowed_without_its_address():
    with names():

        async def go():
            async with web({"/x": OK}) as site, Fetcher(config(allow_private=("Mirror.test",))) as fetcher:
                named = site.base.replace("127.0.0.1", "mirror.test") + "/x"
                return [(await fetcher.fetch(url)).status for url in (named, site.base + "/x")]

        assert asyncio.run(go()) == ["success", "blocked"]


def test_a_shorter_length_than_the_body_is_believed():
    got, _ = fetch_all({"/x": sends(answer(IMAGE[:300]), IMAGE[300:], close=True)}, "/x")
    assert got[0].data == IMAGE[:300]


def test_a_lying_length_does_not_poison_the_next_row():
    smuggled = answer(IMAGE[:100], length=100) + answer(b"not yours")
    got, _ = fetch_all({"/liar": sends(smuggled), "/x": OK}, "/liar", "/x", "/x")
    assert [one.data for one in got] == [IMAGE[:100], IMAGE, IMAGE]


def test_a_proxy_from_the_environment_is_used_only_when_configured(monkeypatch):
    async def go(use: bool):
        async with web({}) as proxy:
            proxy.routes["http://pictures.invalid/x"] = OK
            monkeypatch.setenv("http_proxy", proxy.base)
            monkeypatch.setenv("no_proxy", "")
            # The proxy is private and not in allow_private: it is the user's own.
            async with Fetcher(config(proxy_from_environment=use, allow_private=())) as fetcher:
                urls = ("http://pictures.invalid/x", "http://10.0.0.1/x", proxy.base + "/x")
                return [(await fetcher.fetch(url)).status for url in urls], len(proxy.asked)

    with names():
        assert asyncio.run(go(True)) == (["success", "blocked", "blocked"], 1)
        assert asyncio.run(go(False)) == (["dns_error", "blocked", "blocked"], 0)


def test_user_agent_is_honest():
    assert user_agent("").startswith("pairmill/")
    assert user_agent("me@example.org").endswith(" (+me@example.org)")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        ("soon", None),
        ("-5", None),
        (email.utils.formatdate(1000.0, usegmt=True), 400.0),
        (email.utils.formatdate(10.0, usegmt=True), 0.0),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after(value, 600.0) == seconds


def test_data_url_forms():
    assert data_url("data:,a%20b", 10) == b"a b"
    assert data_url("data:text/plain;base64,YQ", 10) == b"a"
    assert data_url("data:;BASE64, YWJj\n", 10) == b"abc"


def test_unpack_is_bounded_while_unpacking():
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(FetchError, match="too_large"):
        unpack(bomb, "gzip", 1000)


def test_error_text_hides_urls_and_is_short():
    text = error_text("connect_error", "to https://user:pass@host/?sig=1 at 0x7f0012345678\n failed " + "x" * 400)
    assert "pass" not in text
    assert "sig" not in text
    assert "0x7f" not in text
    assert "\n" not in text
    assert len(text) == 300


def test_large_bodies_share_a_budget():
    async def go():
        budget = ByteBudget(total=10 * FREE_BYTES)
        leases = [Lease(budget) for _ in range(5)]
        order = []

        async def read(i: int):
            await leases[i].grow(4 * FREE_BYTES)
            await leases[i].grow(4 * FREE_BYTES)  # asks once
            order.append(i)
            await asyncio.sleep(0.01)
            leases[i].release()
            leases[i].release()

        tasks = [asyncio.create_task(read(i)) for i in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        at_once = len(order)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await budget.take(10 * FREE_BYTES)  # all of it came back
        small = Lease(budget)
        await small.grow(FREE_BYTES)  # small bodies never wait
        return at_once, order

    assert asyncio.run(asyncio.wait_for(go(), 5)) == (2, [0, 1, 3, 4])
