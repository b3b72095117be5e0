"""What training and evaluation left as JSON, for a report: curves of metrics.jsonl, metrics of results.json.

Nothing of their code is used: a run is a folder with metrics.jsonl, identity.json and evaluations/*/results.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.errors import PairmillError
from shards.dataset import PAIRS, Dataset

METRICS, IDENTITY, RESULTS = "metrics.jsonl", "identity.json", "results.json"
MAX_METRICS_BYTES = 64 << 20
MAX_JSON_BYTES = 1 << 20
POINTS = 240  # of a curve
MAX_RUNS = 40
MAX_CURVES = 12  # of a run
_NO_CURVE = frozenset({"step", "epoch", "lr", "step_s", "data_s", "logit_scale"})


def read_runs(dataset: Dataset, asked: Sequence[str]) -> list[dict[str, Any]]:
    """The runs asked for (a run's folder, or one with runs in it), then those in DATASET/runs, then those of a folder
    `runs` beside the dataset that say they were trained on it as it stands. At most 40, each once.

    Raises PairmillError: a folder that was asked for has no run.
    """
    found: dict[Path, None] = {}
    for place in asked:
        runs = list(_runs_in(Path(place)))
        if not runs:
            raise PairmillError(
                f"{place} holds no run: neither it nor a folder in it has {METRICS} or evaluations/*/{RESULTS}. "
                "Give a folder that `pairmill train -o` wrote."
            )
        found |= dict.fromkeys(runs)
    root = dataset.folder.local
    if root is not None:
        found |= dict.fromkeys(_runs_in(root / "runs"))
        beside = [run for run in _runs_in(root.absolute().parent / "runs") if not {run, run.resolve()} & found.keys()]
        if beside:
            mine = _pairs_hash(dataset)
            found |= {run: None for run in beside if mine in _trained_on(run)}
    unique = {run.resolve(): run for run in found}
    return [run for place in list(unique.values())[:MAX_RUNS] if (run := _read(place))]


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folder where it is a run, else the runs in it, by name."""
    if _is_run(folder):
        yield folder
    elif folder.is_dir():
        yield from (inside for inside in sorted(folder.iterdir()) if inside.is_dir() and _is_run(inside))


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or bool(_results_of(folder))


def _results_of(folder: Path) -> list[Path]:
    return sorted([*folder.glob(f"evaluations/*/{RESULTS}"), *folder.glob(RESULTS)])


def _pairs_hash(dataset: Dataset) -> str:
    """As a run's identity names the pairs it was trained on: blake2b-128 of the shards' digests in order."""
    digests = "".join(dataset.stage(PAIRS).digests(range(dataset.num_shards)))
    return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()


def _trained_on(run: Path) -> set[str]:
    """Hashes of the pairs of its sources."""
    sources = _object(run / IDENTITY).get("sources")
    sources = sources if isinstance(sources, list) else []
    return {str(s.get("pairs")) for s in sources if isinstance(s, dict)}


def _read(run: Path) -> dict[str, Any] | None:
    identity = _object(run / IDENTITY)
    lines = list(_metrics(run / METRICS))
    evaluations = [e for file in _results_of(run) if (e := _evaluation(file))]
    if not lines and not evaluations:
        return None
    sources = [s for s in identity.get("sources") or [] if isinstance(s, dict)]
    return {
        "name": run.resolve().name,
        "family": _word(identity.get("family")),
        "preset": _word(identity.get("preset")),
        "selections": [_word(s.get("selection")) or "all pairs" for s in sources],
        "steps": max((int(line["step"]) for line in lines), default=0),
        "curves": _curves(lines),
        "evaluations": evaluations,
    }


def _word(value: Any) -> str | None:
    return value[:100] if isinstance(value, str) else None


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, or one that is too large or damaged."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            return {}
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(file: Path) -> Iterator[dict[str, float]]:
    """Lines with a step, their finite numbers; a line that was cut is left out."""
    if not file.is_file() or file.stat().st_size > MAX_METRICS_BYTES:
        return
    with file.open("rb") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            numbers = _finite(line) if isinstance(line, dict) else {}
            if "step" in numbers:
                yield numbers


def _finite(values: Mapping[Any, Any]) -> dict[str, float]:
    return {str(k)[:100]: float(v) for k, v in values.items() if _is_number(v)}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _curves(lines: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Metric -> (step, value), `loss` first; long ones as means of neighbours."""
    names: dict[str, None] = {}
    for line in lines:
        names |= dict.fromkeys(n for n in line if n not in _NO_CURVE)
    ordered = sorted(names, key=lambda n: (n != "loss", n != "val_loss"))[:MAX_CURVES]
    return {n: _thinned([(line["step"], line[n]) for line in lines if n in line]) for n in ordered}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS) or 1
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(part[-1][0], sum(p[1] for p in part) / len(part)) for part in parts]


def _evaluation(file: Path) -> dict[str, Any] | None:
    found = _object(file)
    metric = found.get("metric")
    if not isinstance(metric, dict):
        return None
    checkpoint, dataset = found.get("checkpoint"), found.get("dataset")
    return {
        "task": _word(found.get("task")) or file.parent.name,
        "split": _word(found.get("split")),
        "checkpoint": _word(checkpoint.get("name")) if isinstance(checkpoint, dict) else None,
        "dataset": _word(dataset.get("name")) if isinstance(dataset, dict) else None,
        "metric": dict(list(_finite(metric).items())[:20]),
    }


def evaluation_tables(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table for each task, split and test set: metrics, and a row for each run with its values."""
    tables: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        for e in run["evaluations"]:
            key = (e["task"], e["split"], e["dataset"])
            tables.setdefault(key, []).append({"run": run["name"], "metric": e["metric"]})
    out = []
    for (task, split, dataset), rows in tables.items():
        names = list(dict.fromkeys(n for r in rows for n in r["metric"]))
        values = {n: [r["metric"][n] for r in rows if n in r["metric"]] for n in names}
        best = {n: max(found) for n, found in values.items() if max(found) > min(found)}
        out.append({"task": task, "split": split, "dataset": dataset, "metrics": names, "rows": rows, "best": best})
    return out
