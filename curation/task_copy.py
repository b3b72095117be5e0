"""Task sets follow their images into a new dataset."""

from __future__ import annotations

import pyarrow as pa

from curation.reshard import Plan
from schemas.errors import PairmillError
from schemas.events import Emit, Notice
from schemas.tasks import IMAGE_REF
from shards.dataset import Dataset, Stage
from shards.reader import read_table
from shards.writer import write_table


def copy_tasks(plan: Plan, target: Dataset, path: str, drop: bool, emit: Emit) -> None:
    """Copies one task set: file by file, part after part, every (shard, row) looked up in the new dataset.

    Raises PairmillError where a row's image is not kept, unless `drop`.
    """
    sources = [(p, part.dataset.stage(path)) for p, part in enumerate(plan.parts)]
    standing = next(sidecar for _, stage in sources if (sidecar := stage.sidecar()) is not None)
    out = target.stage(path)
    out.begin(standing, "Choose another place with -o.")
    dropped = number = 0
    for part, stage in sources:
        for file in sorted(stage.standing()):
            table, missing = _moved(plan, part, stage, file)
            if missing and not drop:
                raise PairmillError(
                    f"{stage.folder.url}/{stage.file(file)}: {missing} task rows refer to images that are not kept. "
                    "Pass --tasks drop to leave those rows out, or --tasks omit to copy no task set."
                )
            dropped += missing
            if not stage_stands(out, number):
                write_table(target.folder, out.file(number), table, {"rows": len(table)})
            number += 1
    if dropped:
        emit(Notice(f"{path}: {dropped} rows were left out, their images are not kept.", True))


def stage_stands(stage: Stage, number: int) -> bool:
    return stage.folder.exists(stage.file(number))


def _moved(plan: Plan, part: int, stage: Stage, file: int) -> tuple[pa.Table, int]:
    """The file's rows with new references, without those that lost an image; and how many those are."""
    table = read_table(stage.folder, stage.file(file))
    place = plan.new_places(part)
    places = [[place(r["shard"], r["row"]) for r in refs] for refs in table["images"].to_pylist()]
    keep = [None not in row for row in places]
    refs = [[dict(zip(("shard", "row"), p, strict=True)) for p in row if p] for row in places]
    at = table.schema.get_field_index("images")
    moved = table.set_column(at, table.schema.field(at), pa.array(refs, pa.list_(IMAGE_REF)))
    return moved.filter(pa.array(keep, pa.bool_())), keep.count(False)
