"""A threaded web on loopback for whole runs: images by number, and a few ways to fail."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def picture(number: int, width: int = 40, height: int = 30) -> bytes:
    """A JPEG that is another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=60)
    return sink.getvalue()


@dataclass
class Loopback:
    """`base` + `/img/N` is a picture, `/gone/N` 404, `/busy/N` 503.

    `/flaky/N` is 503 until `heal` is set, a picture then; `files` answers by path.
    """

    base: str
    heal: threading.Event = field(default_factory=threading.Event)
    asked: Counter[str] = field(default_factory=Counter)
    files: dict[str, bytes] = field(default_factory=dict)
    delay_s: float = 0.0
    open_now: int = 0
    open_most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str) -> tuple[int, bytes]:
        with self.lock:
            self.asked[path] += 1
            self.open_now += 1
            self.open_most = max(self.open_most, self.open_now)
        try:
            time.sleep(self.delay_s)
            return self._answer(path)
        finally:
            with self.lock:
                self.open_now -= 1

    def _answer(self, path: str) -> tuple[int, bytes]:
        if path in self.files:
            return 200, self.files[path]
        _, kind, number = path.split("/")
        if kind == "img" or (kind == "flaky" and self.heal.is_set()):
            return 200, picture(int(number))
        return (404 if kind == "gone" else 503), b"no"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextlib.contextmanager
def loopback() -> Iterator[Loopback]:
    """The web, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body = state.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    state = Loopback(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
