"""Options and tensors that do not fit deformable aggregation are refused in one line."""

import pytest
import torch

from deformable_cases import GRIDS, inputs, several
from zoo.kernels import deformable


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": 5}, "25"),
        ({"kernel": (3,)}, "kernel"),
        ({"kernel": (3, 3, 3)}, "kernel"),
        ({"kernel": 0}, ">= 1"),
        ({"padding": "valid"}, "padding"),
        ({"padding": 1.5}, "padding"),
        ({"padding": 0}, "offsets"),
        ({"stride": 0}, "stride"),
        ({"stride": 2}, "offsets"),
        ({"dilation": 0}, "dilation"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        deformable(*inputs((5, 7)), **({"kernel": 3} | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda value, offsets, weights: (value[:1], offsets, weights),
        lambda value, offsets, weights: (value[:, :4], offsets, weights),
        lambda value, offsets, weights: (value, offsets[:, :, :6], weights[:, :, :6]),
        lambda value, offsets, weights: (value, offsets, weights[:, :, :6]),
        lambda value, offsets, weights: (value, offsets, weights[..., :8]),
        lambda value, offsets, weights: (value, offsets, weights[..., :1, :]),
        lambda value, offsets, weights: (value, offsets[..., :1], weights),
        lambda value, offsets, weights: (value, offsets.flatten(-2), weights),
        lambda value, offsets, weights: (value, offsets.flatten(1, 2), weights.flatten(1, 2)),
        lambda value, offsets, weights: (value, offsets[:, :, :, 0], weights[:, :, :, 0]),
        lambda value, offsets, weights: (value[:, None], offsets, weights),
        lambda value, offsets, weights: (value[..., 0], offsets, weights),
        lambda value, offsets, weights: (value, offsets[..., :0, :, :], weights[..., :0, :]),
        lambda value, offsets, weights: (value[..., :5], offsets, weights),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(change):
    given = inputs((5, 7))
    deformable(*given, kernel=3)
    with pytest.raises(ValueError, match="deformable|groups") as error:
        deformable(*change(*given), kernel=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda value, grids, places, weights: (value[:, 1:], grids, places, weights),
        lambda value, grids, places, weights: (value[:1], grids, places, weights),
        lambda value, grids, places, weights: (value[0], grids, places, weights),
        lambda value, grids, places, weights: (value[..., :3], grids, places, weights),
        lambda value, grids, places, weights: (value, grids[:1], places, weights),
        lambda value, grids, places, weights: (value[:, :12], grids[:1], places, weights),
        lambda value, grids, places, weights: (value[:, :0], (), places[:, :, :, :0], weights[:, :, :, :0]),
        lambda value, grids, places, weights: (value, grids, places, weights[:, :, :, :1]),
        lambda value, grids, places, weights: (value, grids, places[..., :1], weights),
        lambda value, grids, places, weights: (value, grids, places, weights[..., :2]),
        lambda value, grids, places, weights: (value, grids, places[:1], weights),
        lambda value, grids, places, weights: (value, grids, places[:1], weights[:1]),
        lambda value, grids, places, weights: (value, grids, places[0], weights[0]),
    ],
)
def test_maps_and_places_that_do_not_fit_are_refused_in_one_line(change):
    given = (torch.randn(2, 16, 4), GRIDS, torch.rand(2, 5, 2, 2, 3, 2), torch.randn(2, 5, 2, 2, 3))
    several(*given)
    with pytest.raises(ValueError, match="multiscale|fit|groups") as error:
        several(*change(*given))
    assert "\n" not in str(error.value)
