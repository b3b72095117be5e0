"""`report`: one self-contained HTML page on a dataset and the same numbers as JSON, in DATASET/reports/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from curation.distributions import categories, histograms, sizes
from curation.filter_config import ReportConfig
from curation.report_data import causes, hosts, selection_rows, stage_rows, totals
from curation.report_matches import chosen_matches, numbers_of, rows_of
from curation.report_page import Numbers, render
from curation.report_regions import region_pictures
from curation.report_runs import evaluation_tables, read_runs
from curation.rules import Match
from curation.table import Table
from curation.thumbnails import GROUPS, Pick, candidates, choose, groups_of, kinds, load, sample
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from shards.dataset import Dataset
from shards.select import read_selection, selection_about

MOST_OF_A_KIND, MOST_OF_ANY = 6, 8
MATCH_SHARE = 0.3  # of the pictures: duplicates of the drawn selection
MATCH_GROUPS, REGION_GROUPS = 12, 4  # of the 40 row groups
MOST_BYTES = 5_000_000  # of the page


@dataclass(frozen=True)
class Shown:
    """What the page shows of rows: picks and matches by selection, what `load` read of them, region sets."""

    picks: Mapping[str, Sequence[Pick]] = field(default_factory=dict)
    matches: Mapping[str, Mapping[str, Sequence[Sequence[Match]]]] = field(default_factory=dict)
    pictures: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    regions: Sequence[Mapping[str, Any]] = ()


def report(dataset: Dataset | str | Path, config: ReportConfig | None = None, emit: Emit = silent) -> str:
    """Writes `reports/NAME.html` and `reports/NAME.json`; returns the page's path inside the dataset.

    Raises PairmillError: unfinished pairs; an unknown or stale `selection`; a `run` that is none.
    """
    config = config or ReportConfig()
    data = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    table = Table(data)
    if table.pairs.pending():
        raise PairmillError(
            f"{data.url}: pairs are unfinished. Run the download or import command again to finish them."
        )
    numbers = gather(table, config)
    page, shown = "", Shown()
    for part in (1, 2, 4, 8, 0):  # of noise there may have to be fewer than of pictures
        shown = show(table, numbers, config, config.thumbnails // part if part else 0)
        page = render(numbers, shown.picks, shown.matches, shown.pictures, shown.regions)
        if len(page.encode()) <= MOST_BYTES:
            break
    numbers |= _shown_numbers(shown)
    for name, text in (
        (f"{config.name}.json", json.dumps(numbers, indent=1, ensure_ascii=False)),
        (f"{config.name}.html", page),
    ):
        data.folder.write_bytes(f"reports/{name}", text.encode())
    stale = [s["name"] for s in numbers["selections"] if s["stale"]]
    if stale:
        emit(Notice(f"Selections made before their pairs or scores changed: {', '.join(stale)}.", warning=True))
    return f"reports/{config.name}.html"


def gather(table: Table, config: ReportConfig) -> Numbers:
    """Every number of the report."""
    dataset = table.dataset
    found = selection_rows(dataset)
    fresh = [s["name"] for s in found if not s["stale"]]
    if config.selection is not None:
        selection_about(dataset, config.selection)
    drawn = config.selection or (fresh[0] if fresh else None)
    keep = read_selection(dataset, drawn).keep if drawn else None
    cause_rows = causes(table)
    runs = read_runs(dataset, config.run)
    return {
        "dataset": dataset.url.rstrip("/").rsplit("/", 1)[-1],
        "totals": totals(dataset, cause_rows),
        "lists": [{"name": x.name, "bytes": x.bytes, "shards": x.shards} for x in dataset.manifest.lists],
        "causes": cause_rows,
        "hosts": hosts(table),
        "selections": sorted(found, key=lambda s: s["name"] != drawn),
        "drawn": drawn,
        "histograms": histograms(table, keep, [t["column"] for s in found for t in s["thresholds"]]),
        "categories": categories(table, keep),
        "sizes": sizes(table, keep),
        "runs": runs,
        "evaluations": evaluation_tables(runs),
        "stages": stage_rows(dataset),
    }


def show(table: Table, numbers: Numbers, config: ReportConfig, most: int) -> Shown:
    """At most `most` pictures from at most 40 row groups: duplicates, regions, then each selection, the drawn first."""
    dataset = table.dataset
    if not most:
        return Shown()
    fresh = [s for s in numbers["selections"] if not s["stale"]]
    matches: dict[str, dict[str, list[list[Match]]]] = {}
    if fresh:
        of_drawn = chosen_matches(dataset, fresh[0]["name"], int(most * MATCH_SHARE), MATCH_GROUPS)
        matches = {fresh[0]["name"]: of_drawn} if of_drawn else {}
    matched = [n for found in matches.values() for n in rows_of(found)]
    regions = region_pictures(dataset, config.seed, most // 12, REGION_GROUPS)
    used = len(groups_of(dataset, matched)) + len(regions) * REGION_GROUPS
    rows = candidates(dataset, config.seed, GROUPS - used)
    room = max(0, most - _count(matches) - sum(len(r["pictures"]) for r in regions))
    picks = _pick(table, fresh, rows, config.seed, room)
    pictures = load(dataset, [*matched, *(p.index for found in picks.values() for p in found)])
    return Shown(picks, matches, pictures, regions)


def _count(matches: Mapping[str, Mapping[str, Sequence[Sequence[Match]]]]) -> int:
    """Pictures of matches: a group's rows and the one that stays."""
    return sum(len(g) + 1 for found in matches.values() for groups in found.values() for g in groups)


def _pick(table: Table, fresh: Sequence[Numbers], rows: np.ndarray, seed: int, room: int) -> dict[str, list[Pick]]:
    """Pictures of each fresh selection: the first has what it needs, the others share what is left."""
    if not fresh:
        return {"": found} if (found := sample(table, rows, seed, min(room, 3 * MOST_OF_ANY))) else {}
    any_ = min(MOST_OF_ANY, room // 4)
    first, *others = fresh
    room -= 2 * any_
    out: dict[str, list[Pick]] = {first["name"]: choose(table, first, rows, seed, _each(table, [first], room), any_)}
    room -= len(out[first["name"]]) - 2 * any_
    for i, s in enumerate(others):
        each = _each(table, others[i:], room)
        if each:
            out[s["name"]] = choose(table, s, rows, seed, each, 0)
            room -= len(out[s["name"]])
    return {name: found for name, found in out.items() if found}


def _each(table: Table, selections: Sequence[Numbers], room: int) -> int:
    """Pictures of a kind, where these selections share so much room."""
    return min(MOST_OF_A_KIND, room // max(1, sum(kinds(table, s) for s in selections)))


def _shown_numbers(shown: Shown) -> Numbers:
    """Which rows the page shows, for the JSON."""
    return {
        "pictures": {
            name: [{"box": p.box, "kind": p.kind, **_place(shown.pictures[p.index]), "value": p.value} for p in found]
            for name, found in shown.picks.items()
        },
        "matches": {name: numbers_of(found, shown.pictures) for name, found in shown.matches.items()},
        "regions": [
            {**r, "pictures": [{k: p[k] for k in ("shard", "row", "boxes")} for p in r["pictures"]]}
            for r in shown.regions
        ],
    }


def _place(picture: Mapping[str, Any]) -> Numbers:
    return {"shard": picture["shard"], "row": picture["row"]}
