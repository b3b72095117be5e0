"""What a model learns from: one class per objective.

The training loop does, once a step:

    batch = model.prepare(batch, generator)                the model's own random choices (training only)
    for weight, objective in objectives:                   one pass each
        prepared = objective.prepare(batch, generator)     masks, labels, negatives
        outputs = model(prepared, route=objective.route)
        loss, metrics = objective.loss(outputs, prepared)
        total += weight * loss
    total.backward(); optimizer.step(); model.after_step()

An objective lists the batch fields it needs (`inputs`), names the pass that computes what it reads (`route`), and
knows neither model nor loop. `generator` is a CPU generator seeded by (seed, epoch, step), alike on every process:
what is drawn from it is drawn for the global batch (Batch.start, Batch.total), so that a run on two processes sees
the masks and negatives of a run on one. A mean over something other than pairs is taken over all processes
(`global_mean`). Metrics are 0-D tensors without gradient, means over this process's rows.

`Together` lets objectives share one prepared batch and one pass (ViLT: matching and word-patch alignment).
State (queues, momentum teachers) lives in buffers and submodules of the objective, and is saved as its state dict.
Under DistributedDataParallel wrap a module that runs all passes of a step in one forward: two forwards of a wrapped
model before one backward lose gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from schemas.errors import PairmillError
from training.batch import Batch
from training.outputs import Outputs

Metrics = dict[str, Tensor]


class Objective(nn.Module):
    """Base of every objective; see the package's docstring for how it is used."""

    name: str
    route: str
    inputs: frozenset[str] = frozenset()
    span: tuple[float, float] = (0.0, 1.0)  # shares of the run between which it takes part

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with the masks, labels and negatives this objective needs."""
        return batch

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """(0-D loss, metrics) of one pass over a prepared batch."""
        raise NotImplementedError


class Together(Objective):
    """Objectives that read the same pass: their weighted losses are summed."""

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        """`parts` (weight, objective); all must take the first one's route or read any pass (route '')."""
        super().__init__()
        self.weights = [weight for weight, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)
        self.name = "+".join(part.name for _, part in parts)
        self.route = parts[0][1].route
        self.inputs = frozenset().union(*(part.inputs for _, part in parts))
        self.span = parts[0][1].span
        other = [part.name for _, part in parts if part.route not in ("", self.route)]
        if other:
            raise PairmillError(f"{', '.join(other)} cannot share the pass of {parts[0][1].name}")
        if any(part.span != self.span for _, part in parts):
            raise PairmillError(f"{self.name} share a pass: give them the same `begin` and `end`")

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Each part's preparation, in order."""
        for part in self.parts:
            batch = part.prepare(batch, generator)
        return batch

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Sum of weight * loss over the parts; every part's metrics."""
        losses: list[Tensor] = []
        metrics: Metrics = {}
        for weight, part in zip(self.weights, self.parts, strict=True):
            loss, own = part.loss(outputs, batch, generator)
            losses.append(weight * loss)
            metrics |= own
        return torch.stack(losses).sum(), metrics


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """`total` / `count` where both are sums over this process's rows, and the mean is meant over all processes.

    Averaging the results of all processes, as DistributedDataParallel does with gradients, gives the exact mean;
    0 where nothing was counted anywhere.
    """
    count = count.to(total.dtype)
    _, processes = world()
    if processes > 1:
        count = count.detach().clone()
        dist.all_reduce(count)
    return total * processes / count.clamp(min=1)
