"""Does this text belong to this image? Matching (ViLT compute_itm_wpa) and ranking (ViLT compute_irtr)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.errors import PairmillError
from training.batch import Batch
from training.objectives import Metrics, Objective
from training.outputs import Outputs


def match_labels(order: Tensor, total: int) -> Tensor:
    """[B] int64: 1 for the first floor(total/2) places of a permutation of `total`, else 0."""
    return (order < total // 2).long()


def draw_negatives(batch: Batch, generator: torch.Generator, block: int = 2, allow_self: bool = False) -> Tensor:
    """For every pair, the row of the batch whose image it gets as a negative: [B] int64.

    It is drawn from the pair's block of `block` consecutive rows of the global batch, whose order is random already;
    so any number of processes, each with whole blocks, draws the same. A row whose block has no other row here takes
    the next row of the batch. A row with the same (shard, row) is never taken, unless `allow_self`.

    Raises PairmillError: there is no other row.
    """
    B = len(batch)
    place = torch.arange(batch.start, batch.start + B)
    rows = place[:, None] if batch.rows is None else batch.rows.cpu()
    same = (rows[:, None] == rows[None]).all(-1)
    allowed = torch.ones_like(same) if allow_self else ~same
    if not allowed.any(1).all():
        raise PairmillError(
            f"a batch of {B} pairs has no other image for a negative pair: matching needs at least 2 different "
            "images on every process. Raise the batch size."
        )
    near = allowed & (place[:, None] // block == place[None] // block)
    noise = torch.stack(
        [torch.rand(B, generator=torch.Generator().manual_seed(s)) for s in batch.draw_seeds(generator)]
    )
    # In the block at random; else the nearest row that follows.
    distance = (place[None] - place[:, None]) % B
    order = torch.where(near, noise, torch.where(allowed, 1.0 + distance, float("inf")))
    return order.argmin(1)


class Matching(Objective):
    """Cross-entropy of the matching head: floor(B/2) true pairs, the others with another pair's image.

    allow_self  the original's fault: the negative image may be the true one
    block       see draw_negatives
    """

    name = "matching"
    route = "matching"
    inputs = frozenset({"input_ids", "text_mask"})

    def __init__(self, block: int = 2, allow_self: bool = False) -> None:
        super().__init__()
        self.block, self.allow_self = block, allow_self

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Set `match_labels`, and give the pairs labelled 0 the image of another row."""
        labels = match_labels(batch.draw_order(generator), batch.total or len(batch)).to(batch.device)
        others = draw_negatives(batch, generator, self.block, self.allow_self).to(batch.device)
        return batch.choose_images(batch.images(others), labels == 1).replace(match_labels=labels)

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Metrics: loss and accuracy."""
        logits, labels = outputs.need("match_logits").float(), batch.match_labels
        assert labels is not None
        loss = F.cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels).float().mean()
        return loss, {"itm_loss": loss.detach(), "itm_accuracy": right}


class Ranking(Objective):
    """The true text of an image must score higher than false ones: cross-entropy over 1 + F texts."""

    name = "ranking"
    route = "ranking"
    inputs = frozenset({"input_ids", "text_mask", "false_ids", "false_mask"})

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """One row per (image, text): the true text first, then the false ones; B becomes B * (1 + F)."""
        assert batch.input_ids is not None
        assert batch.text_mask is not None
        assert batch.false_ids is not None
        assert batch.false_mask is not None
        ids = torch.cat([batch.input_ids[:, None], batch.false_ids], dim=1)
        mask = torch.cat([batch.text_mask[:, None], batch.false_mask], dim=1)
        repeated = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        return batch.images(repeated).replace(
            input_ids=ids.flatten(0, 1), text_mask=mask.flatten(0, 1), false_ids=batch.false_ids
        )

    def loss(self, outputs: Outputs, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, Metrics]:
        """Metrics: loss, and share of images whose true text is first."""
        assert batch.false_ids is not None
        scores = outputs.need("rank_scores").float().unflatten(0, (-1, 1 + batch.false_ids.shape[1]))
        loss = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))
        right = (scores.argmax(-1) == 0).float().mean()
        return loss, {"ranking_loss": loss.detach(), "ranking_accuracy": right}
