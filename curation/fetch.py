"""URLs to bytes, politely and within bounds of time, size and address.

One deadline (`timeout`) covers a row whole: its redirects, its attempts and the waits between them. It starts when
the row has a connection slot of its host. Inside it, connecting has `connect_timeout` and the answer's head
`first_byte_timeout` more, so that neither a silent nor a dripping server can hold a slot.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import email.utils
import random
import time
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Self
from urllib.parse import unquote_to_bytes

import aiohttp
from yarl import URL

from curation.address import AddressRule, GuardedResolver, clean_url, redirect_target
from curation.body import Lease, read_body
from curation.config import DownloadConfig
from curation.failures import FetchError, error_text, from_exception
from curation.hosts import Hosts
from curation.robots import AGENT, Refused, RobotsTxt, refusal
from schemas.status import SUCCESS

MAX_REDIRECTS = 5
ROBOTS_BYTES = 512 * 1024
BACKOFF_S, BACKOFF_CAP_S = 0.5, 10.0
# Short: a crawl meets hundreds of hosts a second, and each kept connection is an open file.
KEEP_ALIVE_S = 1.0
HEADER_BYTES = 32 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What counts against a host. Its refusals (404, robots) are answers; these are a host that cannot.
_HOST_FAULTS = frozenset({"dns_error", "connect_error", "tls_error", "timeout", "protocol_error"})


@dataclass(frozen=True)
class Fetched:
    """What became of a URL. `data` is there exactly when `status` is success; `error` never holds a URL."""

    status: str
    data: bytes | None = None
    http_status: int | None = None
    attempts: int = 0
    error: str | None = None


@dataclass
class _Trace:
    """What a row has been through: attempts, and the status of the last answer that came in the last of them."""

    attempts: int = 0
    http_status: int | None = None


class _Slot:
    """The one host connection a row holds at a time."""

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        self._host: str | None = None

    async def move(self, host: str) -> None:
        """Leave the host before entering the other: rows that redirect to each other's hosts cannot lock up."""
        if host != self._host:
            self.leave()
            await self._hosts.enter(host)
            self._host = host

    def leave(self) -> None:
        if self._host is not None:
            self._hosts.leave(self._host)
            self._host = None


def user_agent(contact: str) -> str:
    """`pairmill/VERSION (+contact)`."""
    name = f"{AGENT}/{metadata.version(AGENT)}"
    return f"{name} (+{contact})" if contact else name


def host_of(url: str | None) -> str:
    """The host a row waits for; empty for rows that need none (`data:`, malformed)."""
    try:
        return clean_url(url).raw_host or ""
    except FetchError:
        return ""


def new_hosts(config: DownloadConfig, workers: int = 1) -> Hosts:
    """The hosts of one of `workers` processes: each takes its share of `per_host`, at least 1."""
    return Hosts(max(config.per_host // workers, 1), config.host_failures, config.host_rest)


class Fetcher:
    """An async context that fetches many URLs, each on its own.

    hosts    connections and failures by host; pass one to keep them over several fetchers of a process
    workers  processes of the run, for the hosts' share of connections
    """

    def __init__(self, config: DownloadConfig, hosts: Hosts | None = None, workers: int = 1):
        self._config = config
        self.hosts = hosts or new_hosts(config, workers)
        self._rule = AddressRule(config.allow_private)
        self._refused = Refused(config.skip_hosts, config.opt_out)
        self._proxies = urllib.request.getproxies() if config.proxy_from_environment else {}
        self._robots = RobotsTxt(self._read_robots) if config.robots_txt else None
        self._jitter = random.Random()

    async def __aenter__(self) -> Self:
        self._resolver = GuardedResolver(self._rule, self._config.connect_timeout)
        self._direct = self._session(
            aiohttp.TCPConnector(resolver=self._resolver, limit=0, ttl_dns_cache=300, keepalive_timeout=KEEP_ALIVE_S)
        )
        # The proxy itself may well be private, so this connector has no guard; it only ever serves proxied requests.
        self._proxied = self._session(aiohttp.TCPConnector(limit=0)) if self._proxies else None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._direct.close()
        await self._resolver.close()
        if self._proxied is not None:
            await self._proxied.close()

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # unpacked by curation/body.py, which counts
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout),
            headers={
                "User-Agent": user_agent(self._config.contact),
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
        )

    async def fetch(self, url: str | None, lease: Lease | None = None) -> Fetched:
        """The bytes of one URL, or the status that says why not. Raises nothing but cancellation.

        lease  bounds the memory of large bodies; who gives one releases it when done with `data`
        """
        trace, slot = _Trace(), _Slot(self.hosts)
        try:
            if url is not None and url[:5].lower() == "data:":
                return Fetched(SUCCESS, data_url(url, self._config.max_bytes))
            target = clean_url(url)
            self._check(target, url or "")
            await slot.move(target.raw_host or "")
            async with asyncio.timeout(self._config.timeout) as deadline:
                data = await self._attempts(target, slot, trace, deadline, lease or Lease())
            return Fetched(SUCCESS, data, trace.http_status, trace.attempts)
        except TimeoutError:
            failure = FetchError("timeout", f"not done within {self._config.timeout:g} s")
        except FetchError as error:
            failure = error
        finally:
            slot.leave()
        error_words = error_text(failure.status, failure.detail)
        return Fetched(failure.status, None, trace.http_status, trace.attempts, error_words)

    def has_opted_out(self, sha256: bytes) -> bool:
        """Whether the opt-out list holds these bytes' hash."""
        return self._refused.has_image(sha256)

    async def _attempts(self, url: URL, slot: _Slot, trace: _Trace, deadline: asyncio.Timeout, lease: Lease) -> bytes:
        """Raises FetchError: the last attempt's."""
        loop = asyncio.get_running_loop()
        failure: FetchError | None = None
        while True:
            if failure is not None and not self.hosts.admits(url.raw_host or ""):
                raise failure  # other rows put the host to rest meanwhile; the cause says more
            try:
                return await self._follow(url, slot, trace, lease, admitted=failure is not None)
            except FetchError as error:
                failure = error
            lease.release()
            if not failure.again or trace.attempts > self._config.retries:
                raise failure
            wait_s = self._wait(failure, trace.attempts)
            if loop.time() + wait_s >= (deadline.when() or 0):
                raise failure  # it would not be over in time: left to a later run
            await asyncio.sleep(wait_s)

    def _wait(self, failure: FetchError, attempts: int) -> float:
        if failure.retry_after is not None:
            return failure.retry_after
        longest = min(BACKOFF_S * 2 ** (attempts - 1), BACKOFF_CAP_S)
        return longest * self._jitter.uniform(0.5, 1.0)

    async def _follow(self, url: URL, slot: _Slot, trace: _Trace, lease: Lease, admitted: bool) -> bytes:
        """One attempt: the request and its redirects, each hop checked like the first."""
        seen: set[URL] = set()
        for hop in range(MAX_REDIRECTS + 1):
            if url in seen:
                raise FetchError("redirect_error", "loop")
            seen.add(url)
            if hop:
                self._check(url, str(url))
            host = url.raw_host or ""
            await slot.move(host)
            if not (admitted and hop == 0) and not self.hosts.admits(host):
                raise FetchError("host_resting", "its host failed too often in a row", again=False)
            if hop == 0:
                trace.attempts, trace.http_status = trace.attempts + 1, None
            if self._robots is not None:
                await self._robots.check(url)
            answer = await self._request(url, trace, self._config.max_bytes, lease)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise FetchError("redirect_error", f"more than {MAX_REDIRECTS}")

    def _check(self, url: URL, given: str) -> None:
        self._refused.check(url, given)
        self._rule.check_literal(url.raw_host or "")

    async def _request(self, url: URL, trace: _Trace, max_bytes: int, lease: Lease) -> bytes | URL:
        """One request: the body, or where a redirect leads. Reports to the host's account how it went."""
        good = False  # as for a row whose deadline comes while this host has it
        try:
            answer = await self._exchange(url, trace, max_bytes, lease)
            good = True
            return answer
        except Exception as error:
            failure = from_exception(error)
            good = not (failure.status in _HOST_FAULTS or (failure.status == "http_error" and failure.again))
            raise failure from None
        finally:
            self.hosts.report(url.raw_host or "", good)

    async def _exchange(self, url: URL, trace: _Trace, max_bytes: int, lease: Lease) -> bytes | URL:
        response = await self._head(url)
        try:
            trace.http_status = response.status
            token = refusal(response.headers.getall("X-Robots-Tag", []))
            if token is not None and not self._config.ignore_x_robots_tag:
                raise FetchError("disallowed", f"X-Robots-Tag {token}")
            if response.status in _REDIRECTS:
                return redirect_target(url, response.headers.get("Location"))
            if not 200 <= response.status < 300:
                raise _http_error(response)
            return await read_body(response, max_bytes, lease)
        finally:
            # Closes the connection unless the body was read to its end.
            response.release() if response.content.at_eof() else response.close()

    async def _head(self, url: URL) -> aiohttp.ClientResponse:
        """The response once its head is in."""
        proxy = self._proxy(url)
        session = self._direct if proxy is None or self._proxied is None else self._proxied
        within_s = self._config.connect_timeout + self._config.first_byte_timeout
        try:
            async with asyncio.timeout(within_s):
                return await session.get(url, allow_redirects=False, proxy=proxy)
        except aiohttp.ClientError:
            raise  # some of them are TimeoutErrors, and say more
        except TimeoutError:
            raise FetchError("timeout", f"no answer within {within_s:g} s") from None

    def _proxy(self, url: URL) -> str | None:
        proxy = self._proxies.get(url.scheme)
        if proxy is None or urllib.request.proxy_bypass(url.raw_host or ""):
            return None
        return proxy

    async def _read_robots(self, url: URL) -> str | None:
        """robots.txt as RFC 9309 has it: a 4xx means none. Raises FetchError for other failures."""
        trace = _Trace()
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self._rule.check_literal(url.raw_host or "")
                answer = await self._request(url, trace, ROBOTS_BYTES, Lease())
                if isinstance(answer, bytes):
                    return answer.decode("utf-8", "replace")
                url = answer
        except FetchError as error:
            if error.status == "http_error" and not error.again:
                return None
            raise FetchError(error.status, f"robots.txt: {error.detail}", again=error.again) from None
        raise FetchError("redirect_error", "robots.txt: too many")


def _http_error(response: aiohttp.ClientResponse) -> FetchError:
    wait_s = retry_after(response.headers.get("Retry-After"), time.time())
    return FetchError("http_error", str(response.status), http_status=response.status, retry_after=wait_s)


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), None where it says nothing readable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a `data:` URL. Raises FetchError: bad_url, too_large."""
    head, comma, payload = url[5:].partition(",")
    if not comma:
        raise FetchError("bad_url", "data: without a comma")
    if len(payload) > 4 * max_bytes:
        raise FetchError("too_large", f"more than {max_bytes} bytes")
    data = unquote_to_bytes(payload.strip())
    if head.strip().lower().endswith(";base64"):
        try:
            packed = b"".join(data.split())
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error:
            raise FetchError("bad_url", "data: with broken base64") from None
    if len(data) > max_bytes:
        raise FetchError("too_large", f"more than {max_bytes} bytes")
    return data
