"""CLIP's loss: which text belongs to which image of the whole batch (Radford et al. 2021; open_clip loss.py)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from training.batch import Batch
from training.objectives import Metrics, Objective, world
from training.outputs import Outputs


class Contrastive(Objective):
    """Symmetric cross-entropy over the similarities of all pairs of all processes.

    gather_with_grad  True: gradients flow to every process's features; after averaging they are exact.
                      False: each process only learns through its own features; with local_loss False the towers
                      then get 1/processes of the exact gradient, with local_loss True an inexact one.
    local_loss        True: a process computes only its own rows of both matrices (memory B x global B).
    """

    name = "contrastive"
    route = "contrastive"
    inputs = frozenset({"input_ids"})

    def __init__(self, gather_with_grad: bool = True, local_loss: bool = True) -> None:
        super().__init__()
        self.gather_with_grad, self.local_loss = gather_with_grad, local_loss

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Mean of the two cross-entropies; metrics: loss, share of images whose own text is first, temperature."""
        scale = outputs.need("logit_scale").exp()
        images, texts = outputs.need("image_features"), outputs.need("text_features")
        loss, logits, labels = self.pair_loss(images, texts, scale)
        right = (logits.argmax(-1) == labels).float().mean()
        return loss, {
            "contrastive_loss": loss.detach(),
            "contrastive_accuracy": right.detach(),
            "logit_scale": scale.detach(),
        }

    def pair_loss(self, images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits of images, labels) of unit features [B, E]; `scale` multiplies the similarities."""
        rank, processes = world()
        all_images, all_texts = images, texts
        if processes > 1:
            all_images, all_texts = self._gather(images, rank), self._gather(texts, rank)
        if not self.local_loss:
            images, texts = all_images, all_texts
        per_image, per_text = scale * images @ all_texts.T, scale * texts @ all_images.T
        first = rank * len(images) if self.local_loss else 0
        labels = torch.arange(first, first + len(images), device=images.device)
        loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        return loss, per_image, labels

    def _gather(self, own: Tensor, rank: int) -> Tensor:
        """[B, E] of every process, one below the other."""
        if self.gather_with_grad:
            return torch.cat(all_gather(own.contiguous()))
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.detach().contiguous())
        if not self.local_loss:
            parts[rank] = own
        return torch.cat(parts)
