"""The download stage: lists cut into `input/`, their rows fetched into `pairs/`."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from curation.config import DownloadConfig
from curation.download_shard import DownloadShard, Fetching, RetryShard, hopeless, transient_rows
from curation.rows import HopelessWatch
from curation.sources import cut
from schemas.errors import PairmillError
from schemas.events import Emit, Event, Notice, ShardDone, StageFinished, silent
from schemas.pairs import PAIRS, VERSION
from schemas.sidecars import make_sidecar
from schemas.status import is_transient
from shards.dataset import Dataset, Stage
from shards.parallel import run_stage
from shards.reader import read_table

WATCHED_ROWS = 500
Observed: TypeAlias = tuple[str, int | None, str | None]  # status, http_status, error
_MEND = "Use the same options, or choose another output."


@dataclass(frozen=True)
class DownloadResult:
    """What a run did, and the dataset as it stands.

    rows    rows of the whole dataset
    counts  rows by status over the shards that stand
    """

    dataset: str
    rows: int
    counts: dict[str, int]
    finished: StageFinished


def download(lists: Sequence[str], output: str | Path, config: DownloadConfig, emit: Emit = silent) -> DownloadResult:
    """Lists in, pairs out; goes on with what a stopped run left. Without lists, the dataset at `output`.

    Raises PairmillError: lists that cannot be read (see `cut`), other settings than the pairs that stand were made
    with, no engine, no space, a run that is hopeless, another process at work on these pairs.
    """
    if config.engine == "img2dataset":
        from curation.engine_img2dataset import check_engine

        check_engine(config)
    dataset = cut(lists, output, config, emit)
    stage = dataset.stage(PAIRS)
    sidecar = make_sidecar("download", PAIRS, (PAIRS, VERSION), config, versions=_versions(config))
    stage.begin(sidecar, _MEND)
    finished = _retry(dataset, config, emit) if config.retry_failed else _download(dataset, config, emit)
    counts = _counts(stage)
    return DownloadResult(dataset.url, len(dataset), dict(counts), finished)


def _versions(config: DownloadConfig) -> dict[str, str]:
    packages = ("pairmill", "pillow", "opencv-python-headless", "aiohttp")
    return {name: version(name) for name in (*packages, *([config.engine] if config.engine != "pairmill" else []))}


def _counts(stage: Stage) -> Counter[str]:
    total: Counter[str] = Counter()
    for shard in stage.standing():
        total.update(stage.counts(shard))
    return total


def _download(dataset: Dataset, config: DownloadConfig, emit: Emit) -> StageFinished:
    stage = dataset.stage(PAIRS)
    pending = stage.pending()
    if not pending:
        emit(Notice(f"{dataset.url} is whole: {_summary(_counts(stage))}. Nothing to do."))
        return StageFinished(PAIRS, 0, (), 0.0)
    workers = num_workers(config, len(pending))
    watched = frozenset() if config.keep_going else frozenset(pending[:workers])
    return run(stage, DownloadShard(dataset, fetching(config, workers), watched), pending, config, emit)


def _summary(counts: Mapping[str, int]) -> str:
    failed = sum(n for status, n in counts.items() if status not in ("success", "removed"))
    passing = sum(n for status, n in counts.items() if is_transient(status))
    again = f", {passing:,} of them may pass: --retry-failed" if passing else ""
    return f"{counts.get('success', 0):,} of {sum(counts.values()):,} rows have an image, {failed:,} failed{again}"


def fetching(config: DownloadConfig, workers: int) -> Fetching:
    """How a new run fetches."""
    return Fetching(config, workers, uuid.uuid4().hex)


def run(
    stage: Stage, work: DownloadShard | RetryShard, pending: Sequence[int], config: DownloadConfig, emit: Emit
) -> StageFinished:
    """The shards' work, watched while the run is young (a retry is not: its rows have failed before)."""
    watch = None if config.keep_going or isinstance(work, RetryShard) else _Watch(stage, emit)
    return run_stage(
        stage,
        work,
        pending=pending,
        workers=config.workers,
        scheduler=config.scheduler,
        emit=watch or emit,
        bytes_per_row=bytes_per_row(config),
    )


class _Watch:
    """Passes events on; stops the run when its first 500 rows failed nearly all for one cause.

    A large shard looks at its own first rows by itself while it runs; this is for shards that end before.
    """

    def __init__(self, stage: Stage, emit: Emit) -> None:
        self._stage, self._emit = stage, emit
        self._seen: list[Observed] = []

    def __call__(self, event: Event) -> None:
        self._emit(event)
        if len(self._seen) >= WATCHED_ROWS:
            return
        if isinstance(event, ShardDone):
            self._seen += _observed(self._stage, event.shard)
            cause = one_cause(self._seen[:WATCHED_ROWS]) if len(self._seen) >= WATCHED_ROWS else None
            if cause is not None:
                raise hopeless(cause)
        elif isinstance(event, StageFinished):
            cause = one_cause(self._seen)
            if cause is not None:
                self._emit(Notice(f"Nearly all rows failed for one cause: {cause}.", warning=True))


def _observed(stage: Stage, shard: int) -> list[Observed]:
    columns = ["status", "http_status", "error"]
    table = read_table(stage.folder, stage.file(shard), columns)
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return [row for row in rows if row[0] != "removed"]


def one_cause(rows: Sequence[Observed]) -> str | None:
    """The error of the one cause for which over 95 % of the rows failed, None where there is no such one."""
    watch = HopelessWatch(rows=max(1, len(rows)))
    for row in rows:
        watch.observe(*row)
    return watch.cause


def _retry(dataset: Dataset, config: DownloadConfig, emit: Emit) -> StageFinished:
    stage = dataset.stage(PAIRS)
    left = stage.pending()
    if left:
        emit(Notice(f"{len(left)} shards are still to download: run without --retry-failed for them.", warning=True))
    pending = [shard for shard in sorted(stage.standing()) if transient_rows(dataset, shard)]
    if not pending:
        emit(Notice(f"{dataset.url} has no row whose failure may pass. Nothing to do."))
        return StageFinished(PAIRS, 0, tuple(left), 0.0)
    workers = num_workers(config, len(pending))
    return run(stage, RetryShard(dataset, fetching(config, workers)), pending, config, emit)


def num_workers(config: DownloadConfig, shards: int) -> int:
    """Processes that share the connections to a host.

    Raises PairmillError where no scheduler answers at the address that was given.
    """
    if config.workers == 0:
        return 1
    if config.scheduler is not None and config.workers is None:
        return max(1, _threads_of(config.scheduler))
    return max(1, min(config.workers or os.cpu_count() or 1, shards))


def _threads_of(scheduler: str) -> int:
    from distributed import Client

    try:
        with Client(scheduler, timeout="30s", set_as_default=False) as client:
            return sum(client.nthreads().values())
    except (OSError, ValueError) as error:
        raise PairmillError(f"No Dask scheduler answers at {scheduler}: {error}.") from None


def bytes_per_row(config: DownloadConfig) -> int:
    """A low estimate of a row on disk, failures counted in: enough to refuse what cannot fit."""
    if config.resize == "none":
        return 50_000
    per_pixel = 1.0 if config.encode == "png" else 0.15
    return int(config.size**2 * per_pixel)
