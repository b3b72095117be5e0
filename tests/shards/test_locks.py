"""One writer a stage: refused with a name, freed by the kernel, taken over when stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid

import pytest

from schemas.errors import PairmillError
from shards import locks
from shards.files import LocalFolder, open_folder
from shards.locks import lock

HOLD = """
import sys, time
from shards.files import LocalFolder
from shards.locks import lock
with lock(LocalFolder(sys.argv[1]), "scores/clip"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(root) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_second_copy_is_told_who_holds_it_and_a_kill_frees_it(tmp_path):
    folder = LocalFolder(tmp_path)
    child = hold(tmp_path)
    try:
        expected = rf"scores/clip is being written by process {child.pid} on \S+ since \d{{4}}-.*Wait for it to end"
        with pytest.raises(PairmillError, match=expected), lock(folder, "scores/clip"):
            raise AssertionError("two writers")
        with lock(folder, "scores/text"):
            pass  # another stage is free
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with lock(folder, "scores/clip") as lost:
        assert not lost()


def test_two_threads_of_one_process_exclude_each_other(tmp_path):
    folder = LocalFolder(tmp_path)
    with lock(folder, "pairs"):
        with pytest.raises(PairmillError, match=f"process {os.getpid()}"), lock(folder, "pairs"):
            raise AssertionError("two writers")
    with lock(folder, "pairs"):
        pass


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(locks, "_now", lambda: self.now)
        monkeypatch.setattr(locks, "SETTLE_S", 0.0)


@pytest.fixture
def store():
    return open_folder(f"memory://{uuid.uuid4().hex}")


NAME = "logs/locks/scores.clip.json"


def test_lease_is_refused_while_fresh_and_taken_over_when_stale(store, monkeypatch):
    clock = Clock(monkeypatch)
    with lock(store, "scores/clip") as lost:
        with pytest.raises(PairmillError, match=f"process {os.getpid()}"), lock(store, "scores/clip"):
            raise AssertionError("two writers")
        clock.now += locks.STALE_S + 1  # this process slept: nobody renewed
        with lock(store, "scores/clip"):
            taken = json.loads(store.read_bytes(NAME))
            assert taken["renewed"] == clock.now
        assert not lost()  # the taker has gone and the lease with it
    assert not store.exists(NAME)


def test_lease_is_renewed_and_its_loss_is_noticed(store, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(locks, "RENEW_S", 0.01)
    with lock(store, "scores/clip") as lost:
        clock.now += 500
        wait_for(lambda: json.loads(store.read_bytes(NAME))["renewed"] == clock.now)
        assert not lost()
        other = json.dumps({"token": "another", "pid": 1, "host": "h", "since": "s", "renewed": clock.now}).encode()

        def taken() -> bool:
            store.write_bytes(NAME, other)  # once more where a renewal, begun before, has overwritten it
            return lost()

        wait_for(taken)
    assert store.read_bytes(NAME) == other, "the other's lease stays"


def wait_for(condition) -> None:
    stop = threading.Event()
    for _ in range(500):
        if condition():
            return
        stop.wait(0.01)
    raise AssertionError("never came true")


def test_of_two_starters_the_last_writer_wins(store, monkeypatch):
    Clock(monkeypatch)
    write = store.write_bytes

    def write_then_lose(name, data):
        write(name, data)
        write(name, json.dumps({"token": "other", "pid": 7, "host": "h", "since": "s", "renewed": 1000.0}).encode())

    monkeypatch.setattr(store, "write_bytes", write_then_lose)
    with pytest.raises(PairmillError, match="process 7 on h since s"), lock(store, "scores/clip"):
        raise AssertionError("two writers")


def test_a_damaged_lease_is_taken_over(store, monkeypatch):
    Clock(monkeypatch)
    store.write_bytes(NAME, b"{")
    with lock(store, "scores/clip"):
        pass
