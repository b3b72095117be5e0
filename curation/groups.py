"""What the rules on equal and nearly equal rows share: keys to compare, the row that stays, hashes, captions."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import polars as pl

from curation.matches import choose
from curation.rules import Match
from curation.table import Table
from schemas.errors import PairmillError
from shards.scan import rows_at

PIXELS = "pixel_sha256"
_HASHES = frozenset({"phash", "dhash", PIXELS})


def hash_column(table: Table, name: str) -> str:
    """The full name of a column; `pixels` is the hash of the pixels.

    Raises PairmillError as `Table.resolve`, and says how hashes are made where they are missing.
    """
    wanted = PIXELS if name == "pixels" and "pixels" not in table.columns else name
    short = wanted.rpartition(".")[2]
    if short in _HASHES and not any(full.rpartition(".")[2] == short for full in table.columns):
        url = table.dataset.url
        raise PairmillError(f"{url} has no hashes `{name}` yet. Make them: pairmill score hash {url}")
    return table.resolve(wanted)


def hash_values(table: Table, name: str, rule: str) -> tuple[str, pl.Expr]:
    """The full name of a column of 64-bit hashes, and its values as UInt64. Raises PairmillError for another type."""
    full = hash_column(table, name)
    kind = table.columns[full]
    if kind not in (pl.UInt64, pl.Int64):
        raise PairmillError(f"{rule} cannot compare the bits of `{full}`, which is {kind}: give a column of 64 bits.")
    column = pl.col(full)
    return full, column if kind == pl.UInt64 else column.reinterpret(signed=False)


def key_exprs(table: Table, names: Sequence[str], rule: str) -> dict[str, pl.Expr]:
    """Two UInt64 columns, `key0` and `key1`, that are equal where the columns are; null where one of them is null.

    They are 128 bits of a hash with a seed of its own in every run, so that nobody can make values that collide.
    Raises PairmillError for a column that cannot be told equal.
    """
    for full in names:
        kind = table.columns[full]
        if not (kind.is_integer() or kind in (pl.String, pl.Binary, pl.Boolean)):
            raise PairmillError(
                f"{rule} cannot go by `{full}`, which is {kind}: give a column of text, bytes or whole numbers."
            )
    value = pl.col(names[0]) if len(names) == 1 else pl.struct(*names)
    known = pl.all_horizontal(pl.col(n).is_not_null() for n in names)
    return {f"key{i}": pl.when(known).then(value.hash(secrets.randbits(63))) for i in range(2)}


def equal_groups(keys: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose keys another row has, too.

    keys  two arrays uint64 [n]
    ->    int64 [k] places, ascending; int64 [k] group of each, numbered from 0
    """
    ranked = np.sort(keys[0])
    twins = ranked[1:][ranked[1:] == ranked[:-1]]
    del ranked
    if not len(twins):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(twins, keys[0]), len(twins) - 1)
    places = np.flatnonzero(twins[at] == keys[0])
    frame = pl.DataFrame({"a": keys[0][places], "b": keys[1][places]})
    group: np.ndarray = frame.select(pl.struct("a", "b").rank("dense")).to_series().to_numpy().astype(np.int64) - 1
    several = np.bincount(group)[group] > 1
    return places[several], np.unique(group[several], return_inverse=True)[1].astype(np.int64)


def rich(hashes: np.ndarray, flat: int) -> np.ndarray:
    """bool [n]: hashes (uint64) with more than `flat` bits set, and more than `flat` not set."""
    ones = np.bitwise_count(hashes)
    return (ones > flat) & (ones < 64 - flat)


def stays(table: Table, rows: np.ndarray, group: np.ndarray, keep: pl.Series | None) -> np.ndarray:
    """The row that stays of each row's group: int64 [n].

    rows   int64 [n], ascending numbers in the dataset
    group  int64 [n]
    keep   numbers [n], the highest stays, null is below all; None: all are equal

    Ties: the smallest uid, then the smallest number.
    """
    frame = pl.DataFrame({"row": rows, "group": group})
    tied = frame
    if keep is not None:
        ranked = frame.with_columns(keep=keep)
        tied = ranked.filter(pl.col("keep").eq_missing(pl.col("keep").max().over("group"))).drop("keep")
    several = tied.filter(pl.len().over("group") > 1)
    uids = rows_at(table.pairs, several["row"].to_numpy(), ["uid"])["uid"].cast(pl.Binary)
    first = (
        several.with_columns(uid=uids).sort("group", "uid", "row").unique("group", keep="first", maintain_order=True)
    )
    alone = tied.filter(pl.len().over("group") == 1)
    best = pl.concat([first.select("group", stays="row"), alone.select("group", stays="row")])
    return frame.join(best, on="group", how="left", maintain_order="left")["stays"].to_numpy()


def duplicates(
    table: Table, rows: np.ndarray, group: np.ndarray, keep: pl.Series | None, hashes: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[Match, ...]]:
    """Which rows go, and a few of them beside what stays.

    rows int64 [n] ascending, group int64 [n]; hashes uint64 [n]: the matches tell how many bits differ
    """
    if not len(rows):
        return rows, ()
    stay = stays(table, rows, group, keep)
    gone = np.flatnonzero(stay != rows)
    sizes = np.bincount(group)
    found = []
    for i in gone[choose(stay[gone])].tolist():
        apart = None
        if hashes is not None:
            other = hashes[np.searchsorted(rows, stay[i])]
            apart = float(np.bitwise_count(hashes[i] ^ other))
        found.append(Match(int(rows[i]), like=int(stay[i]), value=apart, group=int(sizes[group[i]])))
    return rows[gone], tuple(found)


def normalised(caption: pl.Expr) -> pl.Expr:
    """Captions as they are compared: NFKC, lower case, all but letters, marks and digits is one space, none at the
    ends; null where nothing is left.
    """
    text = caption.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ")
    text = text.str.strip_chars(" ")
    return pl.when(text != "").then(text)
