"""Stems and reductions of images."""

import pytest
import torch
from torch import Tensor, nn

from helpers import longest_size
from zoo.layer import Context
from zoo.stems import REDUCTIONS, STEMS
from zoo.stems.images import Patches


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_lie_one_after_the_other(batch):
    """Whatever the images' memory format: residual branches are added to these tokens, and every sum would keep another
    layout, which each norm and linear then copies."""
    images = torch.randn(batch, 3, 30, 45)
    tokens = torch.randn(batch, 30 * 45, 3)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        assert Patches(3, 24, 4)(given)[0].is_contiguous()
        for row in STEMS.values():
            assert row(3, 24, "layernorm")(given)[0].is_contiguous()
    for row in REDUCTIONS.values():
        assert row(3, 24, "layernorm")(tokens, Context(grid=(30, 45)))[0].is_contiguous()


def test_images_of_integers_are_refused():
    for row in (Patches(3, 24, 4), *(row(3, 24, "layernorm") for row in STEMS.values())):
        with pytest.raises(ValueError, match="images must be floating point, got uint8; use the checkpoint's preproc"):
            row(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


class Chain(nn.Module):
    """A stem and three reductions: the grids of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = STEMS["conv"](3, 8, "layernorm")
        self.steps = nn.ModuleList(REDUCTIONS["conv"](8, 8, "layernorm") for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x, context = self.stem(images)
        for step in self.steps:
            x, context = step(x, context)
        return x


def test_sizes_of_a_compiled_pyramid_do_not_grow_with_its_stages():
    assert longest_size(Chain(), torch.randn(2, 3, 67, 90)) <= 15  # ((H - 1) // 32 + 1) * ((W - 1) // 32 + 1)
