"""Configuration of the rules that compare rows by hashes: `dedup`, `decontaminate`, `placeholder`."""

from __future__ import annotations

from pydantic import model_validator

from schemas.config import StageConfig, identity

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAX_BITS = 16


class DedupConfig(StageConfig):
    """Of rows that are the same, or nearly, keep one. A row without a value is nobody's duplicate and stays."""

    by: str | tuple[str, ...] | None = identity(
        None,
        "rows with equal values are the same: url, uid, caption, sha256, pixels (of `score hash`), another column, or "
        "a list of columns that must all be equal",
    )
    near: str | None = identity(None, "rows whose hashes are nearly equal are the same: hash.phash or hash.dhash")
    bits: int = identity(4, "with `near`: most bits of 64 in which two hashes may differ", ge=0, le=MAX_BITS)
    flat: int = identity(
        8,
        "with `near`: a hash with at most so many bits set, or not set, says too little (an image of one colour) and "
        "is left to an exact rule",
        ge=0,
        le=31,
    )
    keep: str | None = identity(
        None,
        "column or expression: the row with the highest value stays; a minus before it for the lowest; ties and no "
        "`keep`: the smallest uid",
    )
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")

    @model_validator(mode="after")
    def _one_way(self) -> DedupConfig:
        if (self.by is None) == (self.near is None):
            raise ValueError("give `by` (equal values) or `near` (nearly equal hashes), one of the two")
        if self.by == ():
            raise ValueError("`by` needs a column")
        given = {"bits", "flat"} & self.model_fields_set
        if self.by is not None and given:
            raise ValueError(f"`{min(given)}` goes with `near`, not with `by`")
        return self


class DecontaminateConfig(StageConfig):
    """Drop rows that are in another dataset, too: one that models will be tested on."""

    against: str = identity(..., "the other dataset: a folder or URL, or the name of a folder beside this dataset")
    near: str | None = identity("hash.phash", "hash column that both have; null leaves hashes out")
    bits: int = identity(4, "most bits in which the hashes of one image may differ", ge=0, le=MAX_BITS)
    flat: int = identity(8, "a hash with at most so many bits set, or not set, is not compared", ge=0, le=31)
    embeddings: str | None = identity(
        "clip", "features with image embeddings that both have; null leaves embeddings out", pattern=_NAME
    )
    cosine: float = identity(0.96, "least cosine of the embeddings of one image", gt=0, le=1)
    captions: bool = identity(True, "also drop rows whose caption is one of the other dataset's")
    fingerprint: str | None = identity(
        None, "fingerprint of the other dataset; a selection's recipe holds it, and another one is an error"
    )
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")

    @model_validator(mode="after")
    def _some_way(self) -> DecontaminateConfig:
        if self.near is None and self.embeddings is None and not self.captions:
            raise ValueError("nothing is compared: give `near`, `embeddings` or `captions`")
        return self


class PlaceholderConfig(StageConfig):
    """Drop every row of an image that stands under many addresses with unrelated captions."""

    by: str = identity("sha256", "what tells that two images are one: sha256, pixels, hash.phash or another column")
    urls: int | None = identity(10, "at least so many different URLs; null leaves URLs out", ge=2)
    hosts: int | None = identity(None, "or at least so many different hosts", ge=2)
    captions: float = identity(
        0.5, "captions are unrelated when they differ in at least this share of the rows that have one", gt=0, le=1
    )
    word: float = identity(
        0.5, "and when no word of four letters or more is in more than this share of the different captions", ge=0, le=1
    )
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")

    @model_validator(mode="after")
    def _some_count(self) -> PlaceholderConfig:
        if self.urls is None and self.hosts is None:
            raise ValueError("give `urls` or `hosts`")
        return self
