"""The registry: every name in it leads somewhere, and configurations are checked."""

import subprocess
import sys

import pytest
import torch

from schemas.errors import PairmillError
from training.batch import Batch
from training.config import ObjectiveConfig, preset_names, read_preset
from training.config_models import CLIP_SIZES, VILT_SIZES
from training.objectives import Objective, Together
from training.registry import (
    MODELS,
    OBJECTIVES,
    build_model,
    build_objectives,
    family_of,
    model_config,
    model_from_checkpoint,
    model_rows,
    parameter_count,
)


class Words:
    """A tokenizer as a Masker needs it."""

    mask_id, pad_id, cls_id, sep_id, vocab_size = 4, 0, 2, 3, 30
    special = (0, 1, 2, 3, 4)
    continuation = torch.zeros(30, dtype=torch.bool)


def objectives(family, *specs):
    return build_objectives(family, [ObjectiveConfig(**spec) for spec in specs], Words())


def test_tables_agree():
    for family, entry in MODELS.items():
        assert set(entry.objectives) <= set(OBJECTIVES), family
        for config in entry.sizes.values():
            assert isinstance(config, entry.config)
            assert config.family == family
    used = {name for entry in MODELS.values() for name in entry.objectives}
    assert used == set(OBJECTIVES)


@pytest.mark.parametrize("family", MODELS)
def test_every_objective_has_a_route_of_its_model(family):
    entry = MODELS[family]
    every = {"model_heads": ("masked_language", "matching", "ranking")} if family == "vilt" else {}
    with torch.device("meta"):
        model = build_model(model_config(family, {"size": "tiny", **every}))
    assert family_of(model.key_map.to_published(model.state_dict())) == family
    for name in entry.objectives:
        specs = [{"name": name}] if name != "alignment" else [{"name": "matching"}, {"name": name}]
        ((_, objective),) = objectives(family, *specs)
        assert isinstance(objective, Objective)
        assert objective.route in model.routes
        assert name in objective.name


def test_objectives_without_a_pass_join_the_one_before():
    built = objectives("vilt", {"name": "masked_language"}, {"name": "matching"}, {"name": "alignment", "weight": 0.1})
    assert [weight for weight, _ in built] == [1.0, 1.0]
    assert [o.route for _, o in built] == ["masked_language", "matching"]
    assert isinstance(built[1][1], Together)
    assert built[1][1].weights == [1.0, 0.1]


def test_options_reach_the_objective():
    ((weight, contrastive),) = objectives(
        "clip", {"name": "contrastive", "weight": 2, "options": {"local_loss": False}}
    )
    assert weight == 2
    assert not contrastive.local_loss
    ((_, masked),) = objectives("vilt", {"name": "masked_language", "options": {"probability": 0.3}})
    assert masked.masker.probability == 0.3
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    prepared = masked.prepare(Batch(input_ids=ids), torch.Generator().manual_seed(1))
    assert (prepared.labels != -100).sum(1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("family", "specs", "message"),
    [
        ("vilt", [{"name": "alignment"}], "reads the pass of another"),
        ("vilt", [{"name": "maching"}], "Did you mean `matching`"),
        ("clip", [{"name": "matching"}], "clip has no objective `matching`"),
        ("vilt", [{"name": "matching", "options": {"blok": 2}}], "objective matching.*blok"),
        ("clap", [{"name": "contrastive"}], "Did you mean `clip`"),
    ],
)
def test_objectives_that_cannot_be(family, specs, message):
    with pytest.raises(PairmillError, match=message):
        objectives(family, *specs)


def test_masked_language_needs_a_tokenizer():
    with pytest.raises(PairmillError, match="needs a tokenizer"):
        build_objectives("vilt", [ObjectiveConfig(name="masked_language")])


def test_sizes_and_overrides():
    assert model_config("clip", {"size": "RN50"}) == CLIP_SIZES["RN50"]
    changed = model_config("vilt", {"size": "tiny", "dropout": 0.2})
    assert changed == VILT_SIZES["tiny"].model_copy(update={"dropout": 0.2})
    for values, message in (
        ({"size": "RN5"}, "Did you mean `RN50`"),
        ({"size": "tiny", "embedd": 3}, "Did you mean `embed`"),
        ({"size": "tiny", "image_size": 63}, "not a multiple"),
    ):
        with pytest.raises(PairmillError, match=message):
            model_config("clip", values)


@pytest.mark.parametrize("name", preset_names())
def test_presets_build(name):
    preset = read_preset(name)
    config = model_config(preset["family"], preset["model"])
    assert parameter_count(config) > 100_000
    assert objectives(preset["family"], *preset["objectives"])


def test_runs_and_strangers(tmp_path):
    model = build_model(model_config("clip", {"size": "tiny", "vocab": 100}))
    model.save(tmp_path / "run")
    again = model_from_checkpoint(tmp_path / "run")
    assert again.config == model.config
    assert torch.equal(again.text.projection, model.text.projection)
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(PairmillError, match=r"no model we know \(fc.weight"):
        model_from_checkpoint(tmp_path / "x.pt")


def test_rows_name_every_size():
    rows = model_rows()
    assert [(r["model"], r["size"]) for r in rows] == [(f, s) for f, e in MODELS.items() for s in e.sizes]
    assert {"parameters", "inputs", "objectives", "tasks", "published weights"} <= set(rows[0])
    assert next(r for r in rows if r["size"] == "ViT-B-32")["parameters"] == "151,277,313"


def test_importing_the_tables_imports_no_torch():
    code = "import sys, training.registry, training.config_models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
