"""Deformable aggregation against the fp64 oracle; see tests/test_parity.py for other libraries."""

import pytest
import torch
from helpers import relative

from zoo.kernels import deformable
from zoo.kernels.deformable import oracle, sampling


def inputs(grid, groups=2, kernel=3, batch=2, channels=8, kind=torch.float64):
    axes = len(grid)
    taps = kernel**axes
    value = torch.randn(batch, *grid, channels, dtype=kind)
    offsets = 2 * torch.randn(batch, *grid, groups, taps, axes, dtype=kind)
    return value, offsets, torch.randn(batch, *grid, groups, taps, dtype=kind)


def exact(value, offsets, weights, kernel, scale=1.0):
    value, offsets, weights = value.double(), offsets.double(), weights.double()
    return oracle(value, sampling(value, offsets, weights, kernel, 1, 1, "same", scale), weights)


@pytest.mark.parametrize("grid", [(13,), (1,), (5, 7), (1, 9)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_outputs_and_gradients_equal_the_oracle(grid, kernel, scale):
    given = [each.requires_grad_() for each in inputs(grid, kernel=kernel)]
    got, wanted = deformable(*given, kernel=kernel, scale=scale), exact(*given, kernel, scale)
    assert relative(got, wanted) < 1e-10
    weight = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), given),
        torch.autograd.grad((wanted * weight).sum(), given),
        strict=True,
    ):
        assert relative(one, other) < 1e-8


@pytest.mark.parametrize("grid", [(1500,), (56, 56)])
def test_half_precision_reads_the_right_places(grid):
    """On long grids too: places are kept in fp32 whatever the values are in."""
    value, offsets, weights = (each.bfloat16() for each in inputs(grid, batch=1))
    got = deformable(value, offsets, weights, kernel=3)
    assert got.dtype == torch.bfloat16
    assert relative(got.double(), exact(value, offsets, weights, 3)) < 2e-2


def test_offsets_far_outside_give_zeros_and_finite_gradients():
    value, offsets, weights = inputs((5, 7))
    offsets = (offsets + 1e4).requires_grad_()
    y = deformable(value, offsets, weights, kernel=3)
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert offsets.grad.isfinite().all()


def test_batch_mates_change_nothing():
    given = inputs((7, 6), batch=5, kind=torch.float32)
    whole = deformable(*given, kernel=3)
    for index in range(5):
        alone = deformable(*(each[index : index + 1] for each in given), kernel=3)
        assert relative(alone, whole[index : index + 1]) < 1e-6


@pytest.mark.parametrize(
    "change,words",
    [
        ({"kernel": 5}, "25"),
        ({"kernel": (3,)}, "kernel"),
        ({"padding": "valid"}, "padding"),
        ({"stride": 2}, "offsets"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        deformable(*inputs((5, 7)), **({"kernel": 3} | change))


def test_groups_must_divide_channels():
    value, offsets, weights = inputs((5, 7), groups=3, channels=8)
    with pytest.raises(ValueError, match="3 groups"):
        deformable(value, offsets, weights, kernel=3)
