"""Differences of softmax maps against timm, transformers and the maps written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.diff_attention import DiffAttention
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from formulas import DIM, GRID, HEADS, REAL, SINGLE, check, copied, renamed, scattered, tokens
from helpers import Given, position
from zoo.layer import Context, Place
from zoo.mixers import MIXERS

PLACE = Place(index=3)
START = 0.8 - 0.6 * math.exp(-0.9)
BIAS = Given(torch.randn(HEADS, 30, 30, generator=torch.Generator().manual_seed(0)).double())


@pytest.mark.parametrize("masked", [False, True])
def test_differential_is_timm_attention(masked):
    theirs = scattered(DiffAttention(DIM, HEADS, qkv_bias=True, depth=3))
    state = renamed(theirs, sub_norm="head_norm", proj="out")
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    state["vectors"] = torch.stack([state.pop(name) for name in names]).unflatten(0, (2, 2))
    ours = copied(MIXERS["differential"](DIM, HEADS, PLACE), state)
    x = tokens()
    context, mask = GRID, None
    if masked:
        context, mask = GRID._replace(mask=REAL), REAL[:, None, None]
    real = REAL[..., None] if masked else 1
    check(ours(x, context) * real, theirs(x, mask) * real, (x,), tolerance=SINGLE)  # timm computes lambda in fp32


def test_differential_is_diffllama_attention_with_rotary_positions():
    """In DiffLlama the first maps of all heads come first, and the halves of a value are far apart."""
    half = DIM // HEADS // 2
    heads: Any = {"num_attention_heads": 2 * HEADS, "num_key_value_heads": 2 * HEADS, "head_dim": half}
    config = DiffLlamaConfig(hidden_size=DIM, **heads)
    config._attn_implementation = "eager"
    theirs: Any = scattered(DiffLlamaAttention(config, 3))
    theirs.groupnorm.eps = 1e-5
    ours: Any = scattered(MIXERS["differential"](DIM, HEADS, PLACE))
    rows = torch.arange(2 * HEADS).view(2, HEADS).T.flatten()

    def paired(layer):
        return layer.weight.detach().unflatten(0, (2 * HEADS, half))[rows].flatten(0, 1)

    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([paired(each) for each in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]))
        ours.qkv.bias.zero_()
        ours.out.weight.copy_(theirs.o_proj.weight)
        ours.out.bias.zero_()
        ours.head_norm.weight.fill_(1)
        vectors = [theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2]
        ours.vectors.copy_(torch.stack(vectors).unflatten(0, (2, 2)))
    context = position("rope", DIM, half, (5, 6)).place(GRID)
    cosine, sine = (torch.cat([each, each], -1).double()[None] for each in context.rotary)
    x = tokens()
    check(ours(x, context), theirs(x, (cosine, sine), None)[0], (x,), tolerance=SINGLE)  # lambda and angles are fp32


def maps(ours: Any, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, ...]:
    """The two softmax maps [B, H, N, N], the values [B, H, N, d], and lambda."""
    query, key, value = F.linear(x, ours.qkv.weight, ours.qkv.bias).chunk(3, -1)
    query, key = (each.unflatten(-1, (HEADS, 2, -1)) for each in (query, key))
    scores = torch.einsum("bnhtd,bmhtd->tbhnm", query, key) / (DIM / HEADS / 2) ** 0.5
    if context.bias is not None:
        scores = scores + context.bias.values
    if context.mask is not None:
        scores = scores.masked_fill(~context.mask[:, None, None], -torch.inf)
    first, second = scores.softmax(-1)
    (a1, b1), (a2, b2) = ours.vectors
    share = (a1 @ b1).exp() - (a2 @ b2).exp() + START
    return first, second, value.unflatten(-1, (HEADS, -1)).transpose(1, 2), share


def finished(ours: Any, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    y = (weights @ value).transpose(1, 2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.head_norm.weight
    return ours.out((y * (1 - START)).flatten(2))


CONTEXTS = {"plain": GRID, "mask": GRID._replace(mask=REAL), "bias": GRID._replace(mask=REAL, bias=BIAS)}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("name", ["differential", "dint"])
def test_the_maps_written_out(name, context):
    ours: Any = scattered(MIXERS[name](DIM, HEADS, PLACE))
    x = tokens()
    first, second, value, share = maps(ours, x, context)
    weights = first - share * second
    real = torch.ones(3, 30).bool() if context.mask is None else context.mask
    if name == "dint":
        rows = real.double()[:, None, :, None]
        weights = weights + share * (first * rows).sum(2, keepdim=True) / rows.sum(2, keepdim=True)
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
    check(ours(x, context) * real[..., None], finished(ours, weights, value) * real[..., None], (x,))


def test_without_the_second_map_a_prefix_and_all_others_attend_by_the_first():
    """lambda = 0: softmax attention with queries and keys of half the width."""
    ours: Any = scattered(MIXERS["differential"](DIM, HEADS, PLACE))
    ours.start = 0.0
    with torch.no_grad():
        ours.vectors[1] = ours.vectors[0]
    context = GRID._replace(prefix=2)
    x = tokens(context)
    query, key, value = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in ours.qkv(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(query[..., :4], key[..., :4], value).transpose(1, 2)
    y = F.rms_norm(y, (8,), ours.head_norm.weight, 1e-5)
    check(ours(x, context), ours.out(y.flatten(2)), (x,))


def test_odd_heads_are_refused():
    for name in ("differential", "dint"):
        with pytest.raises(ValueError, match="must be even, got 5"):
            MIXERS[name](30, 6)
