"""Serves a page until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable

from cli.web.security import is_loopback
from curation.browse_config import BrowseConfig
from schemas.errors import PairmillError
from schemas.events import Emit, Notice

_GRACE_S = 2


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises PairmillError where the address is taken or not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise PairmillError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Pass another --port (0 takes a free one) "
            "or --host."
        ) from None


def page_address(listening: socket.socket) -> str:
    """Its address for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


def serve(dataset: str, config: BrowseConfig, listening: socket.socket, emit: Emit, say: Callable[[str], None]) -> None:
    """Answers until Ctrl-C. Raises PairmillError: the extra `serve` is missing; the dataset cannot be opened."""
    try:
        import uvicorn

        from cli.web.browse import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise PairmillError(
            f"`browse` needs {error.name}, which is not installed. Run: pip install 'pairmill[serve]'"
        ) from None
    app = create_app(dataset, config, emit)
    if not is_loopback(config.host):
        emit(
            Notice(
                f"Whoever reaches {config.host} can read this dataset and save selections: there is no password.", True
            )
        )
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE_S
    )
    say(f"{page_address(listening)}  (Ctrl-C ends it)")
    uvicorn.Server(settings).run(sockets=[listening])
