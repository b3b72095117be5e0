"""report.html of the demo: one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cli.demo import truth
from cli.demo.results import KS, MODELS, Numbers, smooth
from cli.demo.steps import CURATED, SAMPLE, SELECTION, UNCURATED, Places
from curation import charts
from curation.funnel import FunnelStep
from schemas.status import SUCCESS
from shards.dataset import Dataset

EACH = 8
BOXES = 8
CONFIDENT = 0.5
SMOOTH = 5  # logged steps in a running mean
SMOOTH_VILT = 15  # its batches are small
TONES = {"clean": "good", **dict.fromkeys(truth.DUPLICATES, "twin")}


def write_page(at: Places, found: Numbers) -> Path:
    """Writes report.json and report.html; the page's path."""
    from shards.files import atomic_file

    dataset = Dataset.open(at.data)
    frame = truth.read_truth(dataset, SELECTION)
    seed = found["settings"]["seed"]
    page = render(found, galleries(dataset, frame, seed), boxes(dataset, frame, seed))
    texts = {"report.json": json.dumps(found, indent=1, ensure_ascii=False), "report.html": page}
    for name, text in texts.items():
        with atomic_file(at.folder / name) as stream:
            stream.write(text.encode())
    return at.folder / "report.html"


def render(found: Numbers, shown: Sequence[Numbers], pictures: Sequence[Numbers]) -> str:
    """The page; every caption is escaped by the template engine.

    shown     galleries: title, text, figures with data (JPEG as base64), caption, value, tag, tone
    pictures  with boxes drawn in: data, caption, count
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    template = (files("cli") / "demo" / "report.html").read_text(encoding="utf-8")
    env = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=DictLoader({"report.html": template}),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"commas": lambda n: f"{n:,}", "percent": lambda x: f"{100 * x:.0f}\u00a0%", "one": "{:.1f}".format}
    env.filters |= {"percent_of": "{:.0f}\u00a0%".format}
    drawn = {name: Markup(text) for name, text in _charts(found).items()}
    return env.get_template("report.html").render(
        n=found,
        css=Markup(charts.stylesheet()),
        charts=drawn,
        kinds=[{**k, "bar": Markup(_kind_bar(k)), "tone": TONES.get(k["kind"], "bad")} for k in found["kinds"]],
        galleries=shown,
        boxes=pictures,
        models=MODELS,
        ks=KS,
        share=charts.share,
    )


def _kind_bar(kind: Mapping[str, Any]) -> str:
    return charts.stacked_html(
        [
            ("failed in the download", kind["failed"], "neutral"),
            ("filtered", kind["dropped"], "lost"),
            ("kept", kind["kept"], "kept"),
        ]
    )


def _charts(found: Numbers) -> dict[str, str]:
    curve, bins, losses = found["curve"], found["histogram"], found["losses"]
    mark = [(found["threshold"], "used")]

    def both(metric: str) -> dict[str, list[tuple[int, float]]]:
        names = {CURATED: "curated", UNCURATED: "uncurated"}
        return {told: smooth(losses[name].get(metric, []), SMOOTH_VILT) for name, told in names.items()}

    return {
        "funnel": charts.funnel_html([FunnelStep(**step) for step in found["funnel"]], "pairs in the list"),
        "curve": charts.line_chart_svg(
            {
                "precision: of what is dropped, how much is noise": [(p["threshold"], p["precision"]) for p in curve],
                "recall: of the noise, how much is dropped": [(p["threshold"], p["recall"]) for p in curve],
            },
            "drop below this clip_score",
            "share",
            mark,
        ),
        "histogram": charts.histogram_svg(bins["edges"], bins["all"], bins["right"], mark, "clip_score"),
        "clip_loss": charts.line_chart_svg(
            {"loss": smooth(losses["clip"]["loss"], SMOOTH)}, "step", "contrastive loss", from_zero=False
        ),
        "vilt_loss": charts.line_chart_svg(both("loss"), "step", "loss", from_zero=False),
        "vilt_matching": charts.line_chart_svg(both("itm_accuracy"), "step", "matching accuracy", from_zero=False),
    }


def galleries(dataset: Dataset, frame: pl.DataFrame, seed: int) -> list[Numbers]:
    """Pictures of what was kept and dropped, rightly and wrongly."""
    from curation.thumbnails import load

    there = frame.filter(pl.col("status") == SUCCESS).sample(fraction=1.0, shuffle=True, seed=seed)
    good = pl.col("truth").is_in([truth.CLEAN, *truth.DUPLICATES])
    kept, dropped = there.filter("keep"), there.filter(~pl.col("keep"))
    kinds = [dropped.filter(pl.col("truth") == kind).head(EACH // 2) for kind in (*truth.ABOUT_CAPTION, "tiny")]
    groups = [
        ("Kept", "The best by clip_score.", kept.sort("score", descending=True).head(EACH), "kept"),
        ("Dropped, and rightly so", "A few of each kind of planted noise.", pl.concat(kinds), "lost"),
        (
            "Dropped by mistake",
            "Good pairs that the filter threw away, lowest clip_score first.",
            dropped.filter(good).sort("score", nulls_last=True).head(EACH),
            "lost",
        ),
        (
            "Kept by mistake",
            "Noise that got through, highest clip_score first.",
            kept.filter(~good).sort("score", descending=True, nulls_last=True).head(EACH),
            "kept",
        ),
    ]
    loaded = load(dataset, [i for _, _, rows, _ in groups for i in rows["index"].to_list()])
    return [
        {
            "title": title,
            "text": text,
            "mark": mark,
            "figures": [_figure(row, loaded[row["index"]]["data"]) for row in rows.to_dicts()],
        }
        for title, text, rows, mark in groups
        if rows.height
    ]


def _figure(row: Mapping[str, Any], data: str | None) -> Numbers:
    kind = row["truth"]
    return {
        "data": data,
        "caption": row["caption"] or "",
        "value": None if row["score"] is None else f"{row['score']:.2f}",
        "tag": truth.TITLES.get(kind, kind) + (f" ({row['truth_detail']})" if kind == "language" else ""),
        "tone": TONES.get(kind, "bad"),
    }


def boxes(dataset: Dataset, frame: pl.DataFrame, seed: int) -> list[Numbers]:
    """Pictures of the sample with what the detector found in them: those with two sure objects or more."""
    from extractors.regions.picture import row_picture
    from shards.select import read_selection

    sample = pl.Series(read_selection(dataset, SAMPLE).keep)
    rows = frame.filter(sample).sample(fraction=1.0, shuffle=True, seed=seed + 1).head(8 * BOXES)
    out: list[Numbers] = []
    for row in rows.to_dicts():
        picture, count = row_picture(dataset, row["shard"], row["row"], "regions", CONFIDENT)
        if count > 1:
            out.append({"data": _jpeg(picture), "caption": row["caption"], "count": count})
        if len(out) == BOXES:
            break
    return out


def _jpeg(image: np.ndarray) -> str:
    from shards.images import encode

    return base64.b64encode(encode(image, "jpeg", 85)).decode()
