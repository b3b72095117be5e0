"""The numbers of a report: counted in Polars, plain values out, the same in the page and in its JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from curation.table import Table
from schemas.errors import PairmillError
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import Dataset, Stage
from shards.scan import scan
from shards.select import read_selection, selection_about, selections

BINS = 48
HOSTS = 15
# Userinfo and port are no part of a host, and may be secret.
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?([^/:?#]+)"
_ASPECT = pl.max_horizontal("width", "height") / pl.min_horizontal("width", "height")
PLAIN = ("width", "height", "caption_words")
COMPUTED: dict[str, tuple[tuple[str, ...], pl.Expr]] = {
    "aspect (long / short side)": (("width", "height"), _ASPECT),
    "caption characters": (("caption",), pl.col("caption").str.len_chars()),
}


def stage_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Each stage: shards done, rows by status or state, configuration, versions, seconds as the logs tell them."""
    seconds = _seconds(dataset)
    out = []
    for stage in dataset.stages():
        sidecar, standing = stage.sidecar(), sorted(stage.standing())
        counts: Counter[str] = Counter()
        for shard in standing:
            counts.update(stage.counts(shard))
        out.append(
            {
                "stage": stage.path,
                "shards": len(standing),
                "of": dataset.num_shards,
                "counts": dict(counts.most_common()),
                "seconds": round(seconds.get(stage.path, 0.0), 1),
                "identity": sidecar.identity if sidecar else {},
                "recorded": sidecar.recorded if sidecar else {},
                "columns": sidecar.columns if sidecar else {},
                "versions": sidecar.versions if sidecar else {},
            }
        )
    return out


def _seconds(dataset: Dataset) -> dict[str, float]:
    """Seconds each stage ran, summed over its runs."""
    total: Counter[str] = Counter()
    for name in dataset.folder.names("logs"):
        if name.endswith(".jsonl"):
            for line in dataset.folder.read_bytes(f"logs/{name}").splitlines():
                if b'"StageFinished"' in line:
                    event = json.loads(line)
                    total[event["stage"]] += event["seconds"]
    return dict(total)


def causes(table: Table) -> list[dict[str, Any]]:
    """Rows by status, `http_error` by its number: most frequent first."""
    frame = table.frame(["status", "http_status"])
    cause = pl.when(pl.col("status") == "http_error").then(
        pl.concat_str([pl.col("status"), pl.col("http_status").cast(pl.String)], separator=" ", ignore_nulls=True)
    )
    counted = frame.group_by(cause=cause.otherwise("status")).agg(rows=pl.len())
    return counted.sort(["rows", "cause"], descending=[True, False]).collect(engine="streaming").to_dicts()


def hosts(table: Table) -> list[dict[str, Any]]:
    """The hosts with most rows: rows, how many came, and what most of the others failed of."""
    frame = table.frame(["url", "status"]).filter(pl.col("url").is_not_null())
    host = pl.col("url").str.extract(_HOST).str.to_lowercase().fill_null("(no host)")
    counted = frame.group_by(host.alias("host"), "status").agg(rows=pl.len()).collect(engine="streaming")
    ranked = counted.sort(["rows", "status"], descending=[True, False])
    ok = pl.col("status") == SUCCESS
    per_host = ranked.group_by("host", maintain_order=True).agg(
        rows=pl.col("rows").sum(), ok=pl.col("rows").filter(ok).sum(), failure=pl.col("status").filter(~ok).first()
    )
    return per_host.sort(["rows", "host"], descending=[True, False]).head(HOSTS).to_dicts()


def histograms(table: Table, keep: np.ndarray | None, also: Iterable[str] = ()) -> list[dict[str, Any]]:
    """A histogram of every number in the scores, of the sizes of images and captions, and of columns in `also`.

    keep  bool [rows of the dataset], counted apart in `kept`; not where a score set is unfinished
    """
    out = _of_scores(table, keep)
    extra = sorted(c for c in {*also} - {*PLAIN} if c in table.columns and table.set_of(c) is None)
    for name in (*PLAIN, *extra):
        out.append(_histogram(name, name, table.frame([name]).select(value=pl.first()), keep))
    for title, (columns, expr) in COMPUTED.items():
        out.append(_histogram(title, "", table.frame(columns).select(value=expr), keep))
    return [h for h in out if h["rows"]]


def _of_scores(table: Table, keep: np.ndarray | None) -> list[dict[str, Any]]:
    out = []
    for group, stage in table.score_sets.items():
        done = sorted(stage.done())
        whole = len(done) == table.dataset.num_shards
        for column in _numbers(table, group):
            if done:
                frame = table.frame([f"{group}.{column}"]) if whole else _part(stage, done, f"{group}.{column}")
                one = _histogram(
                    f"{group}.{column}", f"{group}.{column}", frame.select(value=pl.first()), keep if whole else None
                )
                out.append(one | {"shards": len(done)})
    return out


def _numbers(table: Table, group: str) -> list[str]:
    """Columns of a score set that are numbers."""
    return [
        full.rpartition(".")[2]
        for full, kind in table.columns.items()
        if table.set_of(full) == group and kind.is_numeric()
    ]


def _part(stage: Stage, shards: Sequence[int], full: str) -> pl.LazyFrame:
    column = pl.col(full.rpartition(".")[2])
    return scan(stage, shards).select(column.cast(pl.Float64).fill_nan(None))


def _histogram(title: str, column: str, frame: pl.LazyFrame, keep: np.ndarray | None) -> dict[str, Any]:
    """Bins between the 0.5 % and 99.5 % quantiles; what lies beyond is counted in the end bins.

    NaN and infinity count as no value.
    """
    number = pl.col("value").cast(pl.Float64)
    value = pl.when(number.is_finite()).then(number)
    facts = frame.select(
        rows=value.count(),
        nulls=value.null_count(),
        minimum=value.min(),
        maximum=value.max(),
        median=value.median(),
        low=value.quantile(0.005),
        high=value.quantile(0.995),
    )
    found = facts.collect(engine="streaming").row(0, named=True)
    low, high = found.pop("low"), found.pop("high")
    head = {"title": title, "column": column, **found, "kept": None}
    if not found["rows"]:
        return head | {"edges": [], "counts": []}
    edges = _edges(low, high)
    bins = len(edges) - 1
    place = ((value - edges[0]) / (edges[-1] - edges[0]) * bins).floor().clip(0, bins - 1).cast(pl.Int32)
    parts = [frame.select(bin=place)]
    if keep is not None:
        parts.append(pl.LazyFrame({"keep": keep}))
    table = parts[0] if keep is None else pl.concat(parts, how="horizontal")
    kept = pl.len() if keep is None else pl.col("keep").sum()
    counted = table.filter(pl.col("bin").is_not_null()).group_by("bin").agg(rows=pl.len(), kept=kept)
    counts, held = [0] * bins, [0] * bins
    for at, rows, in_selection in counted.collect(engine="streaming").iter_rows():
        counts[at], held[at] = rows, in_selection
    return head | {"edges": edges, "counts": counts, "kept": None if keep is None else held}


def _edges(low: float, high: float) -> list[float]:
    """Bin edges; whole numbers where a bin for each would do."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
        return [low, high]
    if low == int(low) and high == int(high) and high - low < BINS:
        return [low - 0.5 + i for i in range(int(high - low) + 2)]
    return [low + (high - low) * i / BINS for i in range(BINS + 1)]


def selection_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Each selection: recipe, funnel, thresholds, rows kept, and why it is stale where it is."""
    out = []
    for name in selections(dataset):
        about = selection_about(dataset, name)
        try:
            read_selection(dataset, name)
            stale = None
        except PairmillError as error:
            stale = str(error)
        about.pop("made_from")
        out.append({"name": name, "stale": stale, "funnel": [], "thresholds": [], **about})
    return out


def totals(dataset: Dataset, cause_rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Rows, those with an image, text-only ones, failures, shards."""
    by = {c["cause"]: c["rows"] for c in cause_rows}
    images, text = by.get(SUCCESS, 0), by.get(NO_IMAGE, 0)
    rows = sum(by.values())
    return {
        "rows": rows,
        "images": images,
        "text_only": text,
        "failed": rows - images - text,
        "shards": dataset.num_shards,
    }
