"""Configuration of `browse`, and what can be asked for in it. Only pydantic is imported here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from pydantic import PositiveInt

from schemas.config import StageConfig, build_config, execution, identity
from schemas.errors import PairmillError, suggest

PORT = 8765
MAX_TEXT = 500  # characters of a search
MAX_RULES = 100  # ranges and facet values in one query
KEPT = "kept"  # the reason of a row that a selection keeps


class BrowseConfig(StageConfig):
    """`pairmill browse`."""

    host: str = execution(
        "127.0.0.1", "address to listen on; beyond loopback, whoever reaches it can read all and save selections"
    )
    port: int = execution(PORT, "port to listen on; 0 takes a free one", ge=0, le=65535)
    allow_host: tuple[str, ...] = execution(
        (), "a name that browsers may call this page by, such as a proxy's (repeatable)"
    )
    model: str | None = execution(
        None, "the CLIP that made the embeddings, for search by words: a run, a folder or an open_clip name"
    )
    pretrained: str | None = execution(None, "a weights file or tag, for a --model given by name")
    memory: PositiveInt = execution(1024, "most MiB of columns and masks to hold; what does not fit is read anew")


class Range(StageConfig):
    """low <= column <= high; None is open. A null is outside, unless both ends are open."""

    column: str = identity(..., "full name of a column of numbers")
    low: float | None = identity(None, "least value")
    high: float | None = identity(None, "greatest value")


class Query(StageConfig):
    """Which rows, in which order. All conditions hold at once; a page's address holds the same."""

    text: str = identity("", "words that caption or url holds", max_length=MAX_TEXT)
    ranges: tuple[Range, ...] = identity((), "columns between two numbers", max_length=MAX_RULES)
    only: dict[str, tuple[str, ...]] = identity({}, "column -> the values that are wanted; an empty value is null")
    selection: str | None = identity(None, "a selection, for `reasons`")
    reasons: tuple[str, ...] = identity((), "reasons of that selection, or `kept`", max_length=MAX_RULES)
    twins: int | None = identity(None, "rows that show the same picture as this row", ge=0)
    sort: str | None = identity(None, "a column to order by [default: the dataset's order]")
    descending: bool = identity(False, "highest first")
    like: int | None = identity(None, "order by likeness to this row's picture", ge=0)
    see: str = identity("", "order by likeness to these words", max_length=MAX_TEXT)
    features: str | None = identity(None, "the set of embeddings for `like` and `see` [default: the first]")


_ONE = {
    "q": "text",
    "selection": "selection",
    "twins": "twins",
    "like": "like",
    "see": "see",
    "features": "features",
    "sort": "sort",
}
NAMES = (*_ONE, "range", "only", "reason")


def parse_query(pairs: Iterable[tuple[str, str]]) -> Query:
    """A query as an address tells it: names and values, in any order.

    q=WORDS range=COLUMN:LOW:HIGH only=COLUMN:VALUE selection=NAME reason=REASON twins=ROW sort=[-]COLUMN like=ROW
    see=WORDS features=NAME; range, only and reason may be repeated. Raises PairmillError for anything else.
    """
    values: dict[str, object] = {}
    ranges, reasons, only = [], [], defaultdict(list)
    for name, value in pairs:
        if name == "range":
            ranges.append(_range(value))
        elif name == "only":
            column, colon, wanted = value.partition(":")
            if not colon:
                raise PairmillError(f"`only={value}`: expected COLUMN:VALUE.")
            only[column].append(wanted)
        elif name == "reason":
            reasons.append(value)
        elif name in _ONE:
            values[_ONE[name]] = value
        else:
            raise PairmillError(f"A query has no `{name}`.{suggest(name, NAMES)} It has: {', '.join(NAMES)}.")
    sort = str(values.get("sort") or "")
    values |= {"sort": sort.removeprefix("-") or None, "descending": sort.startswith("-")}
    values |= {"ranges": tuple(ranges), "reasons": tuple(reasons), "only": {c: tuple(v) for c, v in only.items()}}
    if sum(map(len, only.values())) > MAX_RULES:
        raise PairmillError(f"A query may name at most {MAX_RULES} values.")
    return build_config(Query, {k: v for k, v in values.items() if v is not None}, "query")


def _range(text: str) -> Range:
    parts = text.rsplit(":", 2)
    try:
        column, low, high = parts
        bounds = [float(b) if b else None for b in (low, high)]
    except ValueError:
        raise PairmillError(f"`range={text}`: expected COLUMN:LOW:HIGH, such as width:200: for 200 and more.") from None
    if any(b is not None and not math.isfinite(b) for b in bounds):
        raise PairmillError(f"`range={text}`: a bound must be a finite number.")
    return Range(column=column, low=bounds[0], high=bounds[1])
