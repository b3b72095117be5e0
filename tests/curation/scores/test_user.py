"""Scorers of other packages: the whole example of docs/scorers.md, and scorers that do not keep to the protocol."""

import re
import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import polars as pl
import pytest

from cli.main import run
from curation.scores import entry_points
from curation.scores.config import UserScoreConfig
from curation.scores.user import describe, score_user
from schemas.errors import PairmillError
from schemas.events import ShardFailed
from shards.images import decode_rgb
from shards.reader import read_table
from shards.scan import scan
from tests.make import make_dataset

ROOT = Path(__file__).parents[3]
HERE = UserScoreConfig(workers=0, batch_size=3)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package of docs/scorers.md, built and installed into a folder of its own."""
    page = (ROOT / "docs" / "scorers.md").read_text()
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name, text in re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL):
        (source / name).write_text(text)
    assert sorted(p.name for p in source.iterdir()) == ["pairmill_brightness.py", "pyproject.toml"]
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


def columns(dataset, name):
    return scan(dataset.stage(f"scores/{name}")).collect()


def test_the_example_of_the_docs_runs(installed, tmp_path, monkeypatch, capfd):
    dataset = make_dataset(tmp_path / "data", fail={(0, 1): "timeout"}, corrupt=[(1, 0)], no_caption=[(0, 2)])
    monkeypatch.syspath_prepend(str(installed))
    assert run(["score", "brightness", dataset.url, "--set", "limit=120", "--batch-size", "3", "--workers", "2"]) == 0
    found = columns(dataset, "brightness")
    assert found.schema == {"middle": pl.Float32, "bright": pl.Boolean}
    pairs = read_table(dataset.folder, "pairs/00000.parquet", ["image", "caption"])
    for row in (0, 2, 7):
        image = decode_rgb(pairs["image"][row].as_py())
        height, width = image.shape[:2]
        middle = image[height // 4 : -height // 4, width // 4 : -width // 4].mean()
        assert found["middle"][row] == pytest.approx(middle)
        assert found["bright"][row] == (middle > 120)
    assert [i for i, v in enumerate(found["middle"]) if v is None] == [1, 8]
    sidecar = dataset.stage("scores/brightness").sidecar()
    assert sidecar.stage == "score brightness"
    assert sidecar.identity == {
        "set_": ["limit=120"],
        "scorer": "pairmill_brightness:Brightness",
        "package": "pairmill-brightness",
        "package_version": "0.1.0",
    }
    assert sidecar.columns["middle"]["scale"] == "0 to 255"

    assert run(["score", "headline", dataset.url, "--workers", "0"]) == 0
    headlines = columns(dataset, "headline")["headline"].to_list()
    assert headlines[0] == pairs["caption"][0].as_py().split(".")[0].strip()
    assert headlines[1] is not None
    assert headlines[2] is None
    assert run(["filter", dataset.url, "-o", "s", "--where", "bright is not null and char_length(headline) > 3"]) == 0
    assert run(["score", "brightness", dataset.url, "--workers", "0"]) == 2
    assert "made with other settings: `set_` was ['limit=120'], now []" in capfd.readouterr().err


def test_help_names_the_package_and_the_list_of_scorers_has_it(installed, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(installed))
    sys.modules.pop("pairmill_brightness", None)
    assert run(["score", "--help"]) == 0
    assert "pairmill-brightness 0.1.0: pairmill_brightness:Headline" in capsys.readouterr().out
    assert run(["score", "brightness", "--help"]) == 0
    assert "--set" in capsys.readouterr().out
    assert "pairmill_brightness" not in sys.modules
    assert run(["score", "brightnes", "x"]) == 2
    assert "Did you mean `brightness`" in capsys.readouterr().err
    assert run(["score", "brightness", "x", "--set", "limit=1", "--set", "limt=2"]) == 2


class Good:
    reads = ("caption", "width")
    writes = MappingProxyType({"characters": "int32"})
    calls: ClassVar[list] = []

    def __call__(self, pairs):
        self.calls.append(len(pairs["caption"]))
        return {"characters": np.array([len(c) + w for c, w in zip(pairs["caption"], pairs["width"], strict=True)])}


def other(**changes):
    return type("Other", (Good,), changes)


class OneShort(Good):
    def __call__(self, pairs):
        return {"characters": [0] * (len(pairs["caption"]) - 1)}


class NoColumn(Good):
    def __call__(self, pairs):
        return {"letters": [0] * len(pairs["caption"])}


class Text(Good):
    def __call__(self, pairs):
        return {"characters": ["a"] * len(pairs["caption"])}


class Nothing(Good):
    def __call__(self, pairs):
        return None


class Raises(Good):
    def __call__(self, pairs):
        raise RuntimeError("out of paint")


class NoCall:
    reads, writes = Good.reads, Good.writes


BAD = {
    "one-short": (OneShort, "returned 2 values of `characters` for 3 pairs"),
    "no-column": (NoColumn, "must return the columns characters, it returned letters"),
    "text": (Text, "a value of `characters` is no int32"),
    "nothing": (Nothing, "it returned NoneType"),
    "no-call": (NoCall, "cannot be called"),
    "no-reads": (other(reads=()), "`reads` must be a list of pair columns"),
    "a-word": (other(reads="caption"), "`reads` must be a list of pair columns, found 'caption'"),
    "no-writes": (other(writes={}), "`writes` must map columns to types"),
    "no-type": (other(writes={"a": "float"}), "the type 'float'. There are: float32"),
    "ours": (other(writes={"caption": "string"}), "`caption`, a column of pairs"),
    "unknown": (other(reads=("captoin",)), "reads `captoin`, .*Did you mean `caption`"),
}


@pytest.fixture
def offer(monkeypatch):
    """Makes entry points of these scorers."""

    def put(**scorers):
        module = types.ModuleType("strange_scorers")
        vars(module).update(scorers)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        points = {name: EntryPoint(name, f"{module.__name__}:{name}", entry_points.GROUP) for name in scorers}
        monkeypatch.setattr(entry_points, "scorers", lambda: points)

    return put


@pytest.mark.parametrize("name", BAD)
def test_a_scorer_that_does_not_keep_to_the_protocol(name, offer, tmp_path):
    scorer, message = BAD[name]
    offer(bad=scorer)
    dataset = make_dataset(tmp_path / "data")
    with pytest.raises(PairmillError, match=message):
        score_user(dataset, "bad", HERE)
    assert dataset.stage("scores/bad").standing() == set()


def test_batches_hold_whole_pairs_and_do_not_cross_shards(offer, tmp_path):
    dataset = make_dataset(tmp_path / "data", no_caption=[(0, 0), (1, 7)], fail={(0, 3): "timeout"})
    offer(good=Good)
    Good.calls.clear()
    finished = score_user(dataset, "good", HERE)
    found = columns(dataset, "good")["characters"]
    assert [i for i, v in enumerate(found) if v is None] == [0, 3, 15]  # no caption, no width, no caption
    assert Good.calls == [3, 3, 3, 3, 1]
    assert finished.counts == {"ok": 13, "null": 3}
    assert score_user(dataset, "good", HERE).done == 0


def test_an_exception_of_the_scorer_is_that_shards(offer, tmp_path):
    dataset = make_dataset(tmp_path / "data")
    offer(raises=Raises)
    events = []
    finished = score_user(dataset, "raises", HERE, events.append)
    assert finished.left == (0, 1)
    failed = [e for e in events if isinstance(e, ShardFailed)]
    assert "out of paint" in failed[0].error


def test_arguments(offer):
    class Takes(Good):
        def __init__(self, limit, name="x"):
            self.limit = limit

    offer(takes=Takes, plain=Good())
    assert describe("takes", ["limit=3"]).settings == ("limit=3",)
    for settings, message in [
        ([], "missing a required argument: 'limit'"),
        (["limit=3", "limt=4"], "unexpected keyword argument 'limt'"),
        (["limit"], "must be KEY=VALUE"),
    ]:
        with pytest.raises(PairmillError, match=message):
            describe("takes", settings)
    with pytest.raises(PairmillError, match="is no class: it takes no `--set`"):
        describe("plain", ["a=1"])
    with pytest.raises(PairmillError, match=r"There is no scorer `plian`\. Did you mean `plain`"):
        describe("plian")


def test_a_module_that_does_not_load(monkeypatch):
    point = EntryPoint("gone", "no_such_module:Scorer", entry_points.GROUP)
    monkeypatch.setattr(entry_points, "scorers", lambda: {"gone": point})
    with pytest.raises(PairmillError, match=r"scorer `gone` .* cannot be loaded: ModuleNotFoundError"):
        describe("gone")
