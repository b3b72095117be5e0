"""CLIP against openai/CLIP and open_clip's loss."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from tests.parity.golden import check_outputs, golden
from training.batch import Batch
from training.config_models import CLIPConfig
from training.models.clip import CLIP, config_from_shapes, key_map
from training.objectives.contrastive import Contrastive

MODES = [(local, gather) for local in (0, 1) for gather in (0, 1)]


def build(case) -> CLIP:
    c = case.config
    resnet = isinstance(c["v_layers"], list)
    config = CLIPConfig(
        embed=c["embed"],
        image_size=c["image_size"],
        patch=c.get("patch"),
        vision_width=c["v_width"],
        vision_layers=tuple(c["v_layers"]) if resnet else c["v_layers"],
        vision_heads=c["v_width"] // 2 if resnet else c["v_heads"],
        context=c["context"],
        vocab=c["vocab"],
        text_width=c["t_width"],
        text_layers=c["t_layers"],
        text_heads=c["t_heads"],
        activation="quick_gelu",
    )
    model = CLIP(config).eval()
    report = model.load_published(case.weights)
    assert report.missing == ()
    assert report.unexpected == ()
    assert config_from_shapes(case.weights, "quick_gelu", config.vision_heads, config.text_heads) == config
    return model


def forward(case, model) -> dict:
    image, text = case.inputs["image"], case.inputs["text"]
    outputs = model(Batch(pixel_values=image, input_ids=text))
    images, texts = model.encode_image(image), model.encode_text(text)
    torch.testing.assert_close(normalize(images, dim=-1), outputs.image_features)
    torch.testing.assert_close(normalize(texts, dim=-1), outputs.text_features)
    loss, _ = Contrastive().loss(outputs, Batch())
    loss.backward()
    grads = key_map(model.config).to_published(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    )
    asked = [name.removeprefix("grad.") for name in case.outputs if name.startswith("grad.")]
    return {
        "image_features": images,
        "text_features": texts,
        "text_hidden": outputs.text,
        "logits_per_image": outputs.logit_scale.exp() * outputs.image_features @ outputs.text_features.T,
        "loss": loss,
        **{f"grad.{name}": grads[name] for name in asked},
    }


@pytest.mark.parametrize("case", golden("clip_vit"), ids=str)
def test_vision_transformer(case):
    check_outputs(case, forward(case, build(case)))


@pytest.mark.parametrize("case", golden("clip_resnet"), ids=str)
def test_resnet_and_grid(case):
    model = build(case)
    got = forward(case, model)
    got["grid"] = model.grid(case.inputs["image"])
    got["grid_nonsquare"] = model.grid(case.inputs["grid_image"])
    check_outputs(case, got)


def world2_worker(rank: int, store: str, images, texts, scale: float, results) -> None:
    """One of two processes: its rows' loss and gradients in every mode."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = slice(rank * len(images) // 2, (rank + 1) * len(images) // 2)
    found = {}
    for local, gather in MODES:
        own_images = images[rows].clone().requires_grad_()
        own_texts = texts[rows].clone().requires_grad_()
        objective = Contrastive(gather_with_grad=bool(gather), local_loss=bool(local))
        loss, _, _ = objective.pair_loss(own_images, own_texts, torch.tensor(scale))
        loss.backward()
        name = f"rank{rank}.local{local}_gathergrad{gather}"
        found |= {
            f"{name}.loss": loss.detach().numpy(),
            f"{name}.grad_image": own_images.grad.numpy(),
            f"{name}.grad_text": own_texts.grad.numpy(),
        }
    results[rank] = found
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", golden("clip_loss_world2"), ids=str)
def test_loss_of_two_processes(case, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        args = (
            str(tmp_path / "store"),
            case.inputs["image_features"],
            case.inputs["text_features"],
            case.config["scale"],
            results,
        )
        mp.spawn(world2_worker, args, nprocs=2)
        got = {name: torch.as_tensor(v) for found in results.values() for name, v in found.items()}
    check_outputs(case, got)
