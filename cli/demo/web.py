"""A small web on loopback that serves pages from memory and misbehaves as the real one does."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType

from schemas.errors import PairmillError

BEHAVIOURS = ("answer", "slow", "cut", "reset", "stall")
_MAX_REQUEST_BYTES = 64 * 1024
_SLOW_PIECES = 6


@dataclass(frozen=True)
class Page:
    """What a path answers.

    behaviour  answer: at once; slow: in pieces over `slow_s`; cut: announces the whole body, sends half and
               closes; reset: closes without a word; stall: says nothing for `stall_s`, then closes
    location   the target of a redirect (status 3xx), else ""
    """

    body: bytes = b""
    status: int = 200
    content_type: str = "image/jpeg"
    location: str = ""
    behaviour: str = "answer"


_NOT_FOUND = Page(b"<html>no such page</html>", 404, "text/html")


class SmallWeb:
    """Serves `pages` (path -> Page, query strings ignored) on 127.0.0.1 from a thread of its own.

        with SmallWeb({"/a.jpg": Page(jpeg)}) as web:
            fetch(web.url + "/a.jpg")

    port 0 takes a free one. `requests` counts what was asked. GET and HEAD, HTTP/1.1 with keep-alive.
    Raises PairmillError when the port is taken.
    """

    def __init__(self, pages: Mapping[str, Page], port: int = 0, stall_s: float = 1.5, slow_s: float = 0.3) -> None:
        self.pages = pages
        self.stall_s = stall_s
        self.slow_s = slow_s
        self.requests = 0
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="small-web", daemon=True)
        self._ready = threading.Event()
        self._open: set[asyncio.Transport] = set()

    def __enter__(self) -> SmallWeb:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        loop = self._loop
        server = loop.run_until_complete(loop.create_server(lambda: _Connection(self), sock=self._socket))
        self._ready.set()
        loop.run_forever()
        server.close()
        for transport in list(self._open):
            transport.abort()
        # One more turn lets the transports close their sockets.
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _listen(port: int) -> socket.socket:
    """A bound socket that already queues connections, so that the web can be used at once."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise PairmillError(
            f"Port {port} on 127.0.0.1 cannot be served: {error.strerror}. "
            "Stop the program that holds it, or choose another port."
        ) from None
    return listener


class _Connection(asyncio.Protocol):
    """One client: requests are answered in the order in which they came."""

    def __init__(self, web: SmallWeb) -> None:
        self.web = web
        self.buffer = b""
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.web._open.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.web._open.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) > _MAX_REQUEST_BYTES:
            self.transport.abort()
            return
        self._answer_waiting()

    def _answer_waiting(self) -> None:
        while not self.busy and b"\r\n\r\n" in self.buffer:
            request, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        self.web.requests += 1
        words = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or words[0] not in ("GET", "HEAD"):
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
            return
        page = self.web.pages.get(words[1].split("?", 1)[0], _NOT_FOUND)
        self._behave(page, page.body if words[0] == "GET" else b"")

    def _behave(self, page: Page, body: bytes) -> None:
        head = _head(page)
        if page.behaviour == "answer":
            self.transport.write(head + body)
        elif page.behaviour == "cut":
            self.transport.write(head + body[: len(body) // 2])
            self.transport.close()
        elif page.behaviour == "reset":
            self.transport.abort()
        elif page.behaviour == "stall":
            self.busy = True
            self.web._loop.call_later(self.web.stall_s, self.transport.abort)
        else:
            self.busy = True
            step = -(-len(body) // _SLOW_PIECES) or 1
            self._drip([head, *(body[i : i + step] for i in range(0, len(body), step))])

    def _drip(self, pieces: list[bytes]) -> None:
        """Send one piece now and the others later; then go on with what waits."""
        self.transport.write(pieces[0])
        if len(pieces) > 1:
            self.web._loop.call_later(self.web.slow_s / _SLOW_PIECES, self._drip, pieces[1:])
            return
        self.busy = False
        self._answer_waiting()


def _head(page: Page) -> bytes:
    lines = [
        f"HTTP/1.1 {page.status} {HTTPStatus(page.status).phrase}",
        f"content-type: {page.content_type}",
        f"content-length: {len(page.body)}",
    ]
    if page.location:
        lines.append(f"location: {page.location}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
