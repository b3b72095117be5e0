"""The `pairmill` command: names and one line each here, code loaded when a command runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cli.versions import version_option
from schemas.errors import PairmillError, suggest

# torch's threads wait for each other by spinning; with more of them than free cores a step took five times as long.
# Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 130

# command -> (module, function, what it does). The help of `pairmill` reads only this table.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("cli.demo.run", "Make a small noisy web; curate, train and evaluate on it."),
    "download": ("cli.curate", "Download the pairs of URL lists into a dataset."),
    "import": ("cli.formats", "Import pairs that somebody already has."),
    "score": ("cli.score", "Score every pair; scores lie beside the pairs."),
    "filter": ("cli.curate", "Choose pairs by rules; writes a selection, not a copy."),
    "report": ("cli.curate", "Write one HTML page that shows what is in a dataset."),
    "show": ("cli.inspect", "Show rows in the terminal, or as a contact sheet."),
    "history": ("cli.inspect", "Tell every stage: settings, versions, counts, seconds."),
    "browse": ("cli.browse", "Look through a dataset in a local page: search, slide, select."),
    "check": ("cli.inspect", "Read a dataset back: hashes, alignment, schemas."),
    "export": ("cli.formats", "Copy pairs into another tool's format."),
    "merge": ("cli.formats", "Join datasets into a new one."),
    "remove": ("cli.inspect", "Take rows out on request, everywhere."),
    "extract": ("cli.extract", "Compute features of every image: patches, grids, regions."),
    "import-features": ("cli.features", "Bring in region features that somebody already has."),
    "export-features": ("cli.features", "Write region features as LXMERT and UNITER read them."),
    "draw": ("cli.extract", "Draw what was extracted."),
    "train": ("cli.train", "Train a model from shards and a selection."),
    "models": ("cli.train", "List models: inputs, objectives, tasks, presets."),
    "task": ("cli.evaluate", "Import a benchmark's official files as a task set."),
    "run": ("cli.recipe", "Run the stages of a recipe, a YAML file, in order."),
    "evaluate": ("cli.evaluate", "Evaluate a run or a checkpoint on a task set."),
}


class Lazy(TyperGroup):
    """Knows its commands by name; imports a command's module when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else TyperCommand(cmd_name, help=entry[1])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        if name not in COMMANDS:
            ctx.fail(f"No such command `{name}`.{suggest(name, COMMANDS)}")
        return name, load(name), args[1:]


def load(name: str) -> Any:
    """The real command or group called `name`."""
    app = import_module(COMMANDS[name][0]).app
    group = typer.main.get_group(app)
    return group.get_command(None, name)  # type: ignore[arg-type]


app = typer.Typer(
    cls=Lazy,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def pairmill(
    version: bool = typer.Option(
        False,
        "--version",
        is_eager=True,
        callback=version_option,
        help="Print the versions a bug report needs, and exit.",
    ),
) -> None:
    """Turn a list of web image-text pairs into curated, featurised, training-ready shards, and train and evaluate
    vision-language models on them.

    Start with `pairmill demo`, or `pairmill download LIST -o DATASET`.
    """


def run(arguments: list[str]) -> int:
    """Runs one command in this process; the exit code: 0 done, 1 shards left, 2 an error to mend, 130 Ctrl-C."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="pairmill", standalone_mode=False)
        if result == INTERRUPTED:  # what Typer makes of Ctrl-C
            print("\nstopped; run the same command again to go on.", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except PairmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    except Exception as error:
        show = getattr(error, "show", None)  # the usage errors of Click, whichever package carries it
        if show is not None and hasattr(error, "exit_code"):
            show()
            return int(error.exit_code)
        raise


def main() -> None:
    """Entry point of the `pairmill` script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
