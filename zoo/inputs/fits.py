"""How an image becomes one of the size that a model takes: each rule as timm, torchvision or transformers have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("crop", "squash", "pad", "longest")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
RESIZERS = {"pil": INTERPOLATIONS, "torch": ("nearest", "bilinear", "bicubic")}
CORNERS: dict[str, Callable[[float], int]] = {"round": round, "floor": int}
Sides = tuple[int, int]  # height and width


def resized(image: Image, sides: Sides, interpolation: str, resizer: str) -> Image:
    """The image at these sides; one that has them is not resampled."""
    from PIL import Image as images

    height, width = sides
    if (width, height) == image.size:
        return image
    if resizer == "pil":
        return image.resize((width, height), images.Resampling[interpolation.upper()])
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    way = InterpolationMode.NEAREST_EXACT if interpolation == "nearest" else InterpolationMode(interpolation)
    values = torch.from_numpy(np.array(image))
    values = values.permute(2, 0, 1).contiguous() if values.ndim == 3 else values[None]
    made = resize(values, [height, width], interpolation=way, antialias=True)
    array = made.permute(1, 2, 0).contiguous() if len(made) > 1 else made[0]
    return images.fromarray(array.numpy())


def sides_for(image: Sides, fit: str, scaled: Sides) -> Sides:
    """The sides of an image after it is resized for `scaled`, which a cut or padding follows."""
    if fit == "squash":
        return scaled
    if fit == "longest":
        share = min(scaled[0] / image[0], scaled[1] / image[1])
        return max(1, int(image[0] * share)), max(1, int(image[1] * share))
    if fit == "crop" and scaled[0] == scaled[1]:
        short = min(image)
        height, width = (scaled[0] if each == short else int(scaled[0] * each / short) for each in image)
        return height, width
    ratio = (min if fit == "crop" else max)(image[0] / scaled[0], image[1] / scaled[1])
    return max(1, round(image[0] / ratio)), max(1, round(image[1] / ratio))


def middle(image: Image, scaled: Sides) -> Image:
    """The middle of an image that is more than eight times longer than a cut to these sides needs."""
    width, height = image.size
    reach = 8 * -(-max(scaled) // min(scaled)) * min(width, height)
    most = (reach + width % 2, reach + height % 2)  # cut evenly on both sides
    if width <= most[0] and height <= most[1]:
        return image
    left, top = max(0, width - most[0]) // 2, max(0, height - most[1]) // 2
    return image.crop((left, top, width - left, height - top))


def centred(image: Image, sides: Sides, corner: str, fill: tuple[int, ...] | int) -> Image:
    """The centre of an image, with a border where the image is smaller."""
    from PIL import Image as images

    (width, height), (high, wide) = image.size, sides
    if wide > width or high > height:
        left, top = max(0, wide - width) // 2, max(0, high - height) // 2
        larger = images.new(image.mode, (max(wide, width), max(high, height)), fill)
        larger.paste(image, (left, top))
        image, (width, height) = larger, larger.size
    left, top = (CORNERS[corner](each / 2) for each in (width - wide, height - high))
    return image.crop((left, top, left + wide, top + high))
