"""Functions of tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import relative
from zoo.tensors import Unfilled, filtered, gelu, linear, relu, shapes_alone, shortfall, silu


@pytest.mark.parametrize(("form", "plain"), [(gelu, F.gelu), (relu, F.relu), (silu, F.silu)])
def test_activations_are_those_of_torch_and_in_place_only_where_gradients_are_off(form, plain):
    x = torch.randn(2, 5, 8, requires_grad=True)
    kept, wanted = x.detach().clone(), plain(x)
    assert torch.equal(form(x), wanted) and torch.equal(x, kept)
    with torch.no_grad():
        given = x.clone()
        got = form(given)
    assert torch.equal(got, wanted) and got.data_ptr() == given.data_ptr()
    traced = torch.compile(form, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(traced(x), wanted) and torch.equal(x, kept)


def test_the_tanh_form_of_gelu():
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(gelu(x.clone(), "tanh"), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("grid", [(12,), (3, 4)])
def test_a_filter_takes_part_of_wider_tokens(grid):
    wide = torch.randn(2, 12, 3 * 24, dtype=torch.float64)
    weight, bias = torch.randn(24, 1, *[3] * len(grid), dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    part = wide[:, :, 24:48]
    conv = F.conv1d if len(grid) == 1 else F.conv2d
    wanted = (
        conv(part.transpose(1, 2).unflatten(2, grid), weight, bias, padding=1, groups=24).flatten(2).transpose(1, 2)
    )
    assert relative(filtered(part, grid, weight, bias, 1), wanted) < 1e-14


def test_the_shortfall_completes_a_multiple():
    assert [shortfall(size, 4) for size in range(6)] == [0, 3, 2, 1, 0, 3]
    assert all(shortfall(size, divisor) == -size % divisor for size in range(30) for divisor in range(1, 9))


def test_unfilled_modules_have_zeros_for_random_values_and_take_no_random_numbers():
    state = torch.get_rng_state()
    with Unfilled():
        made = [linear(3, 4), nn.Conv2d(3, 4, 3), nn.Embedding(5, 2)]
        assert torch.full((2,), 3.0).clamp_(max=2.0).tolist() == [2.0, 2.0]
    assert all(not weight.any() and weight.requires_grad for each in made for weight in each.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with shapes_alone():
        assert linear(3, 4).weight.is_meta and torch.randn(2, device="cpu").isfinite().all()
    assert linear(3, 4).weight.any()
