"""From an image file to the tensor that a detector takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.inputs.base import check_integer
from zoo.inputs.fits import resized
from zoo.inputs.images import LARGEST, PixelPreprocess

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("stretch", "pad", "shortest")


class Prepared(NamedTuple):
    """An image prepared for a detector, and the height and width in pixels of the image that it was."""

    image: Tensor  # float32 [channels, height, width]
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BoxPreprocess(PixelPreprocess):
    """Preprocessing of an image for a detector; stored in a checkpoint's `config.json`.

    The whole image is resized and normalised. Boxes are relative to the image, so that they stay as they are.

    Args:
        fit: "stretch" resizes to `size` by `size` pixels. The others keep the aspect ratio, and leave padding to the
            batch: "pad" resizes so that the longest side is `size`, "shortest" so that the shortest side is `size`, or
            the longest `longest` if it would be longer (DETR). The other fields are those of `PixelPreprocess`.
        longest: most pixels of the longest side with "shortest".
    """

    size: int = 640  # pyright: ignore[reportIncompatibleVariableOverride]
    interpolation: str = "bilinear"
    fit: str = "stretch"
    longest: int = 1333

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("size", self.size, LARGEST)
        check_integer("longest", self.longest, LARGEST)
        self.check_name("fit", FITS)

    def cut(self, image: Image) -> Image:
        """The whole image, resized."""
        return resized(image, self.sides(image.height, image.width), self.interpolation, self.resizer)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of an image after `cut`."""
        if self.fit == "stretch":
            return self.size, self.size
        low, high = sorted((height, width))
        if self.fit == "shortest":  # rounded as in DETR
            exact = self.size if high / low * self.size <= self.longest else self.longest * low / high
            least, most = max(1, round(exact)), max(1, int(exact * high / low))
            return (least, most) if height < width else (most, least)
        return max(1, round(height * self.size / high)), max(1, round(width * self.size / high))

    def parts(self, raw: Any, /) -> Iterator[Prepared]:
        """The prepared image, with its original size."""
        image = self.read(raw)
        yield Prepared(self.normalized([self.cut(image)])[0], (image.height, image.width))


def on_canvas(images: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor | None]:
    """Images [channels, height, width], at least one, at the top left of a batch of zeros [B, channels, H, W], whose
    sides are the least multiples that hold all; and its mask [B, H, W], True on their pixels, None if all are."""
    sides = [-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2)]
    batch = images[0].new_zeros(len(images), images[0].shape[0], *sides)
    mask = torch.zeros(len(images), *sides, dtype=torch.bool)
    for row, image in enumerate(images):
        _, height, width = image.shape
        batch[row, :, :height, :width] = image
        mask[row, :height, :width] = True
    return batch, None if bool(mask.all()) else mask
