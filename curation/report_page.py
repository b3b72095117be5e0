"""The page of a report: numbers and pictures -> HTML. Every word of a stranger is escaped by the template engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from curation import charts
from curation.flow_chart import branches_of, river_svg
from curation.funnel import FunnelStep
from curation.report_matches import side_by_side
from curation.rules import Match
from curation.thumbnails import Pick
from schemas.status import NO_IMAGE, SUCCESS

Numbers = dict[str, Any]
Picture = Mapping[str, Any]
MOST_CARDS = 60  # histograms drawn; the JSON has all
MOST_SETTINGS = 20_000  # letters of a stage's settings
CAPTION_SETS, IMAGE_SETS = ("text", "language"), ("image", "hash")
_KINDS = {
    "any": "Some of those it dropped",
    "best": "Kept, the best",
    "kept": "Kept, nearest to the threshold",
    "nearest": "Dropped, nearest to the threshold",
    "farthest": "Dropped, the worst",
    "null": "Dropped for a missing value",
}


def render(
    numbers: Numbers,
    picks: Mapping[str, Sequence[Pick]],
    matches: Mapping[str, Mapping[str, Sequence[Sequence[Match]]]],
    pictures: Mapping[int, Picture],
    regions: Sequence[Mapping[str, Any]],
) -> str:
    """The page. `pictures` are those of `load`, by row number."""
    marks = _marks(numbers["selections"])
    return _template().render(
        n=numbers,
        css=Markup(charts.stylesheet()),
        share=charts.share,
        river=Markup(_river(numbers)),
        flow=Markup(_flow_bar(numbers)),
        causes=Markup(_cause_bars(numbers["causes"], numbers["totals"]["rows"])),
        hosts=[{**h, "bar": Markup(_host_bar(h))} for h in numbers["hosts"]],
        selections=[_selection(s, numbers, picks.get(s["name"], ()), pictures) for s in numbers["selections"]],
        hero=_hero(picks.get(numbers["drawn"] or "", ()), pictures),
        matches=[m for name, found in matches.items() for m in side_by_side(found, pictures)],
        groups=_groups(numbers, marks),
        regions=regions,
        runs=[_run(r) for r in numbers["runs"]],
    )


def _template() -> Any:
    folder = files("curation") / "templates"
    env = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=DictLoader({"report.html": (folder / "report.html").read_text(encoding="utf-8")}),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": charts.number, "commas": lambda n: f"{n:,}", "pretty": _pretty, "seconds": _seconds}
    return env.get_template("report.html")


def _pretty(value: Any) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return text if len(text) <= MOST_SETTINGS else text[:MOST_SETTINGS] + "\n… (the JSON file has the rest)"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f}\u00a0s"
    return f"{value / 60:.0f}\u00a0min" if value < 5400 else f"{value / 3600:.1f}\u00a0h"


def _failures(causes: Sequence[Numbers]) -> list[tuple[str, int]]:
    return [(c["cause"], c["rows"]) for c in causes if c["cause"] not in (SUCCESS, NO_IMAGE)]


def _drawn(numbers: Numbers) -> Numbers | None:
    return next((s for s in numbers["selections"] if s["name"] == numbers["drawn"]), None)


def _river(numbers: Numbers) -> str:
    drawn = _drawn(numbers)
    rules = [(s["rule"], s["dropped"]) for s in drawn["funnel"] if s["rule"] != "status"] if drawn else []
    branches = branches_of(_failures(numbers["causes"]), [r for r in rules if r[1]])
    end = f"kept by {drawn['name']}" if drawn else "have what they need" if numbers["totals"]["text_only"] else "images"
    return river_svg(numbers["totals"]["rows"], branches, "rows in the list", end) if branches else ""


def _flow_bar(numbers: Numbers) -> str:
    """The river in one bar, for a phone."""
    t, drawn = numbers["totals"], _drawn(numbers)
    good = t["images"] + t["text_only"]
    kept = drawn["kept"] if drawn else good
    return charts.stacked_html(
        [("kept" if drawn else "there", kept, "kept"), ("dropped", good - kept, "lost"), ("failed", t["failed"], "bad")]
    )


def _cause_bars(causes: Sequence[Numbers], whole: int) -> str:
    tones = {SUCCESS: "good", NO_IMAGE: "neutral"}
    items = [(c["cause"], c["rows"]) for c in causes]
    return charts.bars_html(items, whole, {n: tones.get(n, "bad") for n, _ in items})


def _host_bar(host: Numbers) -> str:
    return charts.stacked_html([("came", host["ok"], "good"), ("failed", host["rows"] - host["ok"], "bad")])


def _marks(found: Sequence[Numbers]) -> dict[str, list[tuple[float, str]]]:
    """Thresholds by column, each once."""
    out: dict[str, list[tuple[float, str]]] = {}
    for s in found:
        for t in s["thresholds"]:
            if _mark(t) not in out.setdefault(t["column"], []):
                out[t["column"]].append(_mark(t))
    return out


def _mark(threshold: Numbers) -> tuple[float, str]:
    return threshold["value"], f"{threshold['op']} {charts.number(threshold['value'])}"


def _chart(histogram: Numbers, marks: Sequence[tuple[float, str]]) -> Markup:
    return Markup(
        charts.histogram_svg(histogram["edges"], histogram["counts"], histogram["kept"], marks, histogram["title"])
    )


def _selection(selection: Numbers, numbers: Numbers, picks: Sequence[Pick], pictures: Mapping[int, Picture]) -> Numbers:
    """A selection for the page: funnel, recipe, and each rule that dropped something with its chart and pictures."""
    by_column = {h["column"]: h for h in numbers["histograms"] if h["column"]}
    rules = []
    for step in selection["funnel"]:
        shown = _strips([p for p in picks if p.box == step["rule"]], pictures)
        mine = [t for t in selection["thresholds"] if t["rule"] == step["rule"]]
        drawn = [by_column[c] for c in dict.fromkeys(t["column"] for t in mine) if c in by_column]
        own = [
            _chart(
                {**h, "kept": h["kept"] if selection["name"] == numbers["drawn"] else None},
                [_mark(t) for t in mine if t["column"] == h["column"]],
            )
            for h in drawn[:2]
        ]
        if shown or (own and step["dropped"] and not selection["stale"]):
            charted = [{"title": h["title"], "chart": c} for h, c in zip(drawn, own, strict=False)]
            rules.append({**step, "strips": shown, "charts": charted})
    return {
        **selection,
        "drawn": selection["name"] == numbers["drawn"],
        "funnel_chart": Markup(charts.funnel_html([FunnelStep(**f) for f in selection["funnel"]])),
        "yaml": recipe(selection),
        "rules": rules,
    }


def _strips(picks: Sequence[Pick], pictures: Mapping[int, Picture]) -> list[Numbers]:
    """Pictures by kind, in the order they were chosen."""
    kinds: dict[str, list[Numbers]] = {}
    for p in picks:
        kinds.setdefault(p.kind, []).append(_figure(p, pictures))
    return [{"kind": k, "title": _KINDS[k], "pictures": shown} for k, shown in kinds.items()]


def _figure(pick: Pick, pictures: Mapping[int, Picture]) -> Numbers:
    return {**pictures[pick.index], "value": None if pick.value is None else _value(pick.value), "tag": pick.tag}


def _value(value: float) -> str:
    """Four digits: what lies on either side of a threshold should look different."""
    return charts.number(value) if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def _hero(picks: Sequence[Pick], pictures: Mapping[int, Picture]) -> list[Numbers]:
    """What was kept and what was dropped, at first sight; or any rows where nothing was selected."""
    titles = {"kept": "Kept", "dropped": "Dropped", "rows": "Some of the rows"}
    boxes: dict[str, list[Numbers]] = {}
    for p in picks:
        if p.box in titles:
            boxes.setdefault(p.box, []).append(_figure(p, pictures))
    return [{"box": b, "title": titles[b], "pictures": shown} for b, shown in boxes.items()]


def recipe(selection: Numbers) -> str:
    """A YAML file that repeats the selection."""
    rules: list[Any] = []
    written: Mapping[str, Any] | None = selection["recipe"]
    while written is not None:
        rules = [*written["rules"], *rules]
        written = written.get("from", {}).get("recipe")
    return yaml.safe_dump({"rules": rules}, sort_keys=False, allow_unicode=True, width=100)


def _groups(numbers: Numbers, marks: Mapping[str, Sequence[tuple[float, str]]]) -> list[Numbers]:
    """Distributions by what they are of, cards with thresholds first."""
    titles = {"scores": "Scores", "captions": "Captions", "images": "Images", "licences": "Licences"}
    out: dict[str, Numbers] = {
        name: {"name": name, "title": title, "cards": [], "same": [], "categories": [], "flags": [], "maps": []}
        for name, title in titles.items()
    }
    ordered = sorted(numbers["histograms"], key=lambda h: h["column"] not in marks)
    for i, h in enumerate(ordered):
        group = out[_group_of(h["title"])]
        if h["minimum"] == h["maximum"]:
            group["same"].append({**h, "value": charts.number(h["minimum"])})
        elif i < MOST_CARDS:
            group["cards"].append({**h, "chart": _chart(h, marks.get(h["column"], ()))})
    for c in numbers["categories"]:
        place = {"language": "captions", "format": "images", "licence": "licences"}.get(c["role"])
        group = out[place or _group_of(c["title"])]
        if {v["value"] for v in c["values"]} <= {"true", "false"}:
            group["flags"].append(_flag(c))
        else:
            group["categories"].append({**c, "chart": Markup(_category_bars(c))})
    lines = {column: [v for v, _ in found] for column, found in marks.items()}
    for m in numbers["sizes"]:
        drawn = charts.size_map_svg(m["edges"], m["cells"], tuple(m["columns"]), lines)
        out["images"]["maps"].append({**m, "chart": Markup(drawn)})
    for group in out.values():
        flags = [(f["name"], f["rows"], f["kept"]) for f in group["flags"]]
        group["flags"] = Markup(charts.two_bars_html(flags, max(f["of"] for f in group["flags"]))) if flags else ""
    return [g for g in out.values() if any(g[k] for k in ("cards", "same", "categories", "flags", "maps"))]


def _group_of(title: str) -> str:
    group = title.split(".")[0] if "." in title else ""
    if group in CAPTION_SETS or (not group and title.startswith("caption")):
        return "captions"
    images = ("width", "height", "original_width", "original_height")
    return "images" if group in IMAGE_SETS or title in images or title.startswith("aspect (") else "scores"


def _flag(category: Numbers) -> Numbers:
    yes = next((v for v in category["values"] if v["value"] == "true"), {"rows": 0, "kept": 0})
    return {"name": category["title"], "rows": yes["rows"], "kept": yes["kept"], "of": category["rows"]}


def _category_bars(category: Numbers) -> str:
    items = [(v["value"] or "(empty)", v["rows"], v["kept"]) for v in category["values"]]
    more = category["distinct"] - len(items)
    if more:
        items.append((f"{more:,} more", category["rest"]["rows"], category["rest"]["kept"]))
    if category["nulls"]:
        items.append(("without a value", category["nulls"], None))
    return charts.two_bars_html(items, category["rows"] + category["nulls"])


def _run(run: Numbers) -> Numbers:
    """A run for the page: its loss with a running mean, and what it counts in shares."""
    curves = run["curves"]
    loss = {}
    if curves.get("loss"):
        loss = {"loss": curves["loss"]}
        width = max(1, len(curves["loss"]) // 16)
        if width > 1:
            loss[f"mean of {width}"] = _running_mean(curves["loss"], width)
    if curves.get("val_loss"):
        loss["held out"] = curves["val_loss"]
    shares = {n: p for n, p in curves.items() if n.endswith(("_accuracy", "_recall", "_r1"))}
    drawn = [
        charts.line_chart_svg(loss, "step", "loss", from_zero=False, width=360),
        charts.line_chart_svg(shares, "step", "share", width=360),
    ]
    return {**run, "charts": [Markup(c) for c in drawn if c]}


def _running_mean(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    out = []
    for i in range(width - 1, len(points)):
        out.append((points[i][0], sum(p[1] for p in points[i - width + 1 : i + 1]) / width))
    return out
