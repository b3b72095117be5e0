"""`check --reproduce N`: N rows of every score set are computed again, and compared with what is stored.

The rows are copied into a small dataset in a temporary folder, on which the scorer itself runs with the settings that
the sidecar tells. Weights are found by their hash: a sidecar holds no paths.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.check import Finding
from curation.export import build
from curation.maintenance_config import CheckConfig, MergeConfig
from curation.reshard import Part, make_plan, pairs_schema_of
from curation.scores.config import (
    AestheticScoreConfig,
    HashScoreConfig,
    ImageScoreConfig,
    LanguageScoreConfig,
    SafetyScoreConfig,
    TextScoreConfig,
    WatermarkScoreConfig,
)
from extractors.config import ClipScoreConfig
from schemas.config import StageConfig, build_config
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from schemas.features import SCORES
from schemas.sidecars import Sidecar
from shards.dataset import PAIRS, Dataset, Stage
from shards.files import hash_file, open_folder
from shards.reader import read_table
from shards.weights import checkpoint_file

# How far a number may lie off, of the larger of it and 1: other machines and batches round otherwise.
EXACT, FP32, FP16 = 1e-5, 1e-3, 1e-2
_AGAIN = "again"
_TOLD = 3  # rows of one column that are told one by one

Weights = Mapping[str, Path]  # sha256 -> file or folder


class _Unable(Exception):  # noqa: N818 - it is no error, a sentence to tell
    """Why a set cannot be computed again."""


@dataclass(frozen=True)
class Redo:
    """How a scorer runs again.

    config      its configuration
    run         module:function, loaded when it runs
    off         how far a number may lie off, in fp32
    more        fields that the sidecar cannot tell: (sidecar, weights by hash) -> values
    ignored     columns that hang on rows that are not copied
    embeddings  whether it reads the features that its sidecar names by their fingerprint
    """

    config: type[StageConfig]
    run: str
    off: float
    more: Callable[[Sidecar, Weights], Mapping[str, Any]] = lambda sidecar, weights: {}
    ignored: tuple[str, ...] = ()
    embeddings: bool = False

    def function(self) -> Callable[..., Any]:
        module, _, name = self.run.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


def _needed(sidecar: Sidecar, weights: Weights) -> Path:
    sha256 = str(sidecar.identity["weights"])
    if sha256 not in weights:
        raise _Unable(f"the weights with sha256 {sha256[:12]}... are not among --weights; pass their file or folder")
    return weights[sha256]


def _clip_weights(sidecar: Sidecar, weights: Weights) -> Mapping[str, Any]:
    path = _needed(sidecar, weights)
    if path.is_dir():
        return {"model": f"local-dir:{path}", "embeddings": False}
    name = str(sidecar.columns["clip_score"]["model"]).split(" ", 1)[0]
    return {"model": name, "pretrained": str(path), "embeddings": False}


def _head_weights(column: str) -> Callable[[Sidecar, Weights], Mapping[str, Any]]:
    def more(sidecar: Sidecar, weights: Weights) -> Mapping[str, Any]:
        return {"weights": _needed(sidecar, weights), "made_for": sidecar.columns[column]["clip"], "features": _AGAIN}

    return more


def _language_weights(sidecar: Sidecar, weights: Weights) -> Mapping[str, Any]:
    from curation.scores.language import bundled_model

    if hash_file(bundled_model()) == sidecar.identity["weights"]:
        return {}
    return {"weights": _needed(sidecar, weights)}


def _detector_weights(sidecar: Sidecar, weights: Weights) -> Mapping[str, Any]:
    return {"weights": _needed(sidecar, weights)}


REDO: dict[str, Redo] = {
    "score clip": Redo(ClipScoreConfig, "extractors.clip:score_clip", FP32, _clip_weights),
    "score text": Redo(TextScoreConfig, "curation.scores.text:score_text", EXACT, ignored=("caption_count",)),
    "score image": Redo(ImageScoreConfig, "curation.scores.image:score_image", EXACT),
    "score hash": Redo(HashScoreConfig, "curation.scores.hashes:score_hash", EXACT),
    "score language": Redo(LanguageScoreConfig, "curation.scores.language:score_language", EXACT, _language_weights),
    "score aesthetic": Redo(
        AestheticScoreConfig,
        "curation.scores.embeddings:score_aesthetic",
        FP32,
        _head_weights("aesthetic"),
        embeddings=True,
    ),
    "score safety": Redo(
        SafetyScoreConfig, "curation.scores.embeddings:score_safety", FP32, _head_weights("punsafe"), embeddings=True
    ),
    "score watermark": Redo(WatermarkScoreConfig, "curation.scores.watermark:score_watermark", FP32, _detector_weights),
}


def reproduce(dataset: Dataset, config: CheckConfig, emit: Emit) -> Iterator[Finding]:
    """What differs from the stored scores, in `config.reproduce` rows of each set.

    Numbers may lie off by 1e-5 (counts, hashes, languages), 1e-3 (models in fp32) or 1e-2 (in 16 bits) of the larger
    of their size and 1; texts, bytes and lists' lengths must be equal. A set whose weights are not given is a finding.
    Raises PairmillError where a file of `config.weights` is missing.
    """
    weights = _by_hash(config.weights)
    for name in dataset.folder.folders(SCORES):
        stage = dataset.stage(f"{SCORES}/{name}")
        sidecar = stage.sidecar()
        if sidecar is None:
            continue  # `check` tells that
        if sidecar.stage not in REDO:
            emit(Notice(f"{stage.path}: `{sidecar.stage}` is not computed again: it may hang on other rows and files."))
            continue
        try:
            yield from _set_again(stage, sidecar, REDO[sidecar.stage], config.reproduce, weights, emit)
        except _Unable as why:
            yield Finding(stage.path, f"was not computed again: {why}", error=False)
        except PairmillError as error:
            yield Finding(stage.path, f"cannot be computed again: {error}")


def _by_hash(paths: Sequence[Path]) -> Weights:
    return {hash_file(checkpoint_file(path) if path.is_dir() else path): path for path in map(_there, paths)}


def _there(path: Path) -> Path:
    if not path.exists():
        raise PairmillError(f"`--weights {path}`: no such file or folder.")
    return path.absolute()


def _set_again(
    stage: Stage, sidecar: Sidecar, redo: Redo, count: int, weights: Weights, emit: Emit
) -> Iterator[Finding]:
    more = dict(redo.more(sidecar, weights))
    features = _features(stage.dataset, sidecar) if redo.embeddings else None
    sample = _sample(stage, features, count)
    if not sample.rows:
        emit(Notice(f"{stage.path}: no row with a score to compute again."))
        return
    if features is not None:
        more["features"] = features.name
    own = redo.config.roles()
    told = {k: v for k, v in sidecar.identity.items() if own.get(k) == "identity"}
    values = {**told, **more, "name": _AGAIN, "workers": 0}
    if "device" in own:
        values["batch_size"] = min(count, int(sidecar.recorded.get("batch_size", count)))
    settings = build_config(redo.config, values, stage.path)
    with tempfile.TemporaryDirectory(prefix="pairmill-again-") as folder:
        small = _copy(sample, Path(folder) / "rows", features)
        redo.function()(small, settings, silent)
        again = small.stage(f"{SCORES}/{_AGAIN}")
        fresh = again.sidecar()
        other = [k for k, v in (fresh.identity if fresh else {}).items() if sidecar.identity.get(k) != v]
        if other:
            raise _Unable(f"the scorer of today has another `{other[0]}`; run it anew under another --name to compare")
        new = pa.concat_tables([read_table(small.folder, again.file(s)) for s in range(small.num_shards)])
    old = _stored(stage, sample)
    off = FP16 if sidecar.identity.get("precision") in ("fp16", "bf16") else redo.off
    where = [f"{stage.path} row {s}:{r}" for s, rows in sorted(sample.rows.items()) for r in rows.tolist()]
    findings = list(_compare(where, old, new, redo.ignored, off))
    if not findings:
        emit(Notice(f"{stage.path}: {len(where)} rows computed again, all within {off:g}."))
    yield from findings


def _features(dataset: Dataset, sidecar: Sidecar) -> Stage:
    for stage in dataset.stages():
        found = stage.sidecar()
        if stage.kind == "features" and found and found.fingerprint == sidecar.identity["embeddings"]:
            return stage
    raise _Unable("the embeddings it was made from are gone or were made anew")


@dataclass(frozen=True)
class _Sample(Part):
    """A few rows of a dataset: shard -> rows, in order."""

    rows: Mapping[int, np.ndarray] = field(default_factory=dict)

    def kept(self, shard: int) -> np.ndarray:
        return self.rows.get(shard, np.empty(0, np.int64))


def _sample(stage: Stage, features: Stage | None, count: int) -> _Sample:
    """Rows with a score, from shards drawn by a seed of 0, a few of each."""
    ready = sorted(stage.done() & features.done() if features else stage.done())
    rng = np.random.default_rng(0)
    each = max(1, math.ceil(count / max(1, len(ready))))
    rows: dict[int, np.ndarray] = {}
    left = count
    for shard in rng.permutation(ready).tolist():
        table = read_table(stage.folder, stage.file(shard))
        columns = [c for n, c in zip(table.column_names, table.columns, strict=True) if not n.endswith("state")]
        scored = np.any([c.is_valid().to_numpy() for c in columns], axis=0)
        status = read_table(stage.folder, stage.dataset.stage(PAIRS).file(shard), ["status"])["status"]
        usable = np.flatnonzero(scored & (np.array(status.to_pylist()) != "removed"))
        some = np.sort(rng.permutation(usable)[: min(each, left)])
        if len(some):
            rows[shard] = some
            left -= len(some)
        if not left:
            break
    return _Sample(stage.dataset, rows=rows)


def _copy(sample: _Sample, folder: Path, features: Stage | None) -> Dataset:
    plan = make_plan([sample], 1 << 16)
    build(
        plan,
        open_folder(folder),
        MergeConfig(workers=0),
        silent,
        verb="check",
        schema=pairs_schema_of(sample.dataset),
        renames=({},),
        columns={},
        stages=[features.path] if features else [],
        tasks=[],
        drop_tasks=False,
    )
    return Dataset.open(folder)


def _stored(stage: Stage, sample: _Sample) -> pa.Table:
    parts = [
        read_table(stage.folder, stage.file(shard)).take(pa.array(rows)) for shard, rows in sorted(sample.rows.items())
    ]
    return pa.concat_tables(parts)


def _compare(
    where: Sequence[str], old: pa.Table, new: pa.Table, ignored: Sequence[str], off: float
) -> Iterator[Finding]:
    for name in new.column_names:
        if name in ignored:
            continue
        if name not in old.column_names:
            yield Finding(where[0].split(" ")[0], f"has no column `{name}`, which the scorer writes")
            continue
        pairs = zip(where, old[name].to_pylist(), new[name].to_pylist(), strict=True)
        faults = [(row, a, b) for row, a, b in pairs if not _equal(a, b, off)]
        for row, a, b in faults[:_TOLD]:
            yield Finding(row, f"`{name}` is {_short(a)}, computed again it is {_short(b)} (may differ by {off:g})")
        if len(faults) > _TOLD:
            yield Finding(where[0].split(" ")[0], f"`{name}` differs in {len(faults) - _TOLD} more of the rows tried")


def _equal(a: Any, b: Any, off: float) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y, off) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= off * max(1.0, abs(a))
    return bool(a == b)


def _short(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
