"""Mixers by Fourier transforms, against transformers and against the sum that defines the transform."""

import cmath
import math

import pytest
import torch
from transformers import FNetConfig
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

from helpers import relative
from zoo.layer import Context, Place
from zoo.mixers import MIXERS
from zoo.spec import make


def transform(x, scale):
    """The real part of the transform of x [..., D] along every axis, a sum over all its elements for each of them."""
    result = torch.zeros_like(x)
    places = list(torch.cartesian_prod(*(torch.arange(size) for size in x.shape)))
    for place in places:
        total = 0.0
        for other in places:
            turns = sum(int(a) * int(b) / size for a, b, size in zip(place, other, x.shape, strict=True))
            total += x[tuple(other)].item() * cmath.exp(-2j * math.pi * turns).real
        result[tuple(place)] = total
    return result / math.sqrt(x.numel()) if scale else result


def test_along_time_it_is_that_of_transformers():
    config = FNetConfig(hidden_size=24, max_position_embeddings=20, use_tpu_fourier_optimizations=False)
    x = torch.randn(2, 20, 24, dtype=torch.double)
    wanted = FNetBasicFourierTransform(config)(x)[0]
    assert relative(make(MIXERS, "fnet(scale=False)", 24, 2, Place(1))(x, Context((20,))), wanted) < 1e-12


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(("grid", "extents"), [((5,), [(5,), (3,), (1,)]), ((3, 4), [(3, 4), (2, 3), (1, 1)])])
def test_each_sample_is_transformed_at_its_own_size(grid, extents, scale):
    layer = make(MIXERS, f"fnet(scale={scale})", 4, 2, Place(len(grid)))
    x, mask = torch.randn(len(extents), *grid, 4, dtype=torch.double), torch.zeros(len(extents), *grid).bool()
    wanted = torch.zeros_like(x)
    for sample, extent in enumerate(extents):
        inside = (sample, *(slice(size) for size in extent))
        mask[inside] = True
        wanted[inside] = transform(x[inside], scale)
    got = layer(x.flatten(1, -2), Context(grid, mask=mask.flatten(1))).view_as(x)
    assert relative(got[mask], wanted[mask]) < 1e-12
    whole = layer(x[:1].flatten(1, -2), Context(grid)).view_as(x[:1])
    assert relative(whole, wanted[:1]) < 1e-12


def test_a_long_clip_keeps_single_precision():
    """Angles are taken modulo the length, so they do not lose digits at large places."""
    layer, x = make(MIXERS, "fnet", 8, 2, Place(1)), torch.randn(1, 3001, 8)
    mask = torch.ones(1, 3001, dtype=torch.bool)
    assert relative(layer(x, Context((3001,), mask=mask)).double(), layer(x.double(), Context((3001,)))) < 1e-5
