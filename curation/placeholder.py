"""`placeholder`: drops an image that stands under many addresses with unrelated captions, such as "image removed"."""

from __future__ import annotations

import numpy as np
import polars as pl

from curation.duplicate_config import PlaceholderConfig
from curation.groups import equal_groups, hash_column, key_exprs, normalised
from curation.matches import choose
from curation.rules import Match, Rule
from shards.scan import rows_at

_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)"
_WORD = r"[\p{L}\p{M}\p{N}]{4,}"


class Placeholder(Rule[PlaceholderConfig]):
    """Drops every row of such an image. A row whose image has no hash stays."""

    kind, config_class, shorthand = "placeholder", PlaceholderConfig, "by"

    def prepare(self) -> None:
        self.by = hash_column(self.table, self.config.by)
        self.keys = key_exprs(self.table, [self.by], "placeholder")
        self.columns = frozenset({self.by, "url", "caption"})

    @property
    def label(self) -> str:
        return self.config.name or f"placeholder {self.by}"

    def inputs(self) -> dict[str, pl.Expr]:
        return self.keys

    def mark(self, values: pl.DataFrame, seen: pl.Series, successes: pl.Series) -> pl.Series:
        part = seen & values["key0"].is_not_null()
        rows = np.flatnonzero(part.to_numpy())
        places, group = equal_groups([values[k].filter(part).to_numpy() for k in ("key0", "key1")])
        sizes = np.bincount(group, minlength=1)
        # Fewer rows than addresses cannot be enough: only these rows' texts are read.
        many = sizes[group] >= min(n for n in (self.config.urls, self.config.hosts) if n is not None)
        rows, group = rows[places[many]], group[many]
        verdict: np.ndarray = np.ones(len(seen), bool)
        if len(rows):
            found = rows_at(self.table.pairs, rows, ["url", "caption"])
            bad = np.isin(group, self._placeholders(found.with_columns(group=pl.Series(group))))
            verdict[rows[bad]] = False
            self.matches = _matches(rows[bad], group[bad])
        return pl.Series(verdict)

    def _placeholders(self, frame: pl.DataFrame) -> np.ndarray:
        """Groups of `frame` (url, caption, group) that are placeholders, int64."""
        config = self.config
        host = pl.col("url").str.extract(_HOST, 1).str.to_lowercase()
        texts = frame.with_columns(host=host, text=normalised(pl.col("caption")))
        counts = texts.group_by("group").agg(
            urls=pl.col("url").drop_nulls().n_unique(),
            hosts=pl.col("host").drop_nulls().n_unique(),
            texts=pl.col("text").drop_nulls().n_unique(),
            captioned=pl.col("text").count(),
        )
        enough = pl.lit(False)
        for column, least in (("urls", config.urls), ("hosts", config.hosts)):
            if least is not None:
                enough |= pl.col(column) >= least
        differ = (pl.col("texts") > 1) & (pl.col("texts") >= config.captions * pl.col("captioned"))
        wide = counts.filter(enough & differ).select("group", "texts")
        words = (
            texts.select("group", "text")
            .drop_nulls()
            .join(wide, on="group", how="semi")
            .unique()
            .select("group", word=pl.col("text").str.extract_all(_WORD).list.unique())
            .explode("word")
            .drop_nulls()
        )
        common = words.group_by("group", "word").len().group_by("group").agg(pl.col("len").max())
        shared = wide.join(common, on="group", how="left").with_columns(pl.col("len").fill_null(0))
        return shared.filter(pl.col("len") <= config.word * pl.col("texts"))["group"].sort().to_numpy()


def _matches(rows: np.ndarray, group: np.ndarray) -> tuple[Match, ...]:
    """A few dropped rows, the largest groups among them; no row stays in their place."""
    sizes = np.bincount(group, minlength=1)
    return tuple(Match(int(rows[i]), group=int(sizes[group[i]])) for i in choose(group))
