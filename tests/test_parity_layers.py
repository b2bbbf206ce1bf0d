"""Layers but mixers, stems, heads and positions against other libraries or the formula written out, in fp64."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dct, dctn
from timm.layers import EcaModule, GluMlp, SqueezeExcite, SwiGLU, SwiGLUPacked, resample_abs_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, build_sincos2d_pos_embed
from timm.models.davit import ConvPosEnc
from torch import nn
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2SinePositionEmbedding

from formulas import DIM, GRID, HEADS, REAL, SINGLE, check, copied, renamed, scattered, tokens
from helpers import position as position_of
from zoo.channels import CHANNELS
from zoo.ffns import FFNS
from zoo.heads import HEADS as IMAGE_HEADS
from zoo.layer import Context, Place
from zoo.mixers import MIXERS
from zoo.mixers.attention import rotate
from zoo.norms import NORMS
from zoo.stems import STEMS
from zoo.tensors import to_map, to_tokens

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
