"""How columns are distributed: histograms, categories, sizes of images. Counted in Polars, a column at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from curation.columns import ATTRIBUTION
from curation.table import Table
from shards.dataset import Stage
from shards.scan import scan

BINS = 48
NAMED = 12  # categories told by name
MOST_IN_A_SHARD = 256  # values of a text column that is a category, in the first shard
MOST_COLUMNS = 200  # of each kind: a score set of a stranger may have thousands
CELLS = 26  # of each side of the map of sizes
LARGEST = 1e300  # so that no difference of two values overflows
_EXACT = 2.0**50  # whole numbers below have exact halves beside them
TAIL = 3.0  # a range this many times the middle 99 % is cut there
_ASPECT = pl.max_horizontal("width", "height") / pl.min_horizontal("width", "height")
PLAIN = ("width", "height", "caption_words")
COMPUTED: dict[str, tuple[tuple[str, ...], pl.Expr]] = {
    "aspect (long / short side)": (("width", "height"), _ASPECT),
    "caption characters": (("caption",), pl.col("caption").str.len_chars()),
    "captions of an image": (("captions",), pl.col("captions").list.len()),
}
_WIDE_INTEGERS = (pl.UInt64, pl.Int64)


def histograms(table: Table, keep: np.ndarray | None, also: Iterable[str] = ()) -> list[dict[str, Any]]:
    """A histogram of every number in the scores, of the sizes of images and captions, and of columns in `also`.

    keep  bool [rows of the dataset], counted apart in `kept`; not where a score set is unfinished
    """
    numbers = [c for c in _score_columns(table) if table.columns[c].is_numeric() and not _is_hash(table, c)]
    out = []
    for full in numbers[:MOST_COLUMNS]:
        frame, whole, shards = _score(table, full)
        one = _histogram(full, full, frame, keep if whole else None)
        out.append(one | {"shards": shards, "about": _about(table, full)})
    extra = sorted(c for c in {*also} - {*PLAIN} if c in table.columns and table.set_of(c) is None)
    for name in (*PLAIN, *extra):
        if table.columns[name].is_numeric():
            out.append(_histogram(name, name, table.frame([name]).select(value=pl.first()), keep))
    for title, (columns, expr) in COMPUTED.items():
        out.append(_histogram(title, "", table.frame(columns).select(value=expr), keep))
    return [h for h in out if h["rows"]]


def categories(table: Table, keep: np.ndarray | None) -> list[dict[str, Any]]:
    """Values of yes-or-no and of text columns of the scores, of the images' format and of their licence.

    Text of which the first shard holds more than 256 values (a new caption, say) is left out. Each has `values`: at
    most 12, most frequent first, with `rows` and `kept`; `distinct` is how many there are.
    """
    text = [c for c in _score_columns(table) if table.columns[c] in (pl.String, pl.Boolean) and not _is_state(c)]
    out = []
    for full in text[:MOST_COLUMNS]:
        frame, whole, shards = _score(table, full)
        if _is_category(table, full):
            one = _category(full, frame, keep if whole else None)
            out.append(one | {"shards": shards, "about": _about(table, full), "role": _role(full)})
    licence = _licence(table)
    for name, role in (("format", "format"), *(((licence, "licence"),) if licence else ())):
        out.append(_category(name, table.frame([name]).select(value=pl.first()), keep) | {"role": role})
    return [c for c in out if c["rows"]]


def sizes(table: Table, keep: np.ndarray | None) -> list[dict[str, Any]]:
    """Images by width and height, as they came and as they are stored: cells of equal ratio, each with its rows.

    `edges` px, CELLS + 1 of them rising, the same for both sides; `cells` [[column, row, rows, kept]]. A map of which
    all images have one size has no cells but `only`. As they came is left out where it is as they are stored.
    """
    stored = _size_map(table, "stored", ("width", "height"), keep)
    came = _size_map(table, "as they came", ("original_width", "original_height"), keep)
    same = all(came.get(k) == stored.get(k) for k in ("edges", "cells", "only"))
    return [m for m in ((stored,) if same else (came, stored)) if m["rows"]]


def _score_columns(table: Table) -> list[str]:
    """Full names of the columns of score sets of which a shard is up to date."""
    done = {name: stage.done() for name, stage in table.score_sets.items()}
    return [full for full in table.columns if (group := table.set_of(full)) is not None and done[group]]


def _is_hash(table: Table, full: str) -> bool:
    return table.columns[full] in _WIDE_INTEGERS and "hash" in full.rpartition(".")[2].lower()


def _is_state(full: str) -> bool:
    """Whether the column tells how the scorer went; the history counts it."""
    return full.rpartition(".")[2].endswith("state")


def _role(full: str) -> str:
    return "language" if full.rpartition(".")[2] == "language" else "score"


def _about(table: Table, full: str) -> dict[str, str]:
    """What the scorer's sidecar says of the column: `what` and `scale`, where it does."""
    group = table.set_of(full)
    sidecar = table.score_sets[group].sidecar() if group else None
    told = (sidecar.columns if sidecar else {}).get(full.rpartition(".")[2])
    told = told if isinstance(told, dict) else {}
    return {k: str(told[k])[:300] for k in ("what", "scale") if told.get(k)}


def _score(table: Table, full: str) -> tuple[pl.LazyFrame, bool, int]:
    """(the column as `value`, whether every shard has it, how many have)."""
    group = table.set_of(full)
    assert group is not None, "asked of score columns only"
    stage = table.score_sets[group]
    done = sorted(stage.done())
    whole = len(done) == table.dataset.num_shards
    frame = table.frame([full]) if whole else _part(stage, done, full)
    return frame.select(value=pl.first()), whole, len(done)


def _part(stage: Stage, shards: Sequence[int], full: str) -> pl.LazyFrame:
    return scan(stage, shards).select(pl.col(full.rpartition(".")[2]))


def _is_category(table: Table, full: str) -> bool:
    group = table.set_of(full)
    assert group is not None, "asked of score columns only"
    stage = table.score_sets[group]
    first = _part(stage, sorted(stage.done())[:1], full).select(pl.first().n_unique())
    return int(first.collect(engine="streaming").item()) <= MOST_IN_A_SHARD


def _licence(table: Table) -> str | None:
    """The column that bears one of the usual names of a licence."""
    names = [n for n, kind in table.columns.items() if table.set_of(n) is None and kind == pl.String]
    return next((n for usual in ATTRIBUTION["license"] for n in names if n.lower() == usual), None)


def _with_keep(frame: pl.LazyFrame, keep: np.ndarray | None) -> tuple[pl.LazyFrame, pl.Expr]:
    """(the frame with the selection beside it, how many rows of a group are kept; null without one)."""
    if keep is None:
        return frame, pl.lit(None, pl.UInt32)
    return pl.concat([frame, pl.LazyFrame({"keep": keep})], how="horizontal"), pl.col("keep").sum()


def _category(title: str, frame: pl.LazyFrame, keep: np.ndarray | None) -> dict[str, Any]:
    table, kept = _with_keep(frame.select(pl.col("value").cast(pl.String)), keep)
    counted = table.group_by("value").agg(rows=pl.len(), kept=kept).collect(engine="streaming")
    nulls = counted.filter(pl.col("value").is_null())["rows"].sum()
    ranked = counted.filter(pl.col("value").is_not_null()).sort(["rows", "value"], descending=[True, False])
    rest = ranked.slice(NAMED)
    return {
        "title": title,
        "column": title,
        "rows": int(ranked["rows"].sum()),
        "nulls": int(nulls),
        "distinct": ranked.height,
        "values": ranked.head(NAMED).with_columns(pl.col("value").str.slice(0, 200)).to_dicts(),
        "rest": {"rows": int(rest["rows"].sum()), "kept": None if keep is None else int(rest["kept"].sum())},
    }


def _size_map(table: Table, title: str, sides: tuple[str, str], keep: np.ndarray | None) -> dict[str, Any]:
    frame = table.frame(sides).select(w=pl.col(sides[0]).cast(pl.Float64), h=pl.col(sides[1]).cast(pl.Float64))
    there = (pl.col("w") > 0) & (pl.col("h") > 0)
    pair = pl.col("w", "h").filter(there)
    low, high = pair.min(), pair.max()
    facts = frame.select(low.name.prefix("low_"), high.name.prefix("high_"), there.sum().alias("rows"))
    (w0, h0, w1, h1, rows) = facts.collect(engine="streaming").row(0)
    head = {"title": title, "columns": list(sides), "rows": int(rows or 0)}
    if not rows:
        return head
    if (w0, h0) == (w1, h1):
        return {**head, "only": [int(w0), int(h0)], "edges": [], "cells": []}
    first, last = math.log2(min(w0, h0)), math.log2(max(w1, h1))
    first, last = (first - 0.5, last + 0.5) if last - first < 1 else (first, last)

    def cell(name: str) -> pl.Expr:
        place = (pl.col(name).log(2) - first) / (last - first) * CELLS
        return place.floor().clip(0, CELLS - 1).cast(pl.Int32)

    placed = frame.select(x=pl.when(there).then(cell("w")), y=pl.when(there).then(cell("h")))
    whole, kept = _with_keep(placed, keep)
    counted = whole.filter(pl.col("x").is_not_null()).group_by("x", "y").agg(rows=pl.len(), kept=kept)
    cells = [list(c) for c in counted.sort("x", "y").collect(engine="streaming").iter_rows()]
    edges = [2 ** (first + (last - first) * i / CELLS) for i in range(CELLS + 1)]
    return {**head, "only": None, "edges": edges, "cells": cells}


def _histogram(title: str, column: str, frame: pl.LazyFrame, keep: np.ndarray | None) -> dict[str, Any]:
    """Bins over the whole range, or over the middle 99 % where that is a small part of it: then what lies beyond is
    counted in the end bins, and `cut` is true. NaN, infinity and what is beyond 1e300 count as no value.
    """
    number = pl.col("value").cast(pl.Float64)
    value = pl.when(number.abs() <= LARGEST).then(number)
    facts = frame.select(
        rows=value.count(),
        nulls=value.null_count(),
        minimum=value.min(),
        maximum=value.max(),
        median=value.median(),
        low=value.quantile(0.005),
        high=value.quantile(0.995),
        whole=(value == value.floor()).all(),
    )
    found = facts.collect(engine="streaming").row(0, named=True)
    low, high, whole = found.pop("low"), found.pop("high"), found.pop("whole")
    head = {"title": title, "column": column, **found, "kept": None, "cut": False}
    if not found["rows"]:
        return head | {"edges": [], "counts": []}
    cut = high > low and found["maximum"] - found["minimum"] > TAIL * (high - low)
    edges = _edges(*((low, high) if cut else (found["minimum"], found["maximum"])), whole)
    bins = len(edges) - 1
    place = ((value - edges[0]) / (edges[-1] - edges[0]) * bins).floor().clip(0, bins - 1).cast(pl.Int32)
    table, kept = _with_keep(frame.select(bin=place), keep)
    counted = table.filter(pl.col("bin").is_not_null()).group_by("bin").agg(rows=pl.len(), kept=kept)
    counts, held = [0] * bins, [0] * bins
    for at, rows, in_selection in counted.collect(engine="streaming").iter_rows():
        counts[at], held[at] = rows, in_selection
    return head | {"edges": edges, "counts": counts, "kept": None if keep is None else held, "cut": cut}


def _edges(low: float, high: float, whole: bool) -> list[float]:
    """Edges of at most 48 bins. Bins of whole numbers are a whole number wide: else some would hold more of them."""
    if high <= low:
        pad = max(0.5, abs(low) * 1e-6)
        return [low - pad, low + pad]
    if whole and max(abs(low), abs(high)) < _EXACT:
        low, high = math.floor(low), math.ceil(high)
        step = -(-(high - low + 1) // BINS)
        return [low - 0.5 + step * i for i in range(-(-(high - low + 1) // step) + 1)]
    return [low + (high - low) * i / BINS for i in range(BINS)] + [high]
