"""`decontaminate`: drops rows that are in another dataset, too, such as the images a model will be tested on."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from curation.duplicate_config import DecontaminateConfig
from curation.embeddings import Embeddings
from curation.groups import hash_values, normalised, rich
from curation.hamming import nearest
from curation.kmeans import unit
from curation.matches import choose
from curation.rules import Match, Rule
from curation.table import Table
from curation.thumbnails import load
from schemas.config import fingerprint
from schemas.errors import PairmillError
from schemas.status import SUCCESS
from shards.dataset import MANIFEST, Dataset
from shards.files import open_folder
from shards.scan import rows_at, starts

BLOCK = 4096  # rows compared at once with as many


@dataclass
class Hits:
    """Rows that are in the other dataset: which of its rows, and how like. Parallel lists of arrays."""

    rows: list[np.ndarray]
    targets: list[np.ndarray]
    values: list[np.ndarray]

    def add(self, rows: np.ndarray, targets: np.ndarray, values: np.ndarray) -> None:
        self.rows.append(rows)
        self.targets.append(targets)
        self.values.append(values.astype(np.float64))


class Decontaminate(Rule[DecontaminateConfig]):
    """Drops rows whose image hash, image embedding or caption is that of a row of another dataset.

    Null, and so dropped as `RULE:null`: an image that has no hash or no embedding. A row without an image has none to
    be compared.
    """

    kind, config_class, shorthand = "decontaminate", DecontaminateConfig, "against"

    def prepare(self) -> None:
        config, table = self.config, self.table
        self.other = Other(open_other(config.against, table.dataset))
        self.other.check(config.fingerprint)
        self.columns = frozenset({"status", "caption", "captions"})
        if config.near is not None:
            full, self.hash = hash_values(table, config.near, "decontaminate")
            self.other.check_hashes(config.near, table, full)
            self.columns |= {full}
        if config.embeddings is not None:
            self.embeddings = Embeddings(table.dataset, config.embeddings)
            self.other_embeddings = Embeddings(self.other.dataset, config.embeddings, like=self.embeddings)
            self.features = frozenset({config.embeddings})

    @property
    def label(self) -> str:
        return self.config.name or f"decontaminate {self.other.name}"

    def recorded(self) -> dict[str, object]:
        """The other dataset by name and fingerprint: a path means nothing where the dataset is moved to."""
        return super().recorded() | {"against": self.other.name, "fingerprint": self.other.fingerprint}

    def inputs(self) -> dict[str, pl.Expr]:
        made = {"image": pl.col("status") == SUCCESS}
        if self.config.near is not None:
            made["hash"] = self.hash
        if self.config.captions:
            known = self.other.captions["caption"].unique()
            one = normalised(pl.col("caption")).is_in(known.implode())
            every = pl.col("captions").list.eval(normalised(pl.element()).is_in(known.implode())).list.any()
            made["caption"] = one.fill_null(False) | every.fill_null(False)
        return made

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        bad: np.ndarray = np.zeros(len(seen), bool)
        unknown: np.ndarray = np.zeros(len(seen), bool)
        hits = Hits([], [], [])
        image = (seen & values["image"]).to_numpy()
        if self.config.near is not None:
            has = values["hash"].is_not_null().to_numpy()
            unknown |= image & ~has
            self._by_hash(values["hash"], np.flatnonzero(image & has), hits)
            _mark(bad, hits)
        if self.config.embeddings is not None:
            rows = np.flatnonzero(image & ~bad)
            has = self.embeddings.present(rows)
            unknown[rows[~has]] = True
            self._by_embedding(rows[has], hits)
            _mark(bad, hits)
        if self.config.captions:
            rows = np.flatnonzero((seen & values["caption"]).to_numpy() & ~bad)
            hits.add(rows, np.full(len(rows), -1), np.full(len(rows), np.nan))  # which one, only of those shown
            _mark(bad, hits)
        self.matches = self._show(hits)
        told = pl.Series(bad | ~unknown)
        return pl.select(pl.when(told).then(pl.Series(~bad))).to_series()

    def _by_hash(self, hashes: pl.Series, rows: np.ndarray, hits: Hits) -> None:
        numbers, theirs = self.other.hashes(self.config.near or "")
        some = rich(theirs, self.config.flat)
        numbers, theirs = numbers[some], theirs[some]
        ours = hashes.gather(rows).to_numpy()
        some = rich(ours, self.config.flat)
        rows, ours = rows[some], ours[some]
        index, apart = nearest(ours, theirs, self.config.bits)
        near = index >= 0
        hits.add(rows[near], numbers[index[near]], apart[near])

    def _by_embedding(self, rows: np.ndarray, hits: Hits) -> None:
        """One block of rows at a time beside one block of the other dataset's, products in fp32."""
        theirs = np.arange(len(self.other.dataset))
        theirs = theirs[self.other_embeddings.present(theirs)]
        targets = unit(self.other_embeddings.read(theirs))
        for start in range(0, len(rows) if len(theirs) else 0, BLOCK):
            mine = rows[start : start + BLOCK]
            ours = unit(self.embeddings.read(mine))
            best: np.ndarray = np.full(len(mine), -np.inf, np.float32)
            which: np.ndarray = np.zeros(len(mine), np.int64)
            for begin in range(0, len(theirs), BLOCK):
                top, at = (ours @ targets[begin : begin + BLOCK].T).max(1)
                better = top.numpy() > best
                best[better], which[better] = top.numpy()[better], begin + at.numpy()[better]
            near = best >= self.config.cosine
            hits.add(mine[near], theirs[which[near]], best[near])

    def _show(self, hits: Hits) -> tuple[Match, ...]:
        rows, targets, values = (np.concatenate([np.empty(0, np.int64), *part]) for part in _parts(hits))
        targets = targets.astype(np.int64)
        # A caption has no row of the other dataset yet: each is a group of its own.
        chosen = choose(np.where(targets >= 0, targets, -1 - rows.astype(np.int64)))
        chosen = chosen[np.argsort(rows[chosen], kind="stable")]
        picked = rows[chosen].astype(np.int64)
        like = targets[chosen]
        by_caption = like < 0
        like[by_caption] = self._same_caption(picked[by_caption])
        pictures = load(self.other.dataset, like.tolist())
        begin = starts(self.other.dataset)
        out = []
        for row, other, value in zip(picked.tolist(), like.tolist(), values[chosen].tolist(), strict=True):
            shard = int(np.searchsorted(begin, other, side="right")) - 1
            data = pictures[other]["data"]
            out.append(
                Match(
                    row,
                    value=None if np.isnan(value) else value,
                    other=f"{self.other.name} {shard}:{other - begin[shard]}",
                    image=base64.b64decode(data) if data else None,
                    caption=pictures[other]["caption"],
                )
            )
        return tuple(out)

    def _same_caption(self, rows: np.ndarray) -> np.ndarray:
        """For each row, a row of the other dataset that has one of its captions."""
        if not len(rows):
            return rows
        found = rows_at(self.table.pairs, rows, ["caption", "captions"])
        mine = _captions(found.with_row_index("at"), "at")
        first = self.other.captions.unique("caption", keep="first", maintain_order=True)
        joined = mine.join(first, on="caption", how="inner").group_by("at").agg(pl.col("row").min()).sort("at")
        return joined["row"].to_numpy()


class Other:
    """The dataset that is compared with, as far as it is needed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.table = dataset, Table(dataset)
        missing = self.table.pairs.pending()
        if missing:
            raise PairmillError(
                f"{dataset.url} has pairs for {dataset.num_shards - len(missing)} of {dataset.num_shards} shards. "
                "Finish its download or import first: what is not there cannot be compared."
            )

    @property
    def name(self) -> str:
        return self.dataset.url.rstrip("/").rpartition("/")[2]

    @cached_property
    def fingerprint(self) -> str:
        """Of its pairs: 32 hex digits."""
        return fingerprint({"pairs": self.table.pairs.digests(range(self.dataset.num_shards))})

    def check(self, expected: str | None) -> None:
        """Raises PairmillError where it is not the dataset that a recipe was made with."""
        if expected is not None and expected != self.fingerprint:
            raise PairmillError(
                f"{self.dataset.url} is not the dataset this recipe was made with: its fingerprint is "
                f"{self.fingerprint}, the recipe has {expected}. Give that one, or leave `fingerprint` out."
            )

    def check_hashes(self, near: str, table: Table, full: str) -> None:
        """Raises PairmillError: no such hashes here, unfinished ones, or ones made in another way than `table`'s."""
        mine, _ = hash_values(self.table, near, "decontaminate")
        here, there = (t.set_of(name) for t, name in ((self.table, mine), (table, full)))
        if here is None or there is None:
            return
        stage, other = self.table.score_sets[here], table.score_sets[there]
        command = f"pairmill {_scorer(other.sidecar())} {self.dataset.url}"
        if stage.pending():
            raise PairmillError(f"{self.dataset.url}/{stage.path} is not finished. Run `{command} --name {here}`.")
        a, b = stage.sidecar(), other.sidecar()
        if a is not None and b is not None and a.fingerprint != b.fingerprint:
            raise PairmillError(
                f"{self.dataset.url}/{stage.path} and {table.dataset.url}/{other.path} were made with other settings "
                f"and cannot be compared. Make them alike: {command} --name OTHER, and `near: OTHER.{_short(mine)}`"
            )

    def hashes(self, near: str) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers int64 [m], hashes uint64 [m]) of its rows that have one."""
        full, values = hash_values(self.table, near, "decontaminate")
        column = self.table.frame([full]).select(values.alias("hash")).collect(engine="streaming")["hash"]
        return np.flatnonzero(column.is_not_null().to_numpy()), column.drop_nulls().to_numpy()

    @cached_property
    def captions(self) -> pl.DataFrame:
        """`row` (ascending) and `caption`, as compared and not null, for every caption of a row."""
        frame = self.table.frame(["caption", "captions"]).collect(engine="streaming").with_row_index("row")
        return _captions(frame, "row")


def _captions(frame: pl.DataFrame, index: str) -> pl.DataFrame:
    """`index` (int64) and `caption`, as compared, of `caption` and every one of `captions`."""
    every = pl.concat_list(pl.col("caption"), pl.col("captions").fill_null(pl.lit([], pl.List(pl.String))))
    long = frame.select(pl.col(index).cast(pl.Int64), caption=every).explode("caption")
    return long.select(index, normalised(pl.col("caption"))).drop_nulls().sort(index, maintain_order=True)


def open_other(text: str, dataset: Dataset) -> Dataset:
    """The dataset at `text`, or the one of that name beside `dataset`.

    Raises PairmillError: none there; it is `dataset` itself.
    """
    beside = f"{dataset.url.rstrip('/').rpartition('/')[0]}/{text}"
    plain = "/" not in text and not open_folder(text).exists(MANIFEST) and open_folder(beside).exists(MANIFEST)
    other = Dataset.open(beside if plain else text)
    if other.url == dataset.url:
        raise PairmillError(
            f"{other.url} against itself says nothing: give another dataset, such as the one tested on."
        )
    return other


def _scorer(sidecar: object) -> str:
    return str(getattr(sidecar, "stage", "score hash"))


def _short(full: str) -> str:
    return full.rpartition(".")[2]


def _parts(hits: Hits) -> Sequence[list[np.ndarray]]:
    return hits.rows, hits.targets, hits.values


def _mark(bad: np.ndarray, hits: Hits) -> None:
    for rows in hits.rows:
        bad[rows] = True
