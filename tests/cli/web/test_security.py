"""The security layer that every page shares, around an application that answers everything."""

import asyncio

import pytest

from cli.web.security import HEADERS, MAX_BODY, POLICY, Guard, is_loopback

OURS = "127.0.0.1:8765"
CHANGE = {"content-type": "application/json", "content-length": "2", "origin": f"http://{OURS}"}


async def echo(scope, receive, send):
    message = await receive()
    told = message["type"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"ALLOW")]})
    await send({"type": "http.response.body", "body": told})


def ask(headers, method="GET", listening="127.0.0.1", allowed=(), body=b"{}", kind="http"):
    """(status, headers, body) of one request; `headers` are pairs or a dict."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    pairs = list(headers.items()) if isinstance(headers, dict) else headers
    scope = {"type": kind, "method": method, "headers": [(n.encode(), v.encode()) for n, v in pairs]}
    asyncio.run(Guard(echo, listening, allowed)(scope, receive, send))
    if kind == "websocket":
        return sent[0]
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.parametrize("host", [OURS, "localhost:8765", "LOCALHOST.", "[::1]:8765", "127.0.0.1", "localhost:9000"])
def test_names_of_this_machine_are_ours(host):
    status, headers, body = ask({"host": host})
    assert (status, body) == (200, b"http.request")
    assert {n: headers[n.encode()].decode() for n in HEADERS} == HEADERS
    assert headers[b"cache-control"] == b"no-store"
    assert b"X-Frame-Options" not in headers


def test_the_policy_lets_nothing_in_from_outside():
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'"}
    assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1:80@evil.example"},
        {"host": "localhost:x"},
        {"host": "192.168.0.7:8765"},
        [("host", OURS), ("host", "evil.example")],
    ],
)
def test_other_names_are_refused(headers):
    status, answered, body = ask(headers)
    assert status == 421
    assert body != b"http.request"
    assert answered[b"content-security-policy"].decode() == POLICY


def test_beyond_loopback_numbers_and_allowed_names_are_ours():
    for host, status in [
        ("192.168.0.7:8765", 200),
        ("[fd00::1]:8765", 200),
        ("box.example", 200),
        ("localhost", 200),
        ("evil.example", 421),
    ]:
        assert ask({"host": host}, listening="0.0.0.0", allowed=["Box.example"])[0] == status
    assert ask({"host": "box"}, listening="box")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": f"http://{OURS}.evil.example"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_other_pages_are_refused(headers):
    assert ask({"host": OURS, **headers})[0] == 403
    assert ask({"host": OURS, **CHANGE, **headers}, "POST")[0] == 403


def test_a_link_elsewhere_may_lead_here():
    assert ask({"host": OURS, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})[0] == 200
    headers = {"host": OURS, **CHANGE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask(headers, "POST")[0] == 403


def test_changes_need_origin_json_and_a_small_body():
    good = {"host": OURS, **CHANGE}
    assert ask(good, "POST")[0] == 200
    assert ask(good | {"content-type": "application/json; charset=utf-8"}, "POST")[0] == 200
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask({k: v for k, v in good.items() if k != "origin"}, method)[0] == 403
        assert ask(good | {"content-type": "text/plain"}, method)[0] == 403
    assert ask({k: v for k, v in good.items() if k != "content-type"}, "POST")[0] == 403
    assert ask({k: v for k, v in good.items() if k != "content-length"}, "POST")[0] == 411
    assert ask(good | {"content-length": str(MAX_BODY + 1)}, "POST")[0] == 413
    assert ask(good, "POST", body=b" " * (MAX_BODY + 1))[2] == b"http.disconnect"


def test_sockets_are_closed():
    assert ask({"host": OURS}, kind="websocket") == {"type": "websocket.close", "code": 1008}


def test_loopback():
    assert [
        is_loopback(h) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "::", "box", "10.0.0.1")
    ] == [
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
