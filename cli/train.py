"""`pairmill train`, `pairmill models`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cli.options import Common, command, new_app
from training.config import TrainConfig, resolve

app = new_app()

_HIDE = ("preset", "base", "family", "model", "objectives")


@command(
    app,
    "train",
    TrainConfig,
    example="pairmill train vilt-tiny DATASET --selection best -o runs/vilt",
    hide=_HIDE,
    partial=True,
)
def train(
    given: dict[str, Any],
    common: Common,
    preset: Annotated[str, typer.Argument(help="A preset by name (`pairmill models`), or a YAML file.")],
    datasets: Annotated[list[str], typer.Argument(help="DATASET[@SELECTION][:WEIGHT], one or several.")],
    output: Annotated[str, typer.Option("-o", "--output", help="The run folder; one that stands is gone on with.")],
    selection: Annotated[str | None, typer.Option(help="The selection, when there is one dataset.")] = None,
    val: Annotated[
        str | None, typer.Option(help="What chooses the best checkpoint: DATASET@SELECTION, or a task set's dataset.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print every resolved number and where it differs; train nothing.")
    ] = False,
) -> int:
    """Train a model from shards and a selection.

    Flags replace the preset's numbers. The same command goes on with a run that was stopped or killed. On several GPUs
    or machines: accelerate launch -m cli.main train ...
    """
    config = resolve(preset, given)
    from schemas.errors import PairmillError

    if selection is not None:
        if len(datasets) != 1 or "@" in datasets[0]:
            raise PairmillError("--selection goes with one DATASET without @SELECTION; else write DATASET@SELECTION.")
        head, colon, weight = datasets[0].partition(":") if "://" not in datasets[0] else (datasets[0], "", "")
        datasets = [f"{head}@{selection}{colon}{weight}"]
    if show:
        from training.train import describe_run

        typer.echo(json.dumps(describe_run(config, datasets), indent=1, ensure_ascii=False))
        return 0
    from training.train import train as run_training

    with common.drawer() as emit:
        result = run_training(config, datasets, output, emit, _validation(val, config, output))
    last = f", loss {result.loss:.4f}" if result.loss is not None else ""
    best = f", best {result.best:.4f}" if result.best is not None else ""
    if result.main:
        typer.echo(f"{result.run}: step {result.step:,} of {result.steps:,}{last}{best}")
    return 0 if result.finished or config.stop else 1


def _validation(val: str | None, config: TrainConfig, run: str) -> Any:
    """A task set's metric where `val` is a dataset with tasks, else the text itself: a selection's loss."""
    if val is None or "@" in val:
        return val
    from downstream.retrieval import validation_metric

    return validation_metric(val, config, run)


@command(app, "models", example="pairmill models")
def models(common: Common) -> int:
    """List models with their inputs, objectives, tasks and published weights, and the presets."""
    from cli.tables import print_table
    from training.config import preset_names, read_preset
    from training.registry import model_rows

    print_table(model_rows())
    typer.echo("\npresets")
    for name in preset_names():
        values = read_preset(name)
        typer.echo(
            f"  {name:16} {values['family']} {values['model'].get('size', '')}, {values['steps']:,} steps of "
            f"{values['batch_size']:,} pairs, lr {values['lr']:g}"
        )
    return 0
