"""Names of published weights and ours, and what a load report says."""

import pytest
import torch
from torch import nn

from schemas.errors import PairmillError
from training.key_maps import KeyMap, LoadReport, load_mapped, rules

KEYS = KeyMap(
    rules(
        (("layer.*.query.**", "layer.*.key.**"), "blocks.*.qk.**"),
        ("layer.*.out.**", "blocks.*.proj.**"),
        ("scale", "logit_scale"),
    ),
    ignored=("position_ids",),
)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"qk": nn.Linear(2, 4), "proj": nn.Linear(2, 2)}) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


def test_key_map_round_trip():
    toy = Toy()
    published = KEYS.to_published(toy.state_dict())
    assert published["layer.1.key.weight"].shape == (2, 2)
    assert "layer.0.out.bias" in published
    ours, left = KEYS.to_ours({**published, "position_ids": torch.ones(1)})
    assert left == []
    assert set(ours) == set(toy.state_dict())
    assert all(torch.equal(ours[name], tensor) for name, tensor in toy.state_dict().items())


def test_an_unknown_name_of_ours_raises():
    with pytest.raises(KeyError, match="momentum"):
        KEYS.to_published({"momentum": torch.ones(1)})


def test_load_report_tells_new_and_left():
    source, target = Toy(), Toy()
    published = KEYS.to_published(source.state_dict())
    del published["layer.1.key.bias"]  # its query half is then of no use either
    published["head.weight"] = torch.ones(1)
    published["layer.2.out.bias"] = torch.ones(2)
    published["scale"] = published["scale"].view(1)
    report = load_mapped(target, published, KEYS)
    assert report.missing == ("blocks.1.qk.bias",)
    assert set(report.unexpected) == {"head.weight", "layer.1.query.bias", "layer.2.out.bias"}
    assert set(report.loaded) == set(target.state_dict()) - {"blocks.1.qk.bias"}
    assert torch.equal(target.blocks[0]["qk"].weight, source.blocks[0]["qk"].weight)
    with pytest.raises(PairmillError, match=r"1 \(blocks.1.qk.bias\) not in the file, 3 "):
        report.require_whole("x.pt")


def test_a_wrong_shape_is_an_error_with_both():
    published = KEYS.to_published(Toy().state_dict()) | {"layer.0.out.weight": torch.ones(3, 2)}
    with pytest.raises(PairmillError, match=r"blocks\.0\.proj\.weight.*\(3, 2\).*\(2, 2\)"):
        load_mapped(Toy(), published, KEYS)


def test_whole_reports_pass():
    report = LoadReport(("a",), (), ())
    assert report.require_whole("x") is report
    assert str(report) == "1 loaded, 0 new, 0 left"
