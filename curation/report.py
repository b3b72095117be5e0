"""`report`: one self-contained HTML page on a dataset and the same numbers as JSON, in DATASET/reports/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from curation import charts
from curation.filter_config import ReportConfig
from curation.funnel import FunnelStep
from curation.report_data import causes, histograms, hosts, selection_rows, stage_rows, totals
from curation.table import Table
from curation.thumbnails import Pick, candidates, choose, load
from schemas.errors import PairmillError
from schemas.events import Emit, Notice, silent
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import Dataset
from shards.select import read_selection, selection_about

MOST_IN_A_BOX = 8
Numbers = dict[str, Any]


def report(dataset: Dataset | str | Path, config: ReportConfig | None = None, emit: Emit = silent) -> str:
    """Writes `reports/NAME.html` and `reports/NAME.json`; returns the page's path inside the dataset.

    Raises PairmillError: unfinished pairs; an unknown or stale `selection`.
    """
    config = config or ReportConfig()
    data = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    table = Table(data)
    if table.pairs.pending():
        raise PairmillError(
            f"{data.url}: pairs are unfinished. Run the download or import command again to finish them."
        )
    numbers = gather(table, config)
    picks = _pick(table, numbers, config)
    pictures = load(data, [p.index for boxes in picks.values() for p in boxes])
    numbers["pictures"] = {
        name: [{"box": p.box, **_place(pictures[p.index]), "value": p.value} for p in boxes]
        for name, boxes in picks.items()
    }
    page = render(numbers, picks, pictures)
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
    return {
        "dataset": dataset.url.rstrip("/").rsplit("/", 1)[-1],
        "totals": totals(dataset, cause_rows),
        "lists": [{"name": x.name, "bytes": x.bytes, "shards": x.shards} for x in dataset.manifest.lists],
        "causes": cause_rows,
        "hosts": hosts(table),
        "selections": found,
        "drawn": drawn,
        "histograms": histograms(table, keep, [t["column"] for s in found for t in s["thresholds"]]),
        "stages": stage_rows(dataset),
    }


def _pick(table: Table, numbers: Numbers, config: ReportConfig) -> dict[str, list[Pick]]:
    """Pictures of each fresh selection, within the page's budget."""
    fresh = [s for s in numbers["selections"] if not s["stale"]]
    boxes = sum(len(s["funnel"]) + 3 for s in fresh)
    each = min(MOST_IN_A_BOX, config.thumbnails // boxes) if boxes else 0
    if not each:
        return {}
    rows = candidates(table.dataset, config.seed)
    return {s["name"]: choose(table, s, rows, config.seed, each) for s in fresh}


def _place(picture: Mapping[str, Any]) -> Numbers:
    return {"shard": picture["shard"], "row": picture["row"]}


def render(numbers: Numbers, picks: Mapping[str, Sequence[Pick]], pictures: Mapping[int, Mapping[str, Any]]) -> str:
    """The page. `pictures` are those of `load`, by the picks' row numbers."""
    template = (files("curation") / "templates" / "report.html").read_text(encoding="utf-8")
    env = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=DictLoader({"report.html": template}),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": charts.number, "commas": lambda n: f"{n:,}", "pretty": _pretty}
    all_marks = _marks(numbers["selections"])
    return env.get_template("report.html").render(
        n=numbers,
        css=Markup(charts.stylesheet()),
        share=charts.share,
        causes=Markup(_cause_bars(numbers)),
        cards=[_card(h, all_marks) for h in numbers["histograms"]],
        funnels={
            s["name"]: Markup(charts.funnel_html([FunnelStep(**f) for f in s["funnel"]])) for s in numbers["selections"]
        },
        recipes={s["name"]: _recipe(s) for s in numbers["selections"]},
        boxes={name: _boxes(part, pictures) for name, part in picks.items()},
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _cause_bars(numbers: Numbers) -> str:
    tones = {SUCCESS: "good", NO_IMAGE: "neutral"}
    items = [(c["cause"], c["rows"]) for c in numbers["causes"]]
    t = numbers["totals"]
    parts = [
        ("with an image", t["images"], "good"),
        ("text only", t["text_only"], "neutral"),
        ("failed", t["failed"], "bad"),
    ]
    whole = t["rows"]
    return charts.stacked_html(parts) + charts.bars_html(items, whole, {n: tones.get(n, "bad") for n, _ in items})


def _marks(found: Sequence[Numbers]) -> dict[str, list[tuple[float, str]]]:
    """Thresholds by column, each once."""
    out: dict[str, list[tuple[float, str]]] = {}
    for s in found:
        for t in s["thresholds"]:
            mark = (t["value"], f"{t['op']} {charts.number(t['value'])}")
            if mark not in out.setdefault(t["column"], []):
                out[t["column"]].append(mark)
    return out


def _card(histogram: Numbers, marks: Mapping[str, Sequence[tuple[float, str]]]) -> Numbers:
    lines = marks.get(histogram["column"], ())
    chart = charts.histogram_svg(histogram["edges"], histogram["counts"], histogram["kept"], lines, histogram["title"])
    return {**histogram, "chart": Markup(chart)}


def _recipe(selection: Numbers) -> str:
    """A YAML file that repeats the selection."""
    rules: list[Any] = []
    recipe: Mapping[str, Any] | None = selection["recipe"]
    while recipe is not None:
        rules = [*recipe["rules"], *rules]
        recipe = recipe.get("from", {}).get("recipe")
    return yaml.safe_dump({"rules": rules}, sort_keys=False, allow_unicode=True, width=100)


def _boxes(picks: Sequence[Pick], pictures: Mapping[int, Mapping[str, Any]]) -> list[Numbers]:
    """Pictures by box, in the order of the page."""
    boxes: dict[str, list[Numbers]] = {}
    for p in picks:
        value = None if p.value is None or np.isnan(p.value) else f"{p.value:.4g}"
        boxes.setdefault(p.box, []).append({**pictures[p.index], "value": value})
    return [{"box": name, "kept": name.startswith("kept"), "pictures": shown} for name, shown in boxes.items()]
