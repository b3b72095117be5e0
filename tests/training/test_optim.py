import pytest
import torch
from torch import nn

from schemas.errors import PairmillError
from training.config import TrainConfig, differences, preset_names, read_preset, resolve
from training.optim import Average, learning_rate, make_optimizer, parameter_groups, set_learning_rate
from training.registry import model_config


def config(**changes):
    return TrainConfig(**{"family": "vilt", "steps": 100, "lr": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "step", "rate"),
    [
        ({"warmup": 10}, 0, 0.1),
        ({"warmup": 10}, 9, 1.0),
        ({"warmup": 0.1}, 4, 0.5),
        ({"schedule": "constant"}, 99, 1.0),
        ({"schedule": "linear"}, 50, 0.5),
        ({"schedule": "linear", "warmup": 20}, 60, 0.5),
        ({"schedule": "linear", "min_lr": 0.2}, 100, 0.2),
        ({"schedule": "linear", "min_lr": 0.2}, 50, 0.6),
        ({"schedule": "cosine"}, 0, 1.0),
        ({"schedule": "cosine"}, 50, 0.5),
        ({"schedule": "cosine"}, 100, 0.0),
    ],
)
def test_learning_rate(changes, step, rate):
    assert learning_rate(config(**changes), step) == pytest.approx(rate)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(2, 3)
        self.fresh = nn.Linear(3, 3, bias=False)
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1)})


def test_groups_rates_and_decay():
    model = Small()
    settings = config(weight_decay=0.1, new_lr=2.0, head_lr=5.0)
    loaded = {"trunk.weight", "trunk.bias"}
    groups = parameter_groups(model, settings, loaded, ["heads."], {"trunk.bias", "heads.a.bias"})
    found = {(g.origin, g.decay): (g.names, g.numbers, g.factor) for g in groups}
    assert found == {
        ("loaded", True): (("trunk.weight",), 6, 1.0),
        ("loaded", False): (("trunk.bias",), 3, 1.0),
        ("new", True): (("fresh.weight",), 9, 2.0),
        ("head", True): (("heads.a.weight",), 3, 5.0),
        ("head", False): (("heads.a.bias",), 1, 5.0),
    }
    optimizer = make_optimizer(model, groups, settings)
    set_learning_rate(optimizer, 0.5)
    rates = {tuple(g["params"][0].shape): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert rates[(3, 2)] == (0.5, 0.1)
    assert rates[(3,)] == (0.5, 0.0)
    assert rates[(3, 3)] == (1.0, 0.1)
    assert rates[(1, 3)] == (2.5, 0.1)


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = Average(model, 0.75)
    for value in (4.0, 8.0):
        model.weight.data.fill_(value)
        average.update(model)
    assert average.weights["weight"].item() == pytest.approx(0.75 * 1.0 + 0.25 * 8.0)
    with average.swapped(model):
        assert model.weight.item() == pytest.approx(2.75)
    assert model.weight.item() == 8.0
    assert torch.equal(average.weights["weight"], torch.tensor([[2.75]]))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_and_tells_what_it_changes(name):
    preset = resolve(name, {})
    assert model_config(preset.family, preset.model)
    changed = differences(preset)
    assert bool(changed) == name.endswith("-tiny")
    assert "lr" in differences(resolve(name, {"lr": 0.123}))


def test_preset_files(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base_preset: vilt-tiny\nlr: 0.25\n")
    assert resolve(str(file), {}).lr == 0.25
    assert resolve(str(file), {"steps": 7}).steps == 7
    assert read_preset(str(file))["preset"] == "vilt-tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "must be a mapping"), ("a: [1,", "is no YAML"), ("bse: 3\n", "unknown key `bse`")],
)
def test_broken_preset_files(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(PairmillError, match=message):
        resolve(str(file), {})


def test_unknown_presets_suggest_the_nearest():
    with pytest.raises(PairmillError, match="Did you mean `vilt-tiny`"):
        resolve("vilt-tyny", {})
    with pytest.raises(PairmillError, match="no such file"):
        resolve("nowhere/x.yaml", {})
