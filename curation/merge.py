"""Several datasets joined into a new one, rows in the order of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from curation.columns import ATTRIBUTION
from curation.export import build
from curation.maintenance_config import MergeConfig
from curation.reshard import Part, make_plan, pairs_schema_of
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, StageFinished
from schemas.pairs import carried_fields, pairs_schema
from shards.dataset import Dataset
from shards.files import open_folder


def merge(
    datasets: Sequence[Dataset | str | Path], output: str | Path, config: MergeConfig, emit: Emit
) -> StageFinished:
    """A new dataset of all rows of `datasets`, in order; dataset.json is written last.

    Score, feature and task sets that all have under one name with equal fingerprints go along, others are dropped with
    a Notice; a task set that only one has goes along, too. Carried columns are united by name, the usual names of
    license, author and source_url becoming one. Raises PairmillError: fewer than two datasets, columns of one name and
    types that do not unite, `output` made from something else.
    """
    sources = [d if isinstance(d, Dataset) else Dataset.open(d) for d in datasets]
    if len(sources) < 2:
        raise PairmillError("merge joins two datasets or more: give each of them, and -o for the new one.")
    renames = [attribution_names(s) for s in sources]
    schema = _united(sources, renames)
    plan = make_plan([Part(s) for s in sources], config.shard_rows or sources[0].manifest.shard_rows)
    columns = {renames[i].get(k, k): v for i, s in enumerate(sources) for k, v in s.manifest.columns.items()}
    return build(
        plan,
        open_folder(output),
        config,
        emit,
        verb="merge",
        schema=schema,
        renames=renames,
        columns=columns,
        stages=_shared(sources, ("scores", "features"), emit),
        tasks=_shared(sources, ("tasks",), emit),
        drop_tasks=False,
    )


def attribution_names(dataset: Dataset) -> dict[str, str]:
    """Carried column -> `license`, `author` or `source_url`, for the likeliest column of each that has another name."""
    names = [f.name for f in carried_fields(pairs_schema_of(dataset))]
    out = {}
    for ours, usual in ATTRIBUTION.items():
        found = [n for u in usual for n in names if n.lower() == u]
        if found and ours not in names:
            out[found[0]] = ours
    return out


def _united(sources: Sequence[Dataset], renames: Sequence[dict[str, str]]) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    for dataset, new in zip(sources, renames, strict=True):
        for field in carried_fields(pairs_schema_of(dataset)):
            field = field.with_name(new.get(field.name, field.name)).with_nullable(True)
            fields[field.name] = _unite(fields.get(field.name, field), field, dataset)
    return pairs_schema(fields.values())


def _unite(old: pa.Field, new: pa.Field, dataset: Dataset) -> pa.Field:
    try:
        united = pa.unify_schemas([pa.schema([old]), pa.schema([new])], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise PairmillError(
            f"Column `{new.name}` is {old.type} in the datasets before and {new.type} in {dataset.url}: these do not "
            "unite. Import one of them again under another name or type."
        ) from None
    return united.field(0)


def _shared(sources: Sequence[Dataset], kinds: tuple[str, ...], emit: Emit) -> list[str]:
    """Sets that go along; a Notice for each that does not."""
    sidecars = [{s.path: s.sidecar() for s in d.stages() if s.kind in kinds} for d in sources]
    out = []
    for path in sorted({p for one in sidecars for p in one}):
        have = [one[path] for one in sidecars if path in one]
        alone = path.startswith("tasks/") and len(have) == 1
        if not alone and len(have) < len(sources):
            emit(Notice(f"{path} is dropped: only {len(have)} of {len(sources)} datasets have it.", True))
        elif len({s.fingerprint for s in have if s is not None}) > 1:
            emit(Notice(f"{path} is dropped: the datasets made it with different settings.", True))
        else:
            out.append(path)
    return out
