"""Every stage of a dataset: what made it, how far it is, what it counted, how long it took."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.dataset import PAIRS, Dataset, Stage
from shards.files import Folder
from shards.select import selection_about, selections

_STAMP = re.compile(r"\d{8}T\d{6}\..+\.jsonl\Z")


@dataclass(frozen=True)
class StageSummary:
    """One stage, or one selection (its counts are kept and dropped, its identity the recipe).

    shards   how many stand and are up to date, of how many
    counts   rows by status or state, summed from the shards' footers
    seconds  of all runs together, `runs` of them, as the logs tell
    """

    path: str
    made_by: str
    identity: dict[str, Any]
    fingerprint: str
    versions: dict[str, str]
    shards: tuple[int, int]
    counts: dict[str, int]
    seconds: float = 0.0
    runs: int = 0
    hosts: tuple[str, ...] = ()
    recorded: dict[str, Any] = field(default_factory=dict)


def history(dataset: Dataset | str | Path) -> list[StageSummary]:
    """Pairs, scores, features, tasks, then selections. Raises PairmillError for a damaged shard or sidecar."""
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    logs = dataset.folder.names("logs")
    stages = [_summary(stage, logs) for stage in dataset.stages()]
    return stages + [_selection(dataset, name) for name in selections(dataset)]


def _summary(stage: Stage, logs: list[str]) -> StageSummary:
    sidecar = stage.sidecar()
    assert sidecar is not None, "`stages` gives those with a sidecar"
    counts: Counter[str] = Counter()
    for shard in stage.standing():
        counts.update(stage.counts(shard))
    done = len(stage.done())
    of = done if stage.kind == "tasks" else stage.dataset.num_shards
    runs = list(_runs(stage.folder, stage.path, logs))
    return StageSummary(
        path=stage.path,
        made_by=sidecar.stage,
        identity=sidecar.identity,
        fingerprint=sidecar.fingerprint,
        versions=sidecar.versions,
        shards=(done, of),
        counts=dict(sorted(counts.items())),
        seconds=sum(seconds for _, seconds in runs),
        runs=len(runs),
        hosts=tuple(sorted({host for host, _ in runs})),
        recorded=sidecar.recorded,
    )


def _runs(folder: Folder, path: str, logs: list[str]) -> Iterator[tuple[str, float]]:
    """(host, seconds) of each run of the stage that did something."""
    prefix = path.replace("/", ".") + "."
    for name in logs:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and _STAMP.match(rest):
            seconds = _seconds(folder.read_bytes(f"logs/{name}").decode(errors="replace").splitlines())
            if seconds is not None:
                yield rest.split(".", 1)[1].rsplit(".", 2)[0], seconds


def _seconds(lines: list[str]) -> float | None:
    """As the last line tells; of a run that was killed, from its first event to its last. None: it did nothing."""
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue  # cut by the kill
    if not any(e.get("event") in ("ShardDone", "ShardFailed") for e in events):
        return None
    if events[-1]["event"] == "StageFinished":
        return float(events[-1]["seconds"])
    return events[-1]["at"] - events[0]["at"] + float(events[0].get("seconds", 0.0))


def _selection(dataset: Dataset, name: str) -> StageSummary:
    about = selection_about(dataset, name)
    made, now = about["made_from"]["digests"], dataset.num_shards
    pairs = dataset.stage(PAIRS)
    fresh = sum(1 for s, digest in enumerate(made[:now]) if pairs.digest(s) == digest)
    return StageSummary(
        path=f"selections/{name}",
        made_by="filter",
        identity=about["recipe"],
        fingerprint="",
        versions={},
        shards=(fresh, now),
        counts={"kept": about["kept"], "dropped": about["rows"] - about["kept"]},
    )
