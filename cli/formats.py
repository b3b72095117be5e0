"""`pairmill import`, `export`, `merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Common, command, finish, new_app
from curation.maintenance_config import (
    ArrowExportConfig,
    CsvImportConfig,
    ExportConfig,
    ExportDatasetConfig,
    HuggingFaceImportConfig,
    ImagesImportConfig,
    ImportConfig,
    MergeConfig,
)

app = new_app()
export = new_app()
importer = new_app()
app.add_typer(export, name="export")
app.add_typer(importer, name="import")

DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]
OUTPUT = Annotated[str, typer.Option("-o", "--output", help="Where to write; a stopped run is gone on with.")]


PATHS = Annotated[list[str], typer.Argument(help="Files, folders, globs or URLs.")]

# format -> (what is imported, what is exported; None: it is only imported)
FORMATS: dict[str, tuple[str, str | None]] = {
    "webdataset": (
        "Import webdataset tars: an image, a .txt or .json of captions and columns, by key.",
        "Copy pairs into webdataset tars: the same bytes at every run, with sizes.json and an index.",
    ),
    "img2dataset": (
        "Import what img2dataset wrote (files, webdataset or parquet), failures and their causes included.",
        "Copy pairs into img2dataset's webdataset layout, with its parquet and _stats.json files.",
    ),
    "folder": (
        "Import a folder of images with .txt or .json beside them, or a metadata.csv, .jsonl or .parquet.",
        "Copy pairs into a folder of images with metadata.jsonl, as Hugging Face's ImageFolder reads it.",
    ),
    "huggingface": (
        "Import Hugging Face Parquet: a column of images (bytes and path), captions and columns beside it.",
        "Copy pairs into Hugging Face Parquet, data/train-00000-of-00005.parquet, which `datasets` loads as it is.",
    ),
    "arrow": (
        "Import pair files of ViLT, METER or VLMo: coco, f30k, conceptual, sbu, vg and wikibk .arrow files.",
        "Copy pairs into .arrow files under the names that ViLT, METER and VLMo look for.",
    ),
    "coco": (
        "Import COCO captions: captions_*.json and its images, one pair an image with all its captions.",
        "Copy pairs into a COCO captions.json and its images.",
    ),
    "albef": (
        "Import ALBEF's and BLIP's JSON lists of image, caption and image_id; an image's entries become one pair.",
        "Copy pairs into a JSON list as ALBEF and BLIP read it, pairs.json, and its images.",
    ),
    "llava": (
        "Import LLaVA's JSON: what gpt says of an image is its caption.",
        "Copy pairs into llava.json, one question and one answer an entry, and its images.",
    ),
    "csv": (
        "Import a csv or tsv of image names and captions, such as open_clip's filepath and title.",
        "Copy pairs into pairs.tsv, with open_clip's columns filepath and title, and its images.",
    ),
    "visual_genome": (
        "Import Visual Genome's region_descriptions.json and images: one pair an image, its phrases as captions.",
        None,
    ),
    "datacomp": (
        "Import DataComp's metadata, parquet and npz: rows without images, with scores and embeddings to filter by.",
        "Copy rows, with images or without, into Parquet for `pairmill download`, and DataComp's subset.npy.",
    ),
    "text": ("Import plain text, a caption a line: rows without images.", None),
}
# Where a format has options of its own.
IMPORT_CONFIGS: dict[str, type[ImportConfig]] = {
    "huggingface": HuggingFaceImportConfig,
    "coco": ImagesImportConfig,
    "albef": ImagesImportConfig,
    "llava": ImagesImportConfig,
    "csv": CsvImportConfig,
    "visual_genome": ImagesImportConfig,
}
EXPORT_CONFIGS: dict[str, type[ExportConfig]] = {"arrow": ArrowExportConfig}
# Options that mean nothing to a format.
HIDDEN: dict[str, tuple[str, ...]] = {
    "text": ("caption_key", "uid_key", "max_bytes", "max_pixels"),
    "datacomp": ("max_bytes", "max_pixels"),
}


@importer.callback()
def _import() -> None:
    """Import pairs that somebody already has."""


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


def _register(name: str, import_help: str, export_help: str | None) -> None:
    def import_format(config: ImportConfig, common: Common, paths: PATHS, output: OUTPUT) -> int:
        from curation.importing import import_pairs

        with common.drawer() as emit:
            return finish(import_pairs(name, paths, output, config, emit))

    def export_format(config: ExportConfig, common: Common, dataset: DATASET, output: OUTPUT) -> int:
        from curation.exporting import export_pairs

        with common.drawer() as emit:
            return finish(export_pairs(name, dataset, output, config, emit))

    import_format.__doc__, export_format.__doc__ = import_help, export_help
    reads, writes = IMPORT_CONFIGS.get(name, ImportConfig), EXPORT_CONFIGS.get(name, ExportConfig)
    example = f"pairmill import {name} PATH -o DATASET"
    command(importer, name, reads, example=example, hide=HIDDEN.get(name, ()))(import_format)
    if export_help is not None:
        command(export, name, writes, example=f"pairmill export {name} DATASET --selection best -o PATH")(export_format)


for _name, _helps in FORMATS.items():
    _register(_name, *_helps)
