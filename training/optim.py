"""Parameter groups, AdamW, schedules, the running average of weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay. `factor` multiplies the run's rate."""

    origin: str  # loaded, new or head
    decay: bool
    factor: float
    names: tuple[str, ...]
    numbers: int


def parameter_groups(
    model: nn.Module, config: TrainConfig, loaded: Iterable[str], heads: Iterable[str], no_decay: Iterable[str]
) -> list[ParameterGroup]:
    """(loaded, new, head) x (decay, no decay), without the empty ones.

    `heads` are prefixes of parameter names, `no_decay` the exact names that are not decayed.
    """
    loaded, heads, free = set(loaded), tuple(heads), set(no_decay)
    factors = {"loaded": 1.0, "new": config.new_lr, "head": config.head_lr}
    found: dict[tuple[str, bool], list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            origin = "head" if name.startswith(heads) and heads else "loaded" if name in loaded else "new"
            found.setdefault((origin, name not in free), []).append((name, parameter.numel()))
    return [
        ParameterGroup(origin, decay, factors[origin], tuple(n for n, _ in members), sum(c for _, c in members))
        for (origin, decay), members in sorted(found.items())
    ]


def make_optimizer(model: nn.Module, groups: Iterable[ParameterGroup], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the groups; each keeps its `factor` for the schedule."""
    parameters = dict(model.named_parameters())
    settings = [
        {
            "params": [parameters[n] for n in g.names],
            "weight_decay": config.weight_decay if g.decay else 0.0,
            "factor": g.factor,
        }
        for g in groups
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up to the peak, then the schedule down to `min_lr`."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup) / max(1, config.steps - warmup)
    left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * min(1.0, share))) / 2
    return config.min_lr + (config.lr - config.min_lr) * max(0.0, left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


class Average:
    """Running average of a model's weights: average = decay * average + (1 - decay) * weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone().float() for n, p in model.named_parameters()}

    def to(self, device: torch.device) -> None:
        """Moves the average to the model's device."""
        self.weights = {n: w.to(device) for n, w in self.weights.items()}

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model has the average's weights for the time of the block."""
        parameters = dict(model.named_parameters())
        own = {n: p.detach().clone() for n, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter.detach().float(), 1 - self.decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's state as `PARAMETER/KEY` -> tensor. `names` maps id(parameter) to its name."""
    out: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            out[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return out


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave."""
    for full, tensor in tensors.items():
        name, key = full.rsplit("/", 1)
        parameter = parameters[name]
        place = tensor.to(parameter.device) if key != "step" else tensor.clone()
        optimizer.state[parameter][key] = place
