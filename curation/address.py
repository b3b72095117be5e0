"""Which addresses may be fetched: URLs made clean, names resolved, private networks kept out.

The check stands where the connection is made. aiohttp connects to what `GuardedResolver` returns and to literal
addresses, which `AddressRule.check_literal` sees before every request; nothing is resolved a second time in between.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from urllib.parse import quote, urljoin, urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from curation.failures import BlockedAddressError, FetchError

SCHEMES = ("http", "https")
URL_LENGTH = 16384
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What may stand in a path and a query as it is (browsers' sets). Escapes that are there stay as they are:
# decoding `%2C` and the like would break signed URLs.
_PATH = "!$&'()*+,;=:@/[]|%"
_QUERY = _PATH + "?{}^`\\"
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# aiohttp takes these for addresses and hands them to the socket, which reads `2130706433` as 127.0.0.1.
_NUMERIC = re.compile(r"[\d.]+")


def clean_url(text: str | None) -> URL:
    """A URL that can be requested: escaped where needed, without fragment.

    Raises FetchError bad_url: missing, malformed, too long, or a scheme other than http and https.
    """
    if text is None or not text.strip():
        raise FetchError("bad_url", "missing")
    if len(text) > URL_LENGTH:
        raise FetchError("bad_url", f"longer than {URL_LENGTH} characters")
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise FetchError("bad_url", "malformed") from None
    if parts.scheme not in SCHEMES:
        raise FetchError("bad_url", "scheme is not http or https" if parts.scheme else "no scheme")
    if not host or "\\" in parts.netloc or port == 0:
        raise FetchError("bad_url", "no host" if not host else "malformed host")
    user = parts.netloc.rpartition("@")[0]
    netloc = (quote(user, safe="!$&'()*+,;=:%") + "@" if user else "") + _encoded_host(host)
    netloc += f":{port}" if port is not None else ""
    query = "?" + _escaped(parts.query, _QUERY) if parts.query else ""
    return URL(f"{parts.scheme}://{netloc}{_escaped(parts.path, _PATH) or '/'}{query}", encoded=True)


def _escaped(text: str, safe: str) -> str:
    return quote(_LONE_PERCENT.sub("%25", text), safe=safe, errors="surrogateescape")


@lru_cache(maxsize=10_000)
def _encoded_host(host: str) -> str:
    """IDNA for names; addresses in their one canonical form. Raises FetchError bad_url."""
    try:
        if ":" in host:
            return f"[{ipaddress.IPv6Address(host)}]"
        if _NUMERIC.fullmatch(host):
            return str(ipaddress.IPv4Address(host))
        encoded = URL.build(scheme="http", host=host).raw_host
    except ValueError:
        encoded = None
    if not encoded:
        raise FetchError("bad_url", "malformed host")
    return encoded


def redirect_target(base: URL, location: str | None) -> URL:
    """Where a redirect leads. Raises FetchError redirect_error (no target) or blocked (another scheme)."""
    if not location or not location.strip():
        raise FetchError("redirect_error", "no target")
    try:
        joined = urljoin(str(base), location.strip())
        scheme = urlsplit(joined).scheme
    except ValueError:
        raise FetchError("redirect_error", "malformed target") from None
    if scheme not in SCHEMES:
        raise FetchError("blocked", "redirect to a scheme other than http and https")
    try:
        return clean_url(joined)
    except FetchError as error:
        raise FetchError("redirect_error", f"target: {error.detail}") from None


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, seen through the ways of writing IPv4 inside IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class AddressRule:
    """Public addresses, and what `allow_private` adds: host names, addresses, networks."""

    def __init__(self, allow_private: Sequence[str] = ()):
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in allow_private:
            try:
                self._networks.append(ipaddress.ip_network(entry.strip(), strict=False))
            except ValueError:
                self._names.add(entry.strip().lower())

    def permits(self, host: str, address: str) -> bool:
        """Whether a connection for `host` may go to `address`."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        return host.lower() in self._names or is_public(ip) or any(ip in network for network in self._networks)

    def check_literal(self, host: str) -> None:
        """Raises FetchError blocked where `host` is an address that is not permitted; names pass."""
        if (":" in host or _NUMERIC.fullmatch(host)) and not self.permits(host, host):
            raise FetchError("blocked", "not a public address")


class GuardedResolver(AbstractResolver):
    """getaddrinfo in own threads, within a deadline, handing out permitted addresses only.

    Own threads, because asyncio's few are soon all waiting for dead name servers.
    """

    def __init__(self, rule: AddressRule, timeout_s: float, threads: int = 32):
        self._rule = rule
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises OSError: gaierror, TimeoutError, or BlockedAddressError where none of the addresses is permitted."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._timeout_s):
            found = await loop.run_in_executor(self._pool, _lookup, host, port, family)
        allowed = [(family, address) for family, address in found if self._rule.permits(host, address)]
        if not allowed:
            raise BlockedAddressError("resolves to no public address")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=family, proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for family, address in allowed
        ]  # fmt: skip

    async def close(self) -> None:
        """Threads that still wait for a name server are left to end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _lookup(host: str, port: int, family: int) -> list[tuple[int, str]]:
    """[(family, numeric address)], each once, in the system's order."""
    answers = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys((answer[0], str(answer[4][0])) for answer in answers))
