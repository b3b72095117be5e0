"""Why a URL gave no bytes: exceptions of the network turned into the closed vocabulary of statuses."""

from __future__ import annotations

import os
import re
import socket
import ssl

import aiohttp

from schemas.status import is_transient

ERROR_LENGTH = 300
_URL = re.compile(r"\w+://\S+")
_ADDRESS_IN_MEMORY = re.compile(r"0x[0-9a-fA-F]{6,}")


class FetchError(Exception):
    """A row's failure. `detail` never holds a URL: they may carry secrets.

    again        whether another attempt in this run may help (transient causes, except a name that does not exist)
    retry_after  seconds the server asked to wait
    """

    def __init__(
        self,
        status: str,
        detail: str,
        *,
        http_status: int | None = None,
        again: bool | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.again = is_transient(status, http_status) if again is None else again
        self.retry_after = retry_after


class BlockedAddressError(OSError):
    """A name that resolves to no public address. An OSError, so that it passes through aiohttp's connector."""


def error_text(status: str, detail: str) -> str:
    """`status: detail`, one line, at most 300 characters, without URLs and memory addresses."""
    text = _ADDRESS_IN_MEMORY.sub("0x", _URL.sub("<url>", " ".join(f"{status}: {detail}".split())))
    return text if len(text) <= ERROR_LENGTH else text[: ERROR_LENGTH - 1] + "…"


def from_exception(error: Exception) -> FetchError:
    """The FetchError for what aiohttp, ssl or the socket raised."""
    if isinstance(error, FetchError):
        return error
    if isinstance(error, aiohttp.ClientConnectorError):
        return _from_connecting(error)
    if isinstance(error, ssl.SSLError):
        return _from_tls(error)
    if isinstance(error, TimeoutError):  # aiohttp's own timeouts are TimeoutErrors too
        return FetchError("timeout", "no connection in time")
    if isinstance(error, aiohttp.ClientPayloadError):
        return _from_payload(error)
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", "cannot be requested")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return FetchError("connect_error", f"the proxy answered {error.status}")
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("protocol_error", f"malformed answer: {_first_words(error.message.partition(':')[0])}")
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return FetchError("connect_error", "closed before an answer")
    if isinstance(error, OSError):
        return FetchError("connect_error", _errno(error))
    return FetchError("connect_error", type(error).__name__)


def _from_connecting(error: aiohttp.ClientConnectorError) -> FetchError:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _from_tls(error.certificate_error)
    cause = error.os_error
    if isinstance(cause, BlockedAddressError):
        return FetchError("blocked", str(cause))
    if isinstance(cause, ssl.SSLError):
        return _from_tls(cause)
    if isinstance(cause, socket.gaierror):
        # The name servers' temporary failure is worth another attempt, a name that does not exist is not.
        again = cause.errno == socket.EAI_AGAIN
        return FetchError("dns_error", _first_words(cause.strerror or "cannot resolve"), again=again)
    if isinstance(cause, TimeoutError):
        return FetchError("timeout", "no connection in time")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return FetchError("dns_error", _first_words(str(cause)))
    return FetchError("connect_error", _errno(cause))


def _from_tls(error: Exception) -> FetchError:
    reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or type(error).__name__
    return FetchError("tls_error", _first_words(str(reason)))


def _from_payload(error: aiohttp.ClientPayloadError) -> FetchError:
    """A body that ended early is truncated; one that breaks the transfer encoding is a protocol error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionResetError):
            return FetchError("connect_error", "reset in the body")
        text = f"{type(cause).__name__} {cause}"
        if "ContentLengthError" in text or "Not enough data" in text:
            return FetchError("truncated", "fewer bytes than announced")
        cause = cause.__cause__
    return FetchError("protocol_error", "malformed body")


def _errno(error: OSError) -> str:
    if error.errno:
        return os.strerror(error.errno)
    return type(error).__name__


def _first_words(text: str) -> str:
    return " ".join(text.split())[:100]
