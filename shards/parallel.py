"""Moving over shards: one picklable function a shard, on Dask or in this process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from schemas.errors import PairmillError
from schemas.events import Emit, Notice, Progress, ShardDone, ShardFailed, StageFinished, StageStarted
from shards.dataset import Stage
from shards.files import check_space
from shards.hand import RowInHand, read_hand, read_note
from shards.locks import lock
from shards.system import keep_freed_memory

MOST_TRIES = 20  # how often a shard may wait behind a task that takes its worker down
# Ctrl-C reaches every process of the terminal's group; this process decides, and closes the workers.
_IGNORE_INTERRUPT = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
CONNECT_S = 30.0  # to a scheduler somebody else started
LOST_WORKERS = 3  # how often a shard may lose its worker without a row in hand


class ShardWork(Protocol):
    """Makes one shard's file. Picklable; returns rows by status or state.

    `hand.hold(row)` goes around decoding; rows in `hand.crashed` are not decoded again. Raises PairmillError to stop
    the whole stage; any other exception stops that shard only.
    """

    def __call__(self, shard: int, hand: RowInHand) -> Mapping[str, int]: ...


@dataclass
class _Shard:
    """What is known of one shard in this run."""

    number: int
    hand: Path | None = None
    crashed: frozenset[int] = frozenset()
    suspects: frozenset[int] = frozenset()
    lost: int = 0
    tries: int = 0
    started: float = field(default_factory=time.monotonic)


def run_stage(
    stage: Stage,
    work: ShardWork,
    *,
    pending: Sequence[int],
    workers: int | None = None,
    scheduler: str | None = None,
    emit: Emit,
    bytes_per_row: int = 0,
    gpus: int = 0,
    keep_going: bool = True,
) -> StageFinished:
    """Runs `work` over the pending shards under the stage's lock, and logs it.

    Raises PairmillError: another process holds the stage; the disk cannot take it; no cluster at `scheduler`; or what
    `work` raised as PairmillError. KeyboardInterrupt leaves whole files only.
    """
    if stage.folder.url.startswith("memory://") and workers != 0:
        raise PairmillError(f"{stage.folder.url}: memory:// lives in one process only. Use --workers 0, or a folder.")
    sizes = stage.dataset.manifest.shards
    rows = sum(sizes[s] for s in pending)
    with lock(stage.folder, stage.path) as lost_lock:
        _remove_left_over(stage)
        check_space(stage.folder, rows * bytes_per_row, f"{stage.path} for {rows:,} rows")
        emit(StageStarted(stage.path, len(pending), len(sizes) - len(pending), rows))
        log = _Log(stage)
        start = time.monotonic()
        total: Counter[str] = Counter()
        done: list[int] = []
        runner = _in_process if workers == 0 or not pending else _on_dask
        try:
            for result in runner(stage, work, pending, workers, scheduler, emit, gpus):
                log.write(result)
                emit(result)
                if lost_lock():
                    raise PairmillError(f"{stage.path} of {stage.folder.url} was taken over by another process.")
                if isinstance(result, ShardDone):
                    done.append(result.shard)
                    total.update(result.counts)
        finally:
            finished = StageFinished(
                stage.path, len(done), tuple(sorted(set(pending) - set(done))), time.monotonic() - start, dict(total)
            )
            log.write(finished)
            log.close()
        emit(finished)
        return finished


def _remove_left_over(stage: Stage) -> None:
    """Under the stage's lock, temporary files of dead processes are nobody's."""
    for name in stage.folder.left_over(stage.path):
        with contextlib.suppress(FileNotFoundError):
            stage.folder.remove(f"{stage.path}/{name}")


def _in_process(
    stage: Stage,
    work: ShardWork,
    pending: Sequence[int],
    workers: int | None,
    scheduler: str | None,
    emit: Emit,
    gpus: int,
) -> Iterator[ShardDone | ShardFailed]:
    keep_freed_memory()
    before, before_failed = 0, 0
    for shard in pending:
        start = time.monotonic()
        hand = _LiveHand(stage.path, emit, before, before_failed)
        try:
            counts = dict(work(shard, hand))
        except PairmillError:
            raise
        except Exception:
            yield ShardFailed(stage.path, shard, traceback.format_exc(limit=-4))
            continue
        before += stage.dataset.manifest.shards[shard]
        before_failed += hand.failed
        yield ShardDone(stage.path, shard, sum(counts.values()), time.monotonic() - start, counts)


class _LiveHand(RowInHand):
    """Reports progress straight to the caller, at most every half second."""

    def __init__(self, stage: str, emit: Emit, before: int, before_failed: int) -> None:
        super().__init__(None)
        self._report = (stage, emit, before, before_failed)
        self._next = 0.0
        self.failed = 0

    def progress(self, done: int, failed: int, note: str = "") -> None:
        self.failed = failed
        if time.monotonic() >= self._next:
            stage, emit, before, before_failed = self._report
            emit(Progress(stage, before + done, before_failed + failed, note))
            self._next = time.monotonic() + 0.5


def _run_one(
    work: ShardWork, shard: int, hand: str | None, crashed: frozenset[int], suspects: frozenset[int]
) -> dict[str, int]:
    """What a Dask worker runs."""
    keep_freed_memory()
    return dict(work(shard, RowInHand(Path(hand) if hand else None, crashed, suspects)))


def _on_dask(
    stage: Stage,
    work: ShardWork,
    pending: Sequence[int],
    workers: int | None,
    scheduler: str | None,
    emit: Emit,
    gpus: int,
) -> Iterator[ShardDone | ShardFailed]:
    from distributed import KilledWorker, wait

    with _hand_folder(stage, scheduler) as hands, _client(workers, len(pending), scheduler, gpus) as client:
        options: dict[str, Any] = {"retries": 0, "pure": False, **({"resources": {"GPU": 1}} if gpus else {})}
        waiting = [_Shard(s) for s in pending]
        running: dict[Any, _Shard] = {}
        room = sum(client.nthreads().values())
        done_rows, failed_rows = 0, 0
        while waiting or running:
            while waiting and len(running) < room:
                one = waiting.pop(0)
                one.started = time.monotonic()
                one.tries += 1
                one.hand = hands / f"{one.number}.{one.tries}" if hands else None
                future = client.submit(
                    _run_one,
                    work,
                    one.number,
                    str(one.hand) if one.hand else None,
                    one.crashed,
                    one.suspects,
                    **options,
                )
                running[future] = one
            with contextlib.suppress(TimeoutError), client.as_current():
                wait(list(running), timeout=0.5, return_when="FIRST_COMPLETED")
            for future in [f for f in running if f.done()]:
                one = running.pop(future)
                try:
                    counts = future.result()
                except PairmillError:
                    raise
                except KilledWorker:
                    failed = _lost_worker(one, stage, emit)
                    if failed is None:
                        waiting.insert(0, one)
                    else:
                        yield failed
                except Exception:
                    yield ShardFailed(stage.path, one.number, traceback.format_exc(limit=-4))
                else:
                    done_rows += stage.dataset.manifest.shards[one.number]
                    failed_rows += read_hand(one.hand)[1] if one.hand else 0
                    yield ShardDone(
                        stage.path, one.number, sum(counts.values()), time.monotonic() - one.started, counts
                    )
            live = [read_hand(o.hand) for o in running.values() if o.hand]
            rows, failed_now = done_rows + sum(h[0] for h in live), failed_rows + sum(h[1] for h in live)
            notes = (read_note(o.hand) for o in running.values() if o.hand)
            emit(Progress(stage.path, rows, failed_now, next(filter(None, notes), "")))


def _lost_worker(one: _Shard, stage: Stage, emit: Emit) -> ShardFailed | None:
    """Decides what a dead worker means for its shard: which rows to skip or to try alone, or that it has failed."""
    if one.hand and not one.hand.exists() and one.tries < MOST_TRIES:
        return None  # it had not begun: it waited behind the task that took the worker down
    held = read_hand(one.hand)[2] if one.hand else frozenset()
    if len(held) == 1 and held <= one.suspects:
        one.crashed |= held
        one.suspects -= held
        emit(Notice(f"shard {one.number} row {min(held)}: its decoder took the worker down; the row is skipped.", True))
        return None
    if held:
        one.suspects |= held
        return None
    one.lost += 1
    if one.lost > LOST_WORKERS:
        return ShardFailed(
            stage.path, one.number, f"its worker died {one.lost} times with no row in hand (out of memory?)"
        )
    emit(Notice(f"shard {one.number}: its worker was lost; trying again.", True))
    return None


@contextlib.contextmanager
def _hand_folder(stage: Stage, scheduler: str | None) -> Iterator[Path | None]:
    """Where tasks note the row in hand: a place this process and the workers both see, or None."""
    root = stage.folder.local if scheduler else None
    if scheduler and root is None:
        yield None  # workers on other machines share only the store
        return
    with tempfile.TemporaryDirectory(prefix="hand-", dir=root / "logs" if root else None) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _client(workers: int | None, shards: int, scheduler: str | None, gpus: int) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    # A lost worker is our business (see `_lost_worker`): Dask reports it at once.
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.comm.timeouts.connect": "30s"}
    with dask.config.set(settings):
        if scheduler:
            try:
                client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
            except (OSError, ValueError) as error:
                raise PairmillError(f"No Dask scheduler answers at {scheduler}: {error}.") from None
            with client:
                yield client
            return
        count = min(gpus or workers or os.cpu_count() or 1, max(1, shards))
        cluster = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",  # none would be tried at port 8787, with a warning where that is taken
            host="127.0.0.1",
            silence_logs=50,
            preload=[_IGNORE_INTERRUPT],
            resources={"GPU": 1} if gpus else None,
        )
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


def threads_per_worker(workers: int | None) -> int:
    """Threads one worker may use so that workers x threads never exceeds the cores."""
    cores = os.cpu_count() or 1
    return cores if workers == 0 else max(1, cores // (workers or cores))


class _Log:
    """`logs/STAGE.TIME.HOST.PID.jsonl`: times, hosts and progress; outside every promise of equal bytes."""

    def __init__(self, stage: Stage) -> None:
        name = stage.path.replace("/", ".")
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.name = f"logs/{name}.{stamp}.{socket.gethostname()}.{os.getpid()}.jsonl"
        self.stage = stage
        self.lines: list[str] = []
        root = stage.folder.local
        if root is not None:
            (root / "logs").mkdir(parents=True, exist_ok=True)
        self.stream = (root / self.name).open("a", encoding="utf-8") if root is not None else None

    def write(self, event: ShardDone | ShardFailed | StageFinished) -> None:
        line = json.dumps({"event": type(event).__name__, "at": time.time(), **event.__dict__}) + "\n"
        if self.stream is not None:
            self.stream.write(line)
            self.stream.flush()
        else:
            self.lines.append(line)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        elif self.lines:
            self.stage.folder.write_bytes(self.name, "".join(self.lines).encode())
