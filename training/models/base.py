"""What the training loop knows of a model."""

from __future__ import annotations

import torch
from torch import nn

from schemas.config import StageConfig
from training.batch import Batch
from training.outputs import Outputs


class VisionLanguageModel(nn.Module):
    """A model: its configuration, the routes it can take, and three calls.

        batch = model.prepare(batch, generator)            training only, once a step
        outputs = model(batch, route=objective.route)
        model.after_step()                                 after each optimizer step

    `routes` names what `forward` can compute: one name per objective or head.
    """

    routes: tuple[str, ...] = ()

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with the model's own random choices in it, drawn from `generator`."""
        return batch

    def after_step(self) -> None:
        """Hold parameters inside their bounds."""

    def forward(self, batch: Batch, route: str) -> Outputs:
        """One pass over the batch."""
        raise NotImplementedError
