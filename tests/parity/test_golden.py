"""The comparison itself: it must fail when it should."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.golden import check_outputs, golden


@pytest.fixture
def case(tmp_path, monkeypatch):
    folder = tmp_path / "other_name"
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps({"case": "toy", "config": {}, "tolerance": {"atol": 1e-3}}))
    save_file(
        {"in.x": torch.ones(2), "out.y": torch.ones(2, 3), "out.z": torch.zeros(1)},
        folder / "tensors.safetensors",
    )
    monkeypatch.setenv("PAIRMILL_PARITY", str(tmp_path))
    return golden("toy")[0]


def test_a_family_without_a_case_raises(case):
    with pytest.raises(FileNotFoundError, match="no golden case of `toys`"):
        golden("toys")


def test_equal_within_tolerance(case):
    check_outputs(case, {"y": torch.ones(2, 3) + 9e-4, "z": torch.zeros(1)})


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"y": torch.ones(2, 3)}, "nobody compares"),
        ({"y": torch.ones(2, 3), "z": torch.zeros(1), "w": torch.zeros(1)}, "not in the case"),
        ({"y": torch.ones(2, 3) + 2e-3, "z": torch.zeros(1)}, "max"),
        ({"y": torch.full((2, 3), torch.nan), "z": torch.zeros(1)}, "6 of 6 off"),
        ({"y": torch.ones(2, 1), "z": torch.zeros(1)}, "shape"),
    ],
)
def test_differences_fail(case, got, message):
    with pytest.raises(AssertionError, match=message):
        check_outputs(case, got)


def test_left_out_and_masked(case):
    y = torch.ones(2, 3)
    y[1] = 7
    check_outputs(case, {"y": y}, left_out={"z": "toy"}, where={"y": torch.tensor([True, False])})
    with pytest.raises(AssertionError, match="leaves nothing"):
        check_outputs(case, {"y": y}, left_out={"z": "toy"}, where={"y": torch.tensor([False, False])})


def test_plain_values(tmp_path, monkeypatch):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps({"case": "plain", "config": {}}))
    (folder / "data.json").write_text(json.dumps({"in": {"a": 1}, "out": {"ids": [[1, 2], []], "v": {"x": 0.5}}}))
    monkeypatch.setenv("PAIRMILL_PARITY", str(tmp_path))
    (case,) = golden("plain")
    assert case.inputs == {"a": 1}
    check_outputs(case, {"ids": [[1, 2], []], "v": {"x": 0.5}})
    with pytest.raises(AssertionError, match="ids"):
        check_outputs(case, {"ids": [[1, 3], []], "v": {"x": 0.5}})
