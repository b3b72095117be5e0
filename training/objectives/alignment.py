"""Word-patch alignment: the cheapest transport from words to patches (ViLT objectives; IPOT, Xie et al. 2018).

Shape letters: B pairs, T text tokens, N image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import Batch
from training.objectives import Metrics, Objective
from training.outputs import Outputs


def alignment_masks(text_mask: Tensor, image_mask: Tensor) -> tuple[Tensor, Tensor]:
    """What takes part: words without the first and the last real token, patches without the class token."""
    words, patches = text_mask.clone(), image_mask.clone()
    words.scatter_(1, words.sum(1, keepdim=True) - 1, False)
    words[:, 0] = False
    patches[:, 0] = False
    return words, patches


def cosine_cost(text: Tensor, image: Tensor, words: Tensor, patches: Tensor) -> Tensor:
    """1 - cosine of every word and patch, 0 where either is masked: [B, T, D], [B, N, D] -> [B, T, N]."""
    cost = 1 - F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).transpose(1, 2)
    return cost * (words[:, :, None] & patches[:, None, :])


@torch.no_grad()
def ipot(cost: Tensor, words: Tensor, patches: Tensor, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """The transport plan of inexact proximal point iterations, one inner step each, in float32.

    cost [B, T, N], words [B, T] bool, patches [B, N] bool -> plan [B, N, T]; rows and columns sum to
    1/patches and 1/words, masked entries are 0.
    """
    cost, tiny = cost.float(), 1e-30  # a pair without words or patches has nothing to move: 0, not 0/0
    both = patches[:, :, None] & words[:, None, :]
    num_words = words.sum(1).clamp(min=1).float()[:, None]
    num_patches = patches.sum(1).clamp(min=1).float()[:, None]
    away_words, away_patches = 1e4 * ~words, 1e4 * ~patches
    kernel = torch.exp(-cost.transpose(1, 2) / beta) * both
    plan = both.float()
    sigma = (words / num_words)[:, :, None]
    for _ in range(iterations):
        Q = kernel * plan
        delta = 1 / (num_patches * (Q @ sigma)[:, :, 0] + away_patches).clamp(min=tiny)
        sigma = (1 / (num_words * (delta[:, None] @ Q)[:, 0] + away_words).clamp(min=tiny))[:, :, None]
        plan = delta[:, :, None] * Q * sigma.transpose(1, 2)
    return plan * both


def transport_distance(cost: Tensor, plan: Tensor) -> Tensor:
    """Trace(cost plan) of every pair: [B, T, N], [B, N, T] -> [B]. The plan carries no gradient."""
    return (cost * plan.transpose(1, 2)).sum((1, 2))


class WordPatchAlignment(Objective):
    """(Sum of the distances of true pairs - sum of those of false ones) / B, on any pass that gives tokens.

    Without `match_labels` every pair is a true one.
    """

    name = "alignment"
    route = ""
    inputs = frozenset({"input_ids", "text_mask"})

    def __init__(self, beta: float = 0.5, iterations: int = 50) -> None:
        super().__init__()
        self.beta, self.iterations = beta, iterations

    def distances(self, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """(distance [B], cost [B, T, N], plan [B, N, T]) of every pair."""
        text, image = outputs.need("text").float(), outputs.need("image").float()
        words, patches = alignment_masks(outputs.need("text_mask"), outputs.need("image_mask"))
        with torch.autocast(text.device.type, enabled=False):
            cost = cosine_cost(text, image, words, patches)
            plan = ipot(cost.detach(), words, patches, self.beta, self.iterations)
        return transport_distance(cost, plan), cost, plan

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Metrics: loss."""
        distance, _, _ = self.distances(outputs)
        sign = torch.ones_like(distance) if batch.match_labels is None else 2.0 * batch.match_labels - 1
        loss = (sign * distance).mean()
        return loss, {"alignment_loss": loss.detach()}
