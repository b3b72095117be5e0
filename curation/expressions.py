"""Filter expressions: the user's text -> names resolved -> Polars SQL -> an expression that NaN never passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import polars as pl

from curation.table import Table
from schemas.errors import PairmillError

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<string>'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")*")
    |(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<word>[^\W\d]\w*)
    |(?P<symbol>::|<=|>=|<>|!=|\|\||->>|->|.)""",
    re.VERBOSE | re.DOTALL,
)
# Words of the language; a column of such a name is written in double quotes.
_KEYWORDS = frozenset(
    [
        "and",
        "or",
        "not",
        "is",
        "null",
        "true",
        "false",
        "in",
        "between",
        "like",
        "ilike",
        "similar",
        "to",
        "escape",
        "case",
        "when",
        "then",
        "else",
        "end",
        "cast",
        "try_cast",
        "as",
        "over",
        "partition",
        "by",
        "order",
        "asc",
        "desc",
        "rows",
        "range",
        "unbounded",
        "preceding",
        "following",
        "current",
        "row",
        "nulls",
        "first",
        "last",
        "distinct",
        "filter",
        "where",
        "within",
        "group",
        "from",
        "for",
        "interval",
        "array",
        "any",
        "all",
        "some",
        "regexp",
        "rlike",
        "collate",
        "at",
        "time",
        "zone",
    ]
)
_REFUSED = frozenset(
    ["select", "with", "union", "values", "table", "unnest", "exists", "insert", "update", "delete", "create", "drop"]
)
_TURNED = {">=": "<=", ">": "<", "<=": ">=", "<": ">"}


@dataclass(frozen=True)
class Threshold:
    """A part of a rule that compares one column with one number: `column op value`."""

    column: str
    op: str
    value: float


@dataclass(frozen=True)
class Compiled:
    """An expression over the whole dataset, the columns it reads and the thresholds in it."""

    text: str
    expr: pl.Expr
    columns: frozenset[str]
    thresholds: tuple[Threshold, ...] = ()
    rests: tuple[pl.Expr, ...] = ()  # for each threshold: whether all the rest of the conjunction holds
    column: str | None = None  # where the whole expression is one column


def compile_predicate(text: str, table: Table) -> Compiled:
    """`text` as true, false or null for each row; null where the answer hangs on a null or NaN.

    Aggregates and windows mean the whole dataset, rows of every status included. Raises PairmillError: unknown or
    ambiguous column, text that is no expression, one that is not true or false.
    """
    expr, columns = _parse(text, table)
    frame = table.frame(columns)
    kind = _type(expr, frame, text)
    if kind != pl.Boolean:
        raise PairmillError(f"`{text}` gives {kind}, a rule needs true or false. Compare it with something.")
    schema = frame.collect_schema()
    leaves = list(_leaves(expr))
    found = [(t, i) for i, leaf in enumerate(leaves) if (t := _threshold(leaf, schema)) is not None]
    guarded = [_guard(leaf, frame) for leaf in leaves]
    rests = tuple(pl.all_horizontal(pl.lit(True), *guarded[:i], *guarded[i + 1 :]) for _, i in found)
    return Compiled(text, _guard(expr, frame), columns, tuple(t for t, _ in found), rests)


def compile_value(text: str, table: Table) -> Compiled:
    """`text` as a number for each row (float64); null where it is null or NaN.

    Raises PairmillError as `compile_predicate` does, and for what is no number.
    """
    expr, columns = _parse(text, table)
    kind = _type(expr, table.frame(columns), text)
    if not (kind.is_numeric() or kind == pl.Boolean):
        raise PairmillError(f"`{text}` gives {kind}, a ranking needs a number.")
    value = expr if kind == pl.Float32 else expr.cast(pl.Float64)
    column = expr.meta.output_name() if expr.meta.is_column() else None
    return Compiled(text, value.fill_nan(None), columns, column=column)


def compile_column(text: str, table: Table) -> Compiled:
    """`text` as a number, text or truth value for each row; null where it is null or NaN.

    Raises PairmillError as `compile_predicate` does, and for values of another kind.
    """
    expr, columns = _parse(text, table)
    kind = _type(expr, table.frame(columns), text)
    if isinstance(kind, pl.Decimal):
        expr, kind = expr.cast(pl.Float64), pl.Float64()
    if not (kind.is_numeric() or kind in (pl.Boolean, pl.String)):
        raise PairmillError(f"`{text}` gives {kind}, a score is a number, a text, or true or false. Cast it.")
    return Compiled(text, expr.fill_nan(None) if kind.is_float() else expr, columns)


def _parse(text: str, table: Table) -> tuple[pl.Expr, frozenset[str]]:
    columns: set[str] = set()
    sql = "".join(_rewrite(text, table, columns))
    expr = _sql(sql, text)
    if not expr.meta.undo_aliases().meta.eq(expr):
        raise PairmillError(
            f"`{text}` is not an expression: something follows its end. Write Polars SQL, such as `width >= 200`."
        )
    return expr, frozenset(columns)


def _sql(sql: str, text: str) -> pl.Expr:
    try:
        return pl.sql_expr(sql)
    except Exception as error:
        raise PairmillError(
            f"`{text}` is not an expression: {_reason(error)}. Write Polars SQL, such as `width >= 200`."
        ) from None


def _type(expr: pl.Expr, frame: pl.LazyFrame, text: str) -> pl.DataType:
    # Over no rows first: some faults of types show only when it runs.
    try:
        frame.collect_schema().to_frame(eager=True).with_columns(value=expr)
        return frame.select(value=expr).collect_schema()["value"]
    except Exception as error:
        raise PairmillError(f"`{text}` cannot be computed: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _rewrite(text: str, table: Table, columns: set[str]) -> Iterator[str]:
    """The text with each column as one quoted name; fills `columns`."""
    if "--" in text or "/*" in text:
        raise PairmillError(f"`{text}`: comments do not belong in an expression (write `- -1` for a double minus).")
    at, before = 0, ""
    while at < len(text):
        dotted = (
            table.dotted_name(text, at) if not (before and (text[at - 1].isalnum() or text[at - 1] in '_."')) else None
        )
        if dotted is not None:
            columns.add(dotted[0])
            yield _quoted(dotted[0])
            at += dotted[1]
            before = "column"
            continue
        match = _TOKEN.match(text, at)
        if match is None:
            raise PairmillError(f"`{text}` is not an expression: cannot read `{text[at:]}`.")
        kind, token = str(match.lastgroup), match.group()
        at = match.end()
        if kind == "quoted" or (kind == "word" and _is_column(token, text[at:], before, table)):
            name = table.resolve(token[1:-1].replace('""', '"') if kind == "quoted" else token)
            columns.add(name)
            yield _quoted(name)
        else:
            yield token
        if kind != "space":
            before = token.lower()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _is_column(word: str, rest: str, before: str, table: Table) -> bool:
    """Whether a bare word names a column: no keyword, function, type or part of a date."""
    low = word.lower()
    if low in _REFUSED:
        raise PairmillError(
            f"`{low.upper()}` does not belong in a rule: an expression sees the rows of this dataset only."
        )
    if low in _KEYWORDS or before in ("as", "::", "double"):
        return False
    called_or_typed = rest.lstrip()[:1] in ("(", "'")  # char_length(...), date '2024-01-01'
    return not called_or_typed and not (before == "(" and re.match(r"\s+from\s", rest, re.IGNORECASE))


def _split(expr: pl.Expr) -> tuple[str, pl.Expr, pl.Expr] | None:
    """(op, left, right) of `left and right` or `left or right`, else None."""
    parts = expr.meta.pop()
    if len(parts) == 2:
        right, left = parts
        if (left & right).meta.eq(expr):
            return "and", left, right
        if (left | right).meta.eq(expr):
            return "or", left, right
    return None


def _leaves(expr: pl.Expr) -> Iterator[pl.Expr]:
    """The parts of a conjunction."""
    split = _split(expr)
    if split is not None and split[0] == "and":
        yield from _leaves(split[1])
        yield from _leaves(split[2])
    else:
        yield expr


def _threshold(leaf: pl.Expr, schema: pl.Schema) -> Threshold | None:
    """`column op number` (or the other way round) as a Threshold."""
    parts = leaf.meta.pop()
    columns = [p.meta.output_name() for p in parts if p.meta.is_column()]
    numbers = [pl.select(p).item() for p in parts if p.meta.is_literal()]
    if len(parts) != 2 or len(columns) != 1 or len(numbers) != 1 or isinstance(numbers[0], bool):
        return None
    if not isinstance(numbers[0], int | float | Decimal) or not schema[columns[0]].is_numeric():
        return None
    for op, turned in _TURNED.items():
        name, value = _quoted(columns[0]), str(numbers[0])
        if pl.sql_expr(f"{name} {op} {value}").meta.eq(leaf):
            return Threshold(columns[0], op, float(numbers[0]))
        if pl.sql_expr(f"{value} {op} {name}").meta.eq(leaf):
            return Threshold(columns[0], turned, float(numbers[0]))
    return None


def _guard(expr: pl.Expr, frame: pl.LazyFrame) -> pl.Expr:
    """`expr`, null wherever a comparison in it would see a NaN that arithmetic made.

    NaN that is stored is null already (`Table.frame`); 0/0, ln(-1) and the like are made here, and Polars holds NaN to
    be greater than every number. `and` and `or` keep their three-valued meaning.
    """
    split = _split(expr)
    if split is not None:
        left, right = _guard(split[1], frame), _guard(split[2], frame)
        return left & right if split[0] == "and" else left | right
    suspects = list(_made_floats(expr, frame))
    if not suspects:
        return expr
    return pl.when(pl.any_horizontal(s.is_nan().fill_null(False) for s in suspects)).then(None).otherwise(expr)


def _made_floats(expr: pl.Expr, frame: pl.LazyFrame) -> Iterator[pl.Expr]:
    """Computed floats on which true-or-false parts of `expr` hang."""
    for part in expr.meta.pop():
        if part.meta.is_column() or part.meta.is_literal():
            continue
        kind = _known_type(part, frame)
        if kind is not None and kind.is_float() and _known_type(expr, frame) == pl.Boolean:
            yield part
        yield from _made_floats(part, frame)


def _known_type(expr: pl.Expr, frame: pl.LazyFrame) -> pl.DataType | None:
    """The type of a part, or None for what cannot stand alone (a list of values, say)."""
    try:
        return frame.select(value=expr).collect_schema()["value"]
    except pl.exceptions.PolarsError:
        return None
