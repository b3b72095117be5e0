"""Copies of pairs for other tools: the engine cuts kept successes into files, a format writes each.

File k holds kept successes k * shard_rows to (k + 1) * shard_rows: a killed export goes on and ends with equal bytes.
`pairmill.json` tells what the folder was made from; `README.md`, the dataset card, is written last.
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
from curation.reshard import Part, Plan, make_plan, taken
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, ShardDone, StageFinished, StageStarted
from schemas.status import SUCCESS
from shards.dataset import PAIRS, Dataset
from shards.files import Folder, open_folder
from shards.reader import read_table

MARK = "pairmill.json"


class Writer(Protocol):
    """What a format's module offers to the export, as `Writer`."""

    def stands(self, folder: Folder, number: int) -> bool:
        """Whether file `number` is whole."""

    def write(self, folder: Folder, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes file `number`, whole or not at all."""

    def finish(self, folder: Folder, sizes: Sequence[int]) -> None:
        """Writes what tells of all files. `sizes` are their samples."""


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
    writer: Writer = load_format(format).Writer()
    part = Successes(source, config.selection)
    plan = make_plan([part], config.shard_rows)
    if not plan.rows:
        raise PairmillError(f"{source.url}: no pair with an image is kept. Nothing written.")
    folder = open_folder(output)
    sizes = plan.sizes()
    _begin(folder, {"format": format, **config.identity_fields(), "source": origin(part)})
    left = [n for n in range(len(sizes)) if not writer.stands(folder, n)]
    emit(StageStarted("export", len(left), len(sizes) - len(left), sum(sizes[n] for n in left)))
    for number in left:
        began = time.monotonic()
        writer.write(folder, number, _rows(plan, number))
        emit(ShardDone("export", number, sizes[number], time.monotonic() - began, {SUCCESS: sizes[number]}))
    writer.finish(folder, sizes)
    write_card(folder, part, plan.rows, format)
    without = sum(Part(source, config.selection).counts()) - plan.rows
    if without:
        emit(Notice(f"{without} kept rows have no image and were left out."))
    finished = StageFinished("export", len(left), (), time.monotonic() - start, {SUCCESS: plan.rows})
    emit(finished)
    return finished


def _begin(folder: Folder, mark: dict[str, Any]) -> None:
    """Marks a new folder, or checks that the one that stands was begun by the same export."""
    text = (json.dumps(mark, indent=1, sort_keys=True) + "\n").encode()
    for name in folder.left_over(""):
        folder.remove(name)
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
