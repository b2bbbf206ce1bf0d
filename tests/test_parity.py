"""Mixers against those of other libraries, or against the formula written out, with random weights in fp64."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.davit import ChannelAttention, ConvPosEnc, WindowAttention
from timm.models.metaformer import Pooling, SepConv
from torch import nn

from formulas import DIM, EXACT, GRID, HEADS, REAL, SINGLE, check, copied, renamed, scattered, tokens
from helpers import Given, randomise, rectangle, relative
from helpers import position as position_of
from zoo.block import Block
from zoo.choices import BlockConfig
from zoo.layer import Context, Memory, Place
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.mixers.attention import rotate
from zoo.tensors import to_map, to_tokens

# Attention


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("head_dim", [0, 12])
def test_softmax_is_timm_attention(qk_norm, head_dim):
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = Attention(DIM, HEADS, head_dim or None, qkv_bias=True, qk_norm=qk_norm, norm_layer=norm)
    scattered(theirs)
    ours = MIXERS["softmax"](DIM, HEADS, qk_norm="layernorm" if qk_norm else "none", head_dim=head_dim)
    copied(ours, renamed(theirs, q_norm="query", k_norm="key", proj="out"))
    context = GRID._replace(prefix=2)
    x = tokens(context)
    check(ours(x, context), theirs(x), (x,))


def multihead(ours: nn.Module, linears: list[nn.Linear]) -> nn.MultiheadAttention:
    """PyTorch's attention with the weights of ours."""
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    weights = {"in_proj_weight": torch.cat([each.weight for each in linears])}
    weights["in_proj_bias"] = torch.cat([each.bias for each in linears])
    return copied(theirs, weights | {f"out_proj.{key}": each for key, each in ours.out.state_dict().items()})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_softmax_is_torch_attention(masked, coded, biased):
    ours = scattered(MIXERS["softmax"](DIM, HEADS))
    theirs = multihead(ours, [ours.qkv])
    x, code = tokens(), tokens(batch=1)
    bias = torch.randn(HEADS, 30, 30, dtype=torch.float64)
    context = GRID._replace(mask=REAL if masked else None, code=code if coded else None)
    context = context._replace(bias=Given(bias) if biased else None)
    turned = x + code if coded else x
    away = torch.zeros(REAL.shape, dtype=torch.float64).masked_fill(~REAL, -torch.inf)
    wanted, _ = theirs(
        turned,
        turned,
        x,
        key_padding_mask=away if masked else None,
        attn_mask=bias.repeat(3, 1, 1) if biased else None,
        need_weights=False,
    )
    check(ours(x, context), wanted, (x, code) if coded else (x,))


@pytest.mark.parametrize("coded", [False, True])
def test_cross_is_torch_attention(coded):
    ours = scattered(CROSSES["softmax"](DIM, HEADS))
    theirs = multihead(ours, [ours.queries, ours.keys, ours.values])
    x, code = tokens(), tokens(batch=1)
    beside = Context(grid=(11,))
    there, there_code = tokens(beside), tokens(beside)
    real = torch.arange(11) < torch.tensor([11, 4, 1])[:, None]
    memory = Memory(there, real, there_code if coded else None)
    got = ours(x, GRID._replace(memory=memory, code=code if coded else None))
    queries, keys = (x + code, there + there_code) if coded else (x, there)
    wanted, _ = theirs(queries, keys, there, key_padding_mask=~real, need_weights=False)
    check(got, wanted, (x, there, code, there_code) if coded else (x, there))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_keys_are_repeated_keys(kv_heads):
    ours = scattered(MIXERS["softmax"](DIM, HEADS, kv_heads=kv_heads))
    queries, keys, values = (len(each) for each in ours.qkv.weight.split(ours.widths))
    assert (queries, keys, values) == (DIM, 8 * kv_heads, 8 * kv_heads)
    parts = {}
    for name, each in ours.qkv.state_dict().items():
        query, *rest = each.split([queries, keys, values])
        wide = [part.unflatten(0, (kv_heads, 8)).repeat_interleave(HEADS // kv_heads, 0).flatten(0, 1) for part in rest]
        parts[f"qkv.{name}"] = torch.cat([query, *wide])
    theirs = Attention(DIM, HEADS, qkv_bias=True)
    copied(theirs, parts | {f"proj.{name}": each for name, each in ours.out.state_dict().items()})
    x = tokens()
    check(ours(x, GRID), theirs(x), (x,))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_is_torch_encoder_layer(placement):
    config = BlockConfig(dim=DIM, heads=HEADS, placement=placement, norm="layernorm(eps=1e-5)")
    ours = scattered(Block(config))
    theirs = nn.TransformerEncoderLayer(
        DIM, HEADS, 4 * DIM, 0.0, "gelu", batch_first=True, norm_first=placement == "pre"
    )
    norm = "before" if placement == "pre" else "total"
    names = {f"steps.0.{norm}": "norm1", f"steps.1.{norm}": "norm2", "steps.0.branch.out": "self_attn.out_proj"}
    names |= {"steps.1.branch.expand": "linear1", "steps.1.branch.out": "linear2"}
    weights = renamed(ours, **names)
    for part in ("weight", "bias"):
        weights[f"self_attn.in_proj_{part}"] = weights.pop(f"steps.0.branch.qkv.{part}")
    copied(theirs, weights)
    x = tokens()
    got = ours(x, GRID._replace(mask=REAL))
    check(got[REAL], theirs.train()(x, src_key_padding_mask=~REAL)[REAL], (x,))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_block_is_torch_decoder_layer(placement):
    layout = ("mixer", "cross", "ffn")
    ours = scattered(Block(BlockConfig(dim=DIM, heads=HEADS, layout=layout, placement=placement)))
    theirs = nn.TransformerDecoderLayer(
        DIM, HEADS, 4 * DIM, 0.0, "gelu", 1e-6, batch_first=True, norm_first=placement == "pre"
    )
    norm = "before" if placement == "pre" else "total"
    names = {f"steps.{step}.{norm}": f"norm{step + 1}" for step in range(3)}
    names |= {"steps.0.branch.out": "self_attn.out_proj", "steps.1.branch.out": "multihead_attn.out_proj"}
    names |= {"steps.2.branch.expand": "linear1", "steps.2.branch.out": "linear2"}
    weights = renamed(ours, **names)
    for part in ("weight", "bias"):
        weights[f"self_attn.in_proj_{part}"] = weights.pop(f"steps.0.branch.qkv.{part}")
        projections = [weights.pop(f"steps.1.branch.{each}.{part}") for each in ("queries", "keys", "values")]
        weights[f"multihead_attn.in_proj_{part}"] = torch.cat(projections)
    copied(theirs, weights)
    x, there = tokens(), tokens(Context(grid=(11,)))
    real = torch.arange(11) < torch.tensor([11, 4, 1])[:, None]
    got = ours(x, GRID._replace(memory=Memory(there, real)))
    check(got, theirs.train()(x, there, memory_key_padding_mask=~real), (x, there))


# Other mixers


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("grid", [(5, 6), (11,)])
def test_pool_is_timm_pooling(size, grid):
    context = Context(grid=grid)
    x = tokens(context)
    plane = to_map(x, grid if len(grid) == 2 else (1, *grid))
    got = MIXERS["pool"](DIM, HEADS, Place(len(grid)), size=size)(x, context)
    check(got, to_tokens(Pooling(size)(plane)), (x,))


@pytest.mark.parametrize(("ratio", "kernel"), [(2.0, 7), (1.5, 3)])
def test_sepconv_is_timm_sepconv(ratio, kernel):
    theirs = scattered(SepConv(DIM, ratio, kernel_size=kernel, padding=kernel // 2))
    names = {"pwconv1": "expand", "act1": "activation", "dwconv": "conv", "pwconv2": "out"}
    ours = copied(MIXERS["sepconv"](DIM, HEADS, ratio=ratio, kernel=kernel), renamed(theirs, **names))
    x = tokens()
    check(ours(x, GRID), to_tokens(theirs(to_map(x, GRID.grid))), (x,))


@pytest.mark.parametrize("kernel", [3, 5])
def test_dico_is_its_formula(kernel):
    """On maps: 1x1, depthwise, GELU, a gate from the mean over the map, 1x1."""
    layer: Any = randomise(MIXERS["dico"](DIM, HEADS, kernel=kernel)).double()
    x = tokens().double()
    maps = nn.functional.linear(x, layer.expand.weight, layer.expand.bias).transpose(1, 2).unflatten(2, GRID.grid)
    maps = nn.functional.conv2d(maps, layer.conv.weight, layer.conv.bias, padding=kernel // 2, groups=DIM)
    maps = maps * (1 + torch.erf(maps / 2**0.5)) / 2
    gate = torch.einsum("bchw,dc->bd", maps, layer.gate.weight) / maps[0, 0].numel() + layer.gate.bias
    wanted = torch.einsum("bchw,bc,dc->bhwd", maps, 1 / (1 + torch.exp(-gate)), layer.out.weight) + layer.out.bias
    assert relative(layer(x, GRID), wanted.flatten(1, 2)) < 1e-12


@pytest.mark.parametrize("grid", [(6, 9), (3, 3), (12,)])
def test_window_is_attention_inside_each_window(grid):
    """timm's window attention on windows cut out one by one; sides that the window divides."""
    context = Context(grid=grid)
    theirs = scattered(WindowAttention(DIM, (3, 3), HEADS))
    ours = copied(MIXERS["window"](DIM, HEADS, Place(len(grid)), size=3), renamed(theirs, proj="out"))
    x = tokens(context)
    wanted = torch.zeros_like(x).unflatten(1, grid)
    for corner in itertools.product(*[range(0, side, 3) for side in grid]):
        place = (slice(None), *(slice(start, start + 3) for start in corner))
        part = x.unflatten(1, grid)[place]
        wanted[place] = theirs(part.flatten(1, -2)).view(part.shape)
    check(ours(x, context), wanted.flatten(1, -2), (x,))


@pytest.mark.parametrize("grid", [(5, 7), (10,)])
def test_the_last_windows_attend_to_what_is_there(grid):
    """Attention where a pair of tokens is allowed if both lie in one window."""
    context = Context(grid=grid)
    ours = scattered(MIXERS["window"](DIM, HEADS, Place(len(grid)), size=3))
    x = tokens(context)
    where = torch.stack(torch.meshgrid(*[torch.arange(side) // 3 for side in grid], indexing="ij"), -1).flatten(0, -2)
    allowed = (where[:, None] == where[None]).all(-1)
    query, key, value = ours.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    check(ours(x, context), ours.out(mixed.transpose(1, 2).flatten(2)), (x,))


@pytest.mark.parametrize("grid", [(8, 3), (7, 4), (2, 5), (1, 3), (9,), (3,)])
@pytest.mark.parametrize("masked", [False, True])
def test_area_is_attention_inside_strips_of_each_extent(grid, masked):
    """Row r of R attends to the rows of equal floor(4 r / R), of its own sample alone; plus a convolution of values."""
    ours = scattered(MIXERS["area"](DIM, HEADS, Place(len(grid)), areas=4, kernel=3))
    context, x = Context(grid=grid), tokens(Context(grid=grid))
    extents = [grid, tuple(max(1, side - 2) for side in grid), (max(1, grid[0] // 2), *grid[1:])]
    extents = extents if masked else [grid] * 3
    real = torch.stack([rectangle(grid, extent) for extent in extents])
    got, wanted = ours(x, context._replace(mask=real if masked else None)), torch.zeros_like(x)
    for sample, extent in enumerate(extents):
        part = x[sample][real[sample]]
        strip = (4 * torch.arange(extent[0]) // extent[0]).repeat_interleave(math.prod(extent[1:]))
        query, key, value = ours.qkv(part).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        scores = (query @ key.mT / math.sqrt(DIM // HEADS)).masked_fill(strip[:, None] != strip, -torch.inf)
        plane = value.permute(0, 2, 1).flatten(0, 1).unflatten(1, extent)[None]
        near = ours.conv(plane)[0].flatten(1).T
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1) + near
        wanted[sample, real[sample]] = ours.out(mixed)
    check(got[real], wanted[real], (x,))


def test_area_refuses_no_strips():
    with pytest.raises(ValueError, match="^area: areas must be >= 1, got 0$"):
        MIXERS["area"](DIM, HEADS, areas=0)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_local_is_attention_to_neighbours_and_shared_tokens(masked, shared, prefix):
    context = Context(grid=(11,), prefix=prefix)
    ours = scattered(MIXERS["local"](DIM, HEADS, Place(1), window=2, tokens=shared))
    x, place = tokens(context), torch.arange(prefix + 11)
    whole = place < prefix + shared
    allowed = ((place[:, None] - place).abs() <= 2) | whole[:, None] | whole
    real = place < prefix + torch.tensor([11, 6, 4] if masked else [11] * 3)[:, None]
    query, key, value = ours.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    seen = (allowed & real[:, None]) | ~real[:, :, None]  # padding sees anything, so that no row is empty
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None])
    got = ours(x, context._replace(mask=real if masked else None))
    check(got[real], ours.out(mixed.transpose(1, 2).flatten(2))[real], (x,))


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_is_its_formula(masked):
    """((q_i + u) . k_j + (q_i + v) . [W r(3 (i - j) - c) for c in 0..2]) / sqrt(3 d) for groups i and j of 3 frames."""
    ours = scattered(MIXERS["grouped"](DIM, HEADS, Place(1), size=3))
    context = Context(grid=(11,))
    x, real = tokens(context), torch.arange(11) < torch.tensor([11, 7, 3] if masked else [11] * 3)[:, None]
    projected = F.pad(ours.qkv(x) * real[..., None], (0, 0, 0, 1))
    query, key, value = (part.reshape(3, 4, HEADS, 24) for part in projected.split(DIM, -1))
    scores = torch.zeros(4, 4, 3, HEADS, dtype=torch.float64)
    for i, j in itertools.product(range(4), range(4)):
        offsets = 3 * (i - j) - torch.arange(3, dtype=torch.float64)[:, None]
        angles = offsets / 10000 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        rows = ours.relative(torch.stack([angles.sin(), angles.cos()], -1).flatten(1)).view(HEADS, 24)
        content, offset = (query[:, i] + ours.content) * key[:, j], (query[:, i] + ours.offset) * rows
        scores[i, j] = (content + offset).sum(-1) / math.sqrt(24)
    groups = F.pad(real, (0, 1))[:, ::3].T  # real where the first frame is
    weights = scores.masked_fill(~groups[None, :, :, None], -torch.inf).softmax(1)
    mixed = torch.einsum("ijbh,bjhc->bihc", weights, value).reshape(3, 12, DIM)[:, :11]
    got = ours(x, context._replace(mask=real if masked else None))
    check(got[real], ours.out(mixed)[real], (x,), SINGLE)


def test_depthwise_is_timm_position_encoding():
    theirs = scattered(ConvPosEnc(DIM, 3))
    ours = copied(CONVS["depthwise"](DIM), renamed(theirs, proj="conv"))
    x = tokens()
    check(x + ours(x, GRID), to_tokens(theirs(to_map(x, GRID.grid))), (x,))


def test_channel_is_timm_channel_attention():
    theirs = scattered(ChannelAttention(DIM, HEADS, qkv_bias=True))
    ours = copied(MIXERS["channel"](DIM, HEADS), renamed(theirs, proj="out"))
    x = tokens()
    check(ours(x, GRID), theirs(x), (x,))


@pytest.mark.parametrize("position", ["none", "rope"])
def test_sla_is_its_formula(position):
    context = GRID._replace(prefix=1)
    context = position_of(position, DIM, DIM // HEADS, context.grid, 1).place(context)
    ours = scattered(MIXERS["sla"](DIM, HEADS, kernel=3))
    x = tokens(context)
    query, key, value = ours.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
    query, key = query.relu(), key.relu()
    scores = torch.einsum("bnhd,bmhd->bhnm", rotate(query, context.rotary), rotate(key, context.rotary))
    total = torch.einsum("bnhd,bmhd->bhn", query, key)[..., None]
    mixed = torch.einsum("bhnm,bmhd->bnhd", scores / (total + 1e-6), value)
    near = nn.Conv2d(8, 8, 3, padding=1, groups=8).double()
    near.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    for head in range(HEADS):
        mixed[:, 1:, head] = mixed[:, 1:, head] + to_tokens(near(to_map(value[:, 1:, head], context.grid)))
    check(ours(x, context), ours.out(mixed.flatten(2)), (x,), EXACT if position == "none" else SINGLE)
