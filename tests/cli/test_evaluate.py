"""`pairmill task import retrieval` and `pairmill evaluate retrieval`, as typed."""

import json
import shutil

import pytest

from cli.main import load, run
from tests.downstream.runs import make_run, make_taskset


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with dataset.json, images/ and run/."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.rmtree(make_taskset(folder / "files", test=4, val=1, train=1))
    make_run(folder / "run", "clip-tiny")
    return folder


def imported(place, *more):
    files = place / "files"
    name = "--karpathy", str(files / "dataset.json"), "--images", str(files / "images"), "-o", str(place / "taskset")
    return run(["task", "import", "retrieval", *name, *more])


def test_both_groups_are_found():
    assert sorted(load("task").commands) == ["import"]
    assert sorted(load("evaluate").commands) == ["retrieval"]


@pytest.mark.parametrize("words", [("task", "import", "retrieval"), ("evaluate", "retrieval")])
def test_help_has_an_example(words, capsys):
    assert run([*words, "--help"]) == 0
    assert f"Example: pairmill {' '.join(words)}" in capsys.readouterr().out


def test_import_then_evaluate(place, capsys):
    assert imported(place) == 0
    assert "tasks/retrieval: 6 images; captions: test 20, train 5, val 5" in capsys.readouterr().out
    assert run(["evaluate", "retrieval", str(place / "run"), str(place / "taskset"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    metric = json.loads((place / "run/evaluations/retrieval-test/results.json").read_text())["metric"]
    assert out.splitlines()[0] == "run 00000001, test: 4 images, 20 captions"
    assert out.splitlines()[1].split() == ["R@1", "R@5", "R@10"]
    assert f"Rsum {metric['rsum']:.2f}, mean {metric['mean']:.2f}" in out


def test_mistakes_are_told_without_a_traceback(place, capsys):
    assert imported(place, "--split", "tests") == 2
    assert "Did you mean `test`?" in capsys.readouterr().err
    assert run(["evaluate", "retrieval", str(place / "nowhere"), str(place / "taskset")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run(["evaluate", "retrieval", str(place / "run")]) == 2
    assert run(["evaluate", "retreival", str(place / "run")]) == 2
