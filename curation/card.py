"""The dataset card of an export: what it is, where it is from, what was left out and why, under which licences."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from curation.columns import ATTRIBUTION
from curation.reshard import Part
from schemas.pairs import carried_fields
from shards.dataset import PAIRS
from shards.files import Folder
from shards.reader import open_parquet, read_table
from shards.select import selection_about

_MOST = 50  # licences told by name


def write_card(folder: Folder, part: Part, rows: int, format: str) -> None:
    """Writes `README.md`. Equal datasets give equal cards: no times, no paths."""
    dataset = part.dataset
    lines = ["---", "task_categories: [image-to-text, text-to-image]", "---", "", "# Image-text pairs", ""]
    lines += [f"{rows:,} pairs of {len(dataset):,} rows, written by `pairmill export {format}`.", "", "## Sources", ""]
    lines += [f"- list `{_cell(s.name)}`, {s.bytes:,} bytes, blake2b {s.hash}" for s in dataset.manifest.lists]
    sidecar = dataset.require(PAIRS).sidecar()
    if sidecar is not None:
        lines.append(f"- pairs made by `{sidecar.stage}`, fingerprint {sidecar.fingerprint}")
    lines += ["", "## Filters", "", *_filters(part), "", "## Licences", "", *_licences(part)]
    folder.write_bytes("README.md", ("\n".join(lines) + "\n").encode())


def _filters(part: Part) -> list[str]:
    counts: Counter[str] = Counter()
    for shard in range(part.dataset.num_shards):
        counts.update(part.dataset.stage(PAIRS).counts(shard))
    lines = ["| status | rows |", "|---|---:|", *(f"| {k} | {v:,} |" for k, v in sorted(counts.items()))]
    if part.selection is None:
        return [*lines, "", "Every success was taken."]
    about = selection_about(part.dataset, part.selection)
    lines += ["", f"Selection `{_cell(part.selection)}` keeps {about['kept']:,} of {about['rows']:,} rows.", ""]
    reasons = _reasons(part)
    lines += ["| dropped by | rows |", "|---|---:|", *(f"| {_cell(k)} | {v:,} |" for k, v in reasons.most_common())]
    return [*lines, "", "```json", _pretty(about["recipe"]), "```"]


def _reasons(part: Part) -> Counter[str]:
    table = read_table(part.dataset.folder, f"selections/{part.selection}.parquet", ["reason"])
    counts: Counter[str] = Counter()
    for one in table["reason"].value_counts().to_pylist():
        if one["values"] is not None:
            counts[one["values"]] += one["counts"]
    return counts


def _licences(part: Part) -> list[str]:
    """Rows by licence, from the column that bears one of its usual names."""
    column = _licence_column(part)
    if column is None:
        return ["The source names no licence for its images. Ask before you use them."]
    counts: Counter[str] = Counter()
    for shard in range(part.dataset.num_shards):
        table = read_table(part.dataset.folder, part.dataset.stage(PAIRS).file(shard), [column])
        counts.update(str(v or "not given") for v in table[column].take(part.kept(shard)).to_pylist())
    lines = [f"| {_cell(column)} | pairs |", "|---|---:|"]
    lines += [f"| {_cell(k)} | {v:,} |" for k, v in counts.most_common(_MOST)]
    rest = counts.total() - sum(v for _, v in counts.most_common(_MOST))
    if rest:
        lines.append(f"| {len(counts) - _MOST} more | {rest:,} |")
    return lines


def _licence_column(part: Part) -> str | None:
    with open_parquet(part.dataset.folder, part.dataset.stage(PAIRS).file(0)) as file:
        names = [f.name for f in carried_fields(file.schema_arrow)]
    return next((n for usual in ATTRIBUTION["license"] for n in names if n.lower() == usual), None)


def _cell(text: str) -> str:
    """Text of strangers in a table: on one line, nothing that Markdown or HTML would take for its own."""
    return "".join(f"&#{ord(c)};" if c in "|<>&`*_[]\\" else c for c in " ".join(text.split()))[:200]


def _pretty(recipe: Any) -> str:
    return json.dumps(recipe, indent=1, ensure_ascii=False, sort_keys=True).replace("```", "'''")
