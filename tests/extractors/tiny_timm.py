"""A Swin of some thousand parameters that timm knows by name, and weights whose every part matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "tiny_swin": {
            "input_size": (3, 64, 64),
            "num_classes": 10,
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        }
    }
)


@register_model
def tiny_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    shape = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
    return build_model_with_cfg(
        SwinTransformer, "tiny_swin", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**shape, **kwargs}
    )


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every parameter: a new model's position embeddings and last normalisations are all but nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def save_timm(path: Path, name: str, seed: int = 0, **kwargs: Any) -> Path:
    """The weights of timm's `name`, classifier included."""
    torch.manual_seed(seed)
    save_file(shake(timm.create_model(name, **kwargs), seed).state_dict(), path)
    return path
