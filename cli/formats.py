"""`pairmill import`, `export`, `merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Common, command, finish, new_app
from curation.maintenance_config import ExportDatasetConfig, MergeConfig

app = new_app()
export = new_app()
app.add_typer(export, name="export")

DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]
OUTPUT = Annotated[str, typer.Option("-o", "--output", help="Where to write; a stopped run is gone on with.")]


@export.callback()
def _export() -> None:
    """Copy pairs into another tool's format."""


@command(export, "dataset", ExportDatasetConfig, example="pairmill export dataset DATASET --selection best -o NEW")
def export_dataset(config: ExportDatasetConfig, common: Common, dataset: DATASET, output: OUTPUT) -> int:
    """Cut what a selection keeps into a new dataset, with its scores, features and task sets."""
    from curation.export import export_dataset as run

    with common.drawer() as emit:
        return finish(run(dataset, output, config, emit))


@command(app, "merge", MergeConfig, example="pairmill merge A B -o BOTH")
def merge(
    config: MergeConfig,
    common: Common,
    datasets: Annotated[list[str], typer.Argument(help="Datasets to join, in this order.")],
    output: OUTPUT,
) -> int:
    """Join datasets into a new one; scores and features that all have, made alike, go along."""
    from curation.merge import merge as run

    with common.drawer() as emit:
        return finish(run(datasets, output, config, emit))
