"""Our parts against those of the libraries that we have installed, or against the formula written out, with random
weights in fp64."""

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dct, dctn
from timm.layers import Attention, EcaModule, GluMlp, SqueezeExcite, SwiGLU, SwiGLUPacked, resample_abs_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, build_sincos2d_pos_embed
from timm.models.davit import ChannelAttention, ConvPosEnc, WindowAttention
from timm.models.metaformer import Pooling, SepConv
from torch import Tensor, nn
from torchvision.ops import deform_conv2d
from transformers import DeformableDetrConfig, DFineConfig
from transformers.models.d_fine.modeling_d_fine import DFineGate, DFineMultiscaleDeformableAttention
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
)
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2SinePositionEmbedding

from helpers import Given, randomise, rectangle, relative
from helpers import position as position_of
from zoo.block import Block
from zoo.channels import CHANNELS
from zoo.choices import BlockConfig
from zoo.ffns import FFNS
from zoo.heads import HEADS as IMAGE_HEADS
from zoo.kernels import deformable, multiscale
from zoo.kernels.deformable import gathered
from zoo.layer import Context, Memory, Place
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.mixers.attention import rotate
from zoo.norms import NORMS
from zoo.stems import STEMS
from zoo.tensors import to_map, to_tokens

EXACT = 1e-10  # fp64
SINGLE = 1e-5  # where a table is fp32 by contract
DIM, HEADS = 32, 4
GRID = Context(grid=(5, 6))


def scattered(module: nn.Module) -> nn.Module:
    """The module in fp64 and eval mode, every parameter random."""
    for parameter in module.double().eval().parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def tokens(context: Context = GRID, batch: int = 3, dim: int = DIM) -> Tensor:
    rows = context.prefix + math.prod(context.grid)
    return torch.randn(batch, rows, dim, dtype=torch.float64, requires_grad=True)


def copied(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module in fp64 and eval mode with these weights, all of them."""
    module = module.double().eval()
    module.load_state_dict(
        {name: weights[name].detach().reshape(each.shape) for name, each in module.state_dict().items()}
    )
    assert set(weights) == set(module.state_dict())
    return module


def renamed(module: nn.Module, **names: str) -> dict[str, Tensor]:
    """The state of a module, first parts of its names replaced and those of names without a match kept."""
    state = {}
    for name, value in module.state_dict().items():
        for theirs, ours in names.items():
            if name.startswith(f"{theirs}."):
                name = f"{ours}.{name.removeprefix(f'{theirs}.')}"
                break
        state[name] = value
    return state


def check(got: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...] = (), tolerance: float = EXACT) -> None:
    """Outputs are the same, and so are the gradients of a random projection of them on the leaves."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    if not leaves:
        return
    seed = torch.randn_like(wanted)
    ours = torch.autograd.grad((got * seed).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((wanted * seed).sum(), leaves, retain_graph=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


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


REAL = torch.tensor([[True] * 30, [True] * 12 + [False] * 18, [True] + [False] * 29])


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


# Channel attention


@pytest.mark.parametrize(("dim", "reduction"), [(32, 16), (192, 16), (384, 16), (320, 16), (576, 16), (64, 4), (40, 4)])
def test_se_is_timm_squeeze_excite(dim, reduction):
    theirs = scattered(SqueezeExcite(dim, 1 / reduction))
    ours = copied(CHANNELS["se"](dim, reduction=reduction), renamed(theirs, fc1="squeeze", fc2="excite"))
    x = tokens(dim=dim)
    check(ours(x, GRID), to_tokens(theirs(to_map(x, GRID.grid))), (x,))


@pytest.mark.parametrize("dim", [16, 32, 64, 192, 256, 384, 512, 768, 2048])
def test_eca_is_timm_eca(dim):
    theirs = scattered(EcaModule(dim))
    ours = copied(CHANNELS["eca"](dim), theirs.state_dict())
    x = tokens(dim=dim)
    check(ours(x, GRID), to_tokens(theirs(to_map(x, GRID.grid))), (x,))


# The paper's sixteen frequencies on 7 x 7, as its code lists them: down, then across.
DOWN = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2)
ACROSS = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2)


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (14, 7), (9, 8), (20,)])
def test_fca_is_a_cosine_transform(grid):
    context = Context(grid=grid)
    ours = scattered(CHANNELS["fca"](64, Place(len(grid))))
    x = tokens(context, dim=64)
    maps = x.detach().numpy().reshape(3, *grid, 64)
    if len(grid) == 1:
        spectrum = dct(maps, norm="ortho", axis=1)
        picks = [(place,) for place in range(16)]
    else:
        spectrum = dctn(maps, norm="ortho", axes=(1, 2))
        picks = [(u * (grid[0] // 7), v * (grid[1] // 7)) for u, v in zip(DOWN, ACROSS, strict=True)]
    assert len(set(picks)) == 16
    pooled = [spectrum[(slice(None), *pick, slice(4 * part, 4 * part + 4))] for part, pick in enumerate(picks)]
    gate = ours.excite(ours.squeeze(torch.from_numpy(np.concatenate(pooled, 1))).relu()).sigmoid()
    check(ours(x, context), x * gate[:, None])


@pytest.mark.parametrize("grid", [(5, 6), (1, 1)])
@pytest.mark.parametrize(("kernel", "span", "groups"), [(7, 1, 16), (5, 8, 4)])
def test_ela_is_its_modules(kernel, span, groups, grid):
    context = Context(grid=grid)
    ours = scattered(CHANNELS["ela"](DIM, kernel=kernel, span=span, groups=groups))
    conv = nn.Conv1d(DIM, DIM, kernel, padding=kernel // 2, groups=DIM // span, bias=False)
    strip = nn.Sequential(conv, nn.GroupNorm(groups, DIM), nn.Sigmoid())
    copied(strip, {"0.weight": ours.conv.weight, "1.weight": ours.weight, "1.bias": ours.bias})
    x = tokens(context)
    maps = to_map(x, grid)
    wanted = maps * strip(maps.mean(3))[:, :, :, None] * strip(maps.mean(2))[:, :, None]
    check(ours(x, context), to_tokens(wanted), (x,))


@pytest.mark.parametrize("length", [9, 1])
def test_ela_on_a_line_is_its_modules(length):
    context = Context(grid=(length,))
    ours = scattered(CHANNELS["ela"](DIM, Place(1)))
    x = tokens(context)
    strip = F.conv1d(x.transpose(1, 2), ours.conv.weight, padding=3, groups=DIM)
    gate = F.group_norm(strip, 16, ours.weight, ours.bias).sigmoid()
    check(ours(x, context), x * gate.transpose(1, 2), (x,))


# Feed-forward and norms


def test_swiglu_is_timm_swiglu():
    theirs = scattered(SwiGLU(DIM, 88))
    weights = {f"out.{name}": each for name, each in theirs.fc2.state_dict().items()}
    for part in ("weight", "bias"):
        weights[f"expand.{part}"] = torch.cat([getattr(theirs.fc1_g, part), getattr(theirs.fc1_x, part)])
    ours = copied(FFNS["swiglu"](DIM), weights)
    x = tokens()
    check(ours(x, GRID), theirs(x), (x,))
    packed = copied(SwiGLUPacked(DIM, 176), renamed(ours, expand="fc1", out="fc2"))
    check(ours(x, GRID), packed(x), (x,))


def test_geglu_is_timm_glu_with_gelu():
    theirs = scattered(GluMlp(DIM, 4 * DIM, act_layer=nn.GELU, gate_last=False))
    ours = copied(FFNS["geglu"](DIM, ratio=2.0), renamed(theirs, fc1="expand", fc2="out"))
    x = tokens()
    check(ours(x, GRID), theirs(x), (x,))


@pytest.mark.parametrize("masked", [False, True])
def test_batchnorm_is_torch_batchnorm(masked):
    theirs = scattered(nn.BatchNorm1d(DIM)).train()
    ours = NORMS["batchnorm"](DIM).double()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    context = GRID._replace(mask=REAL if masked else None)
    real = REAL if masked else torch.ones_like(REAL)
    for _ in range(3):
        x = (2.0 + 3.0 * tokens()).detach().requires_grad_()
        check(ours(x, context)[real], theirs(x[real]), (x,))
    ours.eval()
    theirs.eval()
    x = tokens()
    check(ours(x, context)[real], theirs(x[real]), (x,))
    check(ours.running_mean, theirs.running_mean)
    check(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize(("name", "row"), [("layernorm", nn.LayerNorm), ("rmsnorm", nn.RMSNorm)])
def test_token_norms_are_torch_norms(name, row, eps):
    theirs = scattered(row(DIM, eps=eps))
    ours = copied(NORMS[name](DIM, eps=eps), theirs.state_dict())
    x = tokens()
    check(ours(x, GRID), theirs(x), (x,))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_the_compressed_norm_is_that_of_one_more_channel(eps):
    theirs = scattered(nn.LayerNorm(DIM + 1, eps=eps, bias=False))
    ours = copied(NORMS["crmsnorm"](DIM, eps=eps), {"weight": theirs.weight[:-1]})
    x = tokens()
    whole = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    check(ours(x, GRID), theirs(whole)[..., :-1], (x,))


# Stems and heads


def test_double_stem_is_its_formula():
    ours = scattered(STEMS["double"](3, DIM, "layernorm"))
    images = torch.randn(2, 3, 18, 27, dtype=torch.float64, requires_grad=True)
    maps = images
    for number, step in enumerate((ours.first, ours.second)):
        maps = F.conv2d(F.gelu(maps) if number else maps, step.conv.weight, step.conv.bias, stride=2, padding=1)
        rows = F.layer_norm(maps.movedim(1, -1), maps.shape[1:2], step.after.weight, step.after.bias, 1e-6)
        maps = rows.movedim(-1, 1)
    got, context = ours(images)
    assert context.grid == (5, 7)
    check(got, to_tokens(maps), (images,))


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("norm_first", [False, True])
def test_conv_head_is_its_formula(norm_first, classes):
    ours = scattered(IMAGE_HEADS["conv"](DIM, classes, "layernorm", norm_first=norm_first))
    x = tokens()
    y = F.layer_norm(x, (DIM,), ours.norm.weight, ours.norm.bias, 1e-6) if norm_first else x
    if classes == 0:
        check(ours(x, GRID), y.mean(1), (x,))
        return
    norm = ours.inner
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    y = F.linear(y, ours.expand.weight).flatten(0, 1)
    y = F.gelu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)).view(3, 30, 48).mean(1)
    check(ours(x, GRID), F.linear(y, ours.out.weight, ours.out.bias), (x,))


# Deformable aggregation

CASES = list(itertools.product((3, 5), (1, 2), (1, 2), ("same", 0, 1), (1.0,)))
CASES += [(3, 1, 1, "same", 0.5), (5, 2, 2, "same", 2.0), (3, 1, 2, 1, 0.5)]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "padding", "scale"), CASES)
def test_deformable_is_torchvision(kernel, stride, dilation, padding, scale):
    batch, groups, channels, grid, taps = 2, 2, 6, (9, 11), kernel**2
    centred = dilation * (kernel - 1) // 2
    margin = centred if padding == "same" else padding
    out = [(size + 2 * margin - dilation * (kernel - 1) - 1) // stride + 1 for size in grid]
    value = torch.randn(batch, *grid, channels, dtype=torch.float64, requires_grad=True)
    offsets = (2 * torch.randn(batch, *out, groups, taps, 2, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(batch, *out, groups, taps, dtype=torch.float64, requires_grad=True)

    # What is read at place + scale * (tap + offset) lies scale * (tap + offset) - tap away from the tap.
    line = dilation * torch.arange(kernel, dtype=torch.float64) - centred
    tap = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(taps, 2)
    moved = scale * (tap + offsets) - tap
    lines = [stride * torch.arange(size) + centred - margin for size in out]
    points = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 1, 1, 2)
    places = points + scale * (tap + offsets.flatten(1, 2))
    wanted = deform_conv2d(
        value.permute(0, 3, 1, 2),
        moved.permute(0, 3, 4, 5, 1, 2).flatten(1, 3),
        torch.ones(channels, 1, kernel, kernel, dtype=torch.float64),
        stride=stride,
        padding=margin,
        dilation=dilation,
        mask=weights.permute(0, 3, 4, 1, 2).flatten(1, 2),
    ).permute(0, 2, 3, 1)
    leaves = (value, offsets, weights)
    options = {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding, "scale": scale}
    check(deformable(*leaves, **options), wanted, leaves)
    check(gathered(value, places, weights.flatten(1, 2)), wanted.flatten(1, 2), leaves)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (9, 1), (5, 2)])
def test_deformable_on_a_line_is_torchvision(kernel, dilation):
    value = torch.randn(2, 17, 6, dtype=torch.float64, requires_grad=True)
    offsets = (2 * torch.randn(2, 17, 3, kernel, 1, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 17, 3, kernel, dtype=torch.float64, requires_grad=True)
    flat = torch.cat([torch.zeros_like(offsets), offsets], -1)
    wanted = deform_conv2d(
        value.transpose(1, 2)[:, :, None],
        flat.permute(0, 2, 3, 4, 1).flatten(1, 3)[:, :, None],
        torch.ones(6, 1, 1, kernel, dtype=torch.float64),
        padding=(0, dilation * (kernel - 1) // 2),
        dilation=dilation,
        mask=weights.permute(0, 2, 3, 1).flatten(1, 2)[:, :, None],
    )
    leaves = (value, offsets, weights)
    check(deformable(*leaves, kernel=kernel, dilation=dilation), wanted[:, :, 0].transpose(1, 2), leaves)
    taps = dilation * (torch.arange(kernel)[:, None] - kernel // 2)
    places = torch.arange(17).view(17, 1, 1, 1) + taps + offsets
    check(gathered(value, places, weights), wanted[:, :, 0].transpose(1, 2), leaves)


@pytest.mark.parametrize(("kernel", "groups"), [(3, 0), (5, 2)])
def test_dcnv4_is_torchvision(kernel, groups):
    ours = scattered(MIXERS["dcnv4"](DIM, HEADS, kernel=kernel, groups=groups))
    x = tokens()
    groups, taps = groups or HEADS, kernel**2
    sample = to_map(ours.sample(x), GRID.grid).unflatten(1, (groups, 3 * taps))
    maps = deform_conv2d(
        to_map(ours.value(x), GRID.grid),
        sample[:, :, : 2 * taps].flatten(1, 2),
        torch.ones(DIM, 1, kernel, kernel, dtype=torch.float64),
        padding=kernel // 2,
        mask=sample[:, :, 2 * taps :].flatten(1, 2),
    )
    check(ours(x, GRID), ours.out(to_tokens(maps)), (x,))


MAPS = ((5, 7), (3, 4), (2, 2))


def maps_of(grids: tuple[tuple[int, int], ...]) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """How transformers names the maps of a memory: their sizes, twice, and where each begins."""
    sizes = torch.tensor(grids)
    return sizes, list(grids), torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])


def test_multiscale_is_transformers():
    value = torch.randn(2, 51, DIM, dtype=torch.float64, requires_grad=True)
    places = (1.4 * torch.rand(2, 6, HEADS, 3, 5, 2, dtype=torch.float64) - 0.2).requires_grad_()
    weights = torch.randn(2, 6, HEADS, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = MultiScaleDeformableAttention()(
        value.unflatten(-1, (HEADS, -1)), *maps_of(MAPS), places.flip(-1), weights, im2col_step=64
    )
    check(multiscale(value, MAPS, places.unbind(3), weights.unbind(3)), wanted, (value, places, weights))


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("points", [1, 4])
def test_deformable_cross_attention_is_transformers(boxes, masked, points):
    config = DeformableDetrConfig(d_model=DIM, num_feature_levels=len(MAPS), use_timm_backbone=False)
    theirs = scattered(DeformableDetrMultiscaleDeformableAttention(config, HEADS, points))
    ours = copied(
        CROSSES["deformable"](DIM, HEADS, Place(levels=len(MAPS)), points=points),
        renamed(theirs, sampling_offsets="offsets", attention_weights="scores", value_proj="values", output_proj="out"),
    )
    real = torch.cat(
        [
            torch.stack([torch.arange(rows * columns) < area, torch.arange(rows * columns) % columns < columns - 1])
            for (rows, columns), area in zip(MAPS, (21, 8, 2), strict=True)
        ],
        1,
    )
    sides = torch.rand(2, 6, 4, dtype=torch.float64)
    reference = (sides if boxes else sides[..., :2].clone()).requires_grad_()
    queries, memory, code = (torch.randn(2, size, DIM, dtype=torch.float64, requires_grad=True) for size in (6, 51, 6))
    context = Context(
        grid=(6,),
        code=code,
        memory=Memory(memory, mask=real if masked else None, grids=MAPS, reference=reference),
    )
    sizes, listed, begins = maps_of(MAPS)
    wanted, _ = theirs(
        queries,
        attention_mask=real if masked else None,
        encoder_hidden_states=memory,
        position_embeddings=code,
        reference_points=reference[:, :, None].expand(-1, -1, len(MAPS), -1),
        spatial_shapes=sizes,
        spatial_shapes_list=listed,
        level_start_index=begins,
    )
    check(ours(queries, context), wanted, (queries, memory, code, reference))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("points", [4, (3, 6, 3)])
def test_gated_cross_attention_with_points_for_each_level_is_d_fine(points, masked):
    """Their gate and its norm together, as the residual around our attention."""
    number = list(points) if isinstance(points, tuple) else points
    config = DFineConfig(d_model=DIM, decoder_attention_heads=HEADS, decoder_n_points=number)
    theirs, gate = scattered(DFineMultiscaleDeformableAttention(config)), scattered(DFineGate(DIM))
    theirs.num_points_scale = theirs.num_points_scale.reciprocal().round().reciprocal()  # theirs are of fp32
    row = CROSSES["deformable"](DIM, HEADS, Place(levels=len(MAPS)), points=points, project=False, gated=True)
    weights = renamed(theirs, sampling_offsets="offsets", attention_weights="scores")
    weights = {name: value for name, value in weights.items() if name != "num_points_scale"}
    ours = copied(row, weights | {f"gate.{name}": value for name, value in gate.gate.state_dict().items()})
    reference = torch.rand(2, 6, 4, dtype=torch.float64).requires_grad_()
    queries, memory, code = (torch.randn(2, size, DIM, dtype=torch.float64, requires_grad=True) for size in (6, 51, 6))
    real = torch.rand(2, 51) < 0.7 if masked else None
    sizes, listed, _ = maps_of(MAPS)
    given = {"encoder_hidden_states": memory, "attention_mask": None if real is None else real[..., None]}
    given |= {"reference_points": reference[:, :, None], "spatial_shapes": sizes, "spatial_shapes_list": listed}
    wanted = gate(queries, theirs(queries + code, **given)[0])
    context = Context(grid=(6,), code=code, memory=Memory(memory, mask=real, grids=MAPS, reference=reference))
    check(gate.norm(queries + ours(queries, context)), wanted, (queries, memory, code, reference))


# Positions


@pytest.mark.parametrize("prefix", [0, 2])
def test_cpe_is_timm_position_encoding(prefix):
    context = GRID._replace(prefix=prefix)
    theirs = scattered(ConvPosEnc(DIM, 3))
    ours = copied(position_of("cpe", DIM, 8, GRID.grid, prefix), renamed(theirs, proj="conv"))
    x = tokens(context)
    moved = to_tokens(theirs(to_map(x[:, prefix:], GRID.grid)))
    check(ours(x, context), torch.cat([x[:, :prefix], moved], 1), (x,))


@pytest.mark.parametrize("prefix", [0, 2])
def test_sincos_is_timm_table(prefix):
    context = Context(grid=(5, 9), prefix=prefix)
    got = position_of("sincos", DIM, 8, (3, 3), prefix)(torch.zeros(1, prefix + 45, DIM), context)[0]
    table = build_sincos2d_pos_embed([5, 9], DIM).unflatten(1, (2, 2, -1))  # sine or cosine, axis, rate
    check(got[prefix:], table.transpose(1, 2).flatten(1), tolerance=SINGLE)
    assert not got[:prefix].any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_sine_is_detr_position_embedding(prefix, padded):
    theirs = DetrSinePositionEmbedding(DIM // 2, normalize=True)
    real = torch.ones(2, 5, 9, dtype=torch.bool)
    if padded:
        real[0, 3:], real[0, :, 7:], real[1, 4:] = False, False, False
    wanted = to_tokens(theirs(torch.Size((2, DIM, 5, 9)), "cpu", torch.float64, mask=real))
    mask = torch.cat([real.new_ones(2, prefix), real.flatten(1)], 1) if padded else None
    context = position_of("sine", DIM, 8, (3, 3), prefix).place(Context(grid=(5, 9), prefix=prefix, mask=mask))
    code = context.code.expand(2, -1, -1)
    inside = real.flatten(1)
    check(code[:, prefix:][inside], wanted[inside], tolerance=SINGLE)
    assert not code[:, :prefix].any()


def test_sine_without_extent_is_the_table_of_rt_detr():
    place = position_of("sine", DIM, 8, (3, 3), extent=False).place
    wanted = RTDetrV2SinePositionEmbedding(DIM)(9, 5, torch.device("cpu"), torch.float64)
    check(place(Context(grid=(5, 9))).code, wanted, tolerance=SINGLE)
    mask = torch.arange(45)[None] < 20
    assert torch.equal(place(Context(grid=(5, 9), mask=mask)).code, place(Context(grid=(5, 9))).code)


def test_sincos_on_a_line_is_its_formula():
    got = position_of("sincos", DIM, 8, (3,), 0)(torch.zeros(1, 50, DIM), Context(grid=(50,)))[0]
    wanted = [
        [wave(place / 10000 ** (2 * k / DIM)) for wave in (math.sin, math.cos) for k in range(DIM // 2)]
        for place in range(50)
    ]
    check(got, torch.tensor(wanted), tolerance=SINGLE)


@pytest.mark.parametrize("grid", [(4, 4), (7, 9), (2, 3), (4, 8)])
@pytest.mark.parametrize("antialias", [False, True])
def test_learned_table_is_resized_as_in_timm(grid, antialias):
    position = position_of("learned", DIM, 8, (4, 4), 2, antialias=antialias)
    nn.init.normal_(position.table)
    context = Context(grid=grid, prefix=2)
    got = position(torch.zeros(1, 2 + math.prod(grid), DIM), context)
    check(got, resample_abs_pos_embed(position.table, list(grid), [4, 4], 2, antialias=antialias), tolerance=SINGLE)


@pytest.mark.parametrize("mode", ["bicubic", "antialias", "linear"])
def test_learned_table_is_resized_to_the_extent_of_each_sample(mode):
    grid, extents = ((9,), [(9,), (4,), (2,)]) if mode == "linear" else ((6, 7), [(6, 7), (3, 5), (2, 2)])
    antialias = mode == "antialias"
    mode = "bicubic" if antialias else mode
    position = position_of("learned", DIM, 8, grid[:1] * len(grid), 0, antialias=antialias)
    nn.init.normal_(position.table)
    mask = torch.zeros(3, *grid, dtype=torch.bool)
    for each, extent in zip(mask, extents, strict=True):
        each[tuple(slice(size) for size in extent)] = True
    got = position(torch.zeros(3, math.prod(grid), DIM), Context(grid=grid, mask=mask.flatten(1)))
    for each, real, extent in zip(got, mask.flatten(1), extents, strict=True):
        table = to_map(position.table, position.grid)
        wanted = F.interpolate(table, extent, mode=mode, align_corners=False, antialias=antialias)
        check(each[real], to_tokens(wanted)[0], tolerance=SINGLE)


@pytest.mark.parametrize("grid", [(6, 5), (13,)])
def test_rope_turns_complex_numbers(grid):
    context = Context(grid=grid, prefix=1)
    context = position_of("rope", DIM, 8, (4,) * len(grid), 1, base=50.0).place(context)
    x = torch.randn(2, 1 + math.prod(grid), HEADS, 8, dtype=torch.float64)
    places = np.stack(np.meshgrid(*[np.arange(size) for size in grid], indexing="ij"), -1).reshape(-1, len(grid))
    width = 4 // len(grid)
    angles = np.concatenate([places[:, [axis]] / 50.0 ** (np.arange(width) / width) for axis in range(len(grid))], 1)
    angles = np.concatenate([np.zeros((1, 4)), angles])
    turned = (x[..., :4] + 1j * x[..., 4:]) * torch.from_numpy(np.exp(1j * angles))[:, None]
    check(rotate(x, context.rotary), torch.cat([turned.real, turned.imag], -1), tolerance=SINGLE)


@pytest.mark.parametrize("grid", [(6, 5), (13,)])
def test_rope_scores_depend_on_relative_places(grid):
    context = position_of("rope", DIM, 8, grid, 0).place(Context(grid=grid))
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, math.prod(grid), 1, 8)
    scores = torch.einsum("bnhd,bmhd->nm", rotate(query, context.rotary), rotate(key, context.rotary))
    scores = scores.view(*grid, *grid)
    by_distance = {}
    for here in itertools.product(*map(range, grid)):
        for there in itertools.product(*map(range, grid)):
            away = tuple(a - b for a, b in zip(here, there, strict=True))
            by_distance.setdefault(away, []).append(scores[(*here, *there)].item())
    assert len(by_distance) == math.prod(2 * size - 1 for size in grid)
    assert all(max(each) - min(each) < SINGLE for each in by_distance.values())
    assert np.std([each[0] for each in by_distance.values()]) > 0.1


@pytest.mark.parametrize("kind", ["reference", "centred"])
@pytest.mark.parametrize("grid", [(4, 4), (6, 5), (2, 3)])
def test_rope_of_a_changing_grid_is_that_of_timm(kind, grid):
    options = {"reference": 4} if kind == "reference" else {"centred": True}
    context = position_of("rope", DIM, 8, (4, 4), 0, base=100.0, **options).place(Context(grid=grid))
    if kind == "centred":
        wanted = RotaryEmbeddingDinoV3(8, temperature=100.0).get_embed(grid)
    else:
        cat = RotaryEmbeddingCat(8, temperature=100.0, in_pixels=False, ref_feat_shape=[4, 4], rotate_half=True)
        wanted = cat.get_embed(grid)
    sine, cosine = (each[:, :4] for each in wanted.chunk(2, -1))
    check(context.rotary, torch.stack([cosine, sine]), tolerance=SINGLE)


@pytest.mark.parametrize("options", [{"reference": 4}, {"centred": True}], ids=str)
def test_rope_of_a_changing_grid_is_that_of_each_sample_alone(options):
    rope, extents = position_of("rope", DIM, 8, (4, 4), 1, **options), [(6, 7), (3, 5), (2, 2)]
    mask = torch.zeros(3, 6, 7, dtype=torch.bool)
    for each, extent in zip(mask, extents, strict=True):
        each[tuple(slice(size) for size in extent)] = True
    whole = torch.cat([torch.ones(3, 1, dtype=torch.bool), mask.flatten(1)], 1)
    together = rope.place(Context(grid=(6, 7), prefix=1, mask=whole))
    x = torch.randn(3, 43, HEADS, 8, dtype=torch.float64)
    for index, extent in enumerate(extents):
        alone = rope.place(Context(grid=extent, prefix=1))
        wanted = rotate(x[index : index + 1, whole[index]], alone.rotary)
        check(rotate(x, together.rotary)[index : index + 1, whole[index]], wanted, tolerance=SINGLE)


def test_learned_rope_is_both():
    both = position_of("learned_rope", DIM, 8, (4, 4), 1, antialias=True, base=50.0, reference=4)
    nn.init.normal_(both.table)
    table = position_of("learned", DIM, 8, (4, 4), 1, antialias=True)
    table.load_state_dict({"table": both.table})
    context, x = Context(grid=(6, 5), prefix=1), torch.randn(2, 31, DIM)
    assert torch.equal(both(x, context), table(x, context))
    rope = position_of("rope", DIM, 8, (4, 4), 1, base=50.0, reference=4)
    assert torch.equal(both.place(context).rotary, rope.place(context).rotary)


def test_rope_attention_stays_under_shifts():
    """A picture in a larger, masked one: attention gives the same wherever it lies on a line."""
    ours = scattered(MIXERS["softmax"](DIM, HEADS))
    rope = position_of("rope", DIM, 8, (9,), 0)
    x = tokens(Context(grid=(9,)), 1)
    wanted = ours(x, rope.place(Context(grid=(9,))))
    shifted = torch.cat([torch.randn(1, 4, DIM, dtype=torch.float64), x], 1)
    mask = torch.arange(13)[None] >= 4
    got = ours(shifted, rope.place(Context(grid=(13,), mask=mask)))
    check(got[:, 4:], wanted, tolerance=SINGLE)
    still = ours(x, Context(grid=(9,)))
    assert (still - wanted).abs().max() > 0.01 * wanted.abs().max()
