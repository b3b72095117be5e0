"""One writer a stage: a lock that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from schemas.errors import PairmillError
from shards.files import Folder

RENEW_S = 20.0
STALE_S = 120.0
SETTLE_S = 0.2
_now = time.time


def _holder() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _who(holder: Mapping[str, object]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"


def _refuse(stage: str, who: str) -> PairmillError:
    return PairmillError(f"{stage} is being written by {who}. Wait for it to end, or stop it, and run this again.")


@contextlib.contextmanager
def lock(folder: Folder, stage: str) -> Iterator[Callable[[], bool]]:
    """Holds the lock of one stage (`pairs`, `scores/clip`, ...) of a dataset.

    Local folders: flock, which the kernel frees when the process dies. Stores: a lease renewed every 20 s and taken
    over after 120 s. Yields a function that tells whether the lock was lost meanwhile (a lease whose process slept).
    Raises PairmillError that names the holder.
    """
    held = _flock(folder.local, stage) if folder.local is not None else _lease(folder, stage)
    with held as lost:
        yield lost


def _lock_name(stage: str) -> str:
    return f"logs/locks/{stage.replace('/', '.')}"


@contextlib.contextmanager
def _flock(root: Path, stage: str) -> Iterator[Callable[[], bool]]:
    path = root / f"{_lock_name(stage)}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            try:
                who = json.loads(stream.read())
            except ValueError:  # it is writing its name just now
                who = {}
            raise _refuse(stage, _who(who)) from None
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(_holder()))
        stream.flush()
        yield lambda: False


@contextlib.contextmanager
def _lease(folder: Folder, stage: str) -> Iterator[Callable[[], bool]]:
    name = f"{_lock_name(stage)}.json"
    token = uuid.uuid4().hex
    lost = threading.Event()

    def read() -> dict[str, object]:
        try:
            return json.loads(folder.read_bytes(name))
        except (FileNotFoundError, ValueError):
            return {}

    def renew() -> None:
        folder.write_bytes(name, json.dumps({**_holder(), "token": token, "renewed": _now()}).encode())

    found = read() if folder.exists(name) else {}
    if found and _now() - float(str(found.get("renewed", 0))) < STALE_S:
        raise _refuse(stage, _who(found))
    renew()
    # Stores without conditional writes let two starters both write; the last one stands and the other sees it.
    time.sleep(SETTLE_S)
    now = read()
    if now.get("token") != token:
        raise _refuse(stage, _who(now))
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(RENEW_S):
            with contextlib.suppress(Exception):  # the store did not answer: try again next time
                if read().get("token") != token:  # we slept too long and another took over
                    lost.set()
                    return
                renew()

    thread = threading.Thread(target=keep, name=f"lease {stage}", daemon=True)
    thread.start()
    try:
        yield lost.is_set
    finally:
        stop.set()
        thread.join()
        if read().get("token") == token:
            folder.remove(name)
