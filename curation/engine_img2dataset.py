"""`--engine img2dataset`: img2dataset's own fetching and resizing, our rows, order and files.

For people who need its exact pixels. What it does not do, whatever the options say: no deadline on a whole transfer
(`--timeout` bounds single socket operations), no limit on a body before it is in memory, no rest for failing hosts and
no `--per-host`, literal addresses checked only before the first request (not names, not redirects), a browser's
User-Agent with `pairmill` in it, orientation and colour profiles ignored, pixels counted after decoding, proxies of
the environment always used, no `--robots-txt`. `attempts` is 1 whatever it tried. It needs Python below 3.13.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.address import AddressRule, clean_url
from curation.config import DownloadConfig
from curation.failures import FetchError, error_text
from curation.resize import Processed
from curation.robots import AGENT, Refused
from curation.rows import Hold, Request, Result, keep
from schemas.errors import PairmillError
from schemas.status import SUCCESS

_FORMATS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_PNG_COMPRESSION = 6
_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]
_TOO_LARGE, _MISMATCH, _OPT_OUT = "body too large", "hash mismatch", "in the opt-out list"

# What urllib, ssl, OpenCV and img2dataset say, the first that is found in the message.
_SAYINGS: tuple[tuple[str, str], ...] = (
    ("would lead to an infinite loop", "redirect_error"),
    ("X-Robots-Tag", "disallowed"),
    (_TOO_LARGE, "too_large"),
    (_MISMATCH, "hash_mismatch"),
    (_OPT_OUT, "disallowed"),
    ("image too small", "too_small"),
    ("aspect ratio too large", "bad_aspect"),
    ("image area too large", "bomb"),
    ("Image decoding error", "decode_error"),
    ("CERTIFICATE", "tls_error"),
    ("certificate", "tls_error"),
    ("SSL", "tls_error"),
    ("timed out", "timeout"),
    ("not known", "dns_error"),
    ("name resolution", "dns_error"),
    ("getaddrinfo", "dns_error"),
    ("IncompleteRead", "truncated"),
    ("unknown url type", "bad_url"),
    ("no host given", "bad_url"),
    ("URL can't contain", "bad_url"),
    ("nonnumeric port", "bad_url"),
    ("refused", "connect_error"),
    ("reset", "connect_error"),
    ("closed connection", "connect_error"),
    ("unreachable", "connect_error"),
    ("urlopen error", "connect_error"),
)
_HTTP = re.compile(r"HTTP Error (\d{3})")


def check_engine(config: DownloadConfig) -> None:
    """Raises PairmillError where img2dataset cannot run here, or for an option that it has no counterpart of."""
    if sys.version_info >= (3, 13):
        found = ".".join(map(str, sys.version_info[:2]))
        raise PairmillError(
            f"--engine img2dataset needs Python below 3.13 (it imports `imghdr`), this is {found}. "
            "Leave --engine out: pairmill's own downloads the same lists."
        )
    if config.robots_txt:
        raise PairmillError("--robots-txt has no counterpart in --engine img2dataset. Leave one of the two out.")
    _their_modules()


def _their_modules() -> Any:
    # It imports wandb and albumentations, which would call home.
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        import img2dataset.downloader
        import img2dataset.resizer
    except ImportError as error:
        raise PairmillError(
            f"--engine img2dataset needs the package img2dataset: {error}. "
            "Run `pip install img2dataset`, or leave --engine out."
        ) from None
    return img2dataset


def fetch_rows(
    rows: Sequence[Request],
    config: DownloadConfig,
    *,
    hold: Hold = contextlib.nullcontext,
    on_result: Callable[[int, Result], Result] = keep,
) -> list[Result]:
    """One Result a row, in the rows' order, as `curation.rows.fetch_rows` gives them.

    What `on_result` raises is raised here, after the requests under way have ended.
    """
    run = _Run(rows, config, hold, on_result)
    wanted = run.refuse_rows()
    if wanted:
        run.download(wanted)
    for row in wanted:  # an exception in its loop loses a row
        run.done(row, Result("decode_error", time.time(), attempts=1, error="decode_error: img2dataset lost the row"))
    if run.raised is not None:
        raise run.raised
    return [result for result in run.results if result is not None]


class _Run:
    """One shard's passage through img2dataset. Its loop calls `resize` and `write` in this thread, a row at a time."""

    def __init__(
        self, rows: Sequence[Request], config: DownloadConfig, hold: Hold, on_result: Callable[[int, Result], Result]
    ) -> None:
        self.rows, self.config, self.hold, self.on_result = rows, config, hold, on_result
        self.results: list[Result | None] = [None] * len(rows)
        self.raised: Exception | None = None
        self.digests: dict[int, tuple[bytes, int]] = {}
        self.refused = Refused(config.skip_hosts, config.opt_out)

    def done(self, row: int, result: Result) -> None:
        if self.results[row] is not None or self.raised is not None:
            return
        try:
            self.results[row] = self.on_result(row, result)
        except Exception as error:  # its loop prints exceptions and goes on: this one waits for the end
            self.raised = error
            _stop.set()

    def refuse_rows(self) -> list[int]:
        """The rows that may be asked for; the others are done at once."""
        rule = AddressRule(self.config.allow_private)
        wanted = []
        for row, request in enumerate(self.rows):
            try:
                if request.url is None or request.url[:5].lower() != "data:":
                    url = clean_url(request.url)
                    self.refused.check(url, request.url or "")
                    rule.check_literal(url.raw_host or "")
                wanted.append(row)
            except FetchError as error:
                self.done(row, Result(error.status, time.time(), error=error_text(error.status, error.detail)))
        return wanted

    def download(self, wanted: Sequence[int]) -> None:
        """Runs their Downloader over a temporary file of the wanted rows' URLs."""
        theirs = _their_modules()
        _tag_streams(theirs.downloader)
        _stop.clear()
        with tempfile.TemporaryDirectory(prefix="pairmill-img2dataset-") as folder:
            table = pa.table({"url": [self._url(row) for row in wanted]})
            path = Path(folder) / "shard.feather"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            downloader = self._downloader(theirs, wanted, folder)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what goes wrong
                downloader.download_shard((0, str(path)))

    def _url(self, row: int) -> str:
        url = self.rows[row].url or ""
        return url if url[:5].lower() == "data:" else str(clean_url(url))

    def _downloader(self, theirs: Any, wanted: Sequence[int], folder: str) -> Any:
        return theirs.downloader.Downloader(
            sample_writer_class=lambda *about: _Writer(self, wanted),
            resizer=_resizer(theirs.resizer, self, wanted),
            thread_count=self.config.connections,
            save_caption=False,
            extract_exif=False,
            output_folder=folder,
            column_list=["url"],
            timeout=self.config.timeout,
            number_sample_per_shard=max(2, len(wanted)),
            oom_shard_count=1,
            compute_hash=None,
            verify_hash_type=None,
            encode_format=_FORMATS[self.config.encode],
            retries=self.config.retries,
            user_agent_token=AGENT,
            disallowed_header_directives=None if self.config.ignore_x_robots_tag else _DIRECTIVES,
        )

    def verify(self, row: int, data: bytes) -> str | None:
        """Their word for a body that is not taken, None for one that is."""
        if len(data) > self.config.max_bytes:
            return _TOO_LARGE
        sha256 = hashlib.sha256(data).digest()
        if self.refused.has_image(sha256):
            return _OPT_OUT
        self.digests[row] = sha256, len(data)
        kind, _, expected = (self.rows[row].expected_hash or "").partition(":")
        return _MISMATCH if kind and hashlib.new(kind, data).hexdigest() != expected else None

    def result(self, row: int, image: bytes | None, meta: dict[str, Any]) -> Result:
        """A row as their writer gets it."""
        if image is None:
            status, http_status = status_of(meta["error_message"])
            words = error_text(status, meta["error_message"])
            return Result(status, time.time(), None, http_status, 1, words)
        sha256, size = self.digests.pop(row)
        processed = Processed(
            image=image,
            format=self.config.encode,
            width=meta["width"],
            height=meta["height"],
            original_width=meta["original_width"],
            original_height=meta["original_height"],
            sha256=sha256,
            stored_sha256=hashlib.sha256(image).digest(),
        )
        return Result(SUCCESS, time.time(), processed, 200, 1, None, size)


# A shard that is being given up: set, the requests that are still to begin fail at once. One shard a process.
_stop = threading.Event()


class _Tagged(io.BytesIO):
    """A body that knows its row."""

    row: int


def _tag_streams(downloader: Any) -> None:
    """Wraps the global through which their loop fetches: the only way to know whose body the resizer gets."""
    theirs = downloader.download_image_with_retry
    if getattr(theirs, "tags", False):
        return

    def download(row: tuple[int, str], **options: Any) -> tuple[int, io.BytesIO | None, str | None]:
        if _stop.is_set():
            return row[0], None, "stopped"
        key, stream, error = theirs(row, **options)
        if stream is None:
            return key, None, error or "no answer"
        tagged = _Tagged(stream.getvalue())
        tagged.row = key
        return key, tagged, error

    download.tags = True  # type: ignore[attr-defined]
    downloader.download_image_with_retry = download


def _resizer(resizer: Any, run: _Run, wanted: Sequence[int]) -> Any:
    """Their Resizer with our settings; holds the row in hand while it decodes."""
    config = run.config

    class Resizer(resizer.Resizer):
        def __call__(self, stream: _Tagged, boxes: None = None) -> tuple[Any, ...]:
            row = wanted[stream.row]
            error = run.verify(row, stream.getvalue())
            if error is not None:
                return None, None, None, None, None, error
            with run.hold(row):
                return super().__call__(stream, boxes)

    return Resizer(
        image_size=config.size,
        resize_mode="no" if config.resize == "none" else config.resize.replace("-", "_"),
        resize_only_if_bigger=not config.upscale,
        encode_quality=_PNG_COMPRESSION if config.encode == "png" else config.quality,
        encode_format=_FORMATS[config.encode],
        skip_reencode=config.resize == "none",
        min_image_size=config.min_side,
        max_image_area=config.max_pixels,
        max_aspect_ratio=config.max_aspect or float("inf"),
    )


class _Writer:
    """What their loop believes to be a sample writer."""

    def __init__(self, run: _Run, wanted: Sequence[int]) -> None:
        self.run, self.wanted = run, wanted

    def write(self, image: bytes | None, key: str, caption: None, meta: dict[str, Any]) -> None:
        row = self.wanted[int(key)]
        self.run.done(row, self.run.result(row, image, meta))

    def close(self) -> None:
        """Nothing is open."""


def status_of(message: str) -> tuple[str, int | None]:
    """(status, HTTP status) of one of their error messages, which are exceptions' texts."""
    found = _HTTP.search(message)
    for words, status in _SAYINGS:
        if words in message:
            return status, int(found[1]) if found else None
    if found:
        return "http_error", int(found[1])
    return "protocol_error", None
