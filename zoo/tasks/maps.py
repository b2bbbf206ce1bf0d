"""What drawn maps share: an image as the model sees it, colours over it, and the attention weights of one input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.maps import maps

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 320  # least pixels along the longer side of a drawn map
FOR, AGAINST = (209, 73, 91), (47, 111, 181)  # colours


def seen(preprocess: Any, image: Image) -> Image:
    """The image as the model sees it: cut, and with fit `longest` also the border of the mean at the right and the
    bottom."""
    from PIL import Image as images

    part = preprocess.cut(image)
    if (sides := preprocess.shape[::-1]) == part.size:
        return part
    whole = images.new(part.mode, sides, preprocess.border)
    whole.paste(part)
    return whole


def enlarged(image: Image) -> Image:
    """The image in colour, every pixel a square, so that its longer side has at least `SIDE` pixels."""
    from PIL import Image as images

    scale = max(1, -(-SIDE // max(image.size)))
    return image.convert("RGB").resize((image.width * scale, image.height * scale), images.Resampling.NEAREST)


def drawn(values: Tensor, image: Image, covered: tuple[int, int] | None = None) -> Image:
    """A map [rows, columns] over the image that it belongs to, `enlarged`: red for positive values, blue for negative
    ones, grey for zero.

    `covered` is the height and width of the map in pixels of the image, from its top left; those of the image if None.
    """
    from PIL import Image as images

    large = enlarged(image)
    scale = large.width // image.width
    height, width = (scale * side for side in covered or (image.height, image.width))
    strength = values / values.abs().max().clamp(min=1e-6)
    fine = F.interpolate(strength[None, None], (height, width), mode="bicubic")[0, 0, : large.height, : large.width]
    fine = fine.clamp(strength.min(), strength.max())
    pixels = torch.frombuffer(bytearray(large.tobytes()), dtype=torch.uint8).view(large.height, large.width, 3)
    colour = torch.where(fine[..., None] > 0, torch.tensor(FOR), torch.tensor(AGAINST))
    grey = pixels.float().mean(-1, keepdim=True)
    share = 0.75 * fine.abs()[..., None]
    mixed = grey * (1 - share) + colour * share
    return images.fromarray(mixed.round().to(torch.uint8).numpy())


def weights_of(model: nn.Module, batch: Tensor, precision: str) -> dict[str, Tensor]:
    """`zoo.maps` of a batch, as float32 on the CPU. ValueError if no layer has explicit weights."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        found = maps(model, batch.to(device))
    return {name: weights.float().cpu() for name, weights in found.items()}


def check_weights(model: Any, name: str) -> None:
    """ValueError if no layer of a checkpoint's model has explicit attention weights; runs its probe."""
    try:
        maps(model, **model.config.probe_inputs(torch.Generator().manual_seed(0)))
    except ValueError as error:
        raise ValueError(f"--maps: cannot draw maps of {name}; its layers have no attention weights") from error
