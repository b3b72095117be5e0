"""Predict the masked tokens (Devlin et al. 2019; ViLT objectives.compute_mlm)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import Batch
from training.objectives import Metrics, Objective, global_mean
from training.outputs import Outputs

IGNORED = -100


class Masker(Protocol):
    """Masks token ids: (input_ids [B, T] int64, generator) -> (masked ids, labels, -100 = not to be predicted)."""

    def __call__(self, input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...


class MaskedLanguage(Objective):
    """Cross-entropy of the true tokens at the masked places, a mean over those of all processes."""

    name = "masked_language"
    route = "masked_language"
    inputs = frozenset({"input_ids", "text_mask"})

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self.masker = masker

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Mask `input_ids` and set `labels`; each row by its own seed, so that padding and processes do not matter."""
        assert batch.input_ids is not None
        ids = batch.input_ids.cpu()
        seeds = batch.draw_seeds(generator)
        rows = [
            self.masker(row[None], torch.Generator().manual_seed(seed)) for row, seed in zip(ids, seeds, strict=True)
        ]
        masked, labels = (torch.cat(part).to(batch.device) for part in zip(*rows, strict=True))
        return batch.replace(input_ids=masked, labels=labels)

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Metrics: loss, and share of the masked tokens that the model names."""
        logits, labels = outputs.need("token_logits").float(), batch.labels
        assert labels is not None
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        asked = labels != IGNORED
        loss = global_mean(total, asked.sum())
        right = ((logits.argmax(-1) == labels) & asked).sum() / asked.sum().clamp(min=1)
        return loss, {"mlm_loss": loss.detach(), "mlm_accuracy": right.detach()}
