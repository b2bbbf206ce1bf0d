"""Linear attention against its formula, pair by pair."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formulas import DIM, GRID, HEADS, check, scattered, tokens
from zoo.mixers import MIXERS


@pytest.mark.parametrize(("hidden", "lift"), [(0, True), (24, True), (0, False)])
def test_linfusion_is_its_formula(hidden, lift):
    ours = scattered(MIXERS["linfusion"](DIM, HEADS, hidden=hidden, lift=lift))
    context = GRID._replace(prefix=1)
    x = tokens(context)
    parts = [x, x, x]
    for part in range(2 if lift else 0):
        expand, norm, _, narrow = ours.lifts[part]
        hidden_x = F.layer_norm(F.linear(x, expand.weight, expand.bias), (hidden or DIM,), norm.weight, norm.bias)
        parts[part] = x + F.linear(torch.where(hidden_x > 0, hidden_x, 0.01 * hidden_x), narrow.weight, narrow.bias)
    weights, biases = ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3)
    query, key, value = (
        F.linear(*each).unflatten(-1, (HEADS, -1)) for each in zip(parts, weights, biases, strict=True)
    )
    query, key = (torch.where(each > 0, each + 1, each.exp()) for each in (query, key))
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key)
    mixed = torch.einsum("bhnm,bmhd->bnhd", scores / (scores.sum(-1, keepdim=True) + 1e-6), value)
    check(ours(x, context), ours.out(mixed.flatten(2)), (x,))


def test_linfusion_does_not_change_with_the_number_of_tokens():
    ours = scattered(MIXERS["linfusion"](DIM, HEADS))
    x = tokens()
    twice = torch.cat([x, x], 1)
    check(ours(twice, GRID._replace(grid=(10, 6)))[:, :30], ours(x, GRID), tolerance=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_linfusion_refuses_a_quantized_projection():
    ours = MIXERS["linfusion"](DIM, HEADS).eval()
    quantized = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        ValueError, match="^linfusion: a quantized projection cannot be split; do not quantize its qkv$"
    ):
        quantized(tokens().float(), GRID)
