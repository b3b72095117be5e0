"""Heads in the public formats, with random weights and any widths, as torch modules built by their descriptions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn


class InLayers(nn.Module):
    """Everything under `layers`, as LAION's MLPs are saved."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Autokeras(nn.Module):
    """The two detectors of CLIP-based-NSFW-Detector: standardise, linear layers with ReLU, sigmoid."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.randn(widths[0]) / 4)
        self.norm.register_buffer("variance", torch.rand(widths[0]) / 8 + 0.01)
        self.count = len(widths) - 1
        for n, (a, b) in enumerate(pairwise(widths), 1):
            self.add_module(f"linear_{n}", nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.norm.mean) / self.norm.variance.sqrt()
        for n in range(1, self.count + 1):
            x = self.get_submodule(f"linear_{n}")(x)
            x = x.relu() if n < self.count else x.sigmoid()
        return x


def v1(dim: int) -> nn.Module:
    return nn.Linear(dim, 1)


def v2(dim: int, widths: tuple[int, ...] = (12, 10, 8, 6)) -> nn.Module:
    a, b, c, d = widths
    return InLayers(
        nn.Linear(dim, a),
        nn.Dropout(0.2),
        nn.Linear(a, b),
        nn.Dropout(0.2),
        nn.Linear(b, c),
        nn.Dropout(0.1),
        nn.Linear(c, d),
        nn.Linear(d, 1),
    )


def v2_relu(dim: int) -> nn.Module:
    return InLayers(
        nn.Linear(dim, 12),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(12, 10),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(10, 8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.Linear(6, 1),
    )


def h14(dim: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise((dim, 14, 12, 10, 8, 6)):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2)]
    return InLayers(*layers, nn.Linear(6, 5), nn.Linear(5, 1))


FORMS = {
    ("aesthetic", "V1 linear"): v1,
    ("aesthetic", "V2 linear layers"): v2,
    ("aesthetic", "V2 with ReLU"): v2_relu,
    ("safety", "autokeras 4 layers"): lambda dim: Autokeras(dim, 12, 10, 8, 1),
    ("safety", "autokeras 3 layers"): lambda dim: Autokeras(dim, 12, 12, 1),
    ("safety", "H/14"): h14,
}


def save_head(path: Path, kind: str, form: str, dim: int = 16, seed: int = 0) -> nn.Module:
    """The module that was saved, in eval mode."""
    torch.manual_seed(seed)
    module = FORMS[kind, form](dim).eval()
    torch.save(module.state_dict(), path)
    return module
