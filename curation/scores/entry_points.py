"""Scorers that installed packages offer, by the entry point group `pairmill.scorers`. Loads none of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from schemas.errors import PairmillError, suggest

GROUP = "pairmill.scorers"


def scorers() -> dict[str, EntryPoint]:
    """Of two packages with one name the first in alphabetical order of `module:Class` counts."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        found.setdefault(point.name, point)
    return found


def find_scorer(name: str, others: Iterable[str] = ()) -> EntryPoint:
    """Raises PairmillError that lists the installed ones; `others` are names that are scorers too."""
    found = scorers()
    if name not in found:
        known = [*others, *found]
        have = f" There are: {', '.join(known)}." if known else " No package with scorers is installed."
        raise PairmillError(f"There is no scorer `{name}`.{suggest(name, known)}{have} docs/scorers.md makes one.")
    return found[name]


def package_of(point: EntryPoint) -> str:
    """Name and version of the package that it comes from."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
