"""Samples as 8-bit images, and grids of them."""

from __future__ import annotations

import math
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
    number, height, width, channels = values.shape
    rows, times, gap = math.ceil(number / columns), max(1, -(-least // min(height, width))), 2
    large = values.repeat_interleave(times, 1).repeat_interleave(times, 2)
    step = (height * times + gap, width * times + gap)
    canvas = torch.full((rows * step[0] + gap, columns * step[1] + gap, channels), 255, dtype=torch.uint8)
    for index, each in enumerate(large):
        top, left = (gap + place * size for place, size in zip(divmod(index, columns), step, strict=True))
        canvas[top : top + height * times, left : left + width * times] = each
    return to_image(canvas)
