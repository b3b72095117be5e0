"""The stages of the demo: public commands, in order, with a word on each for the reader."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import PairmillError

SELECTION = "best"
SAMPLE = "sample"
CURATED, UNCURATED = "vilt-curated", "vilt-uncurated"
# Pictures that are no thumbnails, captions that are no file names and hold nothing but ASCII.
RULES = ("width >= 64", r"caption NOT LIKE '%.___' AND caption NOT LIKE '%.jpeg'", "NOT regexp_like(caption, '[^ -~]')")


@dataclass(frozen=True)
class Places:
    """Where the parts of a demo lie; `steps` of every training, None for the presets'."""

    folder: Path
    steps: int | None = None

    @property
    def data(self) -> Path:
        return self.folder / "scenes"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    @property
    def training(self) -> list[str]:
        """Flags of every training."""
        return [] if self.steps is None else ["--steps", str(self.steps)]


@dataclass(frozen=True)
class Step:
    """One command. `title` and `why` are for the reader; `arguments` what follows `pairmill`."""

    name: str
    title: str
    why: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return " ".join(["pairmill", *map(quoted, self.arguments)])


def quoted(word: str) -> str:
    """The word for a shell: in double quotes where it holds single ones, so that it can be read."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _step(at: Places, name: str, title: str, why: str, text: str, *more: str) -> Step:
    """`text` is a command line in which {} stands for the demo's folder."""
    words = [word.replace("{}", str(at.folder)) for word in text.split()]
    return Step(name, title, why, (*words, *more))


def curation(at: Places) -> list[Step]:
    """From the list to a selection."""
    where = [part for rule in RULES for part in ("--where", rule)]
    return [
        _step(
            at,
            "download",
            "Download the list",
            "Every row of the list stays a row, in its place: one that fails has a status that says why.",
            "download {}/list.parquet -o {}/scenes --size 192 --shard-rows 250 --allow-private 127.0.0.1 "
            "--per-host 32 --timeout 3 --retries 1 --workers 0",
        ),
        _step(
            at,
            "train-clip",
            "Train a small CLIP on all of it, noise included",
            "No weights come with the demo: CLIP learns from these pairs alone which words go with which pictures.",
            "train clip-tiny {}/scenes -o {}/runs/clip",
            *at.training,
        ),
        _step(
            at,
            "score",
            "Score every pair with it",
            "clip_score is the cosine of caption and picture. Scores lie beside the pairs; nothing is copied.",
            "score clip {}/scenes --model {}/runs/clip --workers 0",
        ),
        _step(
            at,
            "hash",
            "Hash every picture",
            "A perceptual hash hardly changes when a picture is encoded again: near copies differ in a few bits.",
            "score hash {}/scenes --workers 0",
        ),
        _step(
            at,
            "filter",
            "Choose what to keep",
            "Rules on the pairs, one of each picture, the best by clip_score. Every dropped row has its reason.",
            f"filter {{}}/scenes -o {SELECTION}",
            *where,
            *("--dedup", "near", "--top", "0.85", "--by", "clip_score"),
        ),
    ]


def features(at: Places) -> list[Step]:
    """Patches and regions."""
    return [
        _step(
            at,
            "patches",
            "Cut pictures into patches",
            "What ViLT reads, stored once, so that training decodes nothing.",
            "extract patches {}/scenes --size 64 --patch 16 --workers 0",
        ),
        _step(
            at,
            "sample",
            "Take a sample of what is kept",
            "A selection can start from another; rows are drawn by their ids, the same ones every time.",
            f"filter {{}}/scenes -o {SAMPLE} --from {SELECTION} --sample 0.2",
        ),
        _step(
            at,
            "regions",
            "Find the objects in the sample",
            "With a small detector that comes with pairmill: boxes, features and classes of each object.",
            f"extract regions {{}}/scenes --detector torchvision:tiny --selection {SAMPLE} --workers 0",
        ),
    ]


def training(at: Places) -> list[Step]:
    """The same model on what was kept and on everything."""
    return [
        _step(
            at,
            CURATED,
            "Train ViLT on the curated pairs",
            "It learns to fill in masked words and to tell whether caption and picture belong together.",
            f"train vilt-tiny {{}}/scenes --input patches --selection {SELECTION} -o {{}}/runs/{CURATED}",
            *at.training,
        ),
        _step(
            at,
            UNCURATED,
            "Train the same ViLT on the uncurated pairs",
            "Same seed, same number of steps; only the pairs differ.",
            f"train vilt-tiny {{}}/scenes --input patches -o {{}}/runs/{UNCURATED}",
            *at.training,
        ),
    ]


def evaluation(at: Places) -> list[Step]:
    """Retrieval on clean scenes that no model has seen."""
    return [
        _step(
            at,
            "task",
            "Import the held-out scenes as a retrieval task",
            "Their list has the form of Karpathy's splits of COCO and Flickr30k, which import the same way.",
            "task import retrieval --karpathy {}/held-out/karpathy.json --images {}/held-out/images -o {}/retrieval",
        ),
        _step(
            at,
            "evaluate-clip",
            "Evaluate CLIP: from picture to caption and back",
            "A dual encoder ranks everything by dot products.",
            "evaluate retrieval {}/runs/clip {}/retrieval",
        ),
        *(
            _step(
                at,
                f"evaluate-{name}",
                f"Evaluate the ViLT of the {name.removeprefix('vilt-')} pairs",
                "ViLT reads picture and caption together: a pass for every pair. `--candidates` re-ranks CLIP's best.",
                f"evaluate retrieval {{}}/runs/{name} {{}}/retrieval",
            )
            for name in (CURATED, UNCURATED)
        ),
    ]


def closing(at: Places) -> list[Step]:
    """What a user does to look back."""
    why = "What is in it, and why the rest is not. Any dataset has one."
    return [_step(at, "report", "Write the dataset's own report", why, "report {}/scenes")]


def tour(at: Places) -> list[Step]:
    """What the demo leaves out for time."""
    return [
        _step(
            at,
            "text",
            "Count what captions are made of",
            "Words, repetitions, file names, and how often the dataset has a caption.",
            "score text {}/scenes --workers 0",
        ),
        _step(
            at,
            "strict",
            "Two more rules on top of the selection",
            "From what was kept: captions that say something, and that few pictures share.",
            f"filter {{}}/scenes -o strict --from {SELECTION}",
            *("--where", "text.words >= 4 AND NOT text.is_filename_like", "--where", "text.caption_count <= 3"),
        ),
        _step(
            at,
            "report-strict",
            "Write the report again",
            "With the new scores and both selections.",
            "report {}/scenes",
        ),
        _step(at, "show", "Look at rows", "In the terminal.", "show {}/scenes"),
        _step(at, "history", "Tell how it was made", "Settings, versions, counts, seconds.", "history {}/scenes"),
        _step(at, "check", "Read everything back", "Hashes, alignment, schemas.", "check {}/scenes"),
        _step(
            at,
            "export-dataset",
            "Cut what is kept into a dataset of its own",
            "With its scores and features.",
            f"export dataset {{}}/scenes --selection {SELECTION} -o {{}}/kept",
        ),
        _step(
            at,
            "export-webdataset",
            "Copy what is kept for other tools",
            "Tar archives that img2dataset's users know.",
            f"export webdataset {{}}/scenes --selection {SELECTION} -o {{}}/webdataset",
        ),
        _step(
            at,
            "import-webdataset",
            "Read the archives again",
            "Pairs that somebody already has become a dataset.",
            "import webdataset {}/webdataset -o {}/imported",
        ),
    ]


def require_done(code: int, step: Step) -> None:
    """Raises PairmillError where a stage did not end well; the demo goes on from there when it is run again."""
    if code:
        raise PairmillError(f"`{step.command}` ended with {code}. Run the demo again to go on from here.")
