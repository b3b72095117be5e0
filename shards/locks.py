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
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import PairmillError
from shards.files import Folder

RENEW_S = 20.0
STALE_S = 120.0


def _holder() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _refuse(stage: str, who: str) -> PairmillError:
    return PairmillError(f"{stage} is being written by {who}. Wait for it to end, or stop it, and run this again.")


@contextlib.contextmanager
def lock(folder: Folder, stage: str) -> Iterator[None]:
    """Holds the lock of one stage (`pairs`, `scores/clip`, ...) of a dataset.

    Local folders: flock, which the kernel frees when the process dies. Stores: a lease renewed every 20 s and taken
    over after 120 s. Raises PairmillError that names the holder.
    """
    held = _flock(folder.local, stage) if folder.local is not None else _lease(folder, stage)
    with held:
        yield


def _lock_name(stage: str) -> str:
    return f"logs/locks/{stage.replace('/', '.')}"


@contextlib.contextmanager
def _flock(root: Path, stage: str) -> Iterator[None]:
    path = root / f"{_lock_name(stage)}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            try:
                who = json.loads(stream.read())
                raise _refuse(stage, f"process {who['pid']} on {who['host']} since {who['since']}") from None
            except (ValueError, KeyError):
                raise _refuse(stage, "another process") from None
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(_holder()))
        stream.flush()
        yield


@contextlib.contextmanager
def _lease(folder: Folder, stage: str) -> Iterator[None]:
    name = f"{_lock_name(stage)}.json"
    token = uuid.uuid4().hex

    def read() -> dict[str, object]:
        try:
            return json.loads(folder.read_bytes(name))
        except (FileNotFoundError, ValueError):
            return {}

    def renew() -> None:
        folder.write_bytes(name, json.dumps({**_holder(), "token": token, "renewed": time.time()}).encode())

    found = read() if folder.exists(name) else {}
    if found and time.time() - float(str(found["renewed"])) < STALE_S:
        raise _refuse(stage, f"process {found['pid']} on {found['host']} since {found['since']}")
    renew()
    # Stores without conditional writes let two starters both write; the last one stands and the other sees it.
    time.sleep(0.2)
    now = read()
    if now.get("token") != token:
        raise _refuse(stage, f"process {now.get('pid')} on {now.get('host')} since {now.get('since')}")
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(RENEW_S):
            renew()

    thread = threading.Thread(target=keep, name=f"lease {stage}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        folder.remove(name)
