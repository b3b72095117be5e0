"""Recipes: what the flags can say, a file can; the whole of it is checked before anything runs."""

import re

import pytest
import yaml

from cli.main import run
from cli.recipe import read_recipe
from schemas.errors import PairmillError
from shards.dataset import Dataset
from shards.select import read_selection
from tests.make import make_dataset


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "ds", shards=2, rows=4)


def recipe(tmp_path, stages, **top):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**top, "stages": stages}))
    return file


def test_stages_run_in_order_on_the_recipes_dataset(tmp_path, dataset):
    rules = [{"where": "width >= 64"}, {"sample": 0.9}]
    stages = [
        {"filter": {"output": "wide", "rules": rules}},
        {"extract patches": {"size": 32, "patch": 16, "workers": 0, "selection": "wide"}},
        "report",
    ]
    file = recipe(tmp_path, stages, dataset=dataset.url)
    assert run(["run", str(file)]) == 0
    found = Dataset.open(dataset.url)
    assert found.folder.exists("reports/report.html")
    kept = sum(found.stage("features/patches").counts(s).get("ok", 0) for s in range(2))
    assert kept == len(read_selection(found, "wide")) > 0
    assert run(["run", str(file)]) == 0  # what is done is not done again


def test_print_gives_a_recipe_with_every_setting_and_runs_nothing(tmp_path, dataset, capsys):
    stages = [{"filter": {"output": "a", "where": "width >= 1", "dry-run": True}}, {"history": None}]
    assert run(["run", str(recipe(tmp_path, stages, dataset=dataset.url)), "--print"]) == 0
    printed = capsys.readouterr().out
    whole = yaml.safe_load(printed)
    assert whole["stages"][0]["filter"]["where"] == ["width >= 1"]
    assert whole["stages"][0]["filter"]["of"] == "kept"
    assert whole["stages"][1] == {"history": {"dataset": dataset.url}}
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert [s.config for s in read_recipe(again)] == [s.config for s in read_recipe(tmp_path / "recipe.yaml")]
    assert not dataset.folder.exists("selections/a.parquet")


def test_a_stage_that_fails_ends_the_run_with_its_code(tmp_path, dataset, capsys):
    stages = [{"check": {}}, {"filter": {"output": "none", "where": "width > 100000"}}, "report"]
    dataset.folder.write_bytes("features/x/sidecar.json", b"{")
    assert run(["run", str(recipe(tmp_path, stages, dataset=dataset.url))]) == 2
    assert "stage 1, check, ended with 2: the rest was not started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"filtre": {}}], "stage 1: there is no stage `filtre`. Did you mean `filter`?"),
        ([{"score clop": {}}], "there is no `score clop`. Did you mean `clip`?"),
        ([{"score": {}}], "`score` is a group. Give one of `score clip`"),
        ([{"report": {}}, {"filter": {"wher": "x"}}], "stage 2, `filter`: unknown key `wher`. Did you mean `where`?"),
        ([{"filter": {"top": 0.5}}], "--top and --by go together"),
        ([{"train": {"preset": "vilt-tiny"}}], "stage 1, `train`: `output` is missing"),
        ([{"report": {"dataset": ["a", "b"]}}], "`dataset`: Input should be a valid string"),
        ([{"demo": {}}], "there is no stage `demo`"),
        ([["report"]], "expected one `COMMAND: settings`"),
        ([{"report": [1]}], "expected settings by name"),
        ([], "expected `stages`"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_stage(tmp_path, dataset, stages, says, capsys):
    assert run(["run", str(recipe(tmp_path, stages, dataset=dataset.url))]) == 2
    assert says in capsys.readouterr().err
    assert not dataset.folder.names("reports")


def test_an_unknown_key_suggests_the_nearest(tmp_path):
    with pytest.raises(PairmillError, match=re.escape("unknown key `datset`. Did you mean `dataset`?")):
        read_recipe(recipe(tmp_path, ["report"], datset="x"))
