"""`pairmill download`, `filter`, `report`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Common, command, finish, new_app
from cli.tables import print_table
from curation.config import DownloadConfig
from curation.filter_config import FilterConfig, ReportConfig

app = new_app()
DATASET = Annotated[str, typer.Argument(help="The dataset, a folder or URL.")]


@command(
    app,
    "download",
    DownloadConfig,
    example="pairmill download list.parquet -o DATASET --size 384 --contact me@example.org",
)
def download(
    config: DownloadConfig,
    common: Common,
    lists: Annotated[
        list[str] | None, typer.Argument(help="Lists of URLs and captions: files, folders, globs, URLs.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="The dataset to make or to go on with.")] = None,
) -> int:
    """Download the pairs of URL lists into a dataset; the same command again goes on where it stopped.

    Lists are parquet, csv, tsv, json, jsonl, arrow or txt, also .gz and .zst. Every row of a list stays a row: one that
    fails has a status that says why. --probe N tries N rows and estimates the rest; --retry-failed tries again what may
    pass.
    """
    from schemas.errors import PairmillError

    if config.probe is not None:
        from curation.probe import probe

        with common.drawer() as emit:
            found = probe(lists or [], config, emit)
        typer.echo(
            f"{found.rows:,} of {found.list_rows:,} rows tried: {found.success_share:.1%} succeed, "
            f"{found.stored_bytes / 1000:,.1f} kB each. The whole list: {found.hours:.1f} h, "
            f"{found.transfer_bytes / 2**30:,.1f} GiB of traffic, {found.disk_bytes / 2**30:,.1f} GiB of disk."
        )
        print_table([{"status": s, "rows": n} for s, n in sorted(found.counts.items(), key=lambda i: -i[1])])
        return 0
    if output is None:
        raise PairmillError("download needs a place for the dataset: -o DATASET.")
    from curation.download import download as run_download

    with common.drawer() as emit:
        result = run_download(lists or [], output, config, emit)
    good = result.counts.get("success", 0)
    typer.echo(f"{result.dataset}: {good:,} of {result.rows:,} rows have their image")
    return finish(result.finished)


@command(app, "filter", FilterConfig, example="pairmill filter DATASET -o best --top 0.3 --by clip_score")
def filter_(config: FilterConfig, common: Common, dataset: DATASET) -> int:
    """Choose pairs by rules; writes a selection with a reason for every row, never a copy of images.

    Rules run in the order preset, where, dedup, top, sample, split; --rules FILE gives any order, as YAML.
    """
    from curation.filter import filter_dataset

    with common.drawer() as emit:
        result = filter_dataset(dataset, config, emit)
    print_table([step.__dict__ for step in result.funnel])
    for curve in result.curves:
        typer.echo(f"\n{curve.rule}: rows left if {curve.column} {curve.op} another value than {curve.value:g}")
        print_table([{curve.column: t, "rows left": n} for t, n in curve.points])
    share = result.kept / max(1, result.rows)
    where = result.path or "nothing written (--dry-run)"
    typer.echo(f"kept {result.kept:,} of {result.rows:,} rows ({share:.1%}): {where}")
    return 0


@command(app, "report", ReportConfig, example="pairmill report DATASET")
def report(config: ReportConfig, common: Common, dataset: DATASET) -> int:
    """Write one HTML page that shows what is in a dataset and why the rest is not; the same numbers as JSON.

    The page is one file that needs no network and runs no script. It also shows the training runs in DATASET/runs,
    those in a folder `runs` beside it that were trained on it, and what --run names.
    """
    from curation.report import report as write_report

    with common.drawer() as emit:
        path = write_report(dataset, config, emit)
    typer.echo(str(path))
    return 0
