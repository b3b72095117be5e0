"""Configuration of `pairmill download`. Imports pydantic and schemas only: `--help` must stay fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, field_validator

from curation.list_config import ListConfig
from schemas.config import execution, identity


class DownloadConfig(ListConfig):
    """How a URL list becomes pairs: the image first, then the network."""

    engine: Literal["pairmill", "img2dataset"] = identity("pairmill", "who fetches and resizes")
    resize: Literal["none", "keep-ratio", "keep-ratio-largest", "center-crop", "border"] = identity(
        "keep-ratio",
        "none: bytes as received; keep-ratio: shorter side to --size; keep-ratio-largest: longer side; "
        "center-crop: a square cut from the middle; border: padded with white to a square",
    )
    size: PositiveInt = identity(384, "side in px that --resize aims at", le=16384)
    upscale: bool = identity(False, "enlarge images that are smaller than --size")
    encode: Literal["jpeg", "png", "webp"] = identity("jpeg", "format of images whose pixels had to change")
    quality: int = identity(90, "quality of jpeg and webp, 1 to 100", ge=1, le=100)
    min_side: int = identity(0, "shorter side in px under which an image is too_small", ge=0)
    max_aspect: float | None = identity(None, "longer over shorter side above which an image is bad_aspect", ge=1)
    max_bytes: PositiveInt = identity(32 * 1024 * 1024, "largest body in bytes, also after content-decoding")
    max_pixels: PositiveInt = identity(64 * 1024 * 1024, "largest image in px, from its header")
    ignore_x_robots_tag: bool = identity(
        False, "fetch even where X-Robots-Tag says noai, noimageai, noindex or noimageindex"
    )
    robots_txt: bool = identity(False, "obey robots.txt")
    skip_hosts: Path | None = execution(None, "file of hosts not to fetch from, one a line, subdomains included")
    opt_out: Path | None = execution(None, "file of URLs, hosts and sha256:HEX to leave out, one a line")
    contact: str = execution("", "e-mail address or page named in the User-Agent")
    timeout: PositiveFloat = execution(30.0, "seconds for one row: redirects, retries and waits included")
    connect_timeout: PositiveFloat = execution(5.0, "seconds to resolve the name and connect")
    first_byte_timeout: PositiveFloat = execution(10.0, "seconds after connecting for the answer's head to arrive")
    retries: int = execution(2, "further attempts after a transient failure", ge=0, le=20)
    connections: PositiveInt = execution(64, "open connections of one worker", le=4096)
    per_host: PositiveInt = execution(8, "open connections to one host, over the whole run")
    decode_threads: PositiveInt = execution(1, "threads of one worker that decode and resize", le=64)
    host_failures: PositiveInt = execution(20, "failures in a row after which a host rests")
    host_rest: PositiveFloat = execution(60.0, "seconds that a failing host rests before one trial")
    allow_private: tuple[str, ...] = execution(
        (), "host name, address or network (CIDR) that may be private, for a local mirror"
    )
    proxy_from_environment: bool = execution(
        False,
        "go through HTTP_PROXY, HTTPS_PROXY; it resolves the names, we check literal addresses only",
    )
    keep_going: bool = execution(False, "do not stop when nearly every row fails for one cause")
    retry_failed: bool = execution(False, "try the rows again whose failure may pass, and no others")
    probe: int | None = execution(None, "download N sampled rows to nowhere and estimate the whole list", gt=0)

    @field_validator("contact")
    @classmethod
    def _one_header_line(cls, value: str) -> str:
        if not value.isascii() or not value.isprintable() or set(value) & set("()"):
            raise ValueError("must be printable ASCII without parentheses")
        return value

    @field_validator("allow_private")
    @classmethod
    def _hosts_or_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not entry.strip() or "://" in entry:
                raise ValueError(f"{entry!r} is no host name, address or CIDR network")
        return value
