"""`pairmill extract ...` and `pairmill draw ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Common, command, finish, new_app
from extractors.config import GridConfig, PatchesConfig
from extractors.regions.config import RegionsConfig

app = new_app()
extract = new_app()
draw = new_app()
app.add_typer(extract, name="extract")
app.add_typer(draw, name="draw")

DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]


@extract.callback()
def _extract() -> None:
    """Compute features of every image: patches, grids, regions."""


@draw.callback()
def _draw() -> None:
    """Draw what was extracted."""


@command(extract, "patches", PatchesConfig, example="pairmill extract patches DATASET --size 384 --patch 32")
def patches(config: PatchesConfig, common: Common, dataset: DATASET) -> int:
    """Cut every image into the uint8 patches that ViLT reads, so that training needs no decoder."""
    from extractors.patches import extract_patches

    with common.drawer() as emit:
        return finish(extract_patches(dataset, config, emit))


@command(
    extract,
    "grid",
    GridConfig,
    example="pairmill extract grid DATASET --backbone clip:RN50-quickgelu --pretrained openai",
)
def grid(config: GridConfig, common: Common, dataset: DATASET) -> int:
    """Keep the feature map of every image before it is pooled, as CLIP-ViL, METER and ALBEF read images."""
    from extractors.grid import extract_grid

    with common.drawer() as emit:
        return finish(extract_grid(dataset, config, emit))


@command(extract, "regions", RegionsConfig, example="pairmill extract regions DATASET --detector torchvision:tiny")
def regions(config: RegionsConfig, common: Common, dataset: DATASET) -> int:
    """Find the objects of every image: boxes, features, confidences, class probabilities."""
    from extractors.regions.extractor import extract_regions

    with common.drawer() as emit:
        return finish(extract_regions(dataset, config, emit))


@command(draw, "regions", example="pairmill draw regions DATASET --row 12 -o boxes.png")
def draw_regions(
    common: Common,
    dataset: DATASET,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write, a PNG.")],
    row: Annotated[str, typer.Option(help="N counts over the dataset, S:N is row N of shard S.")] = "0",
    name: Annotated[str, typer.Option(help="The feature set.")] = "regions",
    min_conf: Annotated[float, typer.Option(help="Draw boxes from this confidence on, 0 to 1.")] = 0.3,
) -> int:
    """Draw the boxes of one image with their names and confidences: the 24 most confident; of boxes of one name that
    overlap by more than half, one.
    """
    from extractors.regions.picture import draw_row

    count = draw_row(dataset, row, name, output, min_conf)
    typer.echo(f"{output}: row {row} has {count} boxes of confidence {min_conf:g} or more")
    return 0
