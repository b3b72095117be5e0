"""What every page of pairmill keeps to: who may ask, and what a browser may do with the answer.

Wraps any ASGI application. A request is refused
- whose Host is not ours: a name of a stranger's that leads to this machine (DNS rebinding);
- that comes from another page (Origin, Sec-Fetch-Site) and is no plain visit;
- that changes something without the Origin of this page or as anything but JSON: a form on another site sends neither;
- whose body is larger than 64 KiB.
Every answer carries a Content-Security-Policy that lets the page load from here and from nowhere else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

MAX_BODY = 64 << 10
SAFE = frozenset({"GET", "HEAD"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


def is_loopback(host: str) -> bool:
    """Whether an address to listen on reaches this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """The one security layer.

    host     the address that is listened on; beyond loopback any address by number is taken as ours, for rebinding
             needs a name
    allowed  further names
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", allowed: Iterable[str] = ()) -> None:
        self.app = app
        self.names = LOOPBACK | {host.lower()} | {name.lower() for name in allowed}
        self.any_number = not is_loopback(host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _headers(scope)
        refusal = self._refusal(scope["method"], headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self.app(scope, _bounded(receive), _guarded(send))

    def _refusal(self, method: str, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 421, "This server does not go by that name. Start it with --allow-host NAME to allow one."
        origins = headers.get("origin", [])
        if origins and origins != [f"http://{hosts[0]}"] and origins != [f"https://{hosts[0]}"]:
            return 403, "Another page asked."
        site = headers.get("sec-fetch-site", ["same-origin"])
        visit = method in SAFE and headers.get("sec-fetch-mode") == ["navigate"]
        if site not in (["same-origin"], ["none"]) and not visit:
            return 403, "Another page asked."
        if method not in SAFE:
            kind = headers.get("content-type", [""])[0].split(";")[0].strip().lower()
            if not origins or kind != "application/json":
                return 403, "A change needs this page's Origin and JSON."
            if not headers.get("content-length", ["x"])[0].isdigit():
                return 411, "A change needs its length."
            if int(headers["content-length"][0]) > MAX_BODY:
                return 413, "That is more than 64 KiB."
        return None

    def _is_ours(self, host: str) -> bool:
        name = _name_of(host)
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_number


def _headers(scope: Any) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        out.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return out


def _name_of(host: str) -> str:
    """The host of `HOST:PORT`, lower case; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name, _, port = host.partition(":")
    return name.lower().removesuffix(".") if not port or port.isdigit() else ""


def _bounded(receive: Any) -> Any:
    """A body that ends the request where it is larger than its length said (a server that does not check)."""
    read = 0

    async def bounded() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return {"type": "http.disconnect"} if read > MAX_BODY else message

    return bounded


def _guarded(send: Any) -> Any:
    async def guarded(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": _with_ours(message.get("headers", []))}
        await send(message)

    return guarded


def _with_ours(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    kept = [(n, v) for n, v in headers if n.decode("latin-1").lower() not in HEADERS]
    if not any(n.lower() == b"cache-control" for n, _ in kept):
        kept.append((b"cache-control", b"no-store"))
    return [*kept, *((n.encode(), v.encode()) for n, v in HEADERS.items())]


async def _answer(send: Any, status: int, text: str) -> None:
    body = text.encode()
    about = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": _with_ours(about)})
    await send({"type": "http.response.body", "body": body})
