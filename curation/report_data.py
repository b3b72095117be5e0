"""The numbers of a report: counted in Polars, plain values out, the same in the page and in its JSON.

What became of the rows is here, how columns are distributed in distributions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from curation.history import StageSummary, history
from curation.table import Table
from schemas.errors import PairmillError
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import Dataset
from shards.select import read_selection, selection_about, selections

HOSTS = 15
# Userinfo and port are no part of a host, and may be secret.
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?([^/:?#]+)"


def stage_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Each stage but selections, as `pairmill history` tells it, and what its sidecar says of its columns."""
    return [_stage_row(dataset, s) for s in history(dataset) if not s.path.startswith("selections/")]


def _stage_row(dataset: Dataset, summary: StageSummary) -> dict[str, Any]:
    sidecar = dataset.stage(summary.path).sidecar()
    return {
        "stage": summary.path,
        "made_by": summary.made_by,
        "shards": summary.shards[0],
        "of": summary.shards[1],
        "counts": dict(sorted(summary.counts.items(), key=lambda item: (-item[1], item[0]))),
        "seconds": round(summary.seconds, 1),
        "runs": summary.runs,
        "hosts": list(summary.hosts),
        "fingerprint": summary.fingerprint,
        "identity": summary.identity,
        "recorded": summary.recorded,
        "columns": sidecar.columns if sidecar else {},
        "versions": summary.versions,
    }


def causes(table: Table) -> list[dict[str, Any]]:
    """Rows by status, `http_error` by its number: most frequent first, each with its most frequent `error`."""
    frame = table.frame(["status", "http_status", "error"])
    cause = pl.when(pl.col("status") == "http_error").then(
        pl.concat_str([pl.col("status"), pl.col("http_status").cast(pl.String)], separator=" ", ignore_nulls=True)
    )
    per_error = frame.group_by("error", cause=cause.otherwise("status")).agg(rows=pl.len())
    ranked = per_error.sort(["rows", "error"], descending=[True, False], nulls_last=True)
    told = pl.col("error").drop_nulls().first()
    counted = ranked.group_by("cause", maintain_order=True).agg(pl.col("rows").sum(), error=told)
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
        about.pop("matches", None)
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
