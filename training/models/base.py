"""What the training loop knows of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from schemas.config import StageConfig
from shards.files import atomic_file
from training.batch import Batch
from training.key_maps import KeyMap, LoadReport, load_mapped
from training.outputs import Outputs
from training.weights import read_checkpoint

CONFIG_FILE = "model.json"


class VisionLanguageModel(nn.Module):
    """A model: its configuration, the routes it can take, its published names, and three calls.

        batch = model.prepare(batch, generator)            training only, once a step
        outputs = model(batch, route=objective.route)
        model.after_step()                                 after each optimizer step

    `routes` names what `forward` can compute: one name per objective or head.
    `head_prefixes` are the beginnings of the names of task heads' parameters.
    Weights are written and read under their published names: a run's checkpoint is also the original's.
    """

    routes: tuple[str, ...] = ()
    head_prefixes: tuple[str, ...] = ()

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def key_map(self) -> KeyMap:
        """Published names and ours."""
        raise NotImplementedError

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with the model's own random choices in it, drawn from `generator`."""
        return batch

    def forward(self, batch: Batch, route: str) -> Outputs:
        """One pass over the batch."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Hold parameters inside their bounds."""

    def no_decay(self) -> set[str]:
        """Parameters without weight decay: biases, norms and other vectors and scalars."""
        return {name for name, p in self.named_parameters() if p.dim() < 2}

    def load_published(self, tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> LoadReport:
        """Copy published weights in.

        Raises PairmillError: a shape that is not ours.
        """
        return load_mapped(self, tensors, self.key_map, where)

    def load_checkpoint(self, path: str | Path) -> LoadReport:
        """Copy the weights of a published checkpoint, or of a run's, in.

        Raises PairmillError: a file that is no checkpoint, or `load_published`'s.
        """
        return self.load_published(read_checkpoint(path).tensors, str(path))

    def published_state(self) -> dict[str, Tensor]:
        """Parameters and buffers under their published names, on the CPU."""
        state = self.key_map.to_published(self.state_dict())
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Write FOLDER/model.safetensors, and model.json: the configuration."""
        from safetensors.torch import save

        with atomic_file(Path(folder) / "model.safetensors") as stream:
            stream.write(save(self.published_state()))
        with atomic_file(Path(folder) / CONFIG_FILE) as stream:
            stream.write(self.config.model_dump_json(indent=1).encode())
