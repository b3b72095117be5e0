"""Looking through a dataset: which rows a query means, in which order, and the counts beside it.

Every condition is a rule of `filter` as well: `recipe` writes them, `save` makes a selection of them, and the same rows
are kept. What only orders rows (likeness) is no part of a recipe.
"""

from __future__ import annotations

import math
import re
import shlex
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import yaml

from curation.browse_columns import SEPARATOR, Codes, Columns, Memory, Numbers
from curation.browse_config import KEPT, Query, Range
from curation.browse_similar import Embeddings, TextTower, Twins, embedding_sets, find_set, text_tower, twin_set
from curation.expressions import compile_predicate
from curation.filter import FilterResult, make_selection
from curation.table import DERIVED, Table
from schemas.errors import PairmillError, suggest
from schemas.pairs import RESERVED
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import Dataset
from shards.select import selections

PAGE = 60
MAX_PAGE = 500
MAX_CAPTION = 300
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?\Z")
_WORDS = re.compile(r'(-?)(?:"([^"]*)(?:"|$)|([^\s"]+))')  # a quote that is still open goes to the end
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")  # what Rust's regex::escape escapes
_ESCAPED = r"\\\g<0>"
_DEDUP = "The rule `dedup` with `near: hash.phash` drops all duplicates."
Mask = np.ndarray


@dataclass(frozen=True)
class Found:
    """The rows of a query.

    total     rows that match
    keepable  of them those a selection can keep: with an image, or text-only by design
    rows      numbers of this page's rows, int64, in order
    values    what each was ordered by, None without an order
    next      where the next page begins, None at the end
    """

    total: int
    keepable: int
    rows: np.ndarray
    values: list[float | None] | None
    next: int | None


@dataclass(frozen=True)
class Condition:
    """One condition: rows for which it is true, which part of the query it is, and what it is as a rule."""

    part: str
    mask: Mask
    rule: str | None


@dataclass(frozen=True)
class Recipe:
    """The conditions of a query as `filter --rules` reads them; `start` is the selection to begin from."""

    rules: list[dict[str, Any]]
    start: str | None

    def as_yaml(self, dataset: str) -> str:
        """With the command that applies it."""
        start = f" --from {shlex.quote(self.start)}" if self.start else ""
        head = f"# pairmill filter {shlex.quote(dataset)} --rules recipe.yaml -o NAME{start}\n"
        return head + yaml.safe_dump(self.rules, sort_keys=False, allow_unicode=True, width=10_000)


class View:
    """A dataset opened for looking. Queries run one after another: each uses every core.

    `memory_bytes` bounds the columns, codes and masks that are kept; the embeddings are mapped from their files.
    Raises PairmillError where pairs are missing.
    """

    def __init__(self, dataset: Dataset, memory_bytes: int = 1 << 30) -> None:
        missing = dataset.require("pairs").pending()
        if missing:
            raise PairmillError(
                f"{dataset.url} has pairs for {dataset.num_shards - len(missing)} of {dataset.num_shards} shards. "
                "Run the download or import command again to finish it."
            )
        self.dataset = dataset
        self.table = Table(dataset)
        self.memory = Memory(memory_bytes)
        self.columns = Columns(self.table, self.memory)
        self.rows = len(dataset)
        self.sets = embedding_sets(dataset)
        self.twins = twin_set(self.table, self.columns.sets)
        self.copies = f"{self.twins}.copies"
        if self.twins is not None and self.copies not in self.table.columns:
            self.columns.add_made(self.copies, lambda: self._twins().copies(self._groups()))
        self._embeddings = {s.name: Embeddings(s) for s in self.sets}
        self._tower: tuple[str, TextTower] | None = None
        self._one = threading.RLock()

    def find_model(self, model: str | None, pretrained: str | None) -> str | None:
        """Loads the text tower of the embeddings; its name, or None where it is not at hand (see `text_tower`)."""
        self._tower = text_tower(self.sets, model, pretrained)
        return None if self._tower is None else self._tower[1].label

    def search(self, query: Query, after: int | None = None, limit: int = PAGE) -> Found:
        """The rows that match, in order, from the one after row `after` on.

        Raises PairmillError: a column, value, selection or row that is not there.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise PairmillError(f"A page has 1 to {MAX_PAGE} rows, not {limit}.")
        if after is not None:
            self.check_row(after)
        with self._one:
            conditions = self.conditions(query)
            mask = _all(conditions, self.rows)
            successes = self.columns.codes("status").mask([SUCCESS, NO_IMAGE])
            key = self._key(query)
            rows, more = page(mask, key, after, limit)
            shown = None if key is None else self._shown(query, key, rows)
            total, keepable = int(np.count_nonzero(mask)), int(np.count_nonzero(mask & successes))
            return Found(total, keepable, rows, shown, int(rows[-1]) if more else None)

    def cards(self, found: Found) -> list[dict[str, Any]]:
        """What a grid shows of each row: number, caption (cut to 300 characters), status, what it was ordered by."""
        values = found.values or [None] * len(found.rows)
        with self._one:
            captions = self.columns.captions().gather(found.rows)
            codes = self.columns.codes("status")
        said = [t if t is None or len(t) <= MAX_CAPTION else t[: MAX_CAPTION - 1] + "…" for t in captions]
        status = [codes.values[c] for c in codes.codes[found.rows]]
        names = ("number", "caption", "status", "value")
        return [
            dict(zip(names, row, strict=True)) for row in zip(found.rows.tolist(), said, status, values, strict=True)
        ]

    def counts(self, query: Query, columns: Sequence[str] = ()) -> dict[str, Any]:
        """Histograms of `columns` and facets, each among the rows that all other conditions leave.

        {"histograms": {column: ...}, "facets": {column: [{value, rows, all}]}, "reasons": [...] of the selection}
        """
        with self._one:
            conditions = self.conditions(query)
            histograms = {c: self._histogram(c, conditions) for c in columns}
            facets = {c: self._facet(self.columns.codes(c), c, conditions) for c in self.columns.facets}
            reasons = []
            if query.selection is not None:
                reasons = self._facet(self.columns.reasons(query.selection), "reason", conditions)
            return {"histograms": histograms, "facets": facets, "reasons": reasons}

    def _histogram(self, column: str, conditions: Sequence[Condition]) -> dict[str, Any]:
        numbers = self.number(column)
        mask = _all([c for c in conditions if c.part != column], self.rows)
        bins = len(numbers.counts)
        now = numbers.counts if mask.all() else np.bincount(numbers.bins[mask], minlength=256)[:bins].tolist()
        return {
            "edges": numbers.edges,
            "all": numbers.counts,
            "now": now,
            "minimum": numbers.minimum,
            "maximum": numbers.maximum,
            "nulls": numbers.nulls,
            "whole": numbers.whole,
        }

    def _facet(self, codes: Codes, part: str, conditions: Sequence[Condition]) -> list[dict[str, Any]]:
        others = [c for c in conditions if c.part != part]
        mask = _all(others, self.rows) if others else None
        counted = zip(codes.values, codes.count(mask), codes.count(None), strict=True)
        return [{"value": value, "rows": rows, "all": every} for value, rows, every in counted]

    def number(self, column: str) -> Numbers:
        """A column of numbers. Raises PairmillError where there is none of that name."""
        if column not in self.columns.numbers:
            have = self.columns.numbers
            raise PairmillError(
                f"There is no column of numbers `{column}`.{suggest(column, have)} There are: {', '.join(have)}."
            )
        return self.columns.number(column)

    def conditions(self, query: Query) -> list[Condition]:
        """Every condition of the query over all rows. Raises PairmillError as `search` does."""
        texts = [(sign == "-", quoted or word) for sign, quoted, word in _WORDS.findall(query.text)]
        out = [self._words(without, word) for without, word in texts if word]
        for one in query.ranges:
            rule = _range_rule(one.column, one.low, one.high)
            if rule is not None:
                out.append(self._between(one, rule))
        for column, wanted in query.only.items():
            out.append(self._only(column, wanted))
        if query.reasons:
            if query.selection is None:
                raise PairmillError("`reason` needs `selection`, whose reasons are meant.")
            codes = self.columns.reasons(query.selection)
            _check_values("reason", query.reasons, codes.values)
            out.append(Condition("reason", codes.mask(query.reasons), None))
        if query.twins is not None:
            out.append(Condition("twins", self.twins_of(query.twins), None))
        return out

    def _between(self, one: Range, rule: str) -> Condition:
        values = self.number(one.column).values.rename(one.column)
        made = one.column in self.columns.made

        def make() -> Mask:
            if made:
                low = -math.inf if one.low is None else one.low
                high = math.inf if one.high is None else one.high
                return values.is_between(low, high).fill_null(False).to_numpy()
            keep = compile_predicate(rule, self.table).expr
            return pl.DataFrame([values]).select(keep=keep)["keep"].fill_null(False).to_numpy()

        mask = self.memory.get(("mask", rule), make, lambda m: m.nbytes)
        return Condition(one.column, mask, None if made else rule)

    def _words(self, without: bool, word: str) -> Condition:
        low = word.lower()

        def make() -> Mask:
            found = self.columns.haystack().str.contains(low, literal=True).to_numpy()
            return ~found if without else found

        mask = self.memory.get(("words", without, low), make, lambda m: m.nbytes)
        return Condition("text", mask, _words_rule(without, low))

    def _only(self, column: str, wanted: Sequence[str]) -> Condition:
        if column not in self.columns.facets:
            have = self.columns.facets
            raise PairmillError(f"There is no facet `{column}`.{suggest(column, have)} There are: {', '.join(have)}.")
        codes = self.columns.codes(column)
        values = [w or None for w in wanted]
        _check_values(column, values, codes.values)
        return Condition(column, codes.mask(values), _only_rule(column, values, self.table.columns[column]))

    def _key(self, query: Query) -> np.ndarray | None:
        """What rows are ordered by, lowest first, infinite for null; None for the dataset's order."""
        if query.like is not None or query.see:
            return self._likeness(query)
        if query.sort is None:
            return None

        def make() -> np.ndarray:
            values = self.number(str(query.sort)).values.cast(pl.Float64).fill_null(np.nan).to_numpy()
            key = np.where(np.isnan(values), np.inf, -values if query.descending else values)
            if query.sort == self.copies:  # groups of one size one after another
                group = self._groups()
                key = key + group / (group.max() + 1.0)
            return key

        return self.memory.get(("key", query.sort, query.descending), make, lambda k: k.nbytes)

    def _shown(self, query: Query, key: np.ndarray, rows: np.ndarray) -> list[float | None]:
        """The cosine, or the value in the column that the rows are ordered by."""
        if query.like is not None or query.see:
            return [None if np.isinf(k) else -float(k) for k in key[rows]]
        return self.number(str(query.sort)).values.gather(rows).to_list()

    def _likeness(self, query: Query) -> np.ndarray:
        stage = find_set(self.dataset, self.sets, query.features)
        embeddings = self._embeddings[stage.name]

        def make() -> np.ndarray:
            if query.like is not None:
                self.check_row(query.like)
                vector = embeddings.vector(query.like)
            else:
                vector = self._embed(query.see, stage.name)
            found = embeddings.likeness(vector)
            return np.where(np.isnan(found), np.float32(np.inf), -found)

        return self.memory.get(("likeness", stage.name, query.like, query.see), make, lambda k: k.nbytes)

    def _embed(self, words: str, name: str) -> np.ndarray:
        if self._tower is None or self._tower[0] != name:
            raise PairmillError(
                f"Words cannot be compared with features/{name}: the model that made them is not at hand. "
                "Start `pairmill browse` with --model RUN."
            )
        return self._tower[1](words)

    def twins_of(self, row: int) -> Mask:
        """bool [rows]: the row and those that show the same picture. Raises PairmillError without hashes."""
        self.check_row(row)
        return self._twins().of(row)

    def _twins(self) -> Twins:
        if self.twins is None:
            raise PairmillError(f"{self.dataset.url} has no hashes of its pictures. Make them: pairmill score hash")
        group = self.twins
        return self.memory.get(("twins", group), lambda: Twins(self.table, group), lambda t: t.nbytes)

    def _groups(self) -> np.ndarray:
        return self.memory.get(("groups", self.twins), lambda: self._twins().groups(), lambda g: g.nbytes)

    def check_row(self, row: int) -> None:
        """Raises PairmillError where there is no such row."""
        if not 0 <= row < self.rows:
            raise PairmillError(f"There is no row {row}: {self.dataset.url} has {self.rows:,}.")

    def recipe(self, query: Query) -> Recipe:
        """The query's conditions as rules. Raises PairmillError for those that no rule can say, and for none."""
        if query.twins is not None:
            raise PairmillError(f"Twins of one row are no rule: clear them first. {_DEDUP}")
        if any(r.column in self.columns.made for r in query.ranges):
            raise PairmillError(f"`{self.copies}` is no rule: clear it first. {_DEDUP}")
        with self._one:
            conditions = self.conditions(query)
        start = query.selection if query.reasons == (KEPT,) else None
        if query.reasons and start is None:
            raise PairmillError(
                f"What `{query.selection}` dropped is no rule: choose `kept`, or no reason, to start from it."
            )
        rules = [{"where": c.rule} for c in conditions if c.rule is not None]
        if not rules and start is None:
            raise PairmillError("There is no condition yet: search for words, move a slider or choose a value.")
        return Recipe(rules, start)

    def save(self, name: str, query: Query, replace: bool = False) -> FilterResult:
        """Writes the selection `name` of the query's conditions.

        Raises PairmillError: as `recipe` and `make_selection` do; a name that is taken, without `replace`.
        """
        recipe = self.recipe(query)
        if name in selections(self.dataset) and not replace:
            raise PairmillError(f"There is a selection `{name}` already. Choose another name, or replace it.")
        if name == recipe.start:
            raise PairmillError(f"`{name}` is what the rules start from: choose another name.")
        done = make_selection(self.dataset, name, recipe.rules, start=recipe.start)
        self.columns.forget_reasons(name)
        return done


def page(mask: Mask, key: np.ndarray | None, after: int | None, limit: int) -> tuple[np.ndarray, bool]:
    """(at most `limit` rows of `mask` in the order of (key, row) that follow row `after`; whether there are more)."""
    if key is None:
        first = 0 if after is None else after + 1
        rows: np.ndarray = np.flatnonzero(mask[first:]) + first
        return rows[:limit], len(rows) > limit
    if after is not None:
        later = key > key[after]
        later[after + 1 :] |= key[after + 1 :] == key[after]
        mask = mask & later
    rows = np.flatnonzero(mask)
    if len(rows) <= limit:
        return rows[np.argsort(key[rows], kind="stable")], False
    keys = key[rows]
    cut = np.partition(keys, limit - 1)[limit - 1]
    below = np.flatnonzero(keys < cut)
    tied = np.flatnonzero(keys == cut)[: limit - len(below)]
    chosen = np.sort(np.concatenate([below, tied]))
    return rows[chosen[np.argsort(keys[chosen], kind="stable")]], True


def _all(conditions: Sequence[Condition], rows: int) -> Mask:
    out: np.ndarray = np.ones(rows, bool)
    for condition in conditions:
        out &= condition.mask
    return out


def _check_values(column: str, wanted: Sequence[str | None], known: Sequence[str | None]) -> None:
    strange = [w for w in wanted if w not in known]
    if strange:
        have = [v for v in known if v is not None]
        near = suggest(str(strange[0]), have)
        raise PairmillError(f"`{column}` is never `{strange[0] or 'null'}` here.{near} It is: {', '.join(have)}.")


def _column(name: str) -> str:
    """A column's name in an expression: in quotes where it may be read as something else."""
    plain = _NAME.match(name) and ("." in name or name in RESERVED or name in DERIVED)
    return name if plain else '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _range_rule(column: str, low: float | None, high: float | None) -> str | None:
    bounds = ((">=", low), ("<=", high))
    parts = [f"{_column(column)} {op} {_number(bound)}" for op, bound in bounds if bound is not None]
    return " and ".join(parts) or None


def _words_rule(without: bool, low: str) -> str:
    # Polars' `strpos` takes a pattern as well; regexp_like says so.
    hay = f"lower(coalesce(caption, '') || {_text(SEPARATOR)} || coalesce(url, ''))"
    return f"{'not ' if without else ''}regexp_like({hay}, {_text(_SPECIAL.sub(_ESCAPED, low))})"


def _only_rule(column: str, values: Sequence[str | None], kind: pl.DataType) -> str:
    name = _column(column)
    there = [v for v in values if v is not None]
    parts = [f"{name} is null"] if None in values else []
    if kind == pl.Boolean:
        parts += [f"{name} = {v}" for v in there]
    elif len(there) == 1:
        parts.append(f"{name} = {_text(there[0])}")
    elif there:
        parts.append(f"{name} in ({', '.join(map(_text, there))})")
    return " or ".join(parts)
