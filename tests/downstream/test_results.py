"""What evaluations leave behind: whole files, told apart by what decides them."""

import json

import numpy as np
import pytest

from downstream.results import Blocks, Identity, read_results, standing_results, write_results, writing
from schemas.errors import PairmillError


def identity(**changes):
    values = {
        "task": "retrieval",
        "split": "test",
        "checkpoint": {"name": "run 1", "sha256": "aa"},
        "dataset": {"name": "ds", "task": "retrieval", "fingerprint": "bb"},
        "tokenizer": "cc",
        "configuration": {"ties": "pessimistic", "folds": 1},
    }
    return Identity(**values | changes)


def test_results_come_back(tmp_path):
    content = write_results(tmp_path, identity(), {"rsum": 12.5}, {"images": 3}, None)
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == content
    assert standing_results(tmp_path) == content
    assert standing_results(tmp_path / "elsewhere") is None
    assert content["metric"] == {"rsum": 12.5}
    assert content["split"] == "test"


def test_differences_name_what_decides_and_not_where_it_lies():
    old = identity().values()
    assert identity().differences(old) == []
    assert identity(checkpoint={"name": "moved", "sha256": "aa"}).differences(old) == []
    other = identity(
        checkpoint={"name": "run 1", "sha256": "dd"}, configuration={"ties": "albef", "folds": 1}, split="val"
    )
    assert other.differences(old) == [
        "`checkpoint.sha256` was 'aa', now 'dd'",
        "`configuration.ties` was 'pessimistic', now 'albef'",
        "`split` was 'test', now 'val'",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is damaged"),
        ("[1]", "holds no results"),
        ('{"metric": 3}', "holds no results"),
        ('{"metric": {}, "version": 9}', "written as version 9; this pairmill reads 1"),
    ],
)
def test_what_is_no_results(tmp_path, text, told):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(PairmillError, match=told):
        read_results(tmp_path)


def test_no_results(tmp_path):
    with pytest.raises(PairmillError, match=r"results\.json: No such file.*`pairmill evaluate` writes it"):
        read_results(tmp_path)


def test_blocks_go_on_with_the_same_settings_only(tmp_path):
    blocks = Blocks(tmp_path, identity())
    blocks.save("00000", np.arange(6, dtype=np.float32))
    again = Blocks(tmp_path, identity(checkpoint={"name": "moved", "sha256": "aa"}))
    np.testing.assert_array_equal(again.load("00000", (6,)), np.arange(6))
    assert again.load("00001", (6,)) is None
    with pytest.raises(PairmillError, match=r"has shape \[6\], want \[7\]"):
        again.load("00000", (7,))
    with pytest.raises(PairmillError, match="`tokenizer` was 'cc', now 'ee'"):
        Blocks(tmp_path, identity(tokenizer="ee"))
    blocks.remove()
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_nobody_are_not_read(tmp_path):
    """`remove` ended between its two steps: the arrays stand without the file that says whose they are."""
    Blocks(tmp_path, identity()).save("00000", np.zeros(3))
    (tmp_path / "scores.json").unlink()
    assert Blocks(tmp_path, identity(tokenizer="ee")).load("00000", (3,)) is None


def test_pickles_are_never_read(tmp_path):
    blocks = Blocks(tmp_path, identity())
    np.save(tmp_path / "scores-00000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(PairmillError, match=r"scores-00000\.npy is damaged"):
        blocks.load("00000", (1,))


def test_one_evaluation_at_a_time(tmp_path):
    with writing(tmp_path / "out"):
        with pytest.raises(PairmillError, match="evaluation is being written by process"):
            with writing(tmp_path / "out"):
                raise AssertionError("two evaluations hold one folder")
    with writing(tmp_path / "out"):
        assert json.loads((tmp_path / "out/logs/locks/evaluation.lock").read_text())["pid"] > 0
