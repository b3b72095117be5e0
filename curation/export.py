"""A dataset cut anew: `export dataset` keeps a selection, `merge` (curation/merge.py) joins several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.maintenance_config import ExportDatasetConfig
from curation.reshard import (
    FeaturesWork,
    PairsWork,
    Part,
    Plan,
    ScoresWork,
    complete_shards,
    make_plan,
    pairs_schema_of,
    target_of,
)
from curation.task_copy import copy_tasks
from schemas.config import ShardStage
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, StageFinished
from schemas.pairs import PAIRS, VERSION
from schemas.sidecars import make_sidecar
from shards.dataset import MANIFEST, Dataset, read_manifest, write_manifest
from shards.files import Folder, open_folder
from shards.locks import lock
from shards.parallel import run_stage


def export_dataset(
    dataset: Dataset | str | Path, output: str | Path, config: ExportDatasetConfig, emit: Emit
) -> StageFinished:
    """A new dataset of the kept rows, with their scores and features; dataset.json is written last.

    Task sets go along: their images are looked up in the new dataset by what they were in the old one. Where a task row
    refers to an image that is not kept, `config.tasks` decides (refuse, drop the row, omit all task sets).
    Raises PairmillError: a stale selection, no rows, task rows without an image, `output` made from something else.
    """
    source = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    part = Part(source, config.selection)
    plan = make_plan([part], config.shard_rows or source.manifest.shard_rows)
    return build(
        plan,
        open_folder(output),
        config,
        emit,
        verb="export",
        schema=pairs_schema_of(source),
        renames=({},),
        columns=source.manifest.columns,
        stages=[s.path for s in source.stages() if s.kind in ("scores", "features")],
        tasks=[] if config.tasks == "omit" else [s.path for s in source.stages() if s.kind == "tasks"],
        drop_tasks=config.tasks == "drop",
    )


def build(
    plan: Plan,
    folder: Folder,
    config: ShardStage,
    emit: Emit,
    *,
    verb: str,
    schema: pa.Schema,
    renames: Sequence[Mapping[str, str]],
    columns: Mapping[str, str],
    stages: Sequence[str],
    tasks: Sequence[str],
    drop_tasks: bool,
) -> StageFinished:
    """Writes the planned dataset: pairs, then the stages, then task sets, then dataset.json."""
    if not plan.rows:
        raise PairmillError(f"{folder.url}: no row to write: {_names(plan)} keep none. Nothing written.")
    for part in plan.parts:
        if part.dataset.url == folder.url:
            raise PairmillError(f"{folder.url} is the dataset itself. Give another place with -o. Nothing written.")
    target = target_of(folder, plan, columns)
    pairs = target.stage(PAIRS)
    _refuse_others(folder, target)
    sidecar = make_sidecar(verb, PAIRS, (PAIRS, VERSION), config, {"sources": [origin(p) for p in plan.parts]})
    pairs.begin(sidecar, "Choose another place with -o.")
    with lock(folder, verb):
        work = PairsWork(plan, target, schema, tuple(renames))
        result = _run(target, PAIRS, work, pairs.pending(), config, emit)
        for path in stages:
            result = _copy_stage(plan, target, path, config, emit, result)
        for path in tasks:
            copy_tasks(plan, target, path, drop_tasks, emit)
        if not result.left and not folder.exists(MANIFEST):
            write_manifest(folder, target.manifest)
    return result


def _run(
    target: Dataset, path: str, work: Any, pending: Sequence[int], config: ShardStage, emit: Emit
) -> StageFinished:
    stage = target.stage(path)
    return run_stage(stage, work, pending=pending, workers=config.workers, scheduler=config.scheduler, emit=emit)


def _copy_stage(
    plan: Plan, target: Dataset, path: str, config: ShardStage, emit: Emit, before: StageFinished
) -> StageFinished:
    """Copies a score or feature set as far as it stands; returns `before` with what is left added to it."""
    if before.left:  # pairs are missing: their scores and features come with the next run
        return before
    stage = target.stage(path)
    standing = plan.parts[0].dataset.stage(path).sidecar()
    assert standing is not None, "only stages that stand are copied"
    stage.begin(standing, "Choose another place with -o.")
    ready = complete_shards(plan, target, path)
    if len(ready) < target.num_shards:
        missing = target.num_shards - len(ready)
        emit(Notice(f"{path}: {missing} shards have rows that are not computed yet; they are left to compute.", True))
    kind = ScoresWork if stage.kind == "scores" else FeaturesWork
    done = _run(target, path, kind(plan, target, path), stage.pending(ready), config, emit)
    return StageFinished(before.stage, before.done, done.left, before.seconds + done.seconds, before.counts)


def _refuse_others(folder: Folder, target: Dataset) -> None:
    if not folder.exists(MANIFEST):
        return
    if target.stage(PAIRS).sidecar() is None or read_manifest(folder) != target.manifest:
        raise PairmillError(
            f"{folder.url} holds another dataset already. Nothing written. Choose another place with -o."
        )


def origin(part: Part) -> dict[str, Any]:
    """What the rows come from: no paths, so that a moved dataset gives the same fingerprint."""
    pairs = part.dataset.require(PAIRS)
    digest = hashlib.blake2b(digest_size=16)
    for shard in range(part.dataset.num_shards):
        digest.update(pairs.digest(shard).encode())
        if part.selection is not None:
            digest.update(part.kept(shard).astype("<i8").tobytes())
    sidecar = pairs.sidecar()
    assert sidecar is not None, "`require` raises where there is none"
    return {"stage": sidecar.stage, "identity": sidecar.identity, "rows": len(part.dataset), "kept": digest.hexdigest()}


def _names(plan: Plan) -> str:
    return ", ".join(p.dataset.url + (f" --selection {p.selection}" if p.selection else "") for p in plan.parts)
