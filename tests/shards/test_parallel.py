"""Moving over shards: bad shards, lost workers, decoders that take theirs down, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from schemas.errors import PairmillError
from schemas.events import Notice, Progress, ShardDone, ShardFailed, StageFinished, StageStarted, silent
from shards.dataset import Dataset
from shards.hand import RowInHand, read_hand, read_note
from shards.parallel import run_stage, threads_per_worker
from shards.reader import read_table
from tests.atomicity import tree
from tests.make import make_dataset
from tests.shards.toy import SizeWork, ToyConfig, size_scores

TWO = ToyConfig(workers=2)
HERE = ToyConfig(workers=0)


@pytest.fixture
def whole(tmp_path) -> dict[str, str]:
    """What an undisturbed run in one process leaves."""
    size_scores(make_dataset(tmp_path / "whole", shards=3), HERE, silent)
    return tree(tmp_path / "whole")


def of(events, kind):
    return [e for e in events if isinstance(e, kind)]


def test_in_process_reports_and_logs(tmp_path):
    events: list = []
    dataset = make_dataset(tmp_path / "d", shards=3, fail={(1, 2): "timeout"})
    finished = size_scores(dataset, HERE, events.append)
    assert events[0] == StageStarted("scores/size", 3, 0, 24)
    assert [e.shard for e in of(events, ShardDone)] == [0, 1, 2]
    assert of(events, Progress)
    assert (
        finished == events[-1] == StageFinished("scores/size", 3, (), finished.seconds, {"ok": 23, "decoder_crash": 0})
    )
    logs = list((tmp_path / "d/logs").glob("scores.size.*.jsonl"))
    assert len(logs) == 1
    assert logs[0].read_text().count("\n") == 4
    assert size_scores(dataset, HERE, silent).done == 0


def test_two_workers_write_the_same_bytes(tmp_path, whole):
    dataset = make_dataset(tmp_path / "d", shards=3)
    assert size_scores(dataset, TWO, silent).done == 3
    assert tree(tmp_path / "d") == whole


def test_a_killed_worker_costs_no_row(tmp_path, whole):
    events: list = []
    dataset = make_dataset(tmp_path / "d", shards=3)
    size_scores(dataset, TWO, events.append, trouble="kill", row=3, once=str(tmp_path / "flag"))
    assert (tmp_path / "flag").exists()
    assert tree(tmp_path / "d") == whole


def test_a_decoder_that_takes_its_worker_down_costs_its_row(tmp_path):
    events: list = []
    dataset = make_dataset(tmp_path / "d", shards=2)
    finished = size_scores(dataset, TWO, events.append, trouble="exit", row=3)
    assert (finished.left, finished.counts) == ((), {"ok": 15, "decoder_crash": 1})
    sizes = read_table(dataset.folder, "scores/size/00000.parquet")["size"].to_pylist()
    assert [i for i, s in enumerate(sizes) if s is None] == [3]
    assert "shard 0 row 3" in of(events, Notice)[-1].text


class Threaded(SizeWork):
    """Holds every row of the shard at once, each in a thread."""

    def __call__(self, shard: int, hand: RowInHand) -> dict[str, int]:
        rows = range(self.dataset.manifest.shards[shard])
        ready = threading.Barrier(len(rows) - len(hand.crashed | hand._suspects) or 1)

        def decode(row: int) -> None:
            with hand.hold(row):
                if row not in hand._suspects:
                    ready.wait()
                self._meet(shard, row)

        threads = [threading.Thread(target=decode, args=[r]) for r in rows if r not in hand.crashed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return super().__call__(1, hand) if shard else self._crashed(hand)

    def _crashed(self, hand: RowInHand) -> dict[str, int]:
        return {"decoder_crash": len(hand.crashed), "ok": 8 - len(hand.crashed)}


def test_of_several_rows_in_hand_only_the_culprit_is_lost(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=1)
    stage = dataset.stage("scores/size")
    events: list = []
    work = Threaded(dataset, 1.0, trouble="exit", row=5)
    finished = run_stage(stage, work, pending=[0], workers=1, emit=events.append)
    assert finished.counts == {"decoder_crash": 1, "ok": 7}
    assert [e.text for e in of(events, Notice)] == [
        "shard 0 row 5: its decoder took the worker down; the row is skipped."
    ]


@pytest.mark.parametrize("config", [HERE, TWO])
def test_a_bad_shard_stops_that_shard_only(tmp_path, config):
    events: list = []
    dataset = make_dataset(tmp_path / "d", shards=3)
    finished = size_scores(dataset, config, events.append, trouble="bug", row=2)
    assert (finished.done, finished.left) == (2, (0,))
    assert "RuntimeError: a bad shard" in of(events, ShardFailed)[0].error
    assert dataset.stage("scores/size").pending() == [0]


@pytest.mark.parametrize("config", [HERE, TWO])
def test_what_the_user_can_mend_stops_the_stage(tmp_path, config):
    dataset = make_dataset(tmp_path / "d", shards=3)
    with pytest.raises(PairmillError, match="the user can mend this"):
        size_scores(dataset, config, silent, trouble="mend", row=0)


def test_killing_workers_under_load_gives_the_same_bytes(tmp_path):
    calm = make_dataset(tmp_path / "calm", shards=6)
    size_scores(calm, HERE, silent)
    dataset = make_dataset(tmp_path / "d", shards=6)
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.4) and len(killed) < 2:
            busy = [c for c in _children(os.getpid()) if _computes(c)]
            if busy:
                os.kill(busy[0], signal.SIGKILL)
                killed.append(busy[0])

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        finished = size_scores(dataset, TWO, silent, pause=0.06)
    finally:
        stop.set()
        thread.join()
    assert killed
    assert (finished.done, finished.counts) == (6, {"ok": 48, "decoder_crash": 0})
    assert tree(tmp_path / "d") == tree(tmp_path / "calm")


def _children(pid: int) -> list[int]:
    out = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            out.append(int(path.parent.name))
    return out


def _computes(pid: int) -> bool:
    """Whether the process is a Dask worker with a task's note of its rows open."""
    try:
        return "hand-" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


SCRIPT = """
import sys
from shards.dataset import Dataset
from tests.shards.toy import ToyConfig, size_scores
def say(event):
    print(type(event).__name__, flush=True)
if __name__ == "__main__":
    try:
        size_scores(Dataset.open(sys.argv[1]), ToyConfig(workers=int(sys.argv[2])), say, pause=0.1)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_stage(root: Path, workers: int) -> subprocess.Popen[str]:
    script = root.parent / "stage.py"
    script.write_text(SCRIPT)
    place = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, str(script), str(root), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=place,
        start_new_session=True,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_whole_files_only(tmp_path, workers):
    dataset = make_dataset(tmp_path / "d", shards=4)
    run = start_stage(tmp_path / "d", workers)
    for line in run.stdout:
        if line.startswith("ShardDone"):
            break
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    out, err = run.communicate(timeout=30)
    assert run.returncode == 130, out + err
    assert "Traceback" not in err
    time.sleep(0.2)
    assert not [p for p in (tmp_path / "d/scores/size").iterdir() if p.name.startswith(".tmp")]
    stage = dataset.stage("scores/size")
    assert stage.done() == stage.standing() != set()
    assert len(stage.done()) < 4


def test_rows_in_hand_are_seen_by_another_process(tmp_path):
    path = tmp_path / "hand"
    hand = RowInHand(path)
    with hand.hold(7), hand.hold(9):
        hand.progress(3, 1, "één host limits the run" + "!" * 200)
        assert read_hand(path) == (3, 1, {7, 9})
        assert read_note(path) == "één host limits the run" + "!" * 103
    assert read_hand(path) == (3, 1, frozenset())
    assert read_hand(tmp_path / "none") == (0, 0, frozenset())
    path.write_bytes(b"cut")
    assert read_hand(path) == (0, 0, frozenset())


def test_a_suspect_is_alone_in_hand():
    hand = RowInHand(None, suspects=frozenset({2}))
    inside: set[int] = set()
    seen: list[set[int]] = []

    def decode(row: int) -> None:
        with hand.hold(row):
            inside.add(row)
            time.sleep(0.01)
            if row == 2:
                seen.append(set(inside))
            inside.discard(row)

    threads = [threading.Thread(target=decode, args=[r]) for r in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [{2}]


def test_threads_never_exceed_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [threads_per_worker(w) for w in (0, 1, 2, 3, 8, 16, None)] == [8, 8, 4, 2, 1, 1, 1]


def test_no_scheduler_is_a_clear_error(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "d", shards=1)
    config = ToyConfig(scheduler="tcp://127.0.0.1:1")
    monkeypatch.setattr("shards.parallel.CONNECT_S", 0.5)
    with pytest.raises(PairmillError, match="No Dask scheduler answers at tcp:"):
        run_stage(
            dataset.stage("scores/size"),
            SizeWork(dataset, 1.0),
            pending=[0],
            scheduler=config.scheduler,
            emit=silent,
        )


def test_dataset_travels_to_workers(tmp_path):
    import pickle

    dataset = make_dataset(tmp_path / "d")
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.url, again.manifest) == (dataset.url, dataset.manifest)
    assert isinstance(again, Dataset)


def test_a_cluster_that_somebody_else_started(tmp_path, whole):
    from distributed import LocalCluster

    dataset = make_dataset(tmp_path / "d", shards=3)
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    with LocalCluster(**options, silence_logs=50) as cluster:
        stage = dataset.stage("scores/size")
        stage.begin(Dataset.open(tmp_path / "whole").stage("scores/size").sidecar(), "")
        done = run_stage(
            stage, SizeWork(dataset, 1.0), pending=[0, 1, 2], scheduler=cluster.scheduler_address, emit=silent
        )
    assert done.left == ()
    assert tree(tmp_path / "d") == whole
    assert not list((tmp_path / "d/logs").glob("hand-*"))
