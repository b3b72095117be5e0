"""Reads everything of a dataset back: hashes, alignment, schemas, freshness, left-over files."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.maintenance_config import CheckConfig
from schemas.errors import PairmillError
from schemas.events import Emit, Progress, StageFinished, StageStarted
from schemas.features import FEATURES, SCORES
from schemas.pairs import INPUT, PAIR_FIELDS, PAIRS, pairs_digest
from schemas.status import NO_IMAGE, OK, STATES, STATUSES, SUCCESS
from schemas.tables import VERSIONS, WHOLE, check_schema
from schemas.tasks import TASKS
from shards.dataset import Dataset, Stage
from shards.images import ImageError, header
from shards.reader import MappedShard, open_parquet, read_table, row_groups, stored_counts
from shards.select import read_selection, selections

ROWS_TOLD = 3  # rows of one fault in one shard that are told one by one


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. `error` False: unfinished or out of date, a command completes it."""

    where: str
    text: str
    error: bool = True


def check(dataset: Dataset | str | Path, config: CheckConfig, emit: Emit) -> list[Finding]:
    """Every fault found, in the order pairs, input, scores, features, tasks, selections, left-over files.

    What is damaged is a finding, not an exception; only what is no dataset at all raises PairmillError, and weights
    for `config.reproduce` that are not there. Scores that differ when computed again come last.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    jobs = list(_jobs(dataset))
    start = time.monotonic()
    emit(StageStarted("check", len(jobs), 0, len(dataset)))
    findings: list[Finding] = []
    rows = 0
    with ThreadPoolExecutor(config.threads) as pool:
        for count, found in pool.map(_guarded, jobs):
            rows += count
            findings += found[: max(0, config.most - len(findings))]
            emit(Progress("check", rows, len(findings)))
    if config.reproduce:
        from curation.reproduce import reproduce  # models are heavy

        findings += reproduce(dataset, config, emit)
    emit(StageFinished("check", len(jobs), (), time.monotonic() - start, {"findings": len(findings)}))
    return findings


@dataclass(frozen=True)
class _Job:
    where: str
    rows: int  # of pairs, for the live line
    read: Callable[[], Iterator[Finding]]


def _guarded(job: _Job) -> tuple[int, list[Finding]]:
    found: list[Finding] = []
    try:
        found.extend(job.read())
    except PairmillError as error:
        found.append(Finding(job.where, str(error)))
    return job.rows, found


def _jobs(dataset: Dataset) -> Iterator[_Job]:
    """The dataset in pieces that are read by themselves."""
    yield _Job("dataset.json", 0, partial(_check_shape, dataset))
    stages = [dataset.stage(PAIRS)]
    stages += [dataset.stage(INPUT)] if dataset.folder.names(INPUT) else []
    stages += [
        dataset.stage(f"{kind}/{name}") for kind in (SCORES, FEATURES, TASKS) for name in dataset.folder.folders(kind)
    ]
    whole = cache(partial(_whole, dataset))
    scores = partial(_check_scores, whole)
    for stage in stages:
        if stage.kind != INPUT:
            yield _Job(f"{stage.path}/sidecar.json", 0, partial(_check_sidecar, stage))
        read: dict[str, Callable[..., Iterator[Finding]]] = {
            PAIRS: _check_pairs,
            INPUT: _check_input,
            SCORES: scores,
            FEATURES: _check_features,
        }
        shards = sorted(stage.standing()) if stage.kind == TASKS else range(dataset.num_shards)
        for shard in shards:
            rows = dataset.manifest.shards[shard] if stage.kind == PAIRS else 0
            job = read.get(stage.kind, _check_tasks)
            yield _Job(stage.file(shard), rows, partial(job, stage, shard))
    for name in selections(dataset):
        yield _Job(f"selections/{name}.parquet", 0, partial(_check_selection, dataset, name))
    yield _Job("left over", 0, partial(_check_left_over, dataset, [s.path for s in stages]))


def _check_shape(dataset: Dataset) -> Iterator[Finding]:
    sizes = dataset.manifest.shards
    for shard, rows in enumerate(sizes):
        if not 0 < rows <= dataset.manifest.shard_rows:
            yield Finding(
                "dataset.json", f"shard {shard} has {rows} rows, shards have 1 to {dataset.manifest.shard_rows}"
            )
    for name in dataset.folder.names(PAIRS):
        stem = name.removesuffix(".parquet")
        if stem.isdigit() and int(stem) >= len(sizes):
            yield Finding(f"{PAIRS}/{name}", f"lies beyond the {len(sizes)} shards of dataset.json", error=False)


def _check_sidecar(stage: Stage) -> Iterator[Finding]:
    where = f"{stage.path}/sidecar.json"
    sidecar = stage.sidecar()
    if sidecar is None:
        yield Finding(where, "is missing: nobody can tell what made these shards")
    elif sidecar.schema_name != stage.kind or sidecar.schema_version > VERSIONS[stage.kind]:
        yield Finding(where, f"tells of {sidecar.schema_name} version {sidecar.schema_version}")


def _stands(stage: Stage, shard: int) -> bool:
    return stage.folder.exists(stage.file(shard))


def _check_rows(stage: Stage, shard: int, rows: int) -> Iterator[Finding]:
    want = stage.dataset.manifest.shards[shard]
    if rows != want:
        yield Finding(stage.file(shard), f"has {rows} rows, dataset.json says {want}")


def _check_table(stage: Stage, shard: int) -> None:
    with open_parquet(stage.folder, stage.file(shard)) as file:
        schema = file.schema_arrow
    check_schema(schema, stage.kind, VERSIONS[stage.kind], f"{stage.folder.url}/{stage.file(shard)}")


def _check_counts(stage: Stage, shard: int, counts: Counter[str]) -> Iterator[Finding]:
    told = {k: v for k, v in stored_counts(stage.folder, stage.file(shard)).items() if v}
    if told != dict(counts):
        yield Finding(stage.file(shard), f"its footer counts {told}, it holds {dict(sorted(counts.items()))}")


def _check_pairs(stage: Stage, shard: int) -> Iterator[Finding]:
    file = stage.file(shard)
    if not _stands(stage, shard):
        yield Finding(file, "is missing: run the download or import command again", error=False)
        return
    _check_table(stage, shard)
    rows, faults = 0, Counter[str]()
    seen: list[pa.Table] = []
    counts: Counter[str] = Counter()
    for start, table in row_groups(stage.folder, file, verify=True):
        if not rows:
            yield from _check_columns(file, table.schema)
        for i, row in enumerate(table.select([f.name for f in PAIR_FIELDS]).to_pylist(), start):
            counts[row["status"]] += 1
            for fault in _row_faults(row):
                faults[fault] += 1
                if faults[fault] <= ROWS_TOLD:
                    yield Finding(f"{file} row {i}", fault)
        seen.append(table.select(["status", "sha256"]))
        rows += len(table)
    for fault, count in faults.items():
        if count > ROWS_TOLD:
            yield Finding(file, f"{count - ROWS_TOLD} more rows: {fault}")
    yield from _check_rows(stage, shard, rows)
    yield from _check_counts(stage, shard, counts)
    joined = pa.concat_tables(seen)
    if stage.digest(shard) != pairs_digest(joined["status"], joined["sha256"]):
        yield Finding(file, "its footer's digest is not that of its rows")


def _check_columns(file: str, schema: pa.Schema) -> Iterator[Finding]:
    for field in PAIR_FIELDS:
        if field.name not in schema.names or not schema.field(field.name).type.equals(field.type):
            found = schema.field(field.name).type if field.name in schema.names else "missing"
            yield Finding(file, f"column `{field.name}` is {found}, expected {field.type}")


def _row_faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one pair. Texts are equal for equal faults: they are counted."""
    status, image = row["status"], row["image"]
    if status not in STATUSES:
        yield f"status {status!r} is none of ours"
    if row["captions"] and row["captions"][0] != row["caption"]:
        yield "`caption` is not the first of `captions`"
    if image is None:
        if status == SUCCESS:
            yield "a success without an image"
        return
    if status != SUCCESS:
        yield f"an image though the status is {status}"
    if row["stored_sha256"] != hashlib.sha256(image).digest():
        yield "the image's sha256 is not `stored_sha256`: the image is damaged"
    else:
        yield from _header_faults(row)


def _header_faults(row: dict[str, Any]) -> Iterator[str]:
    try:
        head = header(row["image"])
    except ImageError as error:
        yield f"the stored image is no usable one: {error}"
        return
    if head.kind != row["format"]:
        yield f"`format` is {row['format']}, the image is a {head.kind}"
    if (row["width"], row["height"]) not in (head.upright, head.upright[::-1]):
        yield "`width` and `height` are not those of the image"


def _check_input(stage: Stage, shard: int) -> Iterator[Finding]:
    if not _stands(stage, shard):
        yield Finding(stage.file(shard), "is missing, and other shards of the list are there")
        return
    _check_table(stage, shard)
    uids = [
        u for _, t in row_groups(stage.folder, stage.file(shard), ["uid"], verify=True) for u in t["uid"].to_pylist()
    ]
    yield from _check_rows(stage, shard, len(uids))
    pairs = stage.dataset.stage(PAIRS)
    if _stands(pairs, shard) and read_table(stage.folder, pairs.file(shard), ["uid"])["uid"].to_pylist() != uids:
        yield Finding(stage.file(shard), "its uids are not those of the pairs, row by row")


def _stale(stage: Stage, shard: int) -> Iterator[Finding]:
    pairs = stage.dataset.stage(PAIRS)
    if _stands(pairs, shard) and stage.digest(shard) != pairs.digest(shard):
        text = "was made from other pairs than stand now: run the command that made it again"
        yield Finding(stage.file(shard), text, error=False)


def _unfinished(stage: Stage, shard: int) -> Finding:
    return Finding(stage.file(shard), "is not computed yet: run the command of this stage again", error=False)


def _whole(dataset: Dataset) -> str | None:
    """None where a shard of pairs is missing or damaged, which is told of that shard."""
    try:
        return dataset.whole_digest()
    except PairmillError:
        return None


def _check_scores(whole: Callable[[], str | None], stage: Stage, shard: int) -> Iterator[Finding]:
    if not _stands(stage, shard):
        yield _unfinished(stage, shard)
        return
    _check_table(stage, shard)
    rows = sum(len(table) for _, table in row_groups(stage.folder, stage.file(shard), verify=True))
    yield from _check_rows(stage, shard, rows)
    yield from _stale(stage, shard)
    made_from = stage.footer(shard).get(WHOLE)
    if made_from is not None and whole() not in (None, made_from.decode()):
        text = "tells of the whole dataset, which has changed since: run the command that made it again"
        yield Finding(stage.file(shard), text, error=False)


def _check_features(stage: Stage, shard: int) -> Iterator[Finding]:
    if not _stands(stage, shard):
        yield _unfinished(stage, shard)
        return
    file = stage.file(shard)
    mapped = MappedShard(stage.folder, file)
    check_schema(mapped.schema, FEATURES, VERSIONS[FEATURES], f"{stage.folder.url}/{file}")
    states = mapped.states()
    yield from _check_rows(stage, shard, len(mapped))
    yield from _check_counts(stage, shard, Counter(states))
    strange = sorted({s for s in states if s not in STATES})
    if strange:
        yield Finding(file, f"states {strange} are none of ours")
    for row in range(len(mapped)):
        mapped.row(row)  # raises where a tensor's bytes do not fit its shape
    stale = list(_stale(stage, shard))
    yield from stale or _check_states(stage, shard, states)


def _check_states(stage: Stage, shard: int, states: list[str]) -> Iterator[Finding]:
    pairs = stage.dataset.stage(PAIRS)
    if not _stands(pairs, shard):
        return
    status = read_table(stage.folder, pairs.file(shard), ["status"])["status"].to_pylist()
    for row, (state, one) in enumerate(zip(states, status, strict=False)):
        if state == OK and one not in (SUCCESS, NO_IMAGE):
            yield Finding(f"{stage.file(shard)} row {row}", f"is ok though its pair is {one}")


def _check_tasks(stage: Stage, shard: int) -> Iterator[Finding]:
    _check_table(stage, shard)
    sizes = stage.dataset.manifest.shards
    images = read_table(stage.folder, stage.file(shard), ["images"])["images"].to_pylist()
    for row, refs in enumerate(images):
        for ref in refs:
            if not 0 <= ref["shard"] < len(sizes) or not 0 <= ref["row"] < sizes[ref["shard"]]:
                yield Finding(
                    f"{stage.file(shard)} row {row}", f"refers to {ref['shard']}:{ref['row']}, which is no row"
                )


def _check_selection(dataset: Dataset, name: str) -> Iterator[Finding]:
    file = f"selections/{name}.parquet"
    list(row_groups(dataset.folder, file, verify=True))
    try:
        selection = read_selection(dataset, name)
    except PairmillError as error:
        yield Finding(file, str(error), error="damaged" in str(error))
        return
    if len(selection.keep) != len(dataset):
        yield Finding(file, f"has {len(selection.keep)} rows, the dataset has {len(dataset)}")


def _check_left_over(dataset: Dataset, paths: list[str]) -> Iterator[Finding]:
    for inside in ["", "selections", *paths]:
        for name in dataset.folder.left_over(inside):
            where = f"{inside}/{name}" if inside else name
            yield Finding(where, "is left over from a process that ended; it may be deleted", error=False)
