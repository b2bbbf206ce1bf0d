"""Samples as 8-bit images, and grids of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_bytes(x: Tensor, preprocess: Any) -> Tensor:
    """uint8 [B, H, W, channels] from a model's samples [B, channels, H, W], the inverse of its preprocessing."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
    values = (x.float().cpu() * std + mean) * 255
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_image(values: Tensor) -> Image:
    """A PIL image from uint8 [H, W, 1 or 3]."""
    from PIL import Image as images

    array = values.numpy()
    return images.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def grid(values: Tensor, columns: int, least: int = 32) -> Image:
    """Images uint8 [B, H, W, channels] row by row, enlarged by a whole number until their sides have `least` pixels."""
    from torchvision.utils import make_grid

    channels, times = values.shape[3], max(1, -(-least // min(values.shape[1:3])))
    large = values.permute(0, 3, 1, 2).repeat_interleave(times, 2).repeat_interleave(times, 3)
    return to_image(make_grid(large, columns, pad_value=255)[:channels].permute(1, 2, 0))
