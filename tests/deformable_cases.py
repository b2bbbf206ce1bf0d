"""What the tests of deformable aggregation share: options, inputs, the fp64 oracle, and a comparison with gradients."""

import itertools

import pytest
import torch

from helpers import relative
from zoo.kernels import multiscale
from zoo.kernels.deformable import gathered


def case(grid, kernel=3, groups=2, width=3, **options):
    return pytest.param(grid, kernel, groups, width, options, id=f"{grid}-{kernel}-{groups}x{width}-{options}")


CASES = [
    case((13,)),
    case((5, 7)),
    case((1,)),
    case((1, 9), kernel=5),
    case((1, 1)),
    case((5, 7), kernel=1, groups=4, width=1),
    case((6, 5), kernel=5, groups=1, width=5, scale=0.5),
    case((5, 7), kernel=(3, 5), width=16, scale=2.0),
    case((9,), kernel=(5,), width=20, scale=0.5),
    case((5, 4), kernel=2, width=20),
    case((5, 6), kernel=(2, 4), width=1, groups=3),
    case((11,), kernel=4, groups=1, width=48),
    case((4, 5), groups=2, width=48),
    case((7, 6), stride=2),
    case((8, 7), stride=3, scale=0.5),
    case((12,), stride=2, padding=1),
    case((7, 8), stride=2, padding=0),
    case((7, 6), dilation=2),
    case((6, 6), dilation=2, padding=2, scale=2.0),
    case((7, 6), padding=0),
    case((7, 6), kernel=(1, 3), padding=2),
    case((9, 8), kernel=2, stride=2, padding=0),
    case((15,), kernel=4, stride=2, dilation=2, padding=3),
    case((15,), kernel=4, dilation=2, padding=3, scale=2.0),
    case((9, 8), kernel=(2, 4), dilation=3, scale=0.5),
    case((9, 8), kernel=(4, 2), dilation=3, padding=4, scale=2.0, stride=2),
]


def sizes_of(kernel, axes):
    return (kernel,) * axes if isinstance(kernel, int) else kernel


def out_of(grid, kernel, stride=1, dilation=1, padding="same", scale=1.0):
    """The output's grid, as a convolution's."""
    if padding == "same":
        return tuple(len(range(0, size, stride)) for size in grid)
    kernel = sizes_of(kernel, len(grid))
    return tuple(
        len(range(0, size + 2 * padding - dilation * (taps - 1), stride))
        for size, taps in zip(grid, kernel, strict=True)
    )


def places_of(offsets, kernel, stride=1, dilation=1, padding="same", scale=1.0):
    """The formula, place by place: p * stride + scale * (tap + offset), [B, P, G, K, axes]."""
    *out, _, _, axes = offsets.shape[1:]
    kernel = sizes_of(kernel, axes)
    half = [dilation * (taps - 1) // 2 for taps in kernel]
    taps = [
        [dilation * tap - half[axis] for axis, tap in enumerate(each)]
        for each in itertools.product(*map(range, kernel))
    ]
    first = [0 if padding == "same" else half[axis] - padding for axis in range(axes)]
    points = [[first[axis] + stride * p for axis, p in enumerate(each)] for each in itertools.product(*map(range, out))]
    taps, points = offsets.new_tensor(taps), offsets.new_tensor(points)
    return points[:, None, None] + scale * (taps + offsets.flatten(1, axes))


def inputs(grid, kernel=3, groups=2, width=3, batch=2, kind=torch.float32, **options):
    """Value, offsets and weights; all places stay clear of the kinks at whole pixels, in half precision, too."""
    axes, out = len(grid), out_of(grid, kernel, **options)
    taps = torch.Size(sizes_of(kernel, axes)).numel()
    shape = (batch, *out, groups, taps, axes)
    part = 0.1 + 0.3 * torch.rand(shape) + 0.5 * torch.randint(2, shape)
    offsets = (torch.randint(-2, 3, shape) + part) / options.get("scale", 1.0)
    value = torch.randn(batch, *grid, groups * width)
    return value.to(kind), offsets.to(kind), torch.randn(shape[:-1]).to(kind)


def plainly(form, value, offsets, weights, kernel, **options):
    """What `reference` or `gathered` gives at the places of the formula."""
    axes = offsets.shape[-1]
    places = places_of(offsets.to(torch.promote_types(offsets.dtype, torch.float32)), kernel, **options)
    return form(value, places, weights.flatten(1, axes)).unflatten(1, offsets.shape[1 : axes + 1])


def exact(value, offsets, weights, kernel, **options):
    return plainly(gathered, value.double(), offsets.double(), weights.double(), kernel, **options)


def check(got, wanted, given, leaves, tolerances):
    """Outputs, and gradients on `given`, equal the oracle's on the fp64 `leaves`."""
    seed = torch.randn(got.shape).to(got.dtype)
    ours = torch.autograd.grad(got, given, seed)
    theirs = torch.autograd.grad(wanted, leaves, seed.double())
    assert got.shape == wanted.shape and [each.dtype for each in ours] == [each.dtype for each in given]
    for name, one, other, tolerance in zip(
        ("output", "value", "offsets", "weights"), (got, *ours), (wanted, *theirs), tolerances, strict=True
    ):
        assert other.abs().max() > 0, name
        assert relative(one.double(), other) <= tolerance, name


def both(given):
    """Inputs that ask for gradients, and the same in fp64."""
    return [each.requires_grad_() for each in given], [each.detach().double().requires_grad_() for each in given]


GRIDS = ((3, 4), (2, 2))


def several(value, grids, places, weights):
    """`multiscale` of places and weights with an axis for the levels."""
    return multiscale(value, grids, places.unbind(3), weights.unbind(3))
