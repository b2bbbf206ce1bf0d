"""Samples as 8-bit images, and grids of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.inputs import Preprocess
from zoo.inputs.latents import Autoencoder, LatentPreprocess, is_installed

if TYPE_CHECKING:
    from PIL.Image import Image


def decoder_for(preprocess: Preprocess, name: str | None = None) -> Autoencoder | None:
    """What decodes a model's samples: the autoencoder `name`, by default the one that its preprocessing names. None for
    a model of pixels.

    ValueError if it cannot be loaded, its latents are others, or a model of pixels is given a name.
    """
    if not isinstance(preprocess, LatentPreprocess):
        if name is not None:
            raise ValueError("--decoder: this model gives pixels, which need no decoder")
        return None
    try:
        found = Autoencoder(name or preprocess.decoder)
    except ValueError as error:
        hint = "; `zoo generate sample` takes another one with --decoder" if name is None and is_installed() else ""
        raise ValueError(f"{error}{hint}") from error
    for field, what in (("channels", "channels of latents"), ("factor", "pixels per side of a latent")):
        if (theirs := getattr(found, field)) != (ours := getattr(preprocess, field)):
            raise ValueError(f"decoder {found.name} has {theirs} {what}, but the model has {ours}")
    return found


def sides_of(size: tuple[int, int] | None, preprocess: Any) -> tuple[int, int]:
    """Height and width of a model's samples from those of images in pixels; ValueError if they are not multiples of a
    latent's."""
    if size is None or not isinstance(preprocess, LatentPreprocess):
        return size or (preprocess.size, preprocess.size)
    if any(side % preprocess.factor for side in size):
        raise ValueError(f"--size must be multiples of {preprocess.factor}, got {size[0]}x{size[1]}")
    return size[0] // preprocess.factor, size[1] // preprocess.factor


def to_bytes(x: Tensor, preprocess: Any, decoder: Autoencoder | None = None) -> Tensor:
    """uint8 [B, H, W, channels] from a model's samples [B, channels, H, W]: the inverse of its preprocessing, and the
    images that a decoder makes of latents."""
    if decoder is None:
        mean, std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
        values = x.float().cpu() * std + mean
    else:
        values = decoder.to(x.device).decode(preprocess.inverse(x.float())).cpu() / 2 + 0.5
    return (values * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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
