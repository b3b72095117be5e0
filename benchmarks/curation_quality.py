"""Does filtering help? The same CLIP, trained on filtered pairs, on all, and on a random subset of the filtered size.

    python -m benchmarks.curation_quality [--work FOLDER]

Generated scenes with planted noise that is written down. Every arm sees the same number of samples in training, with
the same seed; each is measured by retrieval among clean scenes that none has seen. The filter knows no truth: its
scores come from the model of the arm `all`. Each arm's run and result stay in the work folder; a benchmark that was
killed goes on, and one that is done only tells.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.compare import Check, Result, show, write
from cli.demo import truth
from cli.demo.noise import NoisyList, plant_noise
from cli.demo.prepare import HELD_OUT, DemoSettings, make_held_out
from cli.demo.steps import RULES
from cli.main import run as command
from schemas.config import StageConfig
from schemas.errors import PairmillError
from schemas.pairs import PAIRS, VERSION, carried_fields, pair_uid, pairs_schema
from schemas.sidecars import make_sidecar
from shards.dataset import Dataset, new_manifest, write_manifest
from shards.files import atomic_file, open_folder
from shards.writer import write_pairs

ARMS = ("all", "random", "filtered")
# The demo's kinds that reach a dataset, captions spoiled twice as often: most of a web crawl is worse than half good.
SHARES = {
    "wrong_caption": 0.25,
    "tiny": 0.03,
    "duplicate": 0.04,
    "reencoded": 0.04,
    "filename": 0.10,
    "language": 0.10,
}
HARMFUL = ("wrong_caption", "tiny", "filename", "language")
TOP = 0.8
SIZE, SHARD_ROWS = 192, 250
HELD_OUT_SEED = 1000  # no seed of the training scenes
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
MEAN = "mean recall"
# Student's t: 97.5 % of the distribution lies below, by degrees of freedom.
T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}
PACKAGES = ("pairmill", "torch", "numpy", "polars")


@dataclass(frozen=True)
class Load:
    """How much: list rows, training steps (None: the preset's), held-out scenes, seeds."""

    rows: int
    steps: int | None
    held_out: int
    seeds: int


FULL, QUICK = Load(4000, None, 500, 3), Load(160, 2, 12, 2)


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of 2 to 10 independent values: mean ± t(0.975, n - 1) * s / sqrt(n)."""
    n = len(values)
    return Interval(statistics.fmean(values), T_975[n - 1] * statistics.stdev(values) / math.sqrt(n))


def settled(work: Path, load: Load) -> None:
    """Notes what the work folder holds. Raises PairmillError where it holds another benchmark's arms."""
    wanted = {**asdict(load), "shares": SHARES, "top": TOP, "rules": list(RULES)}
    file = work / "settings.json"
    if file.is_file():
        if json.loads(file.read_bytes()) != wanted:
            raise PairmillError(
                f"{work} holds arms with other settings. Give another folder with --work, or delete it."
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    _save(file, wanted)


def _save(file: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(file) as stream:
        stream.write((json.dumps(value, indent=1) + "\n").encode())


def pairmill(work: Path, *words: str | Path) -> None:
    """A command in this process; what it says goes to work/log.txt. Raises RuntimeError where it fails."""
    log = work / "log.txt"
    line = " ".join(map(str, words))
    with log.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        print(f"$ pairmill {line}", flush=True)
        code = command([*map(str, words), "-q"])
    if code:
        raise RuntimeError(f"`pairmill {line}` ended with {code}: {log.read_text()[-2000:]}")


def write_dataset(path: Path, noisy: NoisyList) -> Dataset:
    """The pairs of a list as a dataset, as if downloaded; one that is not whole is made again."""
    with contextlib.suppress(PairmillError):
        return Dataset.open(path)
    shutil.rmtree(path, ignore_errors=True)
    listed = noisy.table("http://127.0.0.1")
    schema = pairs_schema(carried_fields(listed.schema))
    rows = listed.to_pylist()
    sizes = [min(SHARD_ROWS, len(rows) - first) for first in range(0, len(rows), SHARD_ROWS)]
    folder = open_folder(path)
    dataset = Dataset(folder, new_manifest(SHARD_ROWS, sizes))
    stage = dataset.stage(PAIRS)
    stage.begin(make_sidecar("import", PAIRS, (PAIRS, VERSION), StageConfig()), "")
    for shard in range(len(sizes)):
        first = shard * SHARD_ROWS
        with write_pairs(folder, stage.file(shard), schema) as writer:
            for row, pair in zip(
                rows[first : first + SHARD_ROWS], noisy.pairs[first : first + SHARD_ROWS], strict=True
            ):
                writer.append(row | _stored(noisy, pair.path) | {"uid": pair_uid(row["url"], row["caption"])})
    write_manifest(folder, dataset.manifest)
    return Dataset.open(path)


def _stored(noisy: NoisyList, path: str) -> dict[str, Any]:
    """What a download fills in of the image at `path`."""
    page = noisy.pages[path]
    body = noisy.pages[page.location].body if page.location else page.body
    height, width = np.asarray(cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)).shape[:2]
    kind = "png" if body[:4] == b"\x89PNG" else "webp" if body[:4] == b"RIFF" else "jpeg"
    size = {"width": width, "height": height, "original_width": width, "original_height": height}
    digest = hashlib.sha256(body).digest()
    same = {"image": body, "format": kind, "sha256": digest, "stored_sha256": digest}
    return {"status": "success", "attempts": 1, **size, **same}


def held_out(work: Path, load: Load) -> Path:
    """The clean scenes as a retrieval task."""
    task = work / "retrieval"
    make_held_out(work, DemoSettings(seed=HELD_OUT_SEED, size=SIZE, held_out=load.held_out))
    lies = work / HELD_OUT
    pairmill(
        work,
        "task",
        "import",
        "retrieval",
        "--karpathy",
        lies / "karpathy.json",
        "--images",
        lies / "images",
        "-o",
        task,
    )
    return task


def arms(work: Path, task: Path, load: Load, seed: int) -> dict[str, dict[str, Any]]:
    """Each arm's result of one seed; what stands is read."""
    place = work / f"seed-{seed}"
    place.mkdir(exist_ok=True)
    found = {arm: place / f"{arm}.json" for arm in ARMS}
    if not all(file.is_file() for file in found.values()):
        data = place / "scenes"
        dataset = write_dataset(data, plant_noise(load.rows, seed, SIZE, SHARES))
        train_and_evaluate(work, task, load, seed, "all")
        pairmill(work, "score", "clip", data, "--model", place / "all", "--workers", "0")
        pairmill(work, "score", "hash", data, "--workers", "0")
        where = [part for rule in RULES for part in ("--where", rule)]
        pairmill(
            work, "filter", data, "-o", "filtered", *where, "--dedup", "near", "--top", str(TOP), "--by", "clip_score"
        )
        kept = int(truth.read_truth(dataset, "filtered")["keep"].sum())
        # All are equal, so that their uids decide, hashes of url and caption: a random subset of exactly that size.
        pairmill(work, "filter", data, "-o", "random", "--top", str(kept), "--by", "width * 0")
        for arm in ("random", "filtered"):
            train_and_evaluate(work, task, load, seed, arm)
        for arm, file in found.items():
            if not file.is_file():
                _save(file, {"recall": recalls(place / arm), **told(dataset, arm)})
    return {arm: json.loads(file.read_bytes()) for arm, file in found.items()}


def train_and_evaluate(work: Path, task: Path, load: Load, seed: int, arm: str) -> None:
    """One arm's run and its recalls, where they do not stand."""
    place = work / f"seed-{seed}"
    run = place / arm
    if results(run).is_file():
        return
    steps = [] if load.steps is None else ["--steps", str(load.steps)]
    chosen = [] if arm == "all" else ["--selection", arm]
    pairmill(work, "train", "clip-tiny", place / "scenes", *chosen, "-o", run, "--seed", str(seed), *steps)
    pairmill(work, "evaluate", "retrieval", run, task)


def results(run: Path) -> Path:
    """Where `evaluate retrieval` puts its numbers."""
    return run / "evaluations" / "retrieval-test" / "results.json"


def recalls(run: Path) -> dict[str, float]:
    """Percent: the six recalls and their mean."""
    metric = json.loads(results(run).read_bytes())["metric"]
    six = {name: float(metric[name]) for name in RECALLS}
    return {**six, MEAN: statistics.fmean(six.values())}


def told(dataset: Dataset, arm: str) -> dict[str, float]:
    """Rows an arm trains on, the share of them with a spoiled caption or picture, and how well the scores rank."""
    frame = truth.read_truth(dataset, "filtered" if arm == "all" else arm)
    rows = frame if arm == "all" else frame.filter("keep")
    spoiled = rows["truth"].is_in(HARMFUL)
    noisy = frame["truth"].is_in(truth.ABOUT_CAPTION).to_numpy()
    wrong = (frame["truth"] == "wrong_caption").to_numpy()
    plain = ~noisy | wrong
    score = frame["score"].fill_null(-1).to_numpy()
    return {
        "rows": rows.height,
        "spoiled": float(spoiled.mean() or 0.0),  # type: ignore[arg-type]
        "wrong captions": float((rows["truth"] == "wrong_caption").mean() or 0.0),  # type: ignore[arg-type]
        "ranking": truth.ranking_quality(score, noisy),
        "ranking of wrong captions": truth.ranking_quality(score[plain], wrong[plain]),
    }


def measure(work: Path, load: Load) -> Result:
    """All arms of all seeds, and the differences between them."""
    settled(work, load)
    task = held_out(work, load)
    return summary([arms(work, task, load, seed) for seed in range(load.seeds)], load)


def summary(seeds: Sequence[Mapping[str, Mapping[str, Any]]], load: Load) -> Result:
    """`seeds`: a seed's results by arm. Differences are paired: the same scenes, the same training seed."""

    def of(arm: str, name: str = MEAN) -> list[float]:
        return [seed[arm]["recall"][name] for seed in seeds]

    def middle(arm: str, name: str) -> float:
        return statistics.fmean(seed[arm][name] for seed in seeds)

    ahead = {}
    for other in ("all", "random"):
        ahead[other] = interval([a - b for a, b in zip(of("filtered"), of(other), strict=True)])
    checks = []
    for other, found in ahead.items():
        checks.append(Check(f"mean recall, filtered over {other}, points", found.mean))
        checks.append(Check(f"the same, lower end of the 95 % interval ± {found.half:.2f}", found.low, 0))
    for arm in ARMS:
        found = interval(of(arm))
        checks.append(Check(f"mean recall of {arm}, % (± {found.half:.2f})", found.mean))
    notes = [
        f"seed {number}, mean recall: " + ", ".join(f"{arm} {seed[arm]['recall'][MEAN]:.2f}" for arm in ARMS)
        for number, seed in enumerate(seeds)
    ]
    return Result(
        "curation_quality",
        "retrieval of a CLIP trained on filtered pairs, on all, on a random subset, equal samples seen; means of seeds",
        len(seeds),
        {
            "rows": load.rows,
            "rows filtered": round(middle("filtered", "rows")),
            "held-out scenes": load.held_out,
            "steps": "the preset's" if load.steps is None else load.steps,
        },
        {
            **{f"{arm}, {name}, %": statistics.fmean(of(arm, name)) for arm in ARMS for name in RECALLS},
            **{f"{arm}, share spoiled": middle(arm, "spoiled") for arm in ARMS},
            **{f"{arm}, share with wrong captions": middle(arm, "wrong captions") for arm in ARMS},
            "clip_score ranks clean over spoiled captions": middle("all", "ranking"),
            "clip_score ranks clean over wrong captions": middle("all", "ranking of wrong captions"),
        },
        checks,
        PACKAGES,
        notes,
    )


def run(rounds: int, quick: bool) -> Result:
    """Three seeds whatever the rounds; a quick run forgets its arms."""
    if quick:
        with tempfile.TemporaryDirectory() as scratch:
            return measure(Path(scratch), QUICK)
    return measure(default_work(), FULL)


def default_work() -> Path:
    """Below /tmp, or $TMPDIR."""
    return Path(tempfile.gettempdir()) / "pairmill-curation-quality"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.curation_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=default_work(), help="where arms stay [default: %(default)s]")
    result = measure(parser.parse_args().work, FULL).as_json()
    show(result)
    write(result)


if __name__ == "__main__":
    main()
