"""The parts against torch's own modules and against their definitions."""

import math

import pytest
import torch
from torch import nn

from training.layers import (
    Blocks,
    CrossAttention,
    MaskedLanguageHead,
    Normalise,
    Pooler,
    PostNormBlock,
    PreNormBlock,
    SelfAttention,
    TextEmbeddings,
    activation,
    attend,
)

B, S, D, H = 2, 5, 12, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tokens(length=S):
    return torch.randn(B, length, D)


def test_activations_differ_as_they_should():
    x = torch.linspace(-4, 4, 33)
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(activation("gelu")(x), exact)
    torch.testing.assert_close(activation("quick_gelu")(x), x * torch.sigmoid(1.702 * x))
    assert (activation("gelu")(x) - activation("quick_gelu")(x)).abs().max() > 0.01


def test_normalise_uint8_and_leaves_float_alone():
    layer = Normalise((0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(layer(pixels).flatten(), torch.tensor([-1.0, 0.75, 0.1]))
    torch.testing.assert_close(layer(pixels.float()), pixels.float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_torch(causal, masked):
    ours, theirs = SelfAttention(D, H).eval(), nn.MultiheadAttention(D, H, batch_first=True).eval()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = tokens()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool) if masked else None
    later = torch.ones(S, S, dtype=torch.bool).triu(1) if causal else None
    want, _ = theirs(x, x, x, key_padding_mask=None if mask is None else ~mask, attn_mask=later)
    torch.testing.assert_close(ours(x, mask, None, causal), want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_bias_is_added_to_the_logits(masked, causal):
    q, k, v = (torch.randn(B, H, S, 4) for _ in range(3))
    bias = torch.randn(1, H, S, S)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool) if masked else None
    logits = q @ k.transpose(2, 3) / 2 + bias
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    if causal:
        logits = logits.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf"))
    want = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, mask, bias, causal), want)


def test_cross_attention_equals_torch_and_ignores_masked_context():
    ours = CrossAttention(D, H, context_width=7).eval()
    theirs = nn.MultiheadAttention(D, H, kdim=7, vdim=7, batch_first=True).eval()
    key, value = ours.kv.weight.data.chunk(2)
    theirs.q_proj_weight.data, theirs.k_proj_weight.data, theirs.v_proj_weight.data = ours.q.weight.data, key, value
    theirs.in_proj_bias.data = torch.cat([ours.q.bias.data, ours.kv.bias.data])
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = tokens(), torch.randn(B, 4, 7)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    want, _ = theirs(x, context, context, key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, context, mask), want)
    other = context.clone()
    other[0, 2:] = 99
    torch.testing.assert_close(ours(x, other, mask), want)


def test_pre_norm_block_equals_torch():
    ours = PreNormBlock(D, H, 4 * D).eval()
    theirs = nn.TransformerEncoderLayer(D, H, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    copy_block(ours, theirs)
    torch.testing.assert_close(ours(x := tokens()), theirs(x))


def test_post_norm_block_equals_torch():
    ours = PostNormBlock(D, H, 4 * D, eps=1e-5).eval()
    theirs = nn.TransformerEncoderLayer(D, H, 4 * D, 0.0, "gelu", batch_first=True).eval()
    copy_block(ours, theirs)
    torch.testing.assert_close(ours(x := tokens()), theirs(x))


def test_post_norm_block_with_a_context_equals_torch_decoder():
    ours = PostNormBlock(D, H, 4 * D, eps=1e-5, context_width=D).eval()
    theirs = nn.TransformerDecoderLayer(D, H, 4 * D, 0.0, "gelu", batch_first=True).eval()
    copy_block(ours, theirs, cross=True)
    x, context = tokens(), tokens(3)
    torch.testing.assert_close(ours(x, None, context), theirs(x, context))
    assert not torch.allclose(ours(x), ours(x, None, context))


def copy_block(ours, theirs, cross=False):
    theirs.self_attn.in_proj_weight.data = ours.attn.qkv.weight.data
    theirs.self_attn.in_proj_bias.data = ours.attn.qkv.bias.data
    theirs.self_attn.out_proj.load_state_dict(ours.attn.proj.state_dict())
    if cross:
        theirs.multihead_attn.in_proj_weight.data = torch.cat([ours.cross.q.weight, ours.cross.kv.weight]).data
        theirs.multihead_attn.in_proj_bias.data = torch.cat([ours.cross.q.bias, ours.cross.kv.bias]).data
        theirs.multihead_attn.out_proj.load_state_dict(ours.cross.proj.state_dict())
    for norm in [m for m in ours.modules() if isinstance(m, nn.LayerNorm)]:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norms = ("norm1", "norm_cross", "norm2") if cross else ("norm1", "norm2")
    for number, name in enumerate(norms, start=1):
        getattr(theirs, f"norm{number}").load_state_dict(getattr(ours, name).state_dict())
    theirs.linear1.load_state_dict(ours.mlp.fc1.state_dict())
    theirs.linear2.load_state_dict(ours.mlp.fc2.state_dict())


def test_checkpointing_changes_no_gradient():
    blocks = Blocks(PreNormBlock(D, H, 2 * D) for _ in range(2)).train()
    x = tokens()
    found = []
    for blocks.checkpointing in (False, True):
        blocks.zero_grad()
        blocks(x, None).square().sum().backward()
        found.append([p.grad.clone() for p in blocks.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_dropout_acts_in_training_only():
    block = PreNormBlock(D, H, 2 * D, dropout=0.5)
    x = tokens()
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_text_embeddings_are_normed_sums():
    layer = TextEmbeddings(20, 9, D).eval()
    nn.init.normal_(layer.norm.weight)
    ids, types = torch.randint(20, (B, S)), torch.randint(2, (B, S))

    def want(types):
        total = layer.word.weight[ids] + layer.position.weight[:S] + layer.token_type.weight[types]
        centred = total - total.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * layer.norm.weight

    torch.testing.assert_close(layer(ids), want(torch.zeros_like(types)))
    torch.testing.assert_close(layer(ids, types), want(types))


def test_heads():
    x = tokens()
    pooler = Pooler(D)
    torch.testing.assert_close(pooler(x), torch.tanh(x[:, 0] @ pooler.dense.weight.T + pooler.dense.bias))
    assert MaskedLanguageHead(D, 31)(x).shape == (B, S, 31)
