"""What stages report while they run; `cli/progress.py` draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageStarted:
    """A stage begins: how many shards and rows lie ahead, how many shards stand already.

    A run of training has no shards and counts steps: `unit` says so.
    """

    stage: str
    shards: int
    standing: int
    rows: int
    unit: str = "rows"


@dataclass(frozen=True)
class Progress:
    """Rows done so far in this run, of them failed, and a word on what limits the run."""

    stage: str
    rows: int
    failed: int
    note: str = ""


@dataclass(frozen=True)
class ShardDone:
    """A shard's file stands. `counts` are rows by status or state."""

    stage: str
    shard: int
    rows: int
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardFailed:
    """A shard could not be finished; the others go on."""

    stage: str
    shard: int
    error: str


@dataclass(frozen=True)
class Notice:
    """One thing the user should know, in a sentence."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class StageFinished:
    """The stage ends: shards done in this run, shards left to do, rows by status, seconds."""

    stage: str
    done: int
    left: tuple[int, ...]
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)


Event = StageStarted | Progress | ShardDone | ShardFailed | Notice | StageFinished
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """An `Emit` that draws nothing."""
