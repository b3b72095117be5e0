"""A process that has started no threads, for tests that fork beside torch and polars: their pools survive no fork."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Imported once, by the server that all clean processes are forked from.
PRELOAD = (
    "curation.download",
    "curation.filter",
    "extractors.clip",
    "extractors.patches",
    "extractors.regions.extractor",
    "extractors.regions.tiny",
    "training.train",
    "accelerate",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


def in_clean_process(function: Callable[..., Any], *arguments: Any, limit_s: float = 240.0) -> Any:
    """`function(*arguments)`, both picklable, computed in a new process. Raises AssertionError with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        assert here.poll(limit_s), f"{function.__name__} has not ended after {limit_s:.0f} s"
        value, error = here.recv()
    finally:
        process.join(1)
        if process.pid is not None and process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        here.close()
    assert error is None, error
    return value


def _send(to: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setpgrp()  # its children end with it
    try:
        to.send((function(*arguments), None))
    except BaseException:
        to.send((None, traceback.format_exc()))
