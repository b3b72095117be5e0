"""A small web on loopback that behaves as badly as the real one: raw sockets, one coroutine a path."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Handler = Callable[["Asked", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Asked:
    """One request as it came in."""

    method: str
    target: str
    headers: dict[str, str]
    times: int  # how often this target was asked for, this time included


@dataclass
class Web:
    """Routes and what was asked of them. `base` is `http://127.0.0.1:PORT`."""

    base: str
    routes: dict[str, Handler]
    asked: list[Asked] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    open_now: int = 0
    open_most: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, TimeoutError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.strip().split("\r\n")
                method, target, _ = first.split(" ", 2)
                self.counts[target] += 1
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                asked = Asked(method, target, headers, self.counts[target])
                self.asked.append(asked)
                self.open_now += 1
                self.open_most = max(self.open_most, self.open_now)
                try:
                    route = self.routes.get(target.partition("?")[0], not_found)
                    await route(asked, writer)
                    await writer.drain()
                finally:
                    self.open_now -= 1
                if writer.is_closing():
                    return


@contextlib.asynccontextmanager
async def web(routes: dict[str, Handler], tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    """A server for `routes` on a free port of 127.0.0.1, gone at the end with all its connections."""
    tasks: set[asyncio.Task[None]] = set()
    site = Web("", routes)

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(site.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(lambda done: (tasks.discard(done), writer.close()))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
    port = server.sockets[0].getsockname()[1]
    site.base = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    try:
        yield site
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """A whole HTTP/1.1 answer; `length` lies about the body's."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def sends(*parts: bytes, close: bool = False) -> Handler:
    """A route that sends bytes as they are, a breath between the parts, and then perhaps closes."""

    async def route(asked: Asked, writer: asyncio.StreamWriter) -> None:
        for i, part in enumerate(parts):
            if i:
                await asyncio.sleep(0.05)
            writer.write(part)
            await writer.drain()
        if close:
            writer.close()

    return route


def one_after_another(*routes: Handler) -> Handler:
    """The first route for the first request, and so on; the last for all that follow."""

    async def route(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await routes[min(asked.times, len(routes)) - 1](asked, writer)

    return route


def resets(data: bytes) -> Handler:
    """Sends `data`, then a TCP reset."""

    async def route(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.05)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: close with a reset
        writer.transport.abort()

    return route


def drips(data: bytes, pause_s: float, first: bytes = b"") -> Handler:
    """Sends `first` at once and `data` byte by byte."""

    async def route(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(pause_s)

    return route


def endless(first: bytes, chunk: bytes, pause_s: float = 0.0) -> Handler:
    """Sends `first`, then `chunk` for ever."""

    async def route(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return route


async def silent(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Takes the request and says nothing."""
    await asyncio.sleep(60)


async def not_found(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """404, with a body as real sites have one."""
    writer.write(answer(b"<html>gone</html>", "404 Not Found"))


def self_signed() -> ssl.SSLContext:
    """A server's context whose certificate nobody vouches for."""
    import datetime
    import tempfile

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.flush()
        context.load_cert_chain(file.name)
    return context
