"""Image preprocessing in a graph: what Pillow and torchvision compute, to a level of 256."""

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.inputs.images import ImagePreprocess
from zoo.tasks.page.graph import drawn
from zoo.tasks.page.pixels import FILTERS, Pixels

SIZES = [(32, 32), (1, 1), (1, 50), (300, 17), (17, 300), (97, 64), (33, 31), (700, 2)]


def levels(sides: tuple[int, int], channels: int = 3, **options: Any) -> Tensor:
    """How far the two are, in levels of 256, for each value."""
    made = ImagePreprocess(channels=channels, mean=(0.449,) * channels, std=(0.226,) * channels, **options)
    pixels = drawn(*sides, torch.Generator().manual_seed(1))["pixels"]
    wanted = made(pixels[..., :3].contiguous())
    return (Pixels(made)(pixels)[0] - wanted).abs() * 0.226 * 255


@pytest.mark.parametrize("fit", ["crop", "pad", "longest"])
@pytest.mark.parametrize("size", [32, (24, 40), 64], ids=str)
def test_it_is_what_pillow_computes(fit: str, size: Any):
    crop = 1.0 if fit == "longest" else 0.9
    for interpolation in FILTERS:
        for sides in SIZES:
            for channels, corner in ((3, "round"), (1, "floor")):
                options = {"fit": fit, "size": size, "crop": crop, "corner": corner, "interpolation": interpolation}
                off = levels(sides, channels, **options)
                assert (off > 0.01).float().mean() < 0.05, (interpolation, sides)
                assert off.quantile(0.98) < 1.01, (interpolation, sides)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad", "longest"])
def test_an_image_of_the_right_size_is_exact(fit: str):
    for interpolation in FILTERS:
        off = levels((24, 40), fit=fit, size=(24, 40), crop=1.0, interpolation=interpolation)
        assert off.max() < 1e-3


def test_it_squashes_as_pillow_does_when_both_sides_shrink():
    assert levels((64, 97), fit="squash", size=32, crop=1.0).max() < 1.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_it_is_near_to_what_torchvision_computes(interpolation: str):
    for sides in ((97, 64), (33, 31), (20, 30)):
        assert levels(sides, resizer="torch", size=32, crop=0.9, interpolation=interpolation).max() < 1.01


def test_alpha_is_ignored():
    pixels = drawn(20, 30, torch.Generator().manual_seed(0))["pixels"]
    clear = torch.cat([pixels[..., :3], torch.zeros_like(pixels[..., 3:])], -1)
    made = Pixels(ImagePreprocess(size=16))
    assert torch.equal(made(pixels), made(clear))
