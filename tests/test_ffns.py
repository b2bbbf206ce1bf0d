"""Feed-forward layers against their formulas, loops over tokens and an installed library."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from formulas import DIM, GRID, REAL, check, scattered, tokens
from zoo import create_model
from zoo.ffns import FFNS
from zoo.norms import Affine


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts": 3, "top": 3, "shared": 1},
        {"experts": 5, "top": 1, "shared": 2, "ratio": 0.5, "activation": "relu"},
        {"gated": True, "bias": False, "activation": "silu"},
    ],
    ids=str,
)
def test_moe_is_its_formula(options, masked):
    ours = scattered(FFNS["moe"](DIM, **options))
    x = tokens()
    got = ours(x, GRID._replace(mask=REAL if masked else None))
    number, shared = ours.experts + ours.shared, ours.shared
    first = ours.expand.weight.chunk(number)
    shifts = [None] * number if ours.expand.bias is None else ours.expand.bias.chunk(number)
    last = ours.out.weight.chunk(number, 1)

    def expert(which: int, token: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(token, first[which], shifts[which])
        if ours.gated:
            gate, value = hidden.chunk(2)
            return last[which] @ (ours.activation(gate) * value)
        return last[which] @ ours.activation(hidden)

    rows = []
    for token in x.flatten(0, 1):
        probable = (ours.router.weight @ token).softmax(0)
        total = sum(expert(which, token) for which in range(shared))
        for which in probable.argsort(descending=True)[: ours.top].tolist():
            total = total + probable[which] * expert(shared + which, token)
        rows.append(total if ours.out.bias is None else total + ours.out.bias)
    wanted = torch.stack(rows).view_as(x)
    if masked:
        got, wanted = got * REAL[..., None], wanted * REAL[..., None]
    check(got, wanted, (x, *ours.parameters()))


def test_moe_is_that_of_transformers():
    """With two shared experts, which are one there, twice as wide."""
    config = DeepseekV2Config(
        hidden_size=DIM,
        moe_intermediate_size=DIM // 2,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_shared_experts=2,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )
    theirs = scattered(DeepseekV2Moe(config))
    theirs.gate.float()  # which computes in fp32
    options = {"experts": 6, "top": 3, "shared": 2, "ratio": 0.5, "gated": True, "activation": "silu", "bias": False}
    ours = scattered(FFNS["moe"](DIM, **options))
    always = theirs.shared_experts
    gates, values = (each.weight.chunk(2) for each in (always.gate_proj, always.up_proj))
    first = [torch.cat(pair) for pair in zip(gates, values, strict=True)]
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        ours.expand.weight.copy_(torch.cat([*first, theirs.experts.gate_up_proj.flatten(0, 1)]))
        ours.out.weight.copy_(torch.cat([always.down_proj.weight, *theirs.experts.down_proj.unbind()], 1))
    x = tokens()
    check(ours(x, GRID), theirs(x), (x,), tolerance=1e-5)


def test_wrong_experts_are_refused():
    with pytest.raises(ValueError, match=r"ffn 'moe\(experts=2, top=3\)': top must be at most the 2 experts, got 3$"):
        create_model("vit_micro", ffn="moe(experts=2, top=3)")
    with pytest.raises(ValueError, match="ratio must give 1 to 1,000,000 hidden channels"):
        create_model("vit_micro", ffn="moe(ratio=0.0)")
    with pytest.raises(ValueError, match="placement 'sub' needs the site 'inner'; ffn 'moe' has: none"):
        create_model("vit_micro", ffn="moe", placement="sub")


@pytest.mark.parametrize(("parts", "ratio", "inner"), [(2, 4.0, False), (4, 2.5, True), (1, 1.0, True)])
def test_chunked_is_an_mlp_of_each_chunk(parts, ratio, inner):
    """One matrix for all channels, block-diagonal."""
    layer: Any = scattered(FFNS["chunked"](DIM, parts=parts, ratio=ratio, activation="relu"))
    wide = int(ratio * (DIM // parts)) * parts
    assert sum(each.numel() for each in layer.parameters()) == 2 * DIM * wide // parts + wide + DIM
    x = tokens()
    hidden = x @ torch.block_diag(*(each.weight for each in layer.expands)).T
    hidden = (hidden + torch.cat([each.bias for each in layer.expands])).clamp(min=0)
    if inner:
        layer.inner = scattered(Affine(wide))
        hidden = hidden * layer.inner.weight + layer.inner.bias
    wanted = hidden @ torch.block_diag(*(each.weight for each in layer.outs)).T
    check(layer(x, GRID), wanted + torch.cat([each.bias for each in layer.outs]), (x,))


def test_chunks_of_one_width_alone():
    with pytest.raises(ValueError, match="^ffn 'chunked\\(parts=5\\)': parts must divide dim 32, got 5$"):
        create_model("vit_micro", dim=32, heads=2, ffn="chunked(parts=5)")
    with pytest.raises(ValueError, match="unknown activation 'gleu'"):
        FFNS["chunked"](DIM, activation="gleu")
