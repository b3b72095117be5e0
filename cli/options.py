"""One source for flags: a command's options come from its configuration model."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic.fields import FieldInfo

from cli.progress import Drawer
from cli.versions import version_option
from schemas.config import StageConfig, build_config
from schemas.events import StageFinished

F = TypeVar("F", bound=Callable[..., Any])

_COMMON = "Every command"


@dataclass(frozen=True)
class Common:
    """What every command understands."""

    verbose: bool
    quiet: bool
    log_file: str | None

    def drawer(self) -> Drawer:
        """Draws the events of a stage on stderr; a context manager."""
        return Drawer(verbose=self.verbose, quiet=self.quiet, log_file=self.log_file)


@dataclass(frozen=True)
class Handler:
    """What stands behind a command: `run recipe.yaml` calls it without a command line.

    config  the model its options come from, or None; `hide` are fields of it that are no options
    own     the handler's other parameters
    """

    call: Callable[..., Any]
    config: type[StageConfig] | None
    hide: tuple[str, ...]
    partial: bool
    own: tuple[inspect.Parameter, ...]

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The configuration's fields that are options."""
        known = {} if self.config is None else self.config.model_fields
        return {name: field for name, field in known.items() if name not in self.hide}


def handler_of(found: Any) -> Handler | None:
    """The handler of a command as Typer made it; None for one that `command` did not register."""
    return getattr(found.callback, "handler", None)


def new_app(**settings: Any) -> typer.Typer:
    """A Typer whose help is plain text, as the main command's."""
    return typer.Typer(rich_markup_mode=None, no_args_is_help=True, **settings)


def command(
    app: typer.Typer,
    name: str,
    config: type[StageConfig] | None = None,
    example: str = "",
    hide: tuple[str, ...] = (),
    partial: bool = False,
) -> Callable[[F], F]:
    """Registers a handler `f(config, common, ...)`: one option a field of `config`, and the common ones.

    The handler's docstring is the help, its other parameters are Typer's own. `hide` names fields that are no flags.
    With `partial` the handler gets `given`, the flags that were given, instead of a configuration.
    """

    def register(handler: F) -> F:
        special = ("config", "given", "common")
        own = tuple(p for n, p in inspect.signature(handler, eval_str=True).parameters.items() if n not in special)
        stage = Handler(handler, config, hide, partial, own)
        fields = stage.fields

        @functools.wraps(handler)
        def call(**flags: Any) -> Any:
            flags.pop("version")
            common = Common(flags.pop("verbose"), flags.pop("quiet"), flags.pop("log_file"))
            values = {n: v for n in fields if (v := flags.pop(n)) not in (None, [], ())}
            if partial:
                return handler(given=values, common=common, **flags)
            if config is None:
                return handler(common=common, **flags)
            return handler(config=build_config(config, values, name), common=common, **flags)

        parameters = [*own, *(_parameter(n, f, partial) for n, f in fields.items()), *_common_parameters()]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.handler = stage  # type: ignore[attr-defined]
        text = inspect.cleandoc(handler.__doc__ or "")
        app.command(name, help=text + (f"\n\nExample: {example}" if example else ""))(call)
        return handler

    return register


def finish(result: StageFinished) -> int:
    """The exit code of a stage: 1 when shards are left to do, which are listed."""
    if not result.left:
        return 0
    shown = ", ".join(map(str, result.left[:20])) + (", ..." if len(result.left) > 20 else "")
    typer.echo(
        f"{result.stage}: {len(result.left)} shards left to do: {shown}. Run the same command again.",
        err=True,
    )
    return 1


_SHORT = {"output": ("-o", "--output"), "from_": ("--from",), "set_": ("--set",)}


def _parameter(name: str, field: FieldInfo, partial: bool) -> inspect.Parameter:
    kind = _kind(field.annotation)
    flag = name.replace("_", "-")
    negative = kind is bool and (partial or field.default is True)
    flags = _SHORT.get(name) or ((f"--{flag}/--no-{flag}",) if negative else (f"--{flag}",))
    required = field.is_required() and not partial
    default = None if required or partial else field.get_default(call_default_factory=True)
    default = list(default) if isinstance(default, tuple) else default
    option = typer.Option(*flags, help=field.description, show_default=default not in (None, [], "", False))
    annotation = kind if required or default is not None else kind | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[annotation, option],
    )


def _kind(annotation: Any) -> Any:
    """The type Typer sees: X of `X | None`, list of a tuple, the first plain type of a union."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(annotation) if k is not type(None)]
        return _kind(kinds[0]) if len(kinds) == 1 else str
    if origin in (tuple, list):
        return list[_kind(typing.get_args(annotation)[0])]  # type: ignore[misc]
    if origin is Annotated:
        return _kind(typing.get_args(annotation)[0])
    if origin is Literal or annotation in (int, float, bool, str, Path):
        return annotation
    return str


def _common_parameters() -> list[inspect.Parameter]:
    def one(name: str, annotation: Any, default: Any, *flags: str, **settings: Any) -> inspect.Parameter:
        option = typer.Option(*flags, rich_help_panel=_COMMON, show_default=False, **settings)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
        )

    return [
        one("verbose", bool, False, "-v", "--verbose", help="Also tell every shard."),
        one("quiet", bool, False, "-q", "--quiet", help="Print errors and results only."),
        one(
            "version",
            bool,
            False,
            "--version",
            help="Print versions and exit.",
            is_eager=True,
            callback=version_option,
        ),
        one("log_file", str | None, None, "--log-file", help="Append every event to this file as JSON lines."),
    ]
