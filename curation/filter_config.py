"""Configuration of `filter` and `report`, and of each rule of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.config import StageConfig, execution, identity

Share = Annotated[float, Field(gt=0, lt=1)]


class WhereConfig(StageConfig):
    """Keep rows for which an expression is true. Null and NaN never pass."""

    expr: str = identity(..., 'Polars SQL expression, such as "clip.clip_score >= 0.28 and width >= 200"')
    name: str | None = identity(None, "what the rule is called in reasons and the funnel [default: the expression]")


class TopConfig(StageConfig):
    """Keep the rows with the highest values."""

    share: Share | None = identity(None, "share of the rows to keep, between 0 and 1")
    count: int | None = identity(None, "number of rows to keep", ge=1)
    by: str = identity(..., "column or expression to rank by, highest first; put a minus before it for lowest first")
    of: Literal["kept", "all"] = identity(
        "kept", "what the share is of: `kept` = rows earlier rules kept, `all` = every success of the dataset"
    )
    ties: Literal["exact", "datacomp"] = identity(
        "exact",
        "`exact`: exactly that many rows, ties broken by uid, then (shard, row); `datacomp`: all rows at or above the "
        "value that DataComp's apply_filter.py takes as threshold (one row more, and its ties)",
    )
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")

    @model_validator(mode="after")
    def _one_size(self) -> TopConfig:
        if (self.share is None) == (self.count is None):
            raise ValueError("give `share` or `count`, one of the two")
        return self


class SampleConfig(StageConfig):
    """Keep a share of the rows by their uid: the same rows however the dataset is cut or grows."""

    share: Share = identity(..., "share of the rows to keep, between 0 and 1")
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")


class SplitConfig(StageConfig):
    """Keep one part of a split in two. Rows with equal values of `by` stay on one side."""

    share: Share = identity(..., "share of the values that makes the first part, between 0 and 1")
    part: Literal["first", "rest"] = identity("first", "which part to keep")
    by: str = identity("sha256", "column whose equal values stay together; a null value falls back to the uid")
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")


class PresetConfig(StageConfig):
    """The rules of a published filter."""

    name: str = identity(..., "a preset; `docs/commands.md` lists them with their sources")
    against: str | None = identity(None, "the target set of a preset that compares with one")


class FilterConfig(StageConfig):
    """`pairmill filter`. Rules run in this order: preset, where, dedup, top, sample, split; or those of `rules`."""

    output: str | None = execution(None, "name of the selection to write; not needed with --dry-run")
    preset: str | None = identity(None, "a published filter, such as datacomp-clip-l14-30")
    against: str | None = identity(None, "with a preset that needs one: the target set, a dataset or an .npy file")
    where: tuple[str, ...] = identity((), "keep rows for which this is true, in Polars SQL (repeatable)")
    dedup: tuple[str, ...] = identity(
        (),
        "keep one row of those with equal values of this column, such as url or sha256; `near`: of those whose "
        "hash.phash differs in at most 4 bits (repeatable)",
    )
    keep: str | None = identity(None, "with --dedup: the row where this is highest stays, such as clip_score")
    top: float | None = identity(None, "keep the best: a share below 1, or a number of rows", gt=0)
    by: str | None = identity(None, "what --top ranks by, such as clip_score")
    of: Literal["kept", "all"] = identity("kept", "--top's share is of the rows kept so far, or of all successes")
    sample: float | None = identity(None, "keep this share of the rows, by uid", gt=0, lt=1)
    split: float | None = identity(None, "keep one part of a split in two: the first part's share", gt=0, lt=1)
    part: Literal["first", "rest"] = identity("first", "which part of --split to keep")
    split_by: str = identity("sha256", "column whose equal values stay on one side of --split")
    rules: str | tuple[dict[str, Any], ...] | None = identity(None, "a YAML file with the rules, in order")
    from_: str | None = identity(None, "start from the rows another selection keeps")
    dry_run: bool = execution(False, "write nothing; show what other thresholds would leave")

    @model_validator(mode="after")
    def _fits(self) -> FilterConfig:
        if (self.top is None) != (self.by is None):
            raise ValueError("--top and --by go together, such as --top 0.3 --by clip_score")
        if self.top is not None and self.top >= 1 and self.top != int(self.top):
            raise ValueError("--top is a share below 1 or a whole number of rows")
        if self.against is not None and self.preset is None:
            raise ValueError("--against goes with --preset; rules of a file name their own")
        if self.keep is not None and not self.dedup:
            raise ValueError("--keep goes with --dedup, such as --dedup near --keep clip_score")
        flags = (self.preset, self.top, self.sample, self.split)
        if self.rules is not None and (self.where or self.dedup or any(f is not None for f in flags)):
            raise ValueError("--rules holds the whole recipe: write the other rules into it")
        return self


class ReportConfig(StageConfig):
    """`pairmill report`."""

    name: str = execution("report", "name of the files in DATASET/reports/")
    selection: str | None = execution(None, "selection to draw over the histograms [default: the first by name]")
    thumbnails: int = execution(200, "most pictures in the page", ge=0, le=200)
    seed: int = execution(0, "which rows the pictures show")
    run: tuple[str, ...] = execution((), "also show this run of `pairmill train`, or each in this folder (repeatable)")
