"""CLIP beside open_clip: published weights in, open_clip folders out."""

import math
import warnings

import pytest
import torch
from torch import nn

from schemas.errors import PairmillError
from training.batch import Batch
from training.config_models import CLIP_SIZES, CLIPConfig
from training.models.clip import CLIP, MEAN, STD, config_from_open_clip, config_from_shapes, open_clip_config
from training.registry import parameter_count

TINY = CLIPConfig(
    embed=24,
    image_size=32,
    patch=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
    context=9,
    vocab=50,
    text_width=64,
    text_layers=2,
    text_heads=4,
    activation="quick_gelu",
)
RESNET = TINY.model_copy(
    update={"vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_heads": 2, "patch": None, "image_size": 64}
)
# Heads of width 64, as checkpoints without a configuration are taken to have.
KINDS = ["transformer", "resnet", "gelu"]
USUAL = TINY.model_copy(update={"vision_heads": 1, "text_heads": 1})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(config, B=3):
    return torch.randint(256, (B, 3, config.image_size, config.image_size), dtype=torch.uint8)


def texts(config, B=3):
    ids = torch.randint(1, config.vocab - 1, (B, config.context))
    ids[torch.arange(B), torch.arange(B) + 2] = config.vocab - 1
    return ids


def lively(config):
    """A model none of whose parts is at its neutral starting value."""
    model = CLIP(config).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "logit_scale":
            tensor.add_(0.1 * torch.randn_like(tensor).abs())
    return model


def same_embeddings(ours, theirs, config):
    pixels, ids = images(config), texts(config)
    with torch.no_grad():
        pairs = (
            (ours.encode_image(pixels), theirs.encode_image(ours.normalise(pixels))),
            (ours.encode_text(ids), theirs.encode_text(ids)),
        )
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("RN50", 102_007_137),
        ("RN101", 119_688_033),
        ("RN50x4", 178_300_601),
        ("RN50x16", 290_979_217),
        ("ViT-B-32", 151_277_313),
        ("ViT-B-16", 149_620_737),
        ("ViT-L-14", 427_616_513),
        ("ViT-L-14-336", 427_944_193),
    ],
)
def test_parameter_counts(size, count):
    assert parameter_count(CLIP_SIZES[size]) == count


@pytest.mark.parametrize("config", [TINY, RESNET, TINY.model_copy(update={"activation": "gelu"})], ids=KINDS)
def test_open_clip_loads_what_we_save(tmp_path, config):
    import open_clip

    ours = lively(config)
    ours.save_open_clip(tmp_path)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    same_embeddings(ours, theirs.eval(), config)
    torch.testing.assert_close(theirs.logit_scale, ours.logit_scale)
    assert tuple(preprocess.transforms[-1].mean) == MEAN
    assert tuple(preprocess.transforms[-1].std) == STD


@pytest.mark.parametrize("config", [TINY, RESNET, TINY.model_copy(update={"activation": "gelu"})], ids=KINDS)
def test_a_saved_folder_loads_again(tmp_path, config):
    ours = lively(config)
    ours.save(tmp_path)
    again = CLIP.from_checkpoint(tmp_path).eval()
    assert again.config == config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert config_from_open_clip(open_clip_config(config)) == config


def test_wrong_activation_of_a_folder_is_an_error(tmp_path):
    CLIP(TINY).save(tmp_path)
    with pytest.raises(PairmillError, match="made with quick_gelu, not gelu"):
        CLIP.from_checkpoint(tmp_path, activation="gelu")
    with pytest.raises(PairmillError, match="Set `activation: quick_gelu`"):
        CLIP(TINY.model_copy(update={"activation": "gelu"})).load_checkpoint(tmp_path)
    assert CLIP(TINY).load_checkpoint(tmp_path).missing == ()


@pytest.mark.parametrize(
    "config", [USUAL, RESNET.model_copy(update={"text_heads": 1, "vision_heads": 4})], ids=KINDS[:2]
)
def test_an_open_clip_training_checkpoint(tmp_path, config):
    source = lively(config)
    state = {f"module.{name}": tensor for name, tensor in source.published_state().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    with pytest.raises(PairmillError, match="GELU or QuickGELU is not written"):
        CLIP.from_checkpoint(tmp_path / "epoch_3.pt")
    model = CLIP.from_checkpoint(tmp_path / "epoch_3.pt", activation="quick_gelu").eval()
    assert model.config == config
    pixels = images(config)
    torch.testing.assert_close(model.encode_image(pixels), source.encode_image(pixels))


class Node(nn.Module):
    """A module tree with the names of a state dict, as a TorchScript archive has them."""

    def forward(self, x: int) -> int:
        return x


def tree(state) -> Node:
    root = Node()
    for name, tensor in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        node.register_parameter(last, nn.Parameter(tensor.half(), requires_grad=False))
    for name, value in {"input_resolution": 32, "context_length": 9, "vocab_size": 50}.items():
        root.register_buffer(name, torch.tensor(value))
    return root


@pytest.fixture
def openai_archive(tmp_path):
    source = lively(USUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(tree(source.published_state())).save(tmp_path / "ViT-tiny.pt")
    return source, tmp_path / "ViT-tiny.pt"


def test_openai_archives(openai_archive, monkeypatch):
    source, path = openai_archive
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("torch.jit.load was called"))
    model = CLIP.from_checkpoint(path).eval()
    assert model.config == USUAL
    assert model.config.activation == "quick_gelu"
    for name, tensor in source.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, tensor.half().float())


def test_openai_weights_in_a_gelu_model_are_an_error(openai_archive):
    from training.weights import read_checkpoint

    _, path = openai_archive
    with pytest.raises(PairmillError, match="made with quick_gelu"):
        CLIP.from_checkpoint(path, activation="gelu")
    model = CLIP(USUAL.model_copy(update={"activation": "gelu"}))
    with pytest.raises(PairmillError, match="Set `activation: quick_gelu`"):
        model.load_published(read_checkpoint(path).tensors)


def test_weights_of_another_model_are_an_error(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(PairmillError, match="not a CLIP checkpoint"):
        CLIP.from_checkpoint(tmp_path / "x.pt", activation="gelu")
    state = CLIP(TINY).published_state()
    with pytest.raises(PairmillError, match="Build the model with the configuration"):
        CLIP(TINY.model_copy(update={"text_width": 32})).load_published(state)
    del state["ln_final.bias"]
    assert CLIP(TINY).load_published(state).missing == ("text.norm.bias",)


def test_open_clip_configurations_of_other_kinds_are_refused():
    saved = open_clip_config(TINY)
    saved["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
    with pytest.raises(PairmillError, match="hf_model_name"):
        config_from_open_clip(saved)


def test_shapes_tell_the_configuration():
    for config in (USUAL, RESNET.model_copy(update={"text_heads": 1, "vision_heads": 4})):
        assert config_from_shapes(CLIP(config).published_state(), "quick_gelu") == config


def test_padding_after_the_end_of_text_does_not_matter():
    model, ids = CLIP(TINY).eval(), texts(TINY)
    other = ids.clone()
    for row in range(3):
        other[row, row + 3 :] = 0
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(other))
    torch.testing.assert_close(model.encode_text(other), model.encode_text(other[:, :6]))


def test_forward_gives_unit_features_and_routes():
    model = CLIP(TINY)
    outputs = model(Batch(pixel_values=images(TINY), input_ids=texts(TINY)), route="contrastive")
    torch.testing.assert_close(outputs.image_features.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(outputs.text_features.norm(dim=-1), torch.ones(3))
    assert outputs.text.shape == (3, TINY.context, TINY.text_width)
    assert model.routes == ("contrastive",)


def test_temperature_is_held_in_its_bounds():
    model = CLIP(TINY)
    assert math.isclose(model.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-6)
    for value, want in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(value)
        model.after_step()
        assert math.isclose(model.logit_scale.item(), want, rel_tol=1e-6)


def test_initialisation_follows_width_and_depth():
    config = TINY.model_copy(update={"text_width": 256, "vocab": 500})
    text = CLIP(config).text
    width, layers = config.text_width, config.text_layers
    for weight, std in (
        (text.token_embedding.weight, 0.02),
        (text.pos_embed, 0.01),
        (text.blocks[0].attn.qkv.weight, width**-0.5),
        (text.blocks[1].attn.proj.weight, (2 * layers * width) ** -0.5),
        (text.blocks[1].mlp.fc2.weight, (2 * layers * width) ** -0.5),
        (text.blocks[0].mlp.fc1.weight, (2 * width) ** -0.5),
        (text.projection, width**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    resnet = CLIP(RESNET).visual
    assert not resnet.layer2[1].bn3.weight.any()


def test_no_decay_is_vectors_and_scalars():
    free = CLIP(TINY).no_decay()
    assert {"logit_scale", "visual.cls_token", "text.norm.weight", "text.blocks.0.mlp.fc1.bias"} <= free
    assert not free & {"visual.pos_embed", "text.projection", "text.token_embedding.weight"}


def test_grid_needs_a_resnet():
    pixels = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    assert CLIP(RESNET).eval().grid(pixels).shape == (1, 32 * RESNET.vision_width, 2, 3)
    with pytest.raises(PairmillError, match="need a ResNet"):
        CLIP(TINY).grid(pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": None}, "needs `patch`"),
        ({"image_size": 30}, "not a multiple of 8"),
        ({"text_heads": 5}, "text_heads 5 does not divide"),
        ({"vision_layers": (1, 1, 1, 1)}, "a ResNet has no patches"),
    ],
)
def test_configurations_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**(TINY.model_dump() | change))
