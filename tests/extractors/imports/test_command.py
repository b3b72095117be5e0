"""Both commands from the command line and from a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import run
from tests.extractors.imports import written
from tests.extractors.imports.test_import import rows_of
from tests.make import SIZES, make_dataset


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `ds`, two pairs, and `f.tsv`, their regions."""
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path / "ds", shards=1, rows=2)
    (tmp_path / "f.tsv").write_text("".join(written.lxmert(str(i), written.regions(i, 2, SIZES[i])) for i in range(2)))
    return tmp_path


def test_in_and_out(place, capsys):
    assert run(["import-features", "tsv", "f.tsv", "ds", "--name", "butd", "--workers", "0"]) == 0
    assert "2 of 2 rows are in f.tsv, joined by the name of the image (url)" in capsys.readouterr().err
    assert run(["export-features", "uniter-lmdb", "ds", "--name", "butd", "-o", "db", "--no-compress"]) == 0
    assert run(["import-features", "uniter-lmdb", "db", "ds", "--name", "back", "--workers", "0"]) == 0
    assert (rows_of(place / "ds", "butd")[1]["features"] == rows_of(place / "ds", "back")[1]["features"]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import-features tvs f.tsv ds", "Did you mean `tsv`?"),
        ("import-features npz f.tsv ds --fields image_id", "are for tsv; npz has names and types of its own"),
        ("import-features npz f.tsv ds --dtype float16", "are for tsv; npz has names and types of its own"),
        ("import-features tsv f.tsv new --new --key url", "Leave out --key, or --new"),
        ("import-features tsv f.tsv ds --classes no.txt", "no.txt cannot be read as a list of names"),
        ("export-features tsv ds -o x", "has no features/regions"),
        ("export-features tsv ds -o x --no-compress", "a tsv is never compressed"),
        ("export-features uniter-lmdb ds -o x --fields butd", "uniter-lmdb has columns of its own"),
    ],
)
def test_mistakes(place, capsys, words, message):
    assert run(words.split()) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in place.iterdir()) == ["ds", "f.tsv"]


def test_a_recipe(place):
    (place / "r.yaml").write_text(
        "dataset: ds\nstages:\n"
        "- import-features: {format: tsv, path: f.tsv, name: butd, workers: 0}\n"
        "- export-features: {format: tsv, name: butd, output: out.tsv}\n"
    )
    assert run(["run", "r.yaml"]) == 0
    before = (place / "out.tsv").read_bytes()
    assert run(["run", "r.yaml"]) == 0
    assert (place / "out.tsv").read_bytes() == before
