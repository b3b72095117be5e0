"""`pairmill import-features` and `pairmill export-features`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Common, command, finish, new_app
from extractors.imports.config import EXPORTS, FORMATS, ExportFeaturesConfig, ImportFeaturesConfig

app = new_app()

DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]


@command(
    app,
    "import-features",
    ImportFeaturesConfig,
    example="pairmill import-features tsv trainval_36.tsv DATASET --key image_id --name butd",
)
def import_features(
    config: ImportFeaturesConfig,
    common: Common,
    format: Annotated[str, typer.Argument(help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")],
    path: Annotated[str, typer.Argument(help="The file, or the folder of an LMDB or of a file an image.")],
    dataset: DATASET,
) -> int:
    """Bring in region features that somebody already has, joined with the rows by what names the image."""
    from extractors.imports.run import import_features as run

    with common.drawer() as emit:
        return finish(run(format, path, dataset, config, emit))


@command(
    app,
    "export-features",
    ExportFeaturesConfig,
    example="pairmill export-features uniter-lmdb DATASET --name regions -o img_db/mine",
)
def export_features(
    config: ExportFeaturesConfig,
    common: Common,
    format: Annotated[str, typer.Argument(help=f"{' or '.join(EXPORTS)}.")],
    dataset: DATASET,
    output: Annotated[str, typer.Option("-o", "--output", help="What to write, on this machine.")],
) -> int:
    """Write region features as LXMERT's and bottom-up attention's TSV, or as UNITER's LMDB."""
    from extractors.imports.export import export_features as run

    with common.drawer() as emit:
        return finish(run(format, dataset, output, config, emit))
