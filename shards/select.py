"""Selections: which rows are kept and why the others are not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.errors import PairmillError, suggest
from schemas.tables import VERSIONS, check_schema, table_schema
from shards.dataset import PAIRS, Dataset
from shards.reader import open_parquet, parquet_footer
from shards.writer import write_table

NAME = "selection"
VERSION = VERSIONS[NAME]
_RECIPE = b"pairmill.recipe"
SCHEMA_FIELDS = (
    pa.field("shard", pa.int32(), nullable=False),
    pa.field("row", pa.int32(), nullable=False),
    pa.field("keep", pa.bool_(), nullable=False),
    pa.field("reason", pa.dictionary(pa.int16(), pa.string())),
)


@dataclass(frozen=True)
class Selection:
    """One byte a row in memory: `keep[starts[s] + r]` for row r of shard s."""

    name: str
    keep: np.ndarray
    starts: np.ndarray
    about: dict[str, Any]

    def mask(self, shard: int) -> np.ndarray:
        """Which rows of the shard are kept: bool [rows]."""
        return self.keep[self.starts[shard] : self.starts[shard + 1]]

    def __len__(self) -> int:
        return int(self.keep.sum())


def made_from(dataset: Dataset, score_sets: list[str]) -> dict[str, Any]:
    """What a selection was made from: pairs digests by shard, and the fingerprint of each score set it read."""
    pairs = dataset.stage(PAIRS)
    scores = {name: dataset.require(f"scores/{name}") for name in sorted(score_sets)}
    fingerprints = {n: s.sidecar().fingerprint for n, s in scores.items()}  # type: ignore[union-attr]
    return {"digests": pairs.digests(range(dataset.num_shards)), "scores": fingerprints}


def feature_fingerprints(dataset: Dataset, names: Iterable[str]) -> dict[str, str]:
    """Fingerprint of each feature set, for `made_from` of a selection whose rules read it."""
    return {n: dataset.require(f"features/{n}").sidecar().fingerprint for n in sorted(names)}  # type: ignore[union-attr]


def write_selection(
    dataset: Dataset,
    name: str,
    keep: np.ndarray,
    reasons: pa.Array,
    recipe: Mapping[str, Any],
    source: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
) -> None:
    """Writes `selections/NAME.parquet`, then `NAME.json`, a copy of its metadata for people.

    `reasons` is null where a row is kept. `source` comes from `made_from`; `results` (the funnel, ...) is kept beside
    the recipe.
    """
    sizes = np.array(dataset.manifest.shards)
    shard: np.ndarray = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    row = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]) if len(sizes) else np.empty(0, np.int32)
    about: dict[str, Any] = {
        "recipe": dict(recipe),
        "made_from": dict(source),
        "rows": len(keep),
        "kept": int(keep.sum()),
        **(results or {}),
    }
    schema = table_schema(NAME, VERSION, SCHEMA_FIELDS, {_RECIPE: json.dumps(about).encode()})
    columns = [pa.array(shard), pa.array(row), pa.array(keep), reasons.cast(SCHEMA_FIELDS[3].type)]
    counts = Counter({"kept": about["kept"], "dropped": len(keep) - about["kept"]})
    write_table(dataset.folder, f"selections/{name}.parquet", pa.Table.from_arrays(columns, schema=schema), counts)
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    dataset.folder.write_bytes(f"selections/{name}.json", text.encode())


def selections(dataset: Dataset) -> list[str]:
    """Names of the selections that stand."""
    return [n.removesuffix(".parquet") for n in dataset.folder.names("selections") if n.endswith(".parquet")]


def selection_about(dataset: Dataset, name: str) -> dict[str, Any]:
    """Its recipe, funnel and what it was made from. Raises PairmillError where there is none of that name."""
    if name not in selections(dataset):
        have = selections(dataset)
        raise PairmillError(
            f"{dataset.url} has no selection `{name}`.{suggest(name, have)} It has: {', '.join(have) or 'none yet'}. "
            "Make one with `pairmill filter`."
        )
    return json.loads(parquet_footer(dataset.folder, f"selections/{name}.parquet")[_RECIPE])


def read_selection(dataset: Dataset, name: str) -> Selection:
    """The selection, checked against the dataset as it stands.

    Raises PairmillError: no such selection; made for fewer shards; its pairs or scores changed since.
    """
    about = selection_about(dataset, name)
    _check_fresh(dataset, name, about["made_from"])
    file = f"selections/{name}.parquet"
    with open_parquet(dataset.folder, file) as parquet:
        check_schema(parquet.schema_arrow, NAME, VERSION, f"{dataset.url}/{file}")
        keep = parquet.read(columns=["keep"])["keep"].to_numpy()
    starts = np.concatenate([[0], np.cumsum(dataset.manifest.shards)]).astype(np.int64)
    return Selection(name, keep, starts, about)


def _check_fresh(dataset: Dataset, name: str, source: Mapping[str, Any]) -> None:
    again = f"Run the `pairmill filter` command for `{name}` again."
    made, now = len(source["digests"]), dataset.num_shards
    if made != now:
        raise PairmillError(f"Selection `{name}` was made for {made} shards, {dataset.url} has {now} now. {again}")
    pairs = dataset.stage(PAIRS)
    changed = [s for s, digest in enumerate(source["digests"]) if pairs.digest(s) != digest]
    if changed:
        raise PairmillError(
            f"Selection `{name}` was made before the pairs of shard {changed[0]} changed (retry or remove). {again}"
        )
    for kind in ("scores", "features"):
        for one, fingerprint in source.get(kind, {}).items():
            sidecar = dataset.stage(f"{kind}/{one}").sidecar()
            if sidecar is None or sidecar.fingerprint != fingerprint:
                raise PairmillError(f"Selection `{name}` was made from other {kind}/{one} than stand now. {again}")
