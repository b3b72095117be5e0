"""`kill -9` of each command at seeded moments, and the same command again: the result of an unkilled run."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.dataset import Dataset
from shards.files import is_temporary
from shards.reader import MappedShard
from tests.atomic_stages import untimed
from tests.atomicity import tree
from tests.curation.loopback import loopback
from tests.downstream.runs import make_run, make_taskset
from tests.extractors.imports import written
from tests.extractors.tiny_clip import save_clip
from tests.kills import Command, run_killed
from tests.make import make_dataset, picture
from training.checkpoint import METRICS, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHARDS, KILLS = 9, 3


def moments(seed: int, most: int) -> list[int]:
    """Three moments of a work that comes as far as `most`, each later than the one before."""
    return sorted(random.Random(seed).sample(range(1, most), KILLS))


def files_in(*folders: Path) -> Callable[[], int]:
    """Counts the whole files in the folders."""
    return lambda: sum(not is_temporary(p.name) for f in folders if f.is_dir() for p in f.iterdir())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four photographs each."""
    place = tmp_path_factory.mktemp("data") / "DS"
    make_dataset(
        place, shards=SHARDS, rows=4, fail={(0, 1): "timeout"}, image=lambda s, r: picture(400, 300, 16 * s + r)
    )
    return place


@pytest.fixture
def copies(tmp_path: Path, dataset: Path) -> tuple[Path, Path]:
    """(one for the killed runs, one for the unkilled run)"""
    killed, whole = tmp_path / "killed" / "DS", tmp_path / "whole" / "DS"
    shutil.copytree(dataset, killed)
    shutil.copytree(dataset, whole)
    return killed, whole


def test_download(tmp_path):
    with loopback() as web:
        web.delay_s = 0.02
        rows = ({"url": f"{web.base}/{'gone' if i % 4 == 3 else 'img'}/{i}", "caption": f"c{i}"} for i in range(240))
        file = tmp_path / "list.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def words(out):
            return ["download", str(file), "-o", str(tmp_path / out), "--allow-private", "127.0.0.1",
                    "--shard-rows", "15", "--size", "64"]  # fmt: skip

        assert run_killed(words("killed"), tmp_path / "log", lambda: sum(web.asked.values()), moments(0, 200)) == KILLS
        Command(words("whole"), tmp_path / "log").finish()
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_score_clip(tmp_path, copies):
    model = f"local-dir:{save_clip(tmp_path / 'clip')}"
    killed, whole = copies
    files = files_in(killed / "scores/clip", killed / "features/clip")
    at = moments(1, 2 * SHARDS)
    assert run_killed(["score", "clip", str(killed), "--model", model], tmp_path / "log", files, at) == KILLS
    Command(["score", "clip", str(whole), "--model", model], tmp_path / "log").finish()
    assert tree(killed) == tree(whole)


@pytest.mark.parametrize(
    ("words", "features"),
    [
        (["extract", "patches"], "patches"),
        (["extract", "regions", "--detector", "torchvision:tiny"], "regions"),
    ],
    ids=["patches", "regions"],
)
def test_extract(tmp_path, copies, words, features):
    killed, whole = copies
    files = files_in(killed / "features" / features)
    assert run_killed([*words, str(killed)], tmp_path / "log", files, moments(2, SHARDS)) == KILLS
    Command([*words, str(whole)], tmp_path / "log").finish()
    assert tree(killed) == tree(whole)


def test_extract_grid(tmp_path, copies):
    killed, whole = copies
    words = ["extract", "grid", "--backbone", f"clip:local-dir:{save_clip(tmp_path / 'clip')}"]
    files = files_in(killed / "features/grid")
    assert run_killed([*words, str(killed)], tmp_path / "log", files, moments(5, SHARDS)) == KILLS
    Command([*words, str(whole)], tmp_path / "log").finish()
    assert tree(killed) == tree(whole)


def test_import_and_export_features(tmp_path, copies):
    """A TSV into the dataset, and the dataset into an LMDB, which is whole or absent."""
    killed, whole = copies
    source = Dataset.open(whole)
    lines = (written.lxmert(str(i), written.regions(i, 400, (400, 300))) for i in range(len(source)))
    (tmp_path / "f.tsv").write_text("".join(lines))
    words = ["import-features", "tsv", str(tmp_path / "f.tsv")]
    files = files_in(killed / "features/regions")
    assert run_killed([*words, str(killed)], tmp_path / "log", files, moments(6, SHARDS)) == KILLS
    Command([*words, str(whole)], tmp_path / "log").finish()
    assert tree(killed) == tree(whole)
    states = MappedShard(source.folder, source.stage("features/regions").file(1)).states()
    assert states == ["ok"] * 4

    words = ["export-features", "uniter-lmdb", str(whole), "-o"]
    told = tmp_path / "killed.lmdb"

    def begun():
        return len(list(tmp_path.glob("*killed.lmdb*")))

    assert run_killed([*words, str(told)], tmp_path / "log", begun, (1, 1, 1)) == KILLS
    Command([*words, str(tmp_path / "whole.lmdb")], tmp_path / "log").finish()
    assert tree(told) == tree(tmp_path / "whole.lmdb")
    assert not [p.name for p in tmp_path.iterdir() if is_temporary(p.name)]


def test_extract_in_a_copy_taken_in_mid_run(tmp_path, copies):
    """`cp -r` beside the running command: what is half written comes along and is nobody's."""
    first, whole = copies
    moved = tmp_path / "elsewhere"
    command = Command(["extract", "patches", str(first)], tmp_path / "log")
    assert command.reaches(files_in(first / "features/patches"), 4)
    subprocess.run(["cp", "-r", str(first), str(moved)], stderr=subprocess.DEVNULL, check=False)
    command.kill()
    shutil.rmtree(tmp_path / "killed")
    assert 0 < len(Dataset.open(moved).stage("features/patches").standing()) < SHARDS
    for place in (moved, whole):
        Command(["extract", "patches", str(place)], tmp_path / "log").finish()
    assert tree(moved) == tree(whole)


def test_filter(tmp_path, copies):
    """It writes two files within milliseconds: the first kill comes when it begins, the others when it writes."""
    killed, whole = copies
    words = ["-o", "best", "--top", "0.3", "--by", "width", "--where", "status == 'success'"]
    beginning = Command(["filter", str(killed), *words], tmp_path / "log")
    maps = Path(f"/proc/{beginning.process.pid}/maps")
    assert beginning.reaches(lambda: "polars" in maps.read_text(), 1)
    beginning.kill()
    assert not (killed / "selections/best.parquet").exists()
    written = files_in(killed / "selections")
    for progress in (lambda: int((killed / "selections").is_dir()), written):
        command = Command(["filter", str(killed), *words], tmp_path / "log")
        command.reaches(progress, 1)
        command.kill()
    Command(["filter", str(killed), *words], tmp_path / "log").finish()
    Command(["filter", str(whole), *words], tmp_path / "log").finish()
    assert tree(killed) == tree(whole)


def test_train(tmp_path, dataset):
    """Killed between checkpoints, which are written at every step."""

    def make(out):
        return ["train", "vilt-tiny", str(dataset), "-o", str(out), "--steps", "8", "--batch-size", "4",
                "--save-minutes", "0", "--log-every", "1", "--device", "cpu"]  # fmt: skip

    def steps():
        return max([m["step"] for m in Run(killed).metrics()], default=0)

    killed, whole = tmp_path / "killed/run", tmp_path / "whole/run"
    assert run_killed(make(killed), tmp_path / "log", steps, moments(3, 8)) == KILLS
    Command(make(whole), tmp_path / "log").finish()
    assert [m["loss"] for m in Run(killed).metrics()] == [m["loss"] for m in Run(whole).metrics()]
    got, want = tree(killed), tree(whole)
    del got[METRICS], want[METRICS]
    assert got == want


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dataset.json and images/ of a split file, and taskset/."""
    folder = tmp_path_factory.mktemp("benchmark")
    make_taskset(folder, test=16, val=2, train=2)
    return folder


def test_task_import(tmp_path, benchmark):
    files = "--karpathy", str(benchmark / "dataset.json"), "--images", str(benchmark / "images")
    words = ["task", "import", "retrieval", *files, "--shard-rows", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    written = files_in(killed / "pairs", killed / "tasks/retrieval")
    assert run_killed([*words, "-o", str(killed)], tmp_path / "log", written, moments(4, 36)) == KILLS
    Command([*words, "-o", str(whole)], tmp_path / "log").finish()
    assert tree(killed) == tree(whole)


def test_evaluate(tmp_path, benchmark):
    """A single-stream model, which scores every pair; killed as soon as its first pairs are scored."""
    run = make_run(tmp_path / "run", "vilt-tiny")
    words = ["evaluate", "retrieval", str(run), str(benchmark / "taskset"), "--device", "cpu"]
    told = tmp_path / "events"

    def reports():
        return told.read_bytes().count(b'"Progress"') if told.exists() else 0

    killed = [*words, "-o", str(tmp_path / "killed"), "--log-file", str(told)]
    assert run_killed(killed, tmp_path / "log", reports, (1, 2, 3)) == KILLS
    Command([*words, "-o", str(tmp_path / "whole")], tmp_path / "log").finish()
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
