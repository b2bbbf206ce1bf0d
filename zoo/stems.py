"""Stems: raw input to tokens, with the grid and the mask that follow."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import compiling, to_tokens


class Patches(nn.Module):
    """Cuts pictures [B, channels, H, W] into patches and maps each to a token (Dosovitskiy et al. 2021,
    arXiv:2010.11929).

    Sides that the patch does not divide are padded with zeros at the right and the bottom. A mask [B, H, W] marks real
    pixels: others are zeroed, and a patch is real where any of its pixels is.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.conv = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Tokens [B, N, dim], the grid (H', W') and the mask of the tokens [B, N] or None."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"the model takes pictures [B, {self.channels}, H, W], not {list(images.shape)}")
        if mask is not None and (mask.shape != images[:, 0].shape or mask.dtype != torch.bool):
            raise ValueError(f"the mask is boolean [B, H, W] as the pictures are, not {mask.dtype} {list(mask.shape)}")
        height, width = images.shape[2:]
        missing = (0, -width % self.patch, 0, -height % self.patch)
        if mask is not None:
            images = images.masked_fill(~mask[:, None], 0.0)
            real = F.max_pool2d(F.pad(mask[:, None].to(images.dtype), missing), self.patch)
            mask = real.flatten(1) > 0
        if compiling() or any(missing):  # a traced program takes any size
            images = F.pad(images, missing)
        maps = self.conv(images)
        # Under autocast the stream of tokens stays in the precision of the weights.
        return to_tokens(maps).to(self.conv.weight.dtype), (maps.shape[2], maps.shape[3]), mask
