"""`pairmill show`, `history`, `check`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import Common, command, new_app
from cli.tables import print_table
from curation.maintenance_config import CheckConfig, RemoveConfig, ShowConfig

app = new_app()
DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]


@command(app, "show", ShowConfig, example="pairmill show DATASET --selection best -o sheet.png")
def show(config: ShowConfig, common: Common, dataset: DATASET) -> int:
    """Show rows in the terminal, or as a contact sheet: a seeded sample, or the rows you name."""
    from curation.show import show as read_rows

    for row in read_rows(dataset, config):
        typer.echo(f"row {row.shard}:{row.row}")
        for name, value in row.values.items():
            if value is not None:
                typer.echo(f"  {name}: {_short(value)}")
    if config.output is not None:
        typer.echo(str(config.output))
    return 0


def _short(value: Any, most: int = 200) -> str:
    if isinstance(value, bytes):
        return value.hex()
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    # A caption is a stranger's text: nothing in it may move the cursor.
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


@command(app, "history", example="pairmill history DATASET -v")
def history(common: Common, dataset: DATASET) -> int:
    """Tell every stage of a dataset: its maker, how far it is, rows by status, seconds; -v adds settings."""
    from curation.history import history as summaries

    found = summaries(dataset)
    print_table(
        [
            {
                "stage": s.path,
                "made by": s.made_by,
                "shards": f"{s.shards[0]:,}/{s.shards[1]:,}",
                "rows": ", ".join(f"{k} {v:,}" for k, v in sorted(s.counts.items(), key=lambda i: -i[1])),
                "seconds": f"{s.seconds:,.1f}",
            }
            for s in found
        ]
    )
    for one in found if common.verbose else ():
        typer.echo(f"\n{one.path}  fingerprint {one.fingerprint}")
        for name, value in {**one.identity, **one.recorded, **one.versions}.items():
            typer.echo(f"  {name}: {value}")
    return 0


@command(app, "check", CheckConfig, example="pairmill check DATASET")
def check(config: CheckConfig, common: Common, dataset: DATASET) -> int:
    """Read a dataset back: hashes of images, alignment, schemas, what is out of date.

    Exit code 0 all well, 1 unfinished or out of date, 2 damaged.
    """
    from curation.check import check as read_back

    with common.drawer() as emit:
        findings = read_back(dataset, config, emit)
    for found in findings:
        typer.echo(f"{'damaged' if found.error else 'unfinished'}: {found.where}: {found.text}")
    if not findings:
        typer.echo("all well")
    return 2 if any(f.error for f in findings) else 1 if findings else 0


@command(app, "remove", RemoveConfig, example="pairmill remove DATASET --list requests.csv")
def remove(config: RemoveConfig, common: Common, dataset: DATASET) -> int:
    """Take rows out on request, by uid or url: out of input, pairs, scores, features, task sets and later downloads.

    A row keeps its place and its uid. Selections made before are out of date, reports are deleted: make them again.
    """
    from curation.remove import remove as take_out

    with common.drawer() as emit:
        done = take_out(dataset, config, emit)
    typer.echo(f"{dataset}: {done.rows:,} rows removed, {done.files:,} files rewritten or deleted")
    if done.unknown:
        typer.echo(f"{done.unknown:,} entries name no row here; later downloads leave them out too.")
    return 0
