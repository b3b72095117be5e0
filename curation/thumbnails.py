"""Pictures for a report: for each rule of a selection what it dropped, and what was kept; few, seeded, small."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from curation.table import DERIVED, Table
from schemas.status import SUCCESS
from shards.dataset import PAIRS, Dataset
from shards.images import ImageError, decode_rgb, encode
from shards.reader import group_rows, read_table, row_groups
from shards.scan import rows_at, starts
from shards.transforms import resize

GROUPS = 40  # most row groups that are opened for their images
SIDE = 176  # longer side of a thumbnail, px
QUALITY = 74
MAX_BYTES = 12_000  # of a thumbnail: 200 of them in base64 are 3.2 MB
MAX_CAPTION = 300
_NULL = ":null"  # ends the reason of a row that a rule dropped for a missing value


@dataclass(frozen=True)
class Pick:
    """A row to show.

    box    `kept`, `dropped` or `rows`; or the rule that it is shown for
    kind   of a rule with a threshold, from best to worst: `best` kept, `kept` nearest to it, `nearest` dropped, the
           `farthest` dropped, or `null`, dropped for a missing value; everywhere else `any`
    value  of the column that the rule looks at
    tag    the rule that dropped it
    """

    box: str
    kind: str
    index: int
    value: float | None = None
    tag: str | None = None


def candidates(dataset: Dataset, seed: int, most: int = GROUPS) -> np.ndarray:
    """Numbers of the rows in at most `most` row groups of pairs, chosen by seed, ascending."""
    rng = np.random.default_rng(seed)
    pairs, begin = dataset.stage(PAIRS), starts(dataset)
    shards = rng.permutation(dataset.num_shards)[:GROUPS]
    found = []
    for shard in shards.tolist():
        first = begin[shard]
        for rows in group_rows(pairs.folder, pairs.file(shard)):
            found.append((int(first), rows))
            first += rows
    chosen = sorted(found[i] for i in rng.permutation(len(found))[:most])
    parts = [np.arange(first, first + rows) for first, rows in chosen]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def groups_of(dataset: Dataset, index: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """(shard, row group) -> the rows of `index` (numbers in the dataset) that lie in it."""
    begin, pairs = starts(dataset), dataset.stage(PAIRS)
    ends: dict[int, np.ndarray] = {}
    out: dict[tuple[int, int], list[int]] = {}
    for number in index:
        shard = int(np.searchsorted(begin, number, side="right")) - 1
        if shard not in ends:
            ends[shard] = np.cumsum(group_rows(pairs.folder, pairs.file(shard)))
        group = int(np.searchsorted(ends[shard], number - begin[shard], side="right"))
        out.setdefault((shard, group), []).append(number)
    return out


def sample(table: Table, rows: np.ndarray, seed: int, count: int) -> list[Pick]:
    """Any successes among `rows`, for a dataset of which nothing was selected yet."""
    frame = _there(table, rows, seed)
    return [Pick("rows", "any", i) for i in frame.sort("order")["index"].head(count)]


def kinds(table: Table, about: Mapping[str, Any]) -> int:
    """How many kinds of pictures `choose` finds for a selection's rules at most."""
    return sum(4 if _threshold(table, about, s["rule"]) else 1 for s in about["funnel"] if s["dropped"])


def choose(table: Table, about: Mapping[str, Any], rows: np.ndarray, seed: int, each: int, any_: int) -> list[Pick]:
    """Rows of one selection to show: any kept and any dropped ones; then for each rule those at its threshold on
    either side, the best and the worst, or any it dropped where it has none.

    rows  candidates (numbers in the dataset, ascending)
    each  pictures of a kind; `any_` of the kept and of the dropped
    """
    name, dataset = about["name"], table.dataset
    reason = read_table(dataset.folder, f"selections/{name}.parquet", ["reason"])["reason"].take(rows).to_pylist()
    frame = _there(table, rows, seed, reason).sort("order")
    kept, dropped = frame.filter(pl.col("reason").is_null()), frame.filter(pl.col("reason").is_not_null())
    picks = [Pick("kept", "any", i) for i in kept["index"].head(any_)]
    some = dropped.head(any_).select("index", "reason")
    picks += [Pick("dropped", "any", i, tag=r.removesuffix(_NULL)) for i, r in some.iter_rows()]
    for step in about["funnel"] if each else ():
        rule = step["rule"]
        mine = dropped.filter(pl.col("reason").is_in([rule, f"{rule}{_NULL}"]))
        if mine.height:
            picks += _of_rule(table, mine, kept, _threshold(table, about, rule), rule, each)
    return picks


def _there(table: Table, rows: np.ndarray, seed: int, reason: list[str | None] | None = None) -> pl.DataFrame:
    """The successes among the rows: `index`, `reason` and a seeded `order`."""
    status = rows_at(table.pairs, rows, ["status"])["status"]
    reasons = pl.Series(reason or [None] * len(rows), dtype=pl.String)
    frame = pl.DataFrame({"index": rows, "reason": reasons, "ok": status == SUCCESS}).filter("ok")
    return frame.with_columns(order=np.random.default_rng(seed).permutation(frame.height))


def _threshold(table: Table, about: Mapping[str, Any], rule: str) -> dict[str, Any] | None:
    return next((t for t in about["thresholds"] if t["rule"] == rule and _readable(table, t["column"])), None)


def _values(table: Table, column: str, index: pl.Series) -> pl.Series:
    """The column's numbers at a few rows, NaN as null."""
    group = table.set_of(column)
    stage = table.pairs if group is None else table.score_sets[group]
    if group is None and column in DERIVED:
        caption = rows_at(stage, index.to_numpy(), ["caption"])
        return caption.select(DERIVED[column][1].cast(pl.Float64)).to_series()
    short = column if group is None else column.rpartition(".")[2]
    return rows_at(stage, index.to_numpy(), [short])[short].cast(pl.Float64).fill_nan(None)


def _readable(table: Table, column: str) -> bool:
    """Whether the column is there and holds numbers."""
    return column in table.columns and table.columns[column].is_numeric()


def _ranked(table: Table, frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """With the column's `value`; rows that have none are left out."""
    frame = frame.sort("index")
    return frame.with_columns(value=_values(table, column, frame["index"])).filter(pl.col("value").is_not_null())


def _of_rule(
    table: Table, dropped: pl.DataFrame, kept: pl.DataFrame, threshold: dict[str, Any] | None, rule: str, each: int
) -> list[Pick]:
    if threshold is None:
        return [Pick(rule, "any", i) for i in dropped["index"].head(each)]
    gap = (pl.col("value") - threshold["value"]).abs()
    above = _ranked(table, kept, threshold["column"]).sort(gap, "order")
    below = _ranked(table, dropped, threshold["column"]).sort(gap, "order")
    parts = {
        "best": above.slice(each).tail(each).reverse(),
        "kept": above.head(each).reverse(),
        "nearest": below.head(each),
        "farthest": below.slice(each).tail(each),
    }
    picks = [Pick(rule, k, i, v) for k, part in parts.items() for i, v in part.select("index", "value").iter_rows()]
    nothing = dropped.filter(~pl.col("index").is_in(below["index"].to_list()))
    return picks + [Pick(rule, "null", i) for i in nothing["index"].head(each - parts["farthest"].height)]


def load(dataset: Dataset, index: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What is shown of each row: shard, row, caption, and `data`, a JPEG as base64, None where it does not decode."""
    begin = starts(dataset)
    wanted = np.unique(np.array(list(index), np.int64))
    shard_of = np.searchsorted(begin, wanted, side="right") - 1
    out: dict[int, dict[str, Any]] = {}
    for shard in np.unique(shard_of).tolist():
        for row, image, caption in stored_rows(dataset, shard, (wanted[shard_of == shard] - begin[shard]).tolist()):
            out[int(begin[shard]) + row] = {
                "shard": shard,
                "row": row,
                "caption": (caption or "")[:MAX_CAPTION],
                "data": thumbnail(image) if image else None,
            }
    return out


def stored_rows(dataset: Dataset, shard: int, rows: Sequence[int]) -> Iterator[tuple[int, Any, str | None]]:
    """(row, image's bytes or None, caption) of rows of a shard, ascending, one row group in memory at a time."""
    pairs = dataset.stage(PAIRS)
    name = pairs.file(shard)
    wanted: np.ndarray = np.unique(np.array(list(rows), np.int64))
    ends = np.cumsum(group_rows(pairs.folder, name))
    groups = np.unique(np.searchsorted(ends, wanted, side="right")).tolist()
    for first, table in row_groups(pairs.folder, name, ["image", "caption"], groups):
        for row in wanted[(wanted >= first) & (wanted < first + len(table))].tolist():
            yield row, table["image"][row - first].as_py(), table["caption"][row - first].as_py()


def thumbnail(data: bytes, side: int = SIDE, most: int = MAX_BYTES) -> str | None:
    """The image at most `side` px, a JPEG of at most about `most` bytes, base64; None where it does not decode."""
    try:
        rgb = decode_rgb(data, shrink_to=(side, side))
    except ImageError:
        return None
    return jpeg(rgb, side, most)


def jpeg(rgb: np.ndarray, side: int, most: int) -> str:
    """uint8 [H, W, 3] as a JPEG of at most `side` px, base64; noise is made smaller until it fits `most` bytes."""
    height, width = rgb.shape[:2]
    while True:
        scale = min(1.0, side / max(height, width))
        small = resize(rgb, max(1, round(width * scale)), max(1, round(height * scale)))
        for quality in (QUALITY, 50):
            made = encode(small, "jpeg", quality)
            if len(made) <= most or side <= 48:
                return base64.b64encode(made).decode()
        side = side * 3 // 4
