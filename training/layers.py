"""The parts every model is made of.

Shape letters: B pairs, S positions of a sequence, K positions attended to, D width, H heads.
Masks are bool, True = a real position. All attention runs on scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): OpenAI CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation(name: str) -> nn.Module:
    """'gelu' (the exact one, with erf) or 'quick_gelu'."""
    return {"gelu": nn.GELU, "quick_gelu": QuickGELU}[name]()


class Normalise(nn.Module):
    """(pixels/255 - mean) / std of uint8 [B, 3, H, W]; float pixels are taken as normalised already."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std if pixels.dtype == torch.uint8 else pixels


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over the positions that `mask` allows.

    q     [B, H, S, d]; k, v [B, H, K, d]
    mask  [B, K]              bool, False = nobody attends to it
    bias  [B or 1, H, S, K]   float, added to the logits (relative positions)
    ->    [B, S, H*d]
    """
    allowed = None if mask is None else mask[:, None, None, :]
    if bias is not None:
        bias = bias.to(q.dtype)
        allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    if causal and allowed is not None:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        allowed = allowed.masked_fill(later, float("-inf")) if allowed.is_floating_point() else allowed & ~later
        causal = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, D] -> [B, H, S, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Positions attend to those of their own sequence; queries, keys and values come from one matrix."""

    def __init__(self, width: int, heads: int, attn_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.attn_dropout = heads, attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """`x` [B, S, D], mask [B, S], bias [B or 1, H, S, S] -> [B, S, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.attn_dropout if self.training else 0.0
        return self.dropout(self.proj(attend(q, k, v, mask, bias, causal, dropout)))


class CrossAttention(nn.Module):
    """Positions of one sequence attend to those of another, which may be of another width."""

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.attn_dropout = heads, attn_dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width or width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` [B, S, D], context [B, K, D'], mask [B, K] of the context -> [B, S, D]."""
        k, v = (split_heads(part, self.heads) for part in self.kv(context).chunk(2, dim=-1))
        dropout = self.attn_dropout if self.training else 0.0
        return self.dropout(self.proj(attend(split_heads(self.q(x), self.heads), k, v, mask, dropout=dropout)))


class MLP(nn.Module):
    """Linear, activation, `inner_dropout`, linear, `dropout`."""

    def __init__(
        self, width: int, hidden: int, act: str = "gelu", dropout: float = 0.0, inner_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation(act)
        self.inner_dropout = nn.Dropout(inner_dropout)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.inner_dropout(self.act(self.fc1(x)))))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the order of ViT, CLIP and ViLT."""

    def __init__(
        self, width: int, heads: int, hidden: int, act: str = "gelu", eps: float = 1e-5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, act, dropout, inner_dropout=dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """`x` [B, S, D], mask [B, S], bias [B or 1, H, S, S] -> [B, S, D]."""
        x = x + self.attn(self.norm1(x), mask, bias, causal)
        return x + self.mlp(self.norm2(x))


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): the order of BERT.

    With `context_width` it has a cross-attention between the two (ALBEF).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        act: str = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, attn_dropout=dropout, dropout=dropout)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        if context_width is not None:
            self.cross = CrossAttention(width, heads, context_width, attn_dropout=dropout, dropout=dropout)
            self.norm_cross = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, act, dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """`x` [B, S, D], mask [B, S]; context [B, K, D'], context_mask [B, K] -> [B, S, D].

        Without a context the cross-attention is left out (ALBEF's text-only pass).
        """
        x = self.norm1(x + self.attn(x, mask))
        if context is not None:
            x = self.norm_cross(x + self.cross(x, context, context_mask))
        return self.norm2(x + self.mlp(x))


class Blocks(nn.ModuleList):
    """A stack of blocks. With `checkpointing` the backward pass computes each anew instead of keeping it."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.checkpointing = False

    def forward(self, x: Tensor, *args: Tensor | bool | None) -> Tensor:
        """`x` [B, S, D] through every block, each called as block(x, *args)."""
        for block in self:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *args, use_reentrant=False)
            else:
                x = block(x, *args)
        return x


class TextEmbeddings(nn.Module):
    """BERT's: word + position + token type, LayerNorm, dropout."""

    def __init__(
        self, vocab: int, positions: int, width: int, types: int = 2, eps: float = 1e-12, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, width)
        self.position = nn.Embedding(positions, width)
        self.token_type = nn.Embedding(types, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """input_ids [B, T] int64, token_types [B, T] int64 (0 when not given) -> [B, T, D]."""
        types = self.token_type.weight[0] if token_types is None else self.token_type(token_types)
        return self.dropout(self.norm(self.word(input_ids) + types + self.position.weight[: input_ids.shape[1]]))


class Pooler(nn.Module):
    """BERT's: tanh(Linear(first token))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S, D] -> [B, D]."""
        return torch.tanh(self.dense(tokens[:, 0]))


class MaskedLanguageHead(nn.Module):
    """BERT's: Linear, GELU, LayerNorm, then logits over the vocabulary. Its decoder is its own, not tied."""

    def __init__(self, width: int, vocab: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.decoder = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]."""
        return self.decoder(self.norm(F.gelu(self.dense(tokens))))


def classifier(width: int, hidden: int, classes: int) -> nn.Sequential:
    """Linear, LayerNorm, GELU, Linear: the head ViLT and METER put on pooled vectors."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """BERT's initialisation of one module, for `Module.apply`: normal weights, zero biases, unit norms."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)
