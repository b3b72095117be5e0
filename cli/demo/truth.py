"""How well a filter found the planted noise, against what was recorded when it was planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from cli.demo.noise import SHARES
from schemas.status import SUCCESS
from shards.dataset import Dataset

CLEAN = "clean"
DUPLICATES = ("duplicate", "reencoded")
# What a score of image and caption can tell: the caption does not say what is in the image.
ABOUT_CAPTION = ("wrong_caption", "filename", "language")
TITLES = {
    CLEAN: "clean",
    "wrong_caption": "wrong caption",
    "dead_link": "dead link",
    "corrupt": "corrupt file",
    "tiny": "tiny picture",
    "duplicate": "exact duplicate",
    "reencoded": "re-encoded duplicate",
    "filename": "file name as caption",
    "language": "other language",
}
CURVE_POINTS = 41


@dataclass(frozen=True)
class Kind:
    """One kind of planted noise, or the clean pairs: rows planted, failed in the download, dropped by rules, kept."""

    kind: str
    planted: int
    failed: int
    dropped: int
    kept: int

    @property
    def found(self) -> float:
        """Share of the rows that did not stay, 0 to 1."""
        return (self.failed + self.dropped) / self.planted if self.planted else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "title": TITLES[self.kind], "found": self.found}


@dataclass(frozen=True)
class Quality:
    """Precision: of what was thrown away, the share that is noise. Recall: of the noise, the share thrown away."""

    precision: float
    recall: float
    thrown: int
    noise: int


@dataclass(frozen=True)
class CurvePoint:
    """Were every scored pair below `threshold` dropped: precision and recall of its captions' noise, pairs left."""

    threshold: float
    precision: float
    recall: float
    left: int


def read_truth(dataset: Dataset, selection: str, scores: str = "clip") -> pl.DataFrame:
    """One row a pair, in the dataset's order.

    Columns index, shard, row, status, caption, width, truth, truth_detail, truth_of, score (null where there is no
    image), keep and reason (null where it is kept). Of a picture and its copy either may stay: where the rule for
    duplicates dropped the first one, the two have changed places here.
    Raises PairmillError where the selection or the scores are not there.
    """
    from shards.reader import read_table
    from shards.scan import scan
    from shards.select import read_selection

    read_selection(dataset, selection)
    chosen: Any = pl.from_arrow(read_table(dataset.folder, f"selections/{selection}.parquet"))
    pairs = (
        scan(dataset.stage("pairs")).select("status", "caption", "width", "truth", "truth_detail", "truth_of").collect()
    )
    values = scan(dataset.require(f"scores/{scores}")).select(score=pl.col("clip_score").fill_nan(None)).collect()
    columns = [chosen.with_columns(pl.col("reason").cast(pl.String)), pairs, values]
    return _one_of_each(pl.concat(columns, how="horizontal").with_row_index("index"))


def _one_of_each(frame: pl.DataFrame) -> pl.DataFrame:
    keep, reason = frame["keep"].to_list(), frame["reason"].to_list()
    copies = frame.filter(pl.col("truth").is_in(DUPLICATES))
    for copy, first in zip(copies["index"], copies["truth_of"], strict=True):
        if keep[copy] and (reason[first] or "").startswith("dedup"):
            keep[copy], keep[first] = keep[first], keep[copy]
            reason[copy], reason[first] = reason[first], reason[copy]
    return frame.with_columns(keep=pl.Series(keep, dtype=pl.Boolean), reason=pl.Series(reason, dtype=pl.String))


def kinds(frame: pl.DataFrame) -> list[Kind]:
    """What became of each kind that was planted: clean first, then in the order of planting."""
    out = []
    for kind in (CLEAN, *SHARES):
        rows = frame.filter(pl.col("truth") == kind)
        failed = rows.filter(pl.col("status") != SUCCESS).height
        kept = rows.filter("keep").height
        if rows.height:
            out.append(Kind(kind, rows.height, failed, rows.height - failed - kept, kept))
    return out


def quality(found: Sequence[Kind], without: Sequence[str] = ()) -> Quality:
    """Precision and recall over all kinds but those in `without`, whose rows count neither way."""
    taken = [k for k in found if k.kind not in without]
    thrown = sum(k.failed + k.dropped for k in taken)
    hit = sum(k.failed + k.dropped for k in taken if k.kind != CLEAN)
    noise = sum(k.planted for k in taken if k.kind != CLEAN)
    return Quality(_share(hit, thrown), _share(hit, noise), thrown, noise)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def threshold_curve(score: np.ndarray, noisy: np.ndarray, points: int = CURVE_POINTS) -> list[CurvePoint]:
    """Precision and recall were a score's threshold another; thresholds rise, at equal steps of the rows left.

    score  [rows] float, no NaN
    noisy  [rows] bool, rows that should go
    """
    order = np.argsort(score, kind="stable")
    ranked, hits = score[order], np.concatenate([[0], np.cumsum(noisy[order])])
    out = []
    for threshold in np.unique(np.quantile(ranked, np.linspace(0, 1, points + 2)[1:-1])) if len(ranked) else []:
        below = int(np.searchsorted(ranked, threshold, "left"))
        if below:
            hit = int(hits[below])
            left = len(ranked) - below
            out.append(CurvePoint(float(threshold), hit / below, _share(hit, int(hits[-1])), left))
    return out


def caption_curve(frame: pl.DataFrame) -> list[CurvePoint]:
    """The curve of `score` over the pairs that have one; noise are the kinds in ABOUT_CAPTION."""
    rows = frame.filter(pl.col("score").is_not_null())
    return threshold_curve(rows["score"].to_numpy(), rows["truth"].is_in(ABOUT_CAPTION).to_numpy())


def ranking_quality(score: np.ndarray, noisy: np.ndarray) -> float:
    """How often a clean row scores above a noisy one, ties as half (the area under the ROC curve); 0.5 is chance."""
    good, bad = np.sort(score[~noisy]), score[noisy]
    if not len(good) or not len(bad):
        return 0.5
    above = len(good) - np.searchsorted(good, bad, "right")
    equal = np.searchsorted(good, bad, "right") - np.searchsorted(good, bad, "left")
    return float((above + equal / 2).sum() / (len(good) * len(bad)))
