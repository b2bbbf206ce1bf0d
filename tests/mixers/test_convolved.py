"""Convolutions behind projections, or in front of them, against the convolutions of PyTorch one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from formulas import DIM, GRID, HEADS, REAL, check, scattered, tokens
from zoo.layer import Chunks, Context, Place
from zoo.mixers import MIXERS
from zoo.spec import make

LINE = Context((11,), mask=torch.tensor([[True] * 11, [True] * 8 + [False] * 3, [True] * 11]))


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1))


def compared(got: Tensor, wanted: Tensor, context: Context, x: Tensor) -> None:
    real = 1 if context.mask is None else context.mask[..., None]
    check(got * real, wanted * real, (x,))


def depthwise(y: Tensor, weight: Tensor, bias: Tensor, context: Context, causal: bool = False) -> Tensor:
    """y [B, N, C], zeros outside the real tokens of the grid; prefix tokens stay."""
    first, y = y[:, : context.prefix], y[:, context.prefix :]
    if context.mask is not None:
        y = y * context.mask[:, context.prefix :, None]
    maps = y.transpose(1, 2).unflatten(2, context.grid)
    width = weight.shape[-1]
    margin = [width - 1, 0] if causal else [width // 2, width // 2] * len(context.grid)
    conv = F.conv1d if len(context.grid) == 1 else F.conv2d
    maps = conv(F.pad(maps, margin), weight, bias, groups=len(weight))
    return torch.cat([first, maps.flatten(2).transpose(1, 2)], 1)


CONTEXTS = {
    "prefix": GRID._replace(prefix=2),
    "mask": GRID._replace(mask=REAL),
    "line": LINE,
    "chunks": LINE._replace(visible=Chunks(3, 6)),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("kernels", "of"), [((3, 5, 7), "qkv"), ((1, 5), "qv"), ((3,), "k")])
def test_projections_are_sums_of_convolutions(kernels, of, context):
    context = CONTEXTS[context]
    ours = scattered(MIXERS["conv_projection"](DIM, HEADS, Place(len(context.grid)), kernels=kernels, of=of))
    x = tokens(context)
    parts = dict(zip("qkv", ours.qkv(x).chunk(3, -1), strict=True))
    shares = ours.shares.softmax(-1)
    assert shares.shape == (len(of), len(kernels))
    for place, letter in enumerate(of):
        total = torch.zeros_like(parts[letter])
        if context.prefix:
            total[:, : context.prefix] = parts[letter][:, : context.prefix]
        for number, conv in enumerate(ours.filters):
            rows = slice(place * DIM, (place + 1) * DIM)
            each = depthwise(parts[letter], conv.weight[rows], conv.bias[rows], context, context.visible is not None)
            total[:, context.prefix :] = (total + shares[place, number] * each)[:, context.prefix :]
        parts[letter] = total
    wanted = ours.out(ours.mix(*map(heads_of, parts.values()), context).flatten(2))
    compared(ours(x, context), wanted, context, x)


def test_convolutions_start_with_equal_shares():
    assert torch.equal(MIXERS["conv_projection"](DIM, HEADS).shares.softmax(-1), torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("kernels", "of"), [((2, 2), "qk"), ((4,), "qkv"), ((2, 4, 2), "v")])
def test_even_kernels_filter_what_projections_read(kernels, of, context):
    """RMSNorm(x + causal convolutions of x) along time, or along each row of an image, as Yuan 2.0 does."""
    context = CONTEXTS[context]
    ours = scattered(MIXERS["conv_projection"](DIM, HEADS, Place(len(context.grid)), kernels=kernels, of=of))
    assert [conv.out_channels for conv in ours.chain] == [*[DIM // 2] * (len(kernels) - 1), DIM]
    x = tokens(context)
    length, y = context.grid[-1], torch.zeros_like(x)
    for start in range(context.prefix, x.shape[1], length):
        row = x[:, start : start + length].transpose(1, 2)
        for conv, kernel in zip(ours.chain, kernels, strict=True):
            row = F.conv1d(F.pad(row, (kernel - 1, 0)), conv.weight, conv.bias)
        y[:, start : start + length] = row.transpose(1, 2)
    y = F.rms_norm(x + y, (DIM,), ours.chain_norm.weight, 1e-6)
    weights, biases = ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3)
    parts = [
        heads_of(F.linear(y if letter in of else x, weight, bias))
        for letter, weight, bias in zip("qkv", weights, biases, strict=True)
    ]
    wanted = ours.out(ours.mix(*parts, context).flatten(2))
    compared(ours(x, context), wanted, context, x)


def test_code_is_added_behind_the_filter_and_not_to_values():
    ours = scattered(MIXERS["conv_projection"](DIM, HEADS, kernels=(2, 2), of="qkv"))
    x, code = tokens(), torch.randn(1, 30, DIM).double()
    y = ours.preceded(x, ours.chain, GRID)
    parts = [part.chunk(3, -1) for part in (ours.qkv(y + code), ours.qkv(y))]
    wanted = ours.out(ours.mix(*map(heads_of, (*parts[0][:2], parts[1][2])), GRID).flatten(2))
    check(ours(x, GRID._replace(code=code)), wanted, (x,))


@pytest.mark.parametrize("window", [0, 4])
def test_relative_attention_of_convolved_projections(window):
    """Against the row without the convolution, which is given its result."""
    ours = scattered(MIXERS["relative"](DIM, HEADS, Place(1), window=window, conv=3))
    for context in (LINE, *([] if window else [CONTEXTS["chunks"]])):
        x = tokens(context)
        y = depthwise(ours.qkv(x), ours.filter.weight, ours.filter.bias, context, context.visible is not None)
        wanted = ours.out(ours.mix(*map(heads_of, y.chunk(3, -1)), context).flatten(2))
        compared(ours(x, context), wanted, context, x)


@pytest.mark.parametrize(
    ("spec", "message"),
    {
        "conv_projection(kernels=())": "kernels must be a tuple of odd widths",
        "conv_projection(kernels=(2, 3))": "kernels must be a tuple of odd widths",
        "conv_projection(kernels=(3, 0))": "kernels must be a tuple of odd widths",
        "conv_projection(kernels=(3, 2.0))": "kernels must be a tuple of odd widths",
        "conv_projection(kernels=3)": "must be a value like",
        "conv_projection(of='')": "of must be some of the letters 'qkv'",
        "conv_projection(of='kq')": "of must be some of the letters 'qkv'",
        "relative(conv=4)": "conv must be odd, or 0 for none, got 4",
    }.items(),
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        make(MIXERS, spec, DIM, HEADS)
    assert "\n" not in str(error.value)
