"""`filter`: an ordered recipe of rules over pairs and scores -> a selection. Nothing is copied, nothing deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curation.filter_config import FilterConfig, PresetConfig
from curation.funnel import Curve, FunnelStep, Ledger, far_outside, what_if
from curation.matches import put_matches
from curation.presets import Preset, preset
from curation.rulebook import rule_class
from curation.rules import Rule
from curation.table import Table
from schemas.config import build_config, read_yaml
from schemas.errors import PairmillError, suggest
from schemas.events import Emit, Notice, silent
from schemas.status import NO_IMAGE, SUCCESS
from shards.dataset import Dataset
from shards.locks import lock
from shards.select import feature_fingerprints, made_from, read_selection, selection_about, write_selection

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")
RuleItem = Mapping[str, Any]


@dataclass(frozen=True)
class FilterResult:
    """What a filter kept. `path` is the selection's file, None after a dry run; `curves` only then."""

    kept: int
    rows: int
    funnel: tuple[FunnelStep, ...]
    path: str | None
    curves: tuple[Curve, ...] = ()


def filter_dataset(dataset: Dataset | str | Path, config: FilterConfig, emit: Emit = silent) -> FilterResult:
    """Applies the configuration's recipe and writes `selections/OUTPUT.parquet`.

    Raises PairmillError: unknown rule, column or preset; scores that are missing or unfinished; nothing kept.
    """
    data = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    return make_selection(data, config.output, recipe_items(config), emit, start=config.from_, dry_run=config.dry_run)


def make_selection(
    dataset: Dataset,
    name: str | None,
    items: Sequence[RuleItem],
    emit: Emit = silent,
    *,
    start: str | None = None,
    dry_run: bool = False,
) -> FilterResult:
    """Applies rules in order, each `{"where": ...}`, `{"top": ...}`, ... as in a YAML recipe, and writes a selection.

    `start` names a selection to begin from. Raises PairmillError as `filter_dataset` does.
    """
    if not dry_run:
        _check_name(name)
    table, rules, ledger, source = apply_rules(dataset, items, emit, start)
    result = FilterResult(int(ledger.kept.sum()), ledger.rows, ledger.steps(), None)
    if dry_run:
        return FilterResult(result.kept, result.rows, result.funnel, None, _curves(table, rules, ledger))
    if not result.kept:
        raise PairmillError(f"No row is left, nothing written. {_where_to(result.funnel)} Try --dry-run.")
    if name is None:
        raise AssertionError("checked above")
    path = f"selections/{name}.parquet"
    about = _about(dataset, rules, items, start)
    results: dict[str, Any] = {"funnel": [s.as_dict() for s in result.funnel], "thresholds": _thresholds(rules, ledger)}
    with lock(dataset.folder, f"selections/{name}"):
        matches = put_matches(dataset, name, {label: rule.matches for label, rule in _labelled(rules, ledger)})
        if matches is not None:
            results["matches"] = matches
        write_selection(dataset, name, ledger.kept.to_numpy(), ledger.reasons(), about, source, results)
    return FilterResult(result.kept, result.rows, result.funnel, path)


def apply_rules(
    dataset: Dataset, items: Sequence[RuleItem], emit: Emit = silent, start: str | None = None
) -> tuple[Table, list[Rule[Any]], Ledger, dict[str, Any]]:
    """The rules' verdicts on every row, and what they were made from; nothing is written.

    Raises PairmillError as `filter_dataset` does, but not for an empty result.
    """
    table = Table(dataset)
    rules = build_rules(table, items, emit)
    columns = frozenset({"status"}).union(*(r.columns for r in rules))
    source = require_complete(table, table.sets_in(columns))
    features = frozenset[str]().union(*(r.features for r in rules))
    if features:
        source["features"] = feature_fingerprints(dataset, features)
    ledger = _run(table, rules, columns, start, source, emit)
    return table, rules, ledger, source


def recipe_items(config: FilterConfig) -> list[RuleItem]:
    """The rules in order: those of `rules`, or preset, where, dedup, top, sample, split from the other fields."""
    if isinstance(config.rules, str):
        return read_recipe(config.rules)
    if config.rules is not None:
        return list(config.rules)
    items: list[RuleItem] = [{"preset": {"name": config.preset, "against": config.against}}] if config.preset else []
    items += [{"where": expr} for expr in config.where]
    for one in config.dedup:
        what = {"near": "hash.phash"} if one == "near" else {"by": one}
        items.append({"dedup": what if config.keep is None else {**what, "keep": config.keep}})
    if config.top is not None:
        size: dict[str, Any] = {"share": config.top} if config.top < 1 else {"count": int(config.top)}
        items.append({"top": {**size, "by": config.by, "of": config.of}})
    if config.sample is not None:
        items.append({"sample": config.sample})
    if config.split is not None:
        items.append({"split": {"share": config.split, "part": config.part, "by": config.split_by}})
    return items


def read_recipe(path: str | Path) -> list[RuleItem]:
    """Rules of a YAML file: a list, or `rules:` with a list.

    Raises PairmillError: no such file, larger than 1 MiB, not YAML, unknown keys.
    """
    found = read_yaml(path)
    if isinstance(found, dict):
        unknown = [k for k in found if k != "rules"]
        if unknown:
            raise PairmillError(f"{path}: unknown key `{unknown[0]}`.{suggest(str(unknown[0]), ['rules'])}")
        found = found.get("rules")
    if not isinstance(found, list) or not all(isinstance(i, dict) for i in found):
        raise PairmillError(f"{path}: expected a list of rules, such as `- where: clip_score >= 0.28`.")
    return found


def build_rules(table: Table, items: Sequence[RuleItem], emit: Emit = silent) -> list[Rule[Any]]:
    """The rules over this dataset. Raises PairmillError for an unknown one, or one that does not fit the dataset."""
    out: list[Rule[Any]] = []
    for number, item in enumerate(items, 1):
        where = f"rule {number}"
        if not isinstance(item, Mapping) or len(item) != 1:
            raise PairmillError(f"{where}: expected one `NAME: settings`, such as `where: width >= 200`, got {item!r}.")
        (kind, settings), *_ = item.items()
        if kind == "preset":
            chosen = _preset_config(settings, where)
            known = preset(chosen.name)
            rules = known.resolved(chosen.against, chosen.name)
            _check_needs(table, chosen.name, known, emit)
            out += [_build(table, part, f"{where} (preset {chosen.name})") for part in rules]
        else:
            out.append(_build(table, item, where))
    return out


def _preset_config(settings: Any, where: str) -> PresetConfig:
    values = dict(settings) if isinstance(settings, Mapping) else {"name": str(settings)}
    return build_config(PresetConfig, values, f"{where}, `preset`")


def _build(table: Table, item: RuleItem, where: str) -> Rule[Any]:
    (kind, settings), *_ = item.items()
    rule = rule_class(str(kind), where)
    if not isinstance(settings, Mapping):
        if rule.shorthand is None:
            raise PairmillError(f"{where}: `{kind}` needs settings: {', '.join(rule.config_class.model_fields)}.")
        settings = {rule.shorthand: settings}
    return rule(build_config(rule.config_class, dict(settings), f"{where}, `{kind}`"), table)


def _check_needs(table: Table, name: str, known: Preset, emit: Emit) -> None:
    """Raises PairmillError where a column the preset needs is missing; warns where another model made it."""
    for column, command in known.needs:
        owners = [full for full in table.columns if full.rpartition(".")[2] == column]
        if not owners:
            raise PairmillError(f"Preset {name} needs `{column}`, which {table.dataset.url} lacks. Make it: {command}")
        for group in table.sets_in(owners):
            sidecar = table.score_sets[group].sidecar()
            if known.model and sidecar and known.model not in json.dumps(sidecar.identity):
                emit(
                    Notice(f"Preset {name} is made for {known.model}; scores/{group} was made by another model.", True)
                )
    if known.lacks:
        emit(Notice(f"Preset {name} leaves out: {known.lacks}."))


def require_complete(table: Table, sets: Sequence[str]) -> dict[str, Any]:
    """What the selection is made from.

    Raises PairmillError where shards of pairs or of a score set are missing or older than their pairs.
    """
    dataset = table.dataset
    missing = table.pairs.pending()
    if missing:
        raise PairmillError(
            f"{dataset.url} has pairs for {dataset.num_shards - len(missing)} of {dataset.num_shards} shards. "
            "Run the download or import command again to finish it."
        )
    source = made_from(dataset, list(sets))
    for name in sets:
        stage = table.score_sets[name]
        standing = stage.standing()
        stale = stage.stale({s: source["digests"][s] for s in sorted(standing)})
        late = [s for s in range(dataset.num_shards) if s not in standing or s in stale]
        if late:
            sidecar = stage.sidecar()
            scorer = sidecar.name if sidecar else name
            raise PairmillError(
                f"scores/{name} lacks {len(late)} of {dataset.num_shards} shards (the first: {late[0]}), or they were "
                f"made before the pairs changed. Run the `pairmill score` command that made it ({scorer}) again."
            )
    return source


def _run(
    table: Table,
    rules: Sequence[Rule[Any]],
    columns: frozenset[str],
    start: str | None,
    source: dict[str, Any],
    emit: Emit,
) -> Ledger:
    """One pass over the files, then the verdicts in order."""
    inputs = {"status": pl.col("status").is_in([SUCCESS, NO_IMAGE])}
    for i, rule in enumerate(rules):
        inputs |= {f"{i}:{key}": expr.alias(f"{i}:{key}") for key, expr in rule.inputs().items()}
    # `with_columns` first: an aggregate alone would be one row.
    whole = table.frame(columns)
    frame = whole.with_columns(**inputs).select(list(inputs))
    thresholds = sorted({t.column for r in rules for t in r.thresholds})
    try:
        values, ranges = pl.collect_all([frame, _ranges(whole, thresholds)], engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise PairmillError(f"The rules cannot be computed: {str(error).splitlines()[0]}.") from None
    _warn_far(rules, ranges, emit)  # thresholds that the data gives (`top`) are not known yet
    ledger = Ledger(values.height)
    ledger.add("status", values["status"])
    successes = ledger.kept
    if start is not None:
        base = read_selection(table.dataset, start)
        for kind in ("scores", "features"):
            source[kind] = {**base.about["made_from"].get(kind, {}), **source.get(kind, {})}
        ledger.add(f"from {start}", pl.Series(base.keep))
    for i, rule in enumerate(rules):
        prefix = f"{i}:"
        mine = values.select(pl.col(c).alias(c.removeprefix(prefix)) for c in values.columns if c.startswith(prefix))
        rule.emit = emit
        ledger.add(rule.label, rule.mark(mine, ledger.kept, successes))
    return ledger


def _ranges(frame: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """Least and greatest value of each column, one row: (`low NAME`, `high NAME`)."""
    low = [pl.col(c).min().alias(f"low {c}") for c in columns]
    return frame.select(*low, *(pl.col(c).max().alias(f"high {c}") for c in columns))


def _warn_far(rules: Sequence[Rule[Any]], ranges: pl.DataFrame, emit: Emit) -> None:
    """Warns of thresholds that cannot be meant for the column's scale."""
    found = ranges.row(0, named=True) if ranges.height else {}
    for rule, t in ((r, t) for r in rules for t in r.thresholds):
        low, high = found[f"low {t.column}"], found[f"high {t.column}"]
        if far_outside(t, (low, high)):
            emit(
                Notice(
                    f"`{rule.label}`: {t.value:g} lies far outside what `{t.column}` holds here, {low:g} to {high:g}. "
                    "Is it another scale?",
                    warning=True,
                )
            )


def _curves(table: Table, rules: Sequence[Rule[Any]], ledger: Ledger) -> tuple[Curve, ...]:
    """What other thresholds would leave, one column in memory at a time."""
    first = len(ledger.labels) - len(rules)
    out = []
    for i, rule in enumerate(rules):
        for threshold, rest in zip(rule.thresholds, rule.rests, strict=True):
            frame = table.frame(rule.columns).with_columns(**{"\0rest": rest}).select(threshold.column, "\0rest")
            column = frame.collect(engine="streaming")
            others = ledger.others(first + i) & column["\0rest"].fill_null(False)
            out.append(what_if(ledger.labels[first + i], threshold, column[threshold.column], others))
    return tuple(out)


def _thresholds(rules: Sequence[Rule[Any]], ledger: Ledger) -> list[dict[str, Any]]:
    """Every threshold with its rule's label, for the report's histograms."""
    named = [(label, t) for label, rule in _labelled(rules, ledger) for t in rule.thresholds]
    return [{"rule": label, "column": t.column, "op": t.op, "value": t.value} for label, t in named]


def _labelled(rules: Sequence[Rule[Any]], ledger: Ledger) -> list[tuple[str, Rule[Any]]]:
    """Each rule with its label in the funnel."""
    return list(zip(ledger.labels[len(ledger.labels) - len(rules) :], rules, strict=True))


def _about(
    dataset: Dataset, rules: Sequence[Rule[Any]], items: Sequence[RuleItem], start: str | None
) -> dict[str, Any]:
    """The recipe as it can be run again: presets written out, defaults left out."""
    written = [{r.kind: r.recorded()} for r in rules]
    about: dict[str, Any] = {"rules": written}
    names = [_preset_config(i["preset"], "preset").name for i in items if "preset" in i]
    if names:
        about["presets"] = names
    if start is not None:
        about["from"] = {"name": start, "recipe": selection_about(dataset, start)["recipe"]}
    return about


def _where_to(funnel: Sequence[FunnelStep]) -> str:
    """Which rule took the last rows."""
    last = next((s for s in funnel if not s.left), None)
    return "" if last is None else f"`{last.rule}` dropped the last {last.dropped:,} ({last.nulls:,} for a null)."


def _check_name(name: str | None) -> None:
    if name is None:
        raise PairmillError("Name the selection: -o NAME. Or --dry-run, which writes nothing.")
    if not _NAME.match(name):
        raise PairmillError(f"`{name}` is no name for a selection: letters, digits, `_`, `-` and `.`, at most 100.")
    if name.endswith(".matches"):  # NAME.json would be another selection's matches
        raise PairmillError(f"`{name}` is no name for a selection: it may not end in `.matches`.")
