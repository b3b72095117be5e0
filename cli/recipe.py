"""`pairmill run recipe.yaml`: the stages of a YAML file, built from the same models as the flags."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from cli.main import COMMANDS, load
from cli.options import Common, Handler, command, handler_of, new_app
from schemas.config import StageConfig, build_config, read_yaml
from schemas.errors import PairmillError, suggest

app = new_app()
KEYS = ("dataset", "stages")
NOT_STAGES = ("demo", "run", "browse")


@dataclass(frozen=True)
class Step:
    """One stage, checked: its command, the handler's own arguments, and its configuration or the values given."""

    name: str
    handler: Handler
    own: dict[str, Any]
    config: StageConfig | None
    given: dict[str, Any]

    def run(self, common: Common) -> int:
        """The command's exit code."""
        if self.handler.partial:
            return self.handler.call(given=self.given, common=common, **self.own)
        if self.config is None:
            return self.handler.call(common=common, **self.own)
        return self.handler.call(config=self.config, common=common, **self.own)

    def as_yaml(self) -> dict[str, Any]:
        """Every setting, defaults included."""
        settings = self.given if self.config is None else self.config.model_dump(mode="json")
        own = {k: str(v) if isinstance(v, Path) else v for k, v in self.own.items() if v is not None}
        return {self.name: {**own, **{k.rstrip("_"): v for k, v in settings.items()}}}


@command(app, "run", example="pairmill run recipe.yaml")
def run(
    common: Common,
    recipe: Annotated[Path, typer.Argument(help="A YAML file: `dataset` and `stages`.")],
    show: Annotated[bool, typer.Option("--print", help="Print every setting as a recipe; run nothing.")] = False,
) -> int:
    """Run the stages of a recipe in order. Each is a command and its settings, by the names of its flags.

    The whole file is checked before the first stage starts. A stage that is done already says so: the same command
    goes on where it was stopped. Paths are relative to the current folder.
    """
    steps = read_recipe(recipe)
    if show:
        text = yaml.safe_dump({"stages": [s.as_yaml() for s in steps]}, sort_keys=False, allow_unicode=True, width=100)
        typer.echo(text, nl=False)
        return 0
    for number, step in enumerate(steps, 1):
        typer.secho(f"== {number}/{len(steps)} {step.name}", err=True, bold=True)
        code = step.run(common)
        if code:
            typer.echo(f"stage {number}, {step.name}, ended with {code}: the rest was not started.", err=True)
            return code
    return 0


def read_recipe(path: Path) -> list[Step]:
    """The stages, checked.

    Raises PairmillError: no YAML file, an unknown key or command (with the nearest one), a value that does not fit.
    """
    found = read_yaml(path)
    if not isinstance(found, dict) or not isinstance(found.get("stages"), list) or not found["stages"]:
        raise PairmillError(f"{path}: expected `stages`, a list such as `- report: {{}}`, and perhaps `dataset`.")
    unknown = [str(key) for key in found if key not in KEYS]
    if unknown:
        raise PairmillError(f"{path}: unknown key `{unknown[0]}`.{suggest(unknown[0], KEYS)}")
    dataset = found.get("dataset")
    if dataset is not None and not isinstance(dataset, str):
        raise PairmillError(f"{path}: `dataset` must be a folder or URL, got {dataset!r}.")
    return [_step(item, dataset, f"{path}, stage {number}") for number, item in enumerate(found["stages"], 1)]


def _step(item: Any, dataset: str | None, where: str) -> Step:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise PairmillError(f"{where}: expected one `COMMAND: settings`, got {item!r}.")
    ((name, settings),) = item.items()
    if not isinstance(settings, dict | None):
        raise PairmillError(f"{where}, `{name}`: expected settings by name, got {settings!r}.")
    handler = _find(str(name), where)
    where = f"{where}, `{name}`"
    values = {str(key).replace("-", "_"): value for key, value in (settings or {}).items()}
    if "from" in values:
        values["from_"] = values.pop("from")
    names = [*(p.name for p in handler.own), *handler.fields]
    for key in values:
        if key not in names:
            raise PairmillError(f"{where}: unknown key `{key}`.{suggest(key, names)}")
    own = dict(_own(handler, values, dataset, str(name).split()[0], where))
    fields = handler.fields
    given = {key: _listed(value, fields[key].annotation) for key, value in values.items() if key in fields}
    if handler.config is None or handler.partial:
        return Step(str(name), handler, own, None, given)
    return Step(str(name), handler, own, build_config(handler.config, given, where), {})


def _find(name: str, where: str) -> Handler:
    """The handler of `score clip`, `filter`, ..."""
    first, *rest = name.split()
    if first not in COMMANDS or first in NOT_STAGES:
        names = [c for c in COMMANDS if c not in NOT_STAGES]
        raise PairmillError(f"{where}: there is no stage `{name}`.{suggest(first, names)}")
    found = load(first)
    for word in rest:
        group = getattr(found, "commands", {})
        if word not in group:
            raise PairmillError(f"{where}: there is no `{name}`.{suggest(word, group)}")
        found = group[word]
    handler = handler_of(found)
    if handler is None:
        known = ", ".join(f"`{first} {word}`" for word in getattr(found, "commands", {}))
        raise PairmillError(f"{where}: `{name}` is a group. Give one of {known}.")
    return handler


def _own(
    handler: Handler, values: dict[str, Any], dataset: str | None, first: str, where: str
) -> Iterator[tuple[str, Any]]:
    """The handler's own arguments, checked; the recipe's `dataset` where a stage names none."""
    makes = first in ("download", "import")
    for parameter in handler.own:
        name, kind = parameter.name, typing.get_args(parameter.annotation)[0]
        if name in values:
            value = _listed(values[name], kind)
            try:
                yield name, TypeAdapter(kind).validate_python(value)
            except ValidationError as error:
                raise PairmillError(f"{where}: `{name}`: {error.errors()[0]['msg']}, got {value!r}.") from None
        elif dataset is not None and (name == "dataset" or (name == "output" and makes)):
            yield name, dataset
        elif dataset is not None and name == "datasets":
            yield name, [dataset]
        elif parameter.default is inspect.Parameter.empty:
            raise PairmillError(f"{where}: `{name}` is missing.")
        else:
            yield name, parameter.default


def _listed(value: Any, kind: Any) -> Any:
    """One word where a list is wanted is a list of it."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = [one for one in (typing.get_args(kind) if union else [kind]) if one is not type(None)]
    lists = all(typing.get_origin(one) in (list, tuple) for one in kinds)
    return [value] if isinstance(value, str) and lists else value
