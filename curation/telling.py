"""Progress of a rule that takes minutes, one step after the other."""

from __future__ import annotations

from curation.kmeans import Tell
from schemas.events import Emit, Progress, StageStarted


class Steps:
    """`Steps(emit, "dedup_semantic")("fit 1,000 centroids", rows)` begins a step; the answer counts its rows."""

    def __init__(self, emit: Emit, stage: str) -> None:
        self.emit, self.stage = emit, stage

    def __call__(self, step: str, rows: int) -> Tell:
        name, done = f"{self.stage}: {step}", 0
        self.emit(StageStarted(name, 0, 0, rows))

        def tell(more: int) -> None:
            nonlocal done
            done += more
            self.emit(Progress(name, done, 0))

        return tell
