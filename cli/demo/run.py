"""`pairmill demo`: every stage as a user would type it, run in one process; the demo is the tutorial."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import new_app

if TYPE_CHECKING:
    from cli.demo.prepare import DemoSettings
    from cli.demo.steps import Places, Step

app = new_app()
TIMES = "times.json"
HELD_OUT = 100
SHOWN_THRESHOLDS = 8


@app.command("demo")
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder of the demo; one that stands is gone on with.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the scenes and their noise.", min=0)] = 0,
    rows: Annotated[int, typer.Option(help="Pairs in the list.", min=60)] = 2000,
    steps: Annotated[int | None, typer.Option(help="Steps of every training [default: the presets']", min=1)] = None,
    tour: Annotated[bool, typer.Option("--tour", help="Also run what the demo leaves out for time.")] = False,
) -> int:
    """Make a small noisy web; curate, train and evaluate on it. Offline, about five minutes on two cores.

    Scenes of coloured shapes have captions, and four in ten pairs are spoiled in a way that is written down: captions
    of other pictures, dead links, corrupt files, tiny pictures, duplicates, file names and other languages for
    captions. The demo downloads them, trains a CLIP, filters with it, tells how much of the noise was found, trains
    ViLT on the curated and on the uncurated pairs, and writes report.html. The same command goes on where it stopped.

    Example: pairmill demo -o demo
    """
    from cli.demo.prepare import DemoSettings

    held_out = min(HELD_OUT, rows // 10)
    report = run_demo(output, DemoSettings(seed=seed, rows=rows, held_out=held_out, steps=steps), tour)
    typer.secho(f"\nOpen {report} in a browser.", bold=True)
    return 0


def run_demo(folder: Path, wanted: DemoSettings, tour: bool = False) -> Path:
    """Runs what is left to do of the demo in `folder`; the path of its report.

    Raises PairmillError where a stage does not end well, or the folder holds something else.
    """
    from cli.demo import steps
    from cli.demo.prepare import begin

    settings = begin(folder, wanted)
    at, clock = steps.Places(folder, settings.steps), Clock(folder / TIMES)
    first, *rest = steps.curation(at)
    _with_web(folder, settings, at, first, clock)
    _run(rest, clock)
    _tell_noise(at)
    _run([*steps.features(at), *steps.training(at), *steps.evaluation(at), *steps.closing(at)], clock)
    if tour:
        _run(steps.tour(at), clock)
    return _finish(at, settings, clock)


class Clock:
    """Seconds of each stage, kept in a file: a stage that a later run finds done keeps what it took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_bytes()) if path.is_file() else {}

    def add(self, name: str, seconds: float) -> None:
        """Records a stage that has ended, the first time only."""
        from shards.files import atomic_file

        if name not in self.seconds:
            self.seconds[name] = round(seconds, 2)
            with atomic_file(self.path) as stream:
                stream.write((json.dumps(self.seconds, indent=1) + "\n").encode())


def _with_web(folder: Path, settings: DemoSettings, at: Places, download: Step, clock: Clock) -> None:
    """Makes the scenes, then downloads while the small web serves them; a finished download is only told."""
    from cli.demo.prepare import is_downloaded, make_held_out, make_list
    from cli.demo.web import SmallWeb

    if is_downloaded(at.data):
        _run([download], clock)
        return
    _head("Make scenes", "Pictures of shapes and what people might say of them; four in ten pairs are spoiled.")
    began = time.monotonic()
    make_held_out(folder, settings)
    noisy = make_list(folder, settings)
    clock.add("scenes", time.monotonic() - began)
    with SmallWeb(noisy.pages, settings.port, stall_s=10.0) as web:
        print(f"{len(noisy.pairs):,} pairs in {folder / 'list.parquet'}, served at {web.url} while they are downloaded")
        _run([download], clock)


def _run(steps: Iterable[Step], clock: Clock) -> None:
    from cli.demo.steps import require_done
    from cli.main import run

    for step in steps:
        _head(step.title, step.why)
        typer.secho(f"$ {step.command}", fg="cyan", bold=True)
        sys.stdout.flush()
        began = time.monotonic()
        code = run(list(step.arguments))
        sys.stdout.flush()
        require_done(code, step)
        clock.add(step.name, time.monotonic() - began)


def _head(title: str, why: str) -> None:
    typer.secho(f"\n== {title}", bold=True)
    print(why)


def _tell_noise(at: Places) -> None:
    """How well the filter found the planted noise."""
    from cli.demo import truth
    from cli.demo.steps import SELECTION
    from cli.tables import print_table
    from shards.dataset import Dataset

    _head("How well did the filter find the planted noise?", "Its choice against what was written down when planting.")
    frame = truth.read_truth(Dataset.open(at.data), SELECTION)
    found = truth.kinds(frame)
    print_table(
        [
            {
                "planted as": truth.TITLES[k.kind],
                "pairs": k.planted,
                "failed": k.failed,
                "filtered": k.dropped,
                "kept": k.kept,
                "gone": f"{k.found:.0%}",
            }
            for k in found
        ]
    )
    q = truth.quality(found)
    print(f"precision {q.precision:.1%}, recall {q.recall:.1%} ({q.thrown:,} gone, {q.noise:,} noisy)\n")
    curve = truth.caption_curve(frame)
    some = curve[:: max(1, len(curve) // SHOWN_THRESHOLDS)]
    print_table(
        [
            {
                "drop below clip_score": round(p.threshold, 3),
                "pairs left": p.left,
                "precision": f"{p.precision:.0%}",
                "recall": f"{p.recall:.0%}",
            }
            for p in some
        ]
    )
    print("Noise here: captions of other pictures, file names, other languages; of pairs that have a picture.")


def _finish(at: Places, settings: DemoSettings, clock: Clock) -> Path:
    """Writes the report and tells the results."""
    from cli.demo.page import write_page
    from cli.demo.results import gather, result_rows
    from cli.tables import print_table

    _head(
        "Results",
        f"Retrieval among {settings.held_out:,} clean scenes that no model has seen; recall at k in percent. "
        "i2t: a picture's captions are searched; t2i: a caption's picture.",
    )
    found = gather(at, settings, clock.seconds)
    print_table(result_rows(found))
    print(f"{sum(clock.seconds.values()):,.0f} s in all")
    return write_page(at, found)
