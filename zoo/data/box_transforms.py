"""Augmentation of images together with the boxes of their objects."""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from zoo.inputs.boxes import BoxPreprocess

if TYPE_CHECKING:
    from PIL.Image import Image

VISIBLE = 0.25  # share of a box's area that must be in a mosaic
MIX = (0.45, 0.55)  # share of the first image in mixup


class Sample(NamedTuple):
    """An image and its objects."""

    image: np.ndarray  # uint8 [H, W, C]
    boxes: np.ndarray  # float32 [N, 4], (left, top, right, bottom) in pixels of this image
    labels: np.ndarray  # int64 [N]


class Made(NamedTuple):
    """A sample at the model's size."""

    image: Tensor  # uint8 [C, H, W]
    boxes: Tensor  # float32 [N, 4], (centre x, centre y, width, height) in 0..1
    labels: Tensor  # int64 [N]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Probabilities of each augmentation. Those in `STRONG` are off in a plain epoch.

    Args:
        flip: of mirroring left and right; and, if `turn` is set, of mirroring up and down.
        turn: of a turn by 90, 180 or 270 degrees.
        photometric: of each change of brightness, contrast, saturation, hue and the order of channels.
        zoom: of placing the image on a canvas of up to four times its side.
        iou_crop: of a crop that keeps a part of some box (SSD, Liu et al. 2016, arXiv:1512.02325).
        mosaic: of four images in one (YOLOv4, Bochkovskiy et al. 2020, arXiv:2004.10934).
        mixup: of the mean of two images with the objects of both (Zhang et al. 2018, arXiv:1710.09412).
    """

    flip: float = 0.0
    turn: float = 0.0
    photometric: float = 0.0
    zoom: float = 0.0
    iou_crop: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0

    def plain(self) -> "Augmentation":
        """Only flips and turns."""
        return dataclasses.replace(self, **dict.fromkeys(STRONG, 0.0))


STRONG = ("photometric", "zoom", "iou_crop", "mosaic", "mixup")


def augmented(
    sample: Sample, others: Callable[[], Sample | None], options: Augmentation, preprocess: BoxPreprocess
) -> Made:
    """A random variant of a sample at the size of `preprocess`, drawn from the CPU generators of `random` and PyTorch.

    Args:
        sample: the image and its objects.
        others: gives a random other sample, or None if it is unreadable, for mosaic and mixup.
        options: what is done, and how often.
        preprocess: the size, fit and interpolation.
    """
    if random.random() < options.mosaic:
        sample = mosaic([sample, *(other for other in (others() for _ in range(3)) if other)], preprocess)
    made = _one(sample, options, preprocess)
    if random.random() < options.mixup and (other := others()) is not None:
        made = mixup(made, _one(other, options, preprocess), random.uniform(*MIX), fill_of(preprocess))
    return made


def resized(sample: Sample, preprocess: BoxPreprocess) -> Made:
    """A sample as in evaluation."""
    height, width = sample.image.shape[:2]
    image = np.array(preprocess.cut(_pil(sample.image)))
    boxes = torch.from_numpy(sample.boxes / np.array([width, height, width, height], dtype=np.float32))
    centres = torch.cat([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], 1) / 2
    tensor = torch.from_numpy(image.reshape(*image.shape[:2], -1).transpose(2, 0, 1))
    return Made(tensor, centres, torch.from_numpy(sample.labels))


def _one(sample: Sample, options: Augmentation, preprocess: BoxPreprocess) -> Made:
    made = resized(_cropped(sample, options, preprocess), preprocess)
    image, (x, y, width, height) = made.image, made.boxes.unbind(1)
    if random.random() < options.flip:
        image, x = image.flip(2), 1 - x
    if options.turn and random.random() < options.flip:
        image, y = image.flip(1), 1 - y
    if random.random() < options.turn:
        quarters = random.randint(1, 3)
        image = image.rot90(quarters, (1, 2))
        for _ in range(quarters):  # against the clock
            x, y, width, height = y, 1 - x, height, width
    if options.photometric:
        image = _photometric(options.photometric)(image)
    return Made(image, torch.stack([x, y, width, height], 1), made.labels)


def _cropped(sample: Sample, options: Augmentation, preprocess: BoxPreprocess) -> Sample:
    """Zoomed out and cropped, at the resolution of the sample."""
    zoom = random.random() < options.zoom
    crop = random.random() < options.iou_crop and len(sample.boxes) > 0  # torchvision cannot crop without objects
    if not zoom and not crop:
        return sample
    if zoom:  # what the canvas is larger by, the image can be smaller
        sample = shrunk(sample, preprocess.size, preprocess)
    image = tv_tensors.Image(torch.from_numpy(sample.image).permute(2, 0, 1))
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(sample.boxes), format="XYXY", canvas_size=sample.image.shape[:2])  # pyright: ignore[reportCallIssue]
    pair: Any = {"image": image, "boxes": boxes, "labels": torch.from_numpy(sample.labels)}
    zoom_out, iou_crop, sanitize = _geometry(fill_of(preprocess))
    for step in (*([zoom_out] * zoom), *([iou_crop] * crop), sanitize):
        pair = step(pair)
    return Sample(
        pair["image"].permute(1, 2, 0).numpy(), pair["boxes"].as_subclass(Tensor).numpy(), pair["labels"].numpy()
    )


class IoUCrop(v2.RandomIoUCrop):
    """torchvision's crop, with all trials of a round at once: the same distribution in a fraction of the time."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = next(each for each in flat_inputs if isinstance(each, tv_tensors.BoundingBoxes))
        height, width = boxes.canvas_size
        x0, y0, x1, y1 = boxes.as_subclass(Tensor).numpy().T
        x, y, areas = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * (y1 - y0)
        while (least := random.choice(self.options)) < 1:  # 1 stands for no crop
            drawn = torch.rand(self.trials, 4, 1, dtype=torch.float64).numpy()
            scale = self.min_scale + (self.max_scale - self.min_scale) * drawn[:, :2]
            wide, high = (width * scale[:, 0]).astype(int), (height * scale[:, 1]).astype(int)
            left, top = ((width - wide) * drawn[:, 2]).astype(int), ((height - high) * drawn[:, 3]).astype(int)
            right, bottom = left + wide, top + high
            inside = (left < x) & (x < right) & (top < y) & (y < bottom)
            across = np.minimum(right, x1) - np.maximum(left, x0)
            down = np.minimum(bottom, y1) - np.maximum(top, y0)
            common = across.clip(0) * down.clip(0)
            matching = inside & (common >= least * (areas + wide * high - common))
            upright = (self.min_aspect_ratio * high <= wide) & (wide <= self.max_aspect_ratio * high)
            fine = matching.any(1) & upright[:, 0]
            if fine.any():
                first = int(fine.argmax())
                place = {"top": top, "left": left, "height": high, "width": wide}
                found = {name: int(values[first, 0]) for name, values in place.items()}
                return found | {"is_within_crop_area": torch.from_numpy(inside[first])}
        return {}


@functools.cache
def _geometry(fill: tuple[int, ...]) -> tuple[Any, Any, Any]:
    return v2.RandomZoomOut(fill=list(fill), p=1.0), IoUCrop(), v2.SanitizeBoundingBoxes(min_size=1)


@functools.cache
def _photometric(probability: float) -> Any:
    return v2.RandomPhotometricDistort(p=probability)


def fill_of(preprocess: BoxPreprocess) -> tuple[int, ...]:
    """The 8-bit colour that normalisation maps to about 0."""
    return tuple(round(255 * min(1.0, max(0.0, value))) for value in preprocess.mean)


def mosaic(samples: Sequence[Sample], preprocess: BoxPreprocess) -> Sample:
    """Up to four images around a random point of a square canvas of twice the model's size.

    Each fills its quarter at its own aspect ratio, with the corner at the point kept; objects of which less than a
    quarter is left are omitted.
    """
    from PIL import Image

    side, method = 2 * preprocess.size, Image.Resampling[preprocess.interpolation.upper()]
    centre = [round(side * random.uniform(0.25, 0.75)) for _ in range(2)]
    canvas = np.empty((side, side, preprocess.channels), dtype=np.uint8)
    canvas[:] = fill_of(preprocess)
    boxes, labels = [], []
    for number, sample in enumerate(samples):
        right, below = number % 2 == 1, number >= 2
        left, wide = (centre[0], side - centre[0]) if right else (0, centre[0])
        top, high = (centre[1], side - centre[1]) if below else (0, centre[1])
        height, width = sample.image.shape[:2]
        scale = max(wide / width, high / height)
        start_x = 0.0 if right else max(0.0, width - wide / scale)
        start_y = 0.0 if below else max(0.0, height - high / scale)
        region = (start_x, start_y, min(width, start_x + wide / scale), min(height, start_y + high / scale))
        part = _pil(sample.image).resize((wide, high), method, box=region)
        canvas[top : top + high, left : left + wide] = np.asarray(part).reshape(high, wide, -1)
        moved = (sample.boxes - np.array([start_x, start_y] * 2)) * scale
        kept = moved.clip(0, [wide, high, wide, high])
        share = np.prod(kept[:, 2:] - kept[:, :2], axis=1) / np.prod(moved[:, 2:] - moved[:, :2], axis=1)
        visible = share >= VISIBLE
        boxes.append(kept[visible] + [left, top, left, top])
        labels.append(sample.labels[visible])
    return Sample(canvas, np.concatenate(boxes).astype(np.float32), np.concatenate(labels))


def mixup(one: Made, other: Made, share: float, fill: Sequence[int]) -> Made:
    """The weighted mean of two images, top left on a canvas that holds both, with the objects of both.

    Args:
        one: its weight is `share`.
        other: its weight is 1 - share.
        share: 0..1.
        fill: the colour where an image has no pixels.
    """
    height, width = (max(one.image.shape[axis], other.image.shape[axis]) for axis in (1, 2))
    canvases, boxes = [], []
    for made in (one, other):
        high, wide = made.image.shape[1:]
        canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
        canvas[:, :high, :wide] = made.image
        canvases.append(canvas.float())
        boxes.append(made.boxes * torch.tensor([wide / width, high / height] * 2))
    mean = torch.lerp(canvases[1], canvases[0], share)
    return Made(mean.round_().to(torch.uint8), torch.cat(boxes), torch.cat([one.labels, other.labels]))


def shrunk(sample: Sample, most: int, preprocess: BoxPreprocess) -> Sample:
    """The sample, with its longest side shrunk to `most` pixels if it is longer."""
    height, width = sample.image.shape[:2]
    if max(height, width) <= most:
        return sample
    small = dataclasses.replace(preprocess, size=most, fit="pad").cut(_pil(sample.image))
    scale = np.array([small.width / width, small.height / height] * 2, dtype=np.float32)
    return Sample(np.array(small).reshape(small.height, small.width, -1), sample.boxes * scale, sample.labels)


def _pil(image: np.ndarray) -> "Image":
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
