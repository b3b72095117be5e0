"""Copies of pairs for other tools: the engine cuts kept successes into files, a format writes each.

File k holds kept successes k * shard_rows to (k + 1) * shard_rows: a killed export goes on and ends with equal bytes.
`PAIRMILL` tells what the folder was made from; `README.md`, the dataset card, is written last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from curation.card import write_card
from curation.export import origin
from curation.importing import load_format
from curation.maintenance_config import ExportConfig
from curation.reshard import Part, Plan, forget_selections, make_plan, taken
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, ShardDone, StageFinished, StageStarted
from schemas.status import SUCCESS
from shards.dataset import PAIRS, Dataset
from shards.files import Folder, open_folder
from shards.reader import read_table

# No `.json`: img2dataset takes every .json of its folder for the statistics of a shard, datasets for data.
MARK = "PAIRMILL"


class Writer(Protocol):
    """What a format's module offers to the export, as `Writer`."""

    def stands(self, folder: Folder, number: int) -> bool:
        """Whether file `number` is whole."""

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes file `number`, whole or not at all."""

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        """Writes what tells of all files. `sizes` are their samples."""


@dataclass(frozen=True)
class Job:
    """Files that one writer writes, and the rows they hold; `notes` are told to the user.

    A format whose files are not simply `shard_rows` rows each offers `jobs(part, config)`.
    """

    writer: Writer
    plan: Plan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Successes(Part):
    """The rows of a part that have an image."""

    def kept(self, shard: int) -> np.ndarray:
        pairs = self.dataset.stage(PAIRS)
        status = read_table(self.dataset.folder, pairs.file(shard), ["status"])["status"].to_pylist()
        return np.array([r for r in super().kept(shard).tolist() if status[r] == SUCCESS], np.int64)


def export_pairs(
    format: str, dataset: Dataset | str | Path, output: str | Path, config: ExportConfig, emit: Emit
) -> StageFinished:
    """Copies the kept successes of a dataset into `output` in another tool's format.

    Raises PairmillError: an unknown format, a stale selection, no success kept, a folder that holds something else.
    """
    start = time.monotonic()
    source = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    module = load_format(format)
    forget_selections()
    part = Successes(source, config.selection)
    jobs: list[Job] = module.jobs(part, config) if hasattr(module, "jobs") else [job(module.Writer(), part, config)]
    rows = sum(one.plan.rows for one in jobs)
    if not rows:
        raise PairmillError(f"{source.url}: no pair with an image is kept. Nothing written.")
    folder = open_folder(output)
    _begin(folder, {"format": format, **config.identity_fields(), "source": origin(part)})
    files = [(one, n, size) for one in jobs for n, size in enumerate(one.plan.sizes())]
    left = [(one, n, size) for one, n, size in files if not one.writer.stands(folder, n)]
    emit(StageStarted("export", len(left), len(files) - len(left), sum(size for _, _, size in left)))
    for one, number, size in left:
        began = time.monotonic()
        one.writer.write(folder, number, _rows(one.plan, number))
        emit(ShardDone("export", number, size, time.monotonic() - began, {SUCCESS: size}))
    for one in jobs:
        one.writer.finish(folder, one.plan.sizes())
    write_card(folder, part, rows, format)
    without = sum(Part(source, config.selection).counts()) - rows
    notes = [f"{without} kept rows have no image and were left out."] if without else []
    for note in (*notes, *(note for one in jobs for note in one.notes)):
        emit(Notice(note))
    finished = StageFinished("export", len(left), (), time.monotonic() - start, {SUCCESS: rows})
    emit(finished)
    return finished


def job(writer: Writer, part: Part, config: ExportConfig) -> Job:
    """Files of `shard_rows` rows each."""
    return Job(writer, make_plan([part], config.shard_rows))


def _begin(folder: Folder, mark: dict[str, Any]) -> None:
    """Marks a new folder, or checks that the one that stands was begun by the same export."""
    text = (json.dumps(mark, indent=1, sort_keys=True) + "\n").encode()
    for inside in ("", *folder.folders("")):
        for name in folder.left_over(inside):
            folder.remove(f"{inside}/{name}" if inside else name)
    if folder.exists(MARK):
        if folder.read_bytes(MARK) != text:
            raise PairmillError(f"{folder.url} holds another export. Nothing written. Choose another place with -o.")
    elif folder.names("") or folder.folders(""):
        raise PairmillError(f"{folder.url} is not empty. Nothing written. Choose another place with -o.")
    else:
        folder.write_bytes(MARK, text)


def _rows(plan: Plan, number: int) -> Iterator[dict[str, Any]]:
    for segment in plan.segments(number):
        dataset = plan.parts[segment.part].dataset
        for table in taken(dataset, dataset.stage(PAIRS).file(segment.shard), segment.rows):
            for batch in table.to_batches(max_chunksize=64):
                yield from batch.to_pylist()
