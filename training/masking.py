"""Masked-language inputs: which tokens are to be predicted, and what stands in their place.

Whole words as ViLT, METER and VLMo mask them (transformers 4.8.1, DataCollatorForWholeWordMask), or single tokens as
BERT does. Of the chosen tokens 80 % become [MASK], 10 % a random piece, 10 % stay.

Shape letters: B texts, T tokens, V vocabulary, W words (padded to T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import PairmillError
from training.text import Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Draws:
    """The random part of masking a batch.

    order         [B, T] int64, the k-th word to be tried, counted from the left; -1 = no more (whole words only)
    replace       [B, T] bool, True in 80 %: a chosen token becomes [MASK]
    random        [B, T] bool, True in 50 %: a chosen token that does not becomes a random piece
    random_words  [B, T] int64, those pieces
    """

    order: Tensor
    replace: Tensor
    random: Tensor
    random_words: Tensor


def find_words(input_ids: Tensor, continuation: Tensor, skipped: Tensor) -> Tensor:
    """Word of each token, counted from the left; -1 for tokens that are in no word. [B, T] int64 -> [B, T] int64.

    continuation  [V] bool, pieces that go on the word before them
    skipped       [V] bool, ids that are never in a word
    """
    inside = ~skipped[input_ids]
    seen = inside.cumsum(1) - inside.long()
    starts = inside & (~continuation[input_ids] | (seen == 0))
    return torch.where(inside, starts.cumsum(1) - 1, -1)


def choose_words(words: Tensor, order: Tensor, budget: Tensor) -> Tensor:
    """Take words in `order` while they fit: [B, T] bool, True for the tokens of the words taken.

    words   [B, T] int64, as `find_words` gives them
    order   [B, T] int64, as in `Draws`
    budget  [B] int64, most tokens; a word that would exceed it is passed over and the next one is tried
    """
    columns = words.shape[1]
    lengths = torch.zeros_like(words).scatter_add_(1, words.clamp(min=0), (words >= 0).long())
    tried = lengths.gather(1, order.clamp(min=0)).masked_fill(order < 0, columns + 1)
    left, fits = budget, []
    for length in tried.unbind(1):
        fit = length <= left
        left = left - length * fit
        fits.append(fit)
    # Places of `order` that hold no word are written to a column of their own.
    target = torch.where(order >= 0, order, columns)
    taken = torch.zeros(len(words), columns + 1, dtype=torch.bool, device=words.device)
    taken.scatter_(1, target, torch.stack(fits, 1))
    return taken.gather(1, words.clamp(min=0)) & (words >= 0)


def replace_tokens(input_ids: Tensor, chosen: Tensor, draws: Draws, mask_id: int) -> tuple[Tensor, Tensor]:
    """(masked ids, labels) [B, T] int64; labels are the true ids where `chosen`, else -100."""
    labels = torch.where(chosen, input_ids, IGNORED)
    masked = torch.where(chosen & draws.random, draws.random_words, input_ids)
    return torch.where(chosen & draws.replace, mask_id, masked), labels


class Masker:
    """(input_ids [B, T] int64, draws from) -> (masked ids, labels with -100), both [B, T] int64.

    Whole words: a row's budget is max(1, round(tokens * probability)) tokens, [CLS] and [SEP] counted, padding not.
    Special tokens are never chosen. `quirks` is the original: padding counts as tokens and, like [UNK], as words that
    use up the budget, so that a short caption may have nothing to predict.

    Raises PairmillError for a tokenizer without a mask token, or a probability outside (0, 1].
    """

    def __init__(
        self, tokenizer: Tokenizer, probability: float = 0.15, whole_words: bool = True, quirks: bool = False
    ) -> None:
        if tokenizer.mask_id is None:
            raise PairmillError(
                "Masking needs a tokenizer with a mask token; CLIP's has none. Pass a BERT-like --tokenizer."
            )
        if not 0 < probability <= 1:
            raise PairmillError(f"`mask probability` must be above 0 and at most 1, got {probability}.")
        self.probability, self.whole_words, self.quirks = probability, whole_words, quirks
        self.mask_id, self.pad_id = tokenizer.mask_id, tokenizer.pad_id
        self.continuation = tokenizer.continuation
        self.special = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        self.special[list(tokenizer.special)] = True
        self.ordinary = (~self.special).nonzero()[:, 0]
        self.skipped = self.special.clone()
        if quirks:
            self.skipped[:] = False
            self.skipped[[tokenizer.cls_id, tokenizer.sep_id]] = True

    def __call__(self, input_ids: Tensor, source: torch.Generator | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw from a generator for the whole batch, or from one seed per row.

        With seeds a row's mask depends on its own seed and tokens alone (not under `quirks`, where padding counts):
        not on the other rows, the padding, or how rows are shared among processes.
        """
        uniform = _uniform(input_ids, source).to(input_ids.device)
        words = find_words(input_ids, self.continuation.to(input_ids.device), self.skipped.to(input_ids.device))
        draws = self._draws(uniform, words)
        return replace_tokens(input_ids, self.choose(input_ids, words, draws.order, uniform), draws, self.mask_id)

    def choose(self, input_ids: Tensor, words: Tensor, order: Tensor, uniform: Tensor) -> Tensor:
        """[B, T] bool: the tokens to predict."""
        special = self.special.to(input_ids.device)[input_ids]
        if self.whole_words:
            return choose_words(words, order, self.budget(input_ids)) & ~special
        return (uniform[..., 0] < self.probability) & ~special

    def budget(self, input_ids: Tensor) -> Tensor:
        """[B] int64: most tokens to predict in each row."""
        counted = torch.ones_like(input_ids) if self.quirks else input_ids != self.pad_id
        return (counted.sum(1).double() * self.probability).round().clamp(min=1).long()

    def _draws(self, uniform: Tensor, words: Tensor) -> Draws:
        ordinary = self.ordinary.to(words.device)
        random_words = ordinary[(uniform[..., 3] * len(ordinary)).long()]
        order = _shuffled(uniform[..., 0], words) if self.whole_words else words
        return Draws(order, uniform[..., 1] < 0.8, uniform[..., 2] < 0.5, random_words)


def _uniform(input_ids: Tensor, source: torch.Generator | Sequence[int]) -> Tensor:
    """[B, T, 4] in [0, 1). A row drawn from its seed starts alike whatever T is: four numbers a token, in order."""
    rows, columns = input_ids.shape
    if isinstance(source, torch.Generator):
        return torch.rand(rows, columns, 4, generator=source, device=source.device)
    generator = torch.Generator()
    return torch.stack([torch.rand(columns, 4, generator=generator.manual_seed(seed)) for seed in source])


def _shuffled(priority: Tensor, words: Tensor) -> Tensor:
    """Each row's words in the order of the priority of their first token, then -1. [B, T] -> [B, T] int64."""
    first = (words >= 0) & (words != torch.nn.functional.pad(words, (1, 0), value=-1)[:, :-1].cummax(1).values)
    columns = words.shape[1]
    slots = torch.full((len(words), columns + 1), 2.0, device=words.device)
    slots.scatter_(1, torch.where(first, words, columns), torch.where(first, priority, 2.0))
    ranked, order = slots[:, :columns].sort(dim=1)
    return torch.where(ranked < 2.0, order, -1)
