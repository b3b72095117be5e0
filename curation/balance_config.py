"""Configuration of the rule `balance`."""

from __future__ import annotations

from schemas.config import StageConfig, identity


class BalanceConfig(StageConfig):
    """MetaCLIP's balancing: rows whose caption names only frequent things are thinned, those that name nothing drop."""

    entries: str = identity(..., "the things to look for: a text file, one a line, or a .json list, as MetaCLIP's")
    t: int = identity(20_000, "cap: an entry is thinned to about this many rows", ge=1)
    column: str = identity("caption", "the text to look in")
    lower: bool = identity(False, "compare in lower case; the original does not")
    seed: int = identity(0, "which rows are drawn", ge=0)
    fingerprint: str | None = identity(
        None, "fingerprint of the entries; a selection's recipe holds it, and another one is an error"
    )
    name: str | None = identity(None, "what the rule is called in reasons and the funnel")
