"""From an image file to the tensor that a model takes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.inputs.base import Preprocess
from zoo.text import reason

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class UnreadableImage(ValueError):
    """A file that holds no whole picture; the message names the file and says why."""


@dataclass(frozen=True, kw_only=True)
class ImagePreprocess(Preprocess):
    """What is done to a picture before a model sees it; stored in a checkpoint's `config.json`.

    The short side is resized to `size / crop` (rounded down), the centre of `size` by `size` pixels
    is cut out, values are scaled to 0..1 and normalised with `mean` and `std`.

    Args:
        size: side of the square that the model takes, in pixels.
        channels: 3 for RGB, 1 for grey.
        mean: what is subtracted, one value per channel, on the scale 0..1.
        std: what is divided by, one value per channel.
        interpolation: one of `INTERPOLATIONS`.
        crop: share of the resized short side that is kept, above 0 and at most 1.

    Raises:
        ValueError: a value is out of its range, or `mean` or `std` has not one value per channel.
    """

    shared = ("channels",)
    raw = "image"

    size: int = 224
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875

    def __post_init__(self) -> None:
        _mode(self.channels)
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"size must be a whole number of pixels above 0, not {self.size!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(map(_is_number, values)):
                raise ValueError(f"{name} must be a list of numbers, not {values!r}")
            if len(values) != self.channels:
                wanted = f"channels={self.channels} needs {self.channels}"
                raise ValueError(f"{name} has {len(values)} values, but {wanted}")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {list(self.std)}")
        if self.interpolation not in INTERPOLATIONS:
            allowed = ", ".join(INTERPOLATIONS)
            raise ValueError(f"unknown interpolation {self.interpolation!r}; allowed: {allowed}")
        if not _is_number(self.crop) or not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, not {self.crop!r}")

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random image, uint8 [H, W, channels], larger than the model takes."""
        height, width = self.size * 3 // 2 + 7, self.size * 2 + 3
        shape = (height // 4 + 1, width // 4 + 1, self.channels)
        coarse = torch.randint(256, shape, generator=generator, device="cpu")
        fine = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
        return fine.to(torch.uint8).contiguous()

    def __call__(self, picture: Picture | Tensor) -> Tensor:
        """Prepares one picture.

        Args:
            picture: a PIL picture of any mode that `convert_image` takes, or a uint8 tensor
                [H, W, C] with C of 1 (grey), 3 (RGB) or 4 (RGBA).

        Returns:
            float32 [channels, size, size].

        Raises:
            ValueError: a tensor of another type or shape, or a mode that `convert_image` refuses.
        """
        if isinstance(picture, Tensor):
            picture = _from_tensor(picture)
        return _evaluation_transform(self)(convert_image(picture, self.channels))


def default_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation to normalise with where none are given.

    ImageNet's for 3 channels; their average over the channels for 1.
    """
    _mode(channels)
    if channels == 3:
        return ImagePreprocess.mean, ImagePreprocess.std
    return (0.449,), (0.226,)


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Picture:
    """Reads the whole of a picture file (the first of an animation), turned as its EXIF says.

    Args:
        path: a file in one of `FORMATS`.
        channels: 3 for a picture of mode "RGB", 1 for one of mode "L".

    Returns:
        A PIL picture in memory, 8 bits per channel; the file is closed.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, broken, no picture, larger than
            Pillow's limit against decompression bombs, or its values have no known range.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    _mode(channels)
    Image.init()
    try:
        # An explicit list keeps out formats that run programs, such as PostScript.
        formats = [name for name in FORMATS if name in Image.OPEN]
        with Image.open(path, formats=formats) as picture:
            return convert_image(ImageOps.exif_transpose(picture), channels)
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        why = "the file is empty" if empty else f"not a picture ({', '.join(FORMATS)})"
        raise UnreadableImage(f"{os.fspath(path)}: {why}") from error
    except Exception as error:  # a broken file may raise anything: OSError, SyntaxError, struct.error
        raise UnreadableImage(f"{os.fspath(path)}: {reason(error)}") from error


def convert_image(picture: Picture, channels: int) -> Picture:
    """The picture in mode "RGB" (`channels` 3) or "L" (1), 8 bits per channel.

    What is transparent is laid on white. 16-bit grey is scaled from 0..65535 to 0..255.

    Raises:
        ValueError: the values are floating-point or exceed 16 bits, so that their range is unknown.
    """
    from PIL import Image

    mode = _mode(channels)
    if picture.mode == "F":
        raise ValueError("floating-point values have no known range")
    if picture.mode.startswith("I"):
        picture = _to_8_bits(picture)
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)


def _to_8_bits(picture: Picture) -> Picture:
    import numpy
    from PIL import Image

    values = numpy.asarray(picture).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit 16 bits")
    grey = (values * 255 + 32767) // 65535
    grey[values == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(numpy.uint8))


def _from_tensor(picture: Tensor) -> Picture:
    from PIL import Image

    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
        found = f"{str(picture.dtype).removeprefix('torch.')} {list(picture.shape)}"
        raise ValueError(f"a picture tensor must be uint8 [H, W, 1, 3 or 4], not {found}")
    array = picture.detach().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


@functools.lru_cache(maxsize=16)
def _evaluation_transform(preprocess: ImagePreprocess) -> Callable[[Picture], Tensor]:
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(
        preprocess.size,
        crop_pct=preprocess.crop,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    return transform


def _mode(channels: int) -> str:
    if isinstance(channels, bool) or channels not in MODES:
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey) for pictures, not {channels!r}")
    return MODES[channels]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


MODES = {1: "L", 3: "RGB"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
