"""Deformable mixers against their formulas."""

import pytest
import torch

from formulas import DIM, HEADS, check, scattered, tokens
from zoo.kernels.deformable import gathered
from zoo.layer import Context, Place
from zoo.mixers import MIXERS


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("grid", [(5, 6), (13,)])
def test_learned_scales_multiply_taps_and_offsets(grid, kernel):
    """FlowDCN: the places are base + 6 sigmoid(scale) * (tap + offset), with a scale for each group."""
    axes = len(grid)
    ours = scattered(MIXERS["dcnv4"](DIM, HEADS, Place(axes), kernel=kernel, scales=6.0))
    context = Context(grid=grid)
    x = tokens(context)
    found = ours.sample(x).unflatten(-1, (HEADS, -1))
    taps = kernel**axes
    offsets, weights = found[..., : taps * axes].unflatten(-1, (taps, axes)), found[..., taps * axes :]
    steps = torch.arange(kernel, dtype=torch.float64) - (kernel - 1) // 2
    lattice = torch.cartesian_prod(*[steps] * axes).view(taps, axes)
    base = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64) for size in grid]).view(-1, 1, 1, axes)
    places = base + 6 * ours.scales.sigmoid()[:, None, None] * (lattice + offsets)
    wanted = ours.out(gathered(ours.value(x).unflatten(1, grid), places, weights))
    check(ours(x, context), wanted, (x, ours.scales))


def test_learned_scales_start_evenly_spread():
    start = 6 * MIXERS["dcnv4"](DIM, HEADS, scales=6.0).scales.sigmoid()
    assert torch.allclose(start, torch.tensor([0.75, 2.25, 3.75, 5.25]))
    with pytest.raises(ValueError, match="scales must be finite and >= 0"):
        MIXERS["dcnv4"](DIM, HEADS, scales=-1.0)
