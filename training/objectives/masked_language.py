"""Predict the masked tokens (Devlin et al. 2019; ViLT objectives.compute_mlm)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import Batch
from training.objectives import Metrics, Objective, global_mean
from training.outputs import Outputs

IGNORED = -100


class Masker(Protocol):
    """Masks token ids: (input_ids [B, T] int64, one seed per row) -> (masked ids, labels).

    Labels are -100 where nothing is to be predicted. A row's mask depends on its own seed and tokens alone.
    """

    def __call__(self, input_ids: Tensor, seeds: Sequence[int], /) -> tuple[Tensor, Tensor]: ...


class MaskedLanguage(Objective):
    """Cross-entropy of the true tokens at the masked places, a mean over those of all processes."""

    name = "masked_language"
    route = "masked_language"
    inputs = frozenset({"input_ids", "text_mask"})

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self.masker = masker

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Mask `input_ids` and set `labels`; each row by its own seed, however rows are shared out."""
        assert batch.input_ids is not None
        masked, labels = self.masker(batch.input_ids, batch.draw_seeds(generator))
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
