"""From an image file to the tensor that a model takes."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.inputs.base import Preprocess, check_integer, is_number
from zoo.inputs.fits import CORNERS, FITS, INTERPOLATIONS, RESIZERS, centred, middle, resized, sides_for
from zoo.inputs.folders import check_regular
from zoo.text import one_line, reason

if TYPE_CHECKING:
    from PIL.Image import Image


class UnreadableImage(ValueError):
    """A file that is not a complete image; the message has the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class PixelPreprocess(Preprocess):
    """What the preprocessings of images share: an image is read, cut to the model's size, and normalised.

    Args:
        size: side of the model's input in pixels, or its height and width.
        channels: 3 for RGB, 1 for grey.
        mean: mean to subtract, one value per channel, on the scale 0..1.
        std: standard deviation to divide by, one value per channel.
        interpolation: one of `INTERPOLATIONS`.
        resizer: `pil` resizes as Pillow does, `torch` as torchvision resizes tensors, with antialiasing (transformers'
            fast image processors); it has `nearest`, `bilinear` and `bicubic`.

    Raises:
        ValueError: a value is out of range, or `mean` or `std` does not have one value per channel.
    """

    shared = ("channels",)
    raw = "image"
    file = "image.jpg"

    size: int | tuple[int, int] = 224
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    resizer: str = "pil"

    def __post_init__(self) -> None:
        _mode(self.channels)
        self.check_size()
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(
                is_number(each) and abs(each) <= 1e6 for each in values
            ):
                raise ValueError(f"{name} must be a list of numbers within -1e6..1e6, got {one_line(values, 100)}")
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, but channels={self.channels} needs {self.channels}")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) < 1e-6:
            raise ValueError(f"std must be >= 1e-6, got {list(self.std)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
        self.check_name("resizer", RESIZERS)
        if self.interpolation not in (known := RESIZERS[self.resizer]):
            raise ValueError(f"resizer {self.resizer!r} has {', '.join(known)}, got {self.interpolation!r}")

    def check_name(self, field: str, allowed: Iterable[str]) -> None:
        """ValueError if a field is not one of these names."""
        if not isinstance(value := getattr(self, field), str) or value not in allowed:
            raise ValueError(f"unknown {field} {value!r}; allowed: {', '.join(allowed)}")

    def check_size(self) -> None:
        """ValueError if `size` is not allowed; two equal sides become one integer."""
        given: Any = self.size
        sides = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given,)
        for side in sides:
            check_integer("size", side, LARGEST)
        object.__setattr__(self, "size", sides[0] if len(set(sides)) == 1 else tuple(sides))

    @property
    def shape(self) -> tuple[int, int]:
        """The height and width of the model's input."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random image, uint8 [H, W, channels], larger than the model's input."""
        height, width = self.shape[0] * 3 // 2 + 7, self.shape[1] * 2 + 3
        shape = (height // 4 + 1, width // 4 + 1, self.channels)
        coarse = torch.randint(256, shape, generator=generator, device="cpu")
        fine = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
        return fine.to(torch.uint8).contiguous()

    def __call__(self, image: Image | Tensor | np.ndarray | str | os.PathLike[str], /) -> Tensor:
        """Turns one image into the model's input.

        Args:
            image: the path of a file; a PIL image of any mode that `convert_image` takes; or a tensor or NumPy array
                of type uint8, [H, W] or [H, W, C] with C of 1 (grey), 3 (RGB) or 4 (RGBA).

        Returns:
            float32 [channels, height, width], those of `cut`.

        Raises:
            ValueError: another type or shape, a mode that `convert_image` refuses, or an unreadable file.
        """
        return self.normalized([self.cut(self.read(image))])[0]

    def read(self, image: Image | Tensor | np.ndarray | str | os.PathLike[str], /) -> Image:
        """One image of any kind that the call takes as a PIL image of the model's mode, at its own size."""
        if isinstance(image, (str, os.PathLike)):
            return read_image(image, self.channels)
        return convert_image(_from_array(image), self.channels)

    def cut(self, image: Image) -> Image:
        """The image at the size that the model takes."""
        raise TypeError(f"{type(self).__name__} has no cut")

    def normalized(self, images: Sequence[Image]) -> Tensor:
        """PIL images of one size, in the mode that the model takes, as a batch: float32 [B, channels, height, width].
        Without images, they are those of the model's input."""
        return self.scaled(self.stacked(images))

    def stacked(self, images: Sequence[Image]) -> Tensor:
        """PIL images of one size and mode as a batch uint8 [B, channels, height, width]."""
        width, height = images[0].size if images else self.shape[::-1]
        values = torch.empty((0, height, width, self.channels), dtype=torch.uint8, device="cpu")
        if images:
            values = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return values.reshape(len(images), height, width, -1 if images else self.channels).permute(0, 3, 1, 2)

    def scaled(self, values: Tensor) -> Tensor:
        """Values uint8 [..., channels, H, W] on the scale 0..1, without the mean, divided by the deviation: float32."""
        scaled = values.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = (
            torch.tensor(each, dtype=torch.float32, device="cpu")[:, None, None].to(values.device, non_blocking=True)
            for each in (self.mean, self.std)
        )
        return scaled.sub_(mean).div_(std)


@dataclass(frozen=True, kw_only=True)
class ImagePreprocess(PixelPreprocess):
    """Preprocessing of an image for a model; stored in a checkpoint's `config.json`.

    The defaults are timm's evaluation transform. Values are scaled to 0..1 and normalised with `mean` and `std`.

    Args:
        crop: share of the resized image that is kept along each side, in (0, 1]: the image is resized to `size / crop`,
            rounded down, and its centre of `size` is cut out.
        fit: what happens to another aspect ratio. `crop` keeps it, so that the short side fits and the long side is cut
            (timm's "center"); of an image more than eight times as long as wide, the middle is cut out first. `squash`
            resizes each side by itself. `pad` keeps it, so that the long side fits, with a border of the mean on both
            sides (timm's "border"). `longest` does too, at the top left, and the rest is zeros after normalisation, the
            mean (transformers' max_height, max_width and pad); it takes no crop.
        corner: how half of an odd difference is rounded where the centre is cut out: `round`, to even (timm,
            torchvision), or `floor` (transformers).

    The others are those of `PixelPreprocess`.
    """

    crop: float = 0.875
    fit: str = "crop"
    corner: str = "round"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.crop) or not 0 < self.crop <= 1:
            raise ValueError(f"crop must be > 0 and <= 1, got {self.crop!r}")
        if max(self.shape) / self.crop > LARGEST:
            found = f"size={self.size}, crop={self.crop}"
            raise ValueError(f"size / crop must be <= {LARGEST} pixels, got {found}")
        self.check_name("fit", FITS)
        self.check_name("corner", CORNERS)
        if self.fit == "longest" and self.crop != 1:
            raise ValueError(f"fit 'longest' cuts nothing, so crop must be 1.0, got {self.crop}")

    def cut(self, image: Image) -> Image:
        """The part of an image that the model takes, resized: `shape` pixels, or less with fit `longest`."""
        scaled = (int(self.shape[0] / self.crop), int(self.shape[1] / self.crop))
        if self.fit == "crop":
            image = middle(image, scaled)
        wanted = sides_for((image.height, image.width), self.fit, scaled)
        image = resized(image, wanted, self.interpolation, self.resizer)
        if self.fit == "longest":
            return image
        return centred(image, self.shape, self.corner, self.border)

    @property
    def border(self) -> int | tuple[int, ...]:
        """The mean as a colour of PIL, that of what is beside an image."""
        fill = tuple(min(255, max(0, round(255 * value))) for value in self.mean)
        return fill if self.channels > 1 else fill[0]

    def normalized(self, images: Sequence[Image]) -> Tensor:
        if self.fit != "longest":
            return super().normalized(images)
        batch = torch.zeros(len(images), self.channels, *self.shape, dtype=torch.float32, device="cpu")
        for row, image in enumerate(images):
            batch[row, :, : image.height, : image.width] = super().normalized([image])[0]
        return batch


def default_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Default mean and standard deviation for normalisation.

    ImageNet's for 3 channels; their average over the channels for 1.
    """
    _mode(channels)
    if channels == 3:
        return ImagePreprocess.mean, ImagePreprocess.std
    return (0.449,), (0.226,)


def read_image(path: str | os.PathLike[str], channels: int = 3, content: bytes | None = None) -> Image:
    """Reads a complete image file (the first frame of an animation), rotated according to its EXIF.

    Args:
        path: a file in one of `FORMATS`.
        channels: 3 for an image of mode "RGB", 1 for one of mode "L".
        content: the bytes of the file, if they are in memory; `path` is then only its name in messages.

    Returns:
        A PIL image in memory, 8 bits per channel; the file is closed.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, broken, not an image, larger than Pillow's limit against
            decompression bombs, or the range of its values is unknown.
    """
    _mode(channels)
    name = os.fspath(path)
    try:
        if content is None:
            check_regular(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, which is not needed
            try:
                return _read(name if content is None else io.BytesIO(content), channels)
            except Exception:
                if (pixels := _pixels_of_png(name, content)) is None:
                    raise
            return _read(io.BytesIO(pixels), channels)
    except Exception as error:  # a broken file may raise anything: OSError, SyntaxError, struct.error
        raise UnreadableImage(f"{name}: {_why(name, error, content)}") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The height and width that `read_image` gives, from the file's header alone; UnreadableImage as there.

    Pillow may warn of broken metadata. A PNG whose EXIF follows its pixels is not turned.
    """
    from PIL import Image

    name = os.fspath(path)
    try:
        check_regular(name)
        with _opened(name) as image:
            width, height = image.size
            turned = False
            if image.format != "TIFF":  # Pillow turns its size by itself
                with suppress(Exception):  # of broken metadata
                    turned = Image.Image.getexif(image).get(ORIENTATION) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise UnreadableImage(f"{name}: {_why(name, error)}") from error


def _opened(file: str | io.BytesIO) -> Image:
    from PIL import Image, UnidentifiedImageError

    def known() -> list[str]:  # an explicit list keeps out formats that run programs, such as PostScript
        return [name for name in FORMATS if name in Image.OPEN]

    Image.preinit()  # the most frequent formats; to import all takes four times as long
    with suppress(UnidentifiedImageError):
        return Image.open(file, formats=known())
    Image.init()
    return Image.open(file, formats=known())


def _read(file: str | io.BytesIO, channels: int) -> Image:
    from PIL import ImageOps

    with _opened(file) as image:
        image.load()
        with suppress(Exception):  # of broken metadata: the pixels are complete
            image = ImageOps.exif_transpose(image)
        return convert_image(image, channels)


def _why(name: str, error: Exception, content: bytes | None = None) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        empty = (os.path.getsize(name) if content is None else len(content)) == 0
        return "the file is empty" if empty else f"not an image ({', '.join(FORMATS)})"
    return reason(error)


def _pixels_of_png(name: str, content: bytes | None) -> bytes | None:
    """A PNG file without the chunks that pixels do not need, which may be broken; None for other files."""
    try:
        with open(name, "rb") if content is None else io.BytesIO(content) as file:
            if file.read(8) != PNG:
                return None
            kept = [PNG]
            while len(head := file.read(8)) == 8:
                length = struct.unpack(">I", head[:4])[0]
                if head[4:] in PIXELS:
                    body = file.read(length + 4)
                    if head[4:] != b"tRNS" or body[-4:] == struct.pack(">I", zlib.crc32(head[4:] + body[:-4])):
                        kept += [head, body]
                else:
                    file.seek(length + 4, os.SEEK_CUR)
            return b"".join(kept)
    except OSError:
        return None


def convert_image(image: Image, channels: int) -> Image:
    """The image in mode "RGB" (`channels` 3) or "L" (1), 8 bits per channel.

    Transparent pixels are blended with white. 16-bit grey is scaled from 0..65535 to 0..255.

    Raises:
        ValueError: the values are floating-point or exceed 16 bits, so that their range is unknown.
    """
    mode = _mode(channels)
    if image.mode == "F":
        raise ValueError("the range of floating-point values is unknown")
    if image.mode.startswith("I"):
        image = _in_strips(image, "L", _to_8_bits)
    elif image.has_transparency_data:
        image = _in_strips(image, mode, lambda strip: _on_white(strip).convert(mode))
    return image.convert(mode)


def _in_strips(image: Image, mode: str, convert: Callable[[Image], Image]) -> Image:
    """The image converted a few rows at a time, so that no large copy is needed."""
    from PIL import Image as images

    width, height = image.size
    made, rows = images.new(mode, image.size), max(1, STRIP // max(1, width))
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        made.paste(convert(image.crop(box)), box)
    return made


def _on_white(image: Image) -> Image:
    from PIL import Image as images

    image = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", image.size, "white"), image)


def _to_8_bits(image: Image) -> Image:
    from PIL import Image as images

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit in 16 bits")
    grey = (values * 255 + 32767) // 65535
    grey[values == image.info.get("transparency", -1)] = 255
    return images.fromarray(grey.astype(np.uint8))


def _from_array(image: object) -> Image:
    """A PIL image unchanged, or one made from an array or tensor; ValueError for anything else."""
    from PIL import Image as images

    if isinstance(image, images.Image):
        return image
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ValueError(f"an image must be a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) and image.dtype != torch.bfloat16 else image
    shape = tuple(array.shape)
    if array.dtype != np.uint8 or len(shape) not in (2, 3) or len(shape) == 3 and shape[2] not in (1, 3, 4):
        hint = ""
        if array.dtype != np.uint8:
            hint = "; scale it to 0..255 and convert it, or skip preprocessing if it is already prepared"
        elif len(shape) == 3 and shape[0] in (1, 3, 4):
            hint = f"; move the channels last, with {'permute' if isinstance(image, Tensor) else 'transpose'}(1, 2, 0)"
        kind = str(array.dtype).removeprefix("torch.")
        raise ValueError(f"an image array must be uint8 [H, W] or [H, W, 1, 3 or 4], got {kind} {list(shape)}{hint}")
    if 0 in shape:
        raise ValueError(f"an image array must have pixels, got {list(shape)}")
    return images.fromarray(np.ascontiguousarray(array[..., 0] if shape[2:] == (1,) else array))


def _mode(channels: int) -> str:
    if not isinstance(channels, int) or isinstance(channels, bool) or channels not in MODES:
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey) for images, got {channels!r}")
    return MODES[channels]


MODES = {1: "L", 3: "RGB"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EXTENSIONS += (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".avif", ".avifs")
ORIENTATION = 0x0112  # EXIF's number of this entry
LARGEST = 8192  # pixels of the resized short side
STRIP = 2**20  # pixels converted at once
PNG = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
