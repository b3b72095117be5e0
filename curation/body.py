"""A response's body in bounded memory: counted while it comes in, counted again while it is unpacked."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque

import aiohttp

from curation.failures import FetchError
from shards.headers import sniff

FREE_BYTES = 1024 * 1024
BUDGET_BYTES = 256 * 1024 * 1024
STALL_S = 0.5
_IDENTITY = ("", "identity", "none", "binary")
_WINDOW_BITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}


class ByteBudget:
    """Bytes that large bodies may hold together. First come, first served; small bodies do not ask."""

    def __init__(self, total: int = BUDGET_BYTES):
        self._total = total
        self._left = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> int:
        """Wait for `count` bytes (at most the whole budget); give back what this returns."""
        count = min(count, self._total)
        if not self._waiting and count <= self._left:
            self._left -= count
            return count
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(count)
            raise
        return count

    def give_back(self, count: int) -> None:
        """Return what `take` gave, and serve those in line."""
        self._left += count
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done():
                if wanted > self._left:
                    return
                self._left -= wanted
                turn.set_result(None)
            self._waiting.popleft()


class Lease:
    """One row's share of a budget, from its first byte until its image is stored."""

    def __init__(self, budget: ByteBudget | None = None):
        self._budget = budget
        self._held = 0

    async def grow(self, size: int) -> None:
        """Before a body of up to `size` bytes is read on. Once is enough: later calls ask for nothing."""
        if self._budget is not None and not self._held and size > FREE_BYTES:
            self._held = await self._budget.take(size)

    def release(self) -> None:
        """Give everything back."""
        if self._budget is not None and self._held:
            self._budget.give_back(self._held)
        self._held = 0


async def read_body(response: aiohttp.ClientResponse, max_bytes: int, lease: Lease) -> bytes:
    """The body, unpacked. The response must come from a session that does not unpack by itself.

    Raises FetchError: too_large, protocol_error (broken content-encoding); and what aiohttp raises for a body
    that ends early or breaks its transfer encoding.
    """
    announced = response.content_length
    if announced is not None and announced > max_bytes:
        raise FetchError("too_large", f"{announced} bytes announced, at most {max_bytes} are read")
    body = bytearray()
    while chunk := await _read_some(response):
        if len(body) + len(chunk) > max_bytes:
            raise FetchError("too_large", f"more than {max_bytes} bytes")
        if len(body) + len(chunk) > FREE_BYTES:
            await lease.grow(announced or max_bytes)
        body += chunk
    encoding = ",".join(response.headers.getall("Content-Encoding", [])).strip().lower()
    if encoding in _IDENTITY:
        return bytes(body)
    await lease.grow(max_bytes)
    return unpack(bytes(body), encoding, max_bytes)


async def _read_some(response: aiohttp.ClientResponse) -> bytes:
    """The next bytes, empty at the end.

    aiohttp (3.14) closes the connection on broken chunking but lets the reader wait for ever, so a reader
    that has waited for a while looks whether there still is a connection.
    """
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                return await response.content.readany()
        except TimeoutError:
            connection = response.connection
            if connection is None or connection.transport is None or connection.transport.is_closing():
                raise FetchError("protocol_error", "malformed body") from None


def unpack(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo a content-encoding. Servers that announce one they did not apply are believed by the bytes.

    Raises FetchError: too_large, protocol_error.
    """
    if sniff(body) is not None:
        return body
    for window_bits in _WINDOW_BITS.get(encoding, ()):
        unpacker = zlib.decompressobj(window_bits)
        try:
            plain = unpacker.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        if len(plain) > max_bytes:
            raise FetchError("too_large", f"more than {max_bytes} bytes after {encoding}")
        if not unpacker.eof:
            raise FetchError("truncated", f"{encoding} data ends early")
        return plain
    known = "broken data" if encoding in _WINDOW_BITS else "an encoding that was not asked for"
    raise FetchError("protocol_error", f"content-encoding {encoding[:40]!r}: {known}")
