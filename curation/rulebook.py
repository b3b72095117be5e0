"""Every rule by its name in a recipe; its code is loaded when a recipe names it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from curation.rules import Rule
from schemas.errors import PairmillError, suggest

RULES: dict[str, str] = {
    "where": "curation.rules:Where",
    "top": "curation.rules:Top",
    "sample": "curation.rules:Sample",
    "split": "curation.rules:Split",
    "dedup": "curation.dedup:Dedup",
    "decontaminate": "curation.decontaminate:Decontaminate",
    "placeholder": "curation.placeholder:Placeholder",
    "cluster": "curation.cluster:Cluster",
    "balance": "curation.balance:Balance",
    "dedup_semantic": "curation.dedup_semantic:DedupSemantic",
}


def rule_class(kind: str, where: str) -> type[Rule[Any]]:
    """The rule called `kind`. Raises PairmillError that names the nearest, at `where` in the recipe."""
    if kind not in RULES:
        raise PairmillError(f"{where}: there is no rule `{kind}`.{suggest(kind, [*RULES, 'preset'])}")
    module, name = RULES[kind].split(":")
    found: type[Rule[Any]] = getattr(import_module(module), name)
    return found
