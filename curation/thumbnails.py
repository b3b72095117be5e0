"""Pictures for a report: for each rule of a selection what it dropped, and what was kept; few, seeded, small."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from curation.table import DERIVED, Table
from schemas.status import SUCCESS
from shards.dataset import Dataset
from shards.images import ImageError, decode_rgb, encode
from shards.reader import group_rows, read_table, row_groups
from shards.scan import rows_at, starts
from shards.transforms import resize

GROUPS = 40  # most row groups that are opened for their images
SIDE = 144  # longer side of a thumbnail, px
QUALITY = 72
MAX_CAPTION = 300


@dataclass(frozen=True)
class Pick:
    """A row to show: where it lies, in which box of the page, and its value of the box's threshold column."""

    box: str
    index: int
    value: float | None = None


def candidates(dataset: Dataset, seed: int) -> np.ndarray:
    """Numbers of the rows in at most 40 row groups of pairs, chosen by seed, ascending."""
    rng = np.random.default_rng(seed)
    pairs, begin = dataset.stage("pairs"), starts(dataset)
    shards = rng.permutation(dataset.num_shards)[:GROUPS]
    found = []
    for shard in shards.tolist():
        first = begin[shard]
        for rows in group_rows(pairs.folder, pairs.file(shard)):
            found.append((int(first), rows))
            first += rows
    chosen = sorted(found[i] for i in rng.permutation(len(found))[:GROUPS])
    parts = [np.arange(first, first + rows) for first, rows in chosen]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def choose(table: Table, about: dict[str, Any], rows: np.ndarray, seed: int, each: int) -> list[Pick]:
    """Rows of one selection to show: the best, the worst and any of the kept; of each rule's dropped those nearest to
    its threshold, then any.

    rows  candidates (numbers in the dataset, ascending)
    each  pictures in a box
    """
    name, dataset = about["name"], table.dataset
    reason = read_table(dataset.folder, f"selections/{name}.parquet", ["reason"])["reason"].take(rows).to_pylist()
    status = rows_at(table.pairs, rows, ["status"])["status"]
    frame = pl.DataFrame({"index": rows, "reason": reason, "ok": status == SUCCESS}).filter("ok")
    rng = np.random.default_rng(seed)
    frame = frame.with_columns(order=rng.permutation(frame.height))
    lead = next((t for t in about["thresholds"] if t["column"] in table.columns), None)
    picks = _kept(table, frame.filter(pl.col("reason").is_null()), lead, each)
    for step in about["funnel"]:
        rule = step["rule"]
        threshold = next((t for t in about["thresholds"] if t["rule"] == rule and t["column"] in table.columns), None)
        dropped = frame.filter(pl.col("reason").is_in([rule, f"{rule}:null"]))
        picks += _dropped(table, dropped, rule, threshold, each)
    return picks


def _values(table: Table, column: str, index: pl.Series) -> pl.Series:
    """The column's numbers at a few rows, NaN as null."""
    group = table.set_of(column)
    stage = table.pairs if group is None else table.score_sets[group]
    short = column if group is None else column.rpartition(".")[2]
    return rows_at(stage, index.to_numpy(), [short])[short].cast(pl.Float64).fill_nan(None)


def _readable(table: Table, column: str) -> bool:
    """Whether the column lies in files (a derived one does not)."""
    return table.set_of(column) is not None or column not in DERIVED


def _kept(table: Table, frame: pl.DataFrame, lead: dict[str, Any] | None, each: int) -> list[Pick]:
    if lead is None or not _readable(table, lead["column"]):
        return [Pick("kept", i) for i in frame.sort("order")["index"].head(each)]
    frame = frame.sort("index")
    frame = frame.with_columns(value=_values(table, lead["column"], frame["index"]))
    upward = lead["op"][0] == ">"
    ranked = frame.sort("value", "order", descending=[upward, False], nulls_last=True)
    best, rest = ranked.head(each), ranked.slice(each)
    worst = rest.tail(each).reverse()
    others = rest.head(max(0, rest.height - each)).sort("order").head(each)
    boxes = ((f"kept: best {lead['column']}", best), ("kept: nearest to the threshold", worst), ("kept: any", others))
    return [Pick(box, i, v) for box, part in boxes for i, v in part.select("index", "value").iter_rows()]


def _dropped(table: Table, frame: pl.DataFrame, rule: str, threshold: dict[str, Any] | None, each: int) -> list[Pick]:
    if threshold is None or not _readable(table, threshold["column"]):
        return [Pick(rule, i) for i in frame.sort("order")["index"].head(each)]
    frame = frame.sort("index")
    frame = frame.with_columns(value=_values(table, threshold["column"], frame["index"]))
    near = frame.with_columns(gap=(pl.col("value") - threshold["value"]).abs()).sort("gap", "order", nulls_last=True)
    half = near.head(-(-each // 2))
    rest = near.slice(half.height).sort("order").head(each - half.height)
    return [Pick(rule, i, v) for i, v in pl.concat([half, rest]).select("index", "value").iter_rows()]


def load(dataset: Dataset, index: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What is shown of each row: shard, row, caption, and `data`, a JPEG as base64, None where it does not decode."""
    begin = starts(dataset)
    pairs = dataset.stage("pairs")
    wanted = np.unique(np.array(list(index), np.int64))
    shard_of = np.searchsorted(begin, wanted, side="right") - 1
    out: dict[int, dict[str, Any]] = {}
    for shard in np.unique(shard_of).tolist():
        rows = (wanted[shard_of == shard] - begin[shard]).tolist()
        for first, row, image, caption in _read(pairs.folder, pairs.file(shard), rows):
            text = (caption or "")[:MAX_CAPTION]
            out[int(begin[shard]) + first + row] = {
                "shard": shard,
                "row": first + row,
                "caption": text,
                "data": thumbnail(image) if image else None,
            }
    return out


def _read(folder: Any, name: str, rows: Sequence[int]) -> Any:
    """(first row of the group, row in it, image, caption) of the rows, one row group in memory at a time."""
    ends = np.cumsum(group_rows(folder, name))
    groups = np.unique(np.searchsorted(ends, np.array(rows), side="right")).tolist()
    for first, table in row_groups(folder, name, ["image", "caption"], groups):
        for row in (r - first for r in rows if first <= r < first + len(table)):
            yield first, row, table["image"][row].as_py(), table["caption"][row].as_py()


def thumbnail(data: bytes) -> str | None:
    """The image at most 144 px, JPEG, base64; None where it does not decode."""
    try:
        rgb = decode_rgb(data, shrink_to=(SIDE, SIDE))
    except ImageError:
        return None
    height, width = rgb.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    small = resize(rgb, max(1, round(width * scale)), max(1, round(height * scale)))
    return base64.b64encode(encode(small, "jpeg", QUALITY)).decode()
