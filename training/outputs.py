"""What a model gives back: one frozen dataclass that every objective reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from schemas.errors import PairmillError


@dataclass(frozen=True)
class Outputs:
    """Tensors of one pass; None is what the route did not ask for.

    text            [B, T, D]  text tokens after the last norm
    text_mask       [B, T]     bool
    image           [B, N, D]  image tokens after the last norm; the first one is the class token
    image_mask      [B, N]     bool
    pooled          [B, D]     the pair as one vector
    token_logits    [B, T, V]  masked-language head
    match_logits    [B, 2]     matching head; column 1 = belongs together
    rank_scores     [B]        ranking head, higher = belongs together
    answer_logits   [B, A]     a classifier's answers
    image_features  [B, E]     unit length, joint space
    text_features   [B, E]     unit length, joint space
    logit_scale     []         log of the factor on similarities
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    image: Tensor | None = None
    image_mask: Tensor | None = None
    pooled: Tensor | None = None
    token_logits: Tensor | None = None
    match_logits: Tensor | None = None
    rank_scores: Tensor | None = None
    answer_logits: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """The named output.

        Raises PairmillError: this model's route does not compute it.
        """
        value = getattr(self, name)
        if value is None:
            raise PairmillError(
                f"the model's pass gave no `{name}`, which an objective needs: "
                "`pairmill models` lists which objectives go with which models"
            )
        return value

    def replace(self, **fields: Tensor) -> Outputs:
        """A copy with other values in the named fields."""
        return dataclasses.replace(self, **fields)
