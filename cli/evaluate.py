"""`pairmill task import`, `pairmill evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Common, command, new_app
from downstream.config import RetrievalConfig, RetrievalImportConfig

app = new_app()
task = new_app(help="Import a benchmark's official files as a task set.")
importer = new_app(help="Read a benchmark's official files and images into a dataset with a task set.")
evaluate = new_app(help="Evaluate a run or a checkpoint on a task set.")
app.add_typer(task, name="task")
task.add_typer(importer, name="import")
app.add_typer(evaluate, name="evaluate")


@command(
    importer,
    "retrieval",
    RetrievalImportConfig,
    example="pairmill task import retrieval --karpathy dataset_flickr30k.json --images flickr30k-images -o DATASET",
)
def import_retrieval(
    config: RetrievalImportConfig,
    common: Common,
    output: Annotated[str, typer.Option("-o", "--output", help="The dataset; an import that was stopped goes on.")],
) -> int:
    """Import image-text retrieval from a Karpathy split file: Flickr30k, COCO.

    One row per image, its bytes as they are, all its captions in order. COCO's training split is train and restval.
    """
    from downstream.retrieval_import import import_retrieval as run_import

    with common.drawer() as emit:
        result = run_import(output, config, emit)
    captions = ", ".join(f"{split} {count:,}" for split, count in result.captions.items())
    missing = f", {result.missing:,} of them without pixels" if result.missing else ""
    typer.echo(f"{result.url} tasks/{config.name}: {result.images:,} images{missing}; captions: {captions}")
    return 0


@command(
    evaluate,
    "retrieval",
    RetrievalConfig,
    example="pairmill evaluate retrieval runs/clip TASKSET",
)
def evaluate_retrieval(
    config: RetrievalConfig,
    common: Common,
    checkpoint: Annotated[str, typer.Argument(help="A run (its best, else its last checkpoint), or a checkpoint.")],
    taskset: Annotated[str, typer.Argument(help="A dataset with a retrieval task.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Where results go. [default: RUN/evaluations/TASK-SPLIT]")
    ] = None,
) -> int:
    """Recall at 1, 5 and 10 of captions for images and of images for captions.

    CLIP ranks by dot products. ViLT scores every pair, which takes long: the cost is told first, and a stopped
    evaluation goes on; --candidates CLIP_RUN scores only the best --top-k. Choose models on val, report test.
    """
    from cli.tables import print_table
    from downstream.retrieval import evaluate_retrieval as run_evaluation

    with common.drawer() as emit:
        result = run_evaluation(checkpoint, taskset, config, emit, output)
    counts, name = result.content["counts"], result.content["checkpoint"]["name"]
    typer.echo(f"{name}, {config.split}: {counts['images']:,} images, {counts['captions']:,} captions")
    print_table(result.rows())
    typer.echo(f"Rsum {result.metric['rsum']:.2f}, mean {result.metric['mean']:.2f}: {result.folder}/results.json")
    return 0
