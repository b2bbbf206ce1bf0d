"""Image preprocessing as part of a graph: from pixels of any size to a model's input, by Pillow's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.inputs.images import ImagePreprocess

GREYS = (19595, 38470, 7471)  # Pillow's weights of red, green and blue in a grey value, in 65536ths


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _sinc(x: Tensor) -> Tensor:
    turned = math.pi * x
    return torch.where(x == 0, torch.ones_like(x), turned.sin() / torch.where(x == 0, torch.ones_like(x), turned))


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, _sinc(x) * (0.54 + 0.46 * (math.pi * x).cos()), torch.zeros_like(x))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, _sinc(x) * _sinc(x / 3), torch.zeros_like(x))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": _triangle,
    "bicubic": _cubic,
    "box": _box,
    "hamming": _hamming,
    "lanczos": _lanczos,
}
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "box": 0.5, "hamming": 1.0, "lanczos": 3.0}  # where a filter is not 0


class Pixels(nn.Module):
    """What an `ImagePreprocess` computes, on an image of any size, in operations that ONNX has.

    Resizing is a product with a matrix for each side, whose weights are computed from the image's size, and rounds to
    integers between the two as Pillow does. The cut and the border are part of these matrices, so that the result has a
    fixed size.
    """

    fill: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: ImagePreprocess):
        super().__init__()
        self.preprocess = preprocess
        fill = [min(255, max(0, round(255 * value))) for value in preprocess.mean]
        for name, values in (("fill", fill), ("mean", preprocess.mean), ("std", preprocess.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 4], red, green, blue and an alpha that is ignored, to float32 [1, channels, height, width]."""
        made = self.preprocess
        colours = pixels[..., :3]
        if made.channels == 1:
            red, green, blue = (colours[..., index].to(torch.int32) * share for index, share in enumerate(GREYS))
            values = torch.div(red + green + blue + 32768, 65536, rounding_mode="floor")[None].to(torch.float32)
        else:
            values = colours.permute(2, 0, 1).to(torch.float32)
        rows, columns = (torch.arange(side, dtype=torch.float64, device="cpu") for side in pixels.shape[:2])
        sides = rows[-1] + 1, columns[-1] + 1
        (down, inside), (across, within) = (
            self.matrix(positions, axis, sides) for axis, positions in enumerate((rows, columns))
        )
        values = _rounded(values @ across.T)
        values = _rounded(down @ values)
        real = inside[:, None] & within
        border = self.mean * 255 if made.fit == "longest" else self.fill  # zero after normalisation
        return (((torch.where(real, values, border) / 255) - self.mean) / self.std)[None]

    def matrix(self, positions: Tensor, axis: int, sides: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The resampling of rows (axis 0) or columns (axis 1) as weights float32 [size, pixels], and which of the
        `size` are in the image."""
        made, size = self.preprocess, self.preprocess.shape[axis]
        scaled = int(made.shape[0] / made.crop), int(made.shape[1] / made.crop)
        start = torch.zeros_like(sides[axis])
        if made.fit == "crop":
            reach = 8 * -(-max(scaled) // min(scaled)) * torch.minimum(*sides)
            cuts = [((side - reach - side % 2) / 2).floor().clamp(min=0) for side in sides]
            sides = sides[0] - 2 * cuts[0], sides[1] - 2 * cuts[1]
            start = cuts[axis]
        side = sides[axis]
        wanted = self.resized(scaled, axis, sides)
        if made.fit == "longest":
            offset = torch.zeros_like(side)
        else:
            half = (wanted - size) / 2
            half = half.round() if made.corner == "round" else half.trunc()
            offset = torch.where(wanted >= size, half, -((size - wanted) / 2).floor())
        place = torch.arange(size, dtype=torch.float64, device="cpu") + offset
        real = (place >= 0) & (place < wanted)
        scale = side / wanted
        centre = (place[:, None] + 0.5) * scale
        stretch = scale.clamp(min=1)
        reach = SUPPORT[made.interpolation] * stretch
        positions = positions - start
        first, last = ((centre + each + 0.5).trunc() for each in (-reach, reach))
        inside = (positions >= 0) & (positions < side) & (positions >= first) & (positions < last)
        weights = FILTERS[made.interpolation]((positions - centre + 0.5) * (1 / stretch)) * inside
        total = weights.sum(1, keepdim=True)
        return (weights / torch.where(total == 0, torch.ones_like(total), total)).to(torch.float32), real

    def resized(self, scaled: tuple[int, int], axis: int, sides: tuple[Tensor, Tensor]) -> Tensor:
        """A side after resizing; see `zoo.inputs.fits.sides_for`."""
        fit, side = self.preprocess.fit, sides[axis]
        shares = sides[0] / scaled[0], sides[1] / scaled[1]
        if fit == "squash":
            return torch.full_like(side, scaled[axis])
        if fit == "longest":
            share = torch.minimum(scaled[0] / sides[0], scaled[1] / sides[1])
            return (side * share).floor().clamp(min=1)
        if fit == "crop" and scaled[0] == scaled[1]:
            return (scaled[0] * side / torch.minimum(*sides)).floor()
        ratio = torch.minimum(*shares) if fit == "crop" else torch.maximum(*shares)
        return (side / ratio).round().clamp(min=1)


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)
