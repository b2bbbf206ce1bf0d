"""Stems and reductions of images."""

import pytest
import torch

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
