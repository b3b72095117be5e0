"""What sites say about being read by machines: X-Robots-Tag, robots.txt, and lists of those who said no."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from urllib.robotparser import RobotFileParser

from yarl import URL

from curation.failures import FetchError
from schemas.errors import PairmillError

AGENT = "pairmill"
REFUSALS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none: noindex and nofollow
# Directives that have a value after a colon, where others have a user agent before it.
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT_NAME = re.compile(r"[a-z*][\w.*/-]*")
_HEX = re.compile(r"[0-9a-f]{64}")
ORIGINS = 10_000


def refusal(values: Iterable[str]) -> str | None:
    """The directive of the X-Robots-Tag headers that refuses us, None where none does.

    `pairmill: noai` and `*: noai` are for us, `otherbot: noai, noindex` is not; the date after
    `unavailable_after:` is neither.
    """
    for value in values:
        agent = "*"
        for part in value.lower().split(","):
            name, colon, rest = part.strip().partition(":")
            if colon and name in _VALUED:
                continue
            if colon and _AGENT_NAME.fullmatch(name):
                agent, name = name, rest.strip()
            if name in REFUSALS and agent in ("*", AGENT):
                return name
    return None


class RobotsTxt:
    """robots.txt of each origin, read once and kept for the run (the 10 000 last used)."""

    def __init__(self, read: Callable[[URL], Awaitable[str | None]]):
        """`read` gives the file's text, None where there is none, and raises FetchError where it cannot tell."""
        self._read = read
        self._origins: OrderedDict[URL, asyncio.Future[RobotFileParser]] = OrderedDict()

    async def check(self, url: URL) -> None:
        """Raises FetchError: disallowed, or why robots.txt could not be read."""
        rules = await self._rules(url.origin())
        if not rules.can_fetch(AGENT, str(url)):
            raise FetchError("disallowed", "robots.txt")

    async def _rules(self, origin: URL) -> RobotFileParser:
        known = self._origins.get(origin)
        if known is not None:
            self._origins.move_to_end(origin)
            return await asyncio.shield(known)
        task = asyncio.ensure_future(self._load(origin))
        self._origins[origin] = task
        # An unreadable robots.txt is asked for again: its failure is the row's, not the origin's for ever.
        task.add_done_callback(lambda done: self._drop_failed(origin, done))
        if len(self._origins) > ORIGINS:
            self._origins.popitem(last=False)
        return await asyncio.shield(task)

    async def _load(self, origin: URL) -> RobotFileParser:
        text = await self._read(origin.with_path("/robots.txt"))
        rules = RobotFileParser()
        rules.parse((text or "").splitlines())
        return rules

    def _drop_failed(self, origin: URL, done: asyncio.Future[RobotFileParser]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._origins.pop(origin, None)


class Refused:
    """Hosts not to fetch from, and URLs and image hashes whose owners opted out."""

    def __init__(self, skip_hosts: Path | None = None, opt_out: Path | None = None):
        self._hosts = {line.lower().strip(".") for line in _lines(skip_hosts)}
        self._urls: set[str] = set()
        self._hashes: set[bytes] = set()
        for line in _lines(opt_out):
            if "://" in line:
                self._urls.add(line)
            elif line.lower().startswith("sha256:"):
                self._hashes.add(_digest(line, opt_out))
            else:
                self._hosts.add(line.lower().strip("."))

    def check(self, url: URL, given: str) -> None:
        """Raises FetchError disallowed for a listed host, one of its subdomains, or a listed URL."""
        labels = (url.raw_host or "").strip(".").split(".")
        if self._hosts and any(".".join(labels[i:]) in self._hosts for i in range(len(labels))):
            raise FetchError("disallowed", "host is on a list")
        if self._urls and (given in self._urls or str(url) in self._urls):
            raise FetchError("disallowed", "opt-out")

    def has_image(self, sha256: bytes) -> bool:
        """Whether the bytes with this hash were opted out."""
        return sha256 in self._hashes


def _lines(path: Path | None) -> list[str]:
    """Lines of a list, without blank ones and comments. Raises PairmillError where it cannot be read."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PairmillError(f"cannot read the list {path}: {error}. Pass a UTF-8 text file.") from None
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _digest(line: str, path: Path | None) -> bytes:
    text = line.partition(":")[2].strip().lower()
    if not _HEX.fullmatch(text):
        raise PairmillError(f"{path}: `{line[:80]}` is no sha256 hash. Write `sha256:` and 64 hex digits.")
    return bytes.fromhex(text)
