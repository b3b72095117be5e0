"""What came out of a demo, as plain numbers: for the terminal, for report.html and for report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from cli.demo import truth
from cli.demo.prepare import DemoSettings
from cli.demo.steps import CURATED, SELECTION, UNCURATED, Places, Step, curation, evaluation, features, training
from schemas.status import SUCCESS
from shards.dataset import Dataset
from shards.select import selection_about

KS = (1, 5, 10)
BINS = 44
MODELS = {"clip": "CLIP", CURATED: "ViLT, curated pairs", UNCURATED: "ViLT, uncurated pairs"}
Numbers = dict[str, Any]


def gather(at: Places, settings: DemoSettings, seconds: Mapping[str, float]) -> Numbers:
    """Every number of the report. Raises PairmillError where a stage's results are not there."""
    dataset = Dataset.open(at.data)
    frame = truth.read_truth(dataset, SELECTION)
    about = selection_about(dataset, SELECTION)
    found = truth.kinds(frame)
    return {
        "settings": asdict(settings),
        "rows": frame.height,
        "images": frame.filter(pl.col("status") == SUCCESS).height,
        "kept": frame.filter("keep").height,
        "kinds": [k.as_dict() for k in found],
        "quality": asdict(truth.quality(found)),
        "noise_in": _noise_share(frame),
        "noise_left": _noise_share(frame.filter("keep")),
        "curve": [asdict(p) for p in truth.caption_curve(frame)],
        "ranking_quality": _ranking_quality(frame),
        "threshold": next(t["value"] for t in about["thresholds"] if "clip_score" in t["column"]),
        "histogram": _histogram(frame),
        "funnel": about["funnel"],
        "losses": {name: _losses(at, name) for name in MODELS},
        "retrieval": {name: _retrieval(at, name) for name in MODELS},
        "chance": chance(settings.held_out, 2 * settings.held_out),
        "steps": [_told(step, seconds) for step in _shown_steps(at)],
        "seconds": dict(seconds),
    }


def _shown_steps(at: Places) -> list[Step]:
    return [*curation(at), *features(at), *training(at), *evaluation(at)]


def _told(step: Step, seconds: Mapping[str, float]) -> Numbers:
    return {
        "name": step.name,
        "title": step.title,
        "why": step.why,
        "command": step.command,
        "seconds": seconds.get(step.name),
    }


def _noise_share(frame: pl.DataFrame) -> float:
    """Share of the rows with a picture whose caption or picture is spoiled; a duplicate is no such row."""
    rows = frame.filter(pl.col("status") == SUCCESS)
    good = rows.filter(pl.col("truth").is_in([truth.CLEAN, *truth.DUPLICATES])).height
    return 1 - good / rows.height if rows.height else 0.0


def _ranking_quality(frame: pl.DataFrame) -> float:
    rows = frame.filter(pl.col("score").is_not_null())
    noisy = rows["truth"].is_in(truth.ABOUT_CAPTION).to_numpy()
    return truth.ranking_quality(rows["score"].to_numpy(), noisy)


def _histogram(frame: pl.DataFrame) -> Numbers:
    """clip_score of all rows that have one, and of those whose caption is right."""
    rows = frame.filter(pl.col("score").is_not_null())
    values = rows["score"].to_numpy()
    right = values[~rows["truth"].is_in(truth.ABOUT_CAPTION).to_numpy()]
    counts, edges = np.histogram(values, BINS)
    return {
        "edges": edges.tolist(),
        "all": counts.tolist(),
        "right": np.histogram(right, edges)[0].tolist(),
    }


def _losses(at: Places, name: str) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) of every logged step."""
    from training.checkpoint import Run

    lines = Run(at.run(name)).metrics()
    wanted = ("loss", "contrastive_accuracy", "itm_accuracy", "mlm_loss")
    return {key: [(m["step"], m[key]) for m in lines if key in m] for key in wanted if any(key in m for m in lines)}


def _retrieval(at: Places, name: str) -> dict[str, float]:
    file = at.run(name) / "evaluations" / "retrieval-test" / "results.json"
    metric: dict[str, float] = json.loads(file.read_bytes())["metric"]
    return metric


def chance(images: int, captions: int) -> dict[str, float]:
    """The metric of a random order, percent, where each image has the same number of captions.

    A caption's one image is among the first k of n with k/n; an image's m captions all miss the first k with
    C(n - m, k) / C(n, k).
    """
    each = captions // images
    out = {}
    for k in KS:
        miss = math.comb(captions - each, k) / math.comb(captions, k) if k <= captions else 0.0
        out[f"image_to_text_r{k}"] = 100 * (1 - miss)
        out[f"text_to_image_r{k}"] = 100 * min(1.0, k / images)
    return out


def result_rows(found: Numbers) -> list[Numbers]:
    """The table of retrieval, a row a model and a row for chance."""
    rows = {**{MODELS[name]: metric for name, metric in found["retrieval"].items()}, "chance": found["chance"]}
    ways = (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    return [
        {"model": name} | {f"{way} R@{k}": f"{metric[f'{key}_r{k}']:.1f}" for way, key in ways for k in KS}
        for name, metric in rows.items()
    ]


def smooth(points: Sequence[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """Running mean over `width` points, fewer at the beginning."""
    values = [v for _, v in points]
    return [
        (step, sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1)) for i, (step, _) in enumerate(points)
    ]
