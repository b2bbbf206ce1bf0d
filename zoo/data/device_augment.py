"""Augmentation of a batch of uint8 images on a device; timm draws what is done to each image."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from zoo.data.image_transforms import MOVING, operations, training_steps
from zoo.data.sampling import hashed, kept_generators, reseed
from zoo.inputs.images import ImagePreprocess

if TYPE_CHECKING:
    from zoo.data.images import Pixels

Step = tuple[str, float]  # an operation and its strength
Fill = tuple[int, ...]


class Plan:
    """What is done to the images of a batch.

    Lightning and the loader do not look into a class of its own, so numbers stay as they are drawn.

    Args:
        steps: those of each image.
        boxes: the rectangle of each image that is erased, top, left, bottom and right; None for none.
        seed: of the noise in the rectangles.
    """

    def __init__(self, steps: list[list[Step]], boxes: list[tuple[int, ...] | None], seed: int):
        self.steps, self.boxes, self.seed = steps, boxes, seed


class DeviceAugment:
    """RandAugment, jitter, normalisation and erasing of uint8 batches, on the device that they are on.

    Operations, strengths and rectangles are drawn by timm, in the workers, from seed, epoch and index alone. Rectangles
    are those of `training_transform`; operations have its distribution, but are other draws. Results differ from
    Pillow's by rounding, at the borders of rotated, sheared and shifted images, and, with bicubic interpolation, near
    sharp edges, because PyTorch's kernel is another. The noise of erased rectangles is a function of the batch.

    Args:
        transforms: timm's RandAugment or AutoAugment, and torchvision's ColorJitter; the second part of
            `training_steps`.
        erasing: probability of erasing a random rectangle with noise.
        preprocess: normalises the images.
        seed: seed of all choices, with epoch and index.

    Raises:
        ValueError: timm's description has an operation that is not in `OPERATIONS`.
    """

    def __init__(self, transforms: Sequence[Any], erasing: float, preprocess: ImagePreprocess, seed: int):
        from timm.data.random_erasing import RandomErasing

        self.preprocess, self.seed = preprocess, seed
        self.mode = preprocess.interpolation if preprocess.interpolation in MOVING else "bicubic"
        self.fill: Fill = tuple(min(255, round(255 * mean)) for mean in preprocess.mean) * (3 // preprocess.channels)
        self.transforms = [self._planner(each) for each in transforms]
        self.erase: Any = RandomErasing(erasing, mode="const", device="cpu") if erasing else None

    def _planner(self, transform: Any) -> Callable[[list[Step]], Any]:
        from timm.data.auto_augment import AutoAugment, RandAugment

        if ranges := getattr(transform, "brightness", None):
            return functools.partial(_plan_jitter, ranges, transform.contrast, transform.saturation)
        if not isinstance(transform, (RandAugment, AutoAugment)):
            raise ValueError(f"{type(transform).__name__} is for single images; use data.augment=workers")
        for operation in operations(transform):
            name = next((name for name in OPERATIONS if operation.name.startswith(name)), None)
            if name is None:
                raise ValueError(f"{operation.name} is for single images; use data.augment=workers")
            operation.aug_fn = functools.partial(_note, name)
        return transform

    def __call__(self, pixels: "Pixels") -> Tensor:
        """The images of a step, float32 [B, channels, height, width], whatever autocast and the default dtype are."""
        with _full_precision(pixels.images.device):
            return self._finished(pixels)

    def _finished(self, pixels: "Pixels") -> Tensor:
        plan = pixels.plan
        images = self.augmented(pixels.images, plan.steps)
        if self.preprocess.channels == 1 and images.shape[1] == 3:
            images = _grey(images)
        batch = self.preprocess.scaled(images)
        if any(box is not None for box in plan.boxes):
            self.erased(batch, plan.boxes, torch.Generator(batch.device).manual_seed(plan.seed))
        return batch

    def plan(self, keys: Sequence[tuple[int, int]], sides: tuple[int, int]) -> Plan:
        """What is done to the images of these epochs and indices, of this height and width."""
        plans, boxes = [], []
        with _full_precision(torch.device("cpu")), kept_generators():
            for epoch, index in keys:
                reseed(self.seed, epoch, index, 2)
                plans.append([])
                for transform in self.transforms:
                    transform(plans[-1])
                box = _Box(*sides)
                if self.erase:
                    reseed(self.seed, epoch, index, 1)  # as on single images
                    self.erase(box)
                boxes.append(box.found)
        return Plan(plans, boxes, hashed(self.seed, *(number for key in keys for number in key)))

    def augmented(self, images: Tensor, plans: Sequence[Sequence[Step]]) -> Tensor:
        """Images uint8 [B, 3, height, width] after their steps: the first step of all images, then the second, ..."""
        groups: list[tuple[str, list[float]]] = []  # of images that have the same operation next: rows, then strengths
        for turn in range(max(map(len, plans), default=0)):
            found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
            for row, steps in enumerate(plans):
                if turn < len(steps):
                    name, strength = steps[turn]
                    found[name][0].append(row)
                    found[name][1].append(strength)
            groups += [(name, rows + strengths) for name, (rows, strengths) in found.items()]
        if not groups:
            return images
        images = images.clone()
        numbers = _sent([number for _, group in groups for number in group], images.device)
        for (name, _), values in zip(groups, numbers.split([len(group) for _, group in groups]), strict=True):
            rows, strengths = values.chunk(2)
            rows = rows.long()
            images[rows] = OPERATIONS[name](images[rows], strengths[:, None, None, None], self.fill, self.mode)
        return images

    @staticmethod
    def erased(batch: Tensor, boxes: Sequence[tuple[int, ...] | None], generator: torch.Generator) -> None:
        """Puts noise into the rectangles of images [B, channels, height, width], in place."""
        places = _sent([side for box in boxes for side in box or (0, 0, 0, 0)], batch.device).view(-1, 4, 1, 1)
        top, left, bottom, right = places.unbind(1)
        y, x = (torch.arange(side, device=batch.device) for side in batch.shape[2:])
        inside = (top <= y[:, None]) & (y[:, None] < bottom) & (left <= x) & (x < right)
        noise = torch.randn(batch.shape, generator=generator, device=batch.device)
        batch.copy_(torch.where(inside[:, None], noise, batch))


def device_transform(data: Any) -> tuple[Callable[[Any], Any], DeviceAugment]:
    """What a worker does with a PIL image of `Images`, and what the device does afterwards."""
    from torchvision.transforms import Compose, Grayscale

    first, later = training_steps(data)
    grey = [Grayscale(3)] if data.preprocess.channels == 1 and later else []  # timm's operations are for RGB
    return Compose([*first, *grey]), DeviceAugment(later, data.erasing, data.preprocess, data.seed)


class _Box:
    """Stands for an image that timm's RandomErasing writes zeros into; keeps the place."""

    def __init__(self, height: int, width: int) -> None:
        self.sides, self.dtype, self.found = (height, width), torch.float32, None

    def size(self) -> tuple[int, int, int]:
        return 3, *self.sides

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        rows, columns = place[1:]
        self.found = (rows.start, columns.start, rows.stop, columns.stop)


def _note(name: str, steps: list[Step], *strength: float, **_: Any) -> list[Step]:
    """Stands for timm's function of an image: notes the operation."""
    steps.append((name, float(strength[0]) if strength else 0.0))
    return steps


def _plan_jitter(*arguments: Any) -> None:
    """The steps of torchvision's ColorJitter without hue."""
    from torchvision.transforms import ColorJitter

    brightness, contrast, saturation, steps = arguments
    order, *strengths = ColorJitter.get_params(brightness, contrast, saturation, None)
    for index in order.tolist():
        if index < 3:  # the fourth is the hue
            steps.append((("Brightness", "Contrast", "Color")[index], float(strengths[index])))


def _sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as float32 on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device, non_blocking=True)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def _grey(images: Tensor) -> Tensor:
    """Luma of images uint8 [n, 3, H, W], uint8 [n, 1, H, W], rounded as by Pillow."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[:, None].to(torch.uint8)


def _blended(other: Tensor, images: Tensor, share: Tensor) -> Tensor:
    """other + share * (images - other), beyond both for a share above 1, as Pillow's Image.blend."""
    return (other + share * (images - other.float())).clamp(0, 255).to(torch.uint8)


def _color(images: Tensor, share: Tensor, *_: Any) -> Tensor:
    return _blended(_grey(images), images, share)


def _contrast(images: Tensor, share: Tensor, *_: Any) -> Tensor:
    mean = _grey(images).float().mean((1, 2, 3), keepdim=True)
    return _blended((mean + 0.5).floor(), images, share)


def _brightness(images: Tensor, share: Tensor, *_: Any) -> Tensor:
    return _blended(torch.zeros_like(images), images, share)


def _sharpness(images: Tensor, share: Tensor, *_: Any) -> Tensor:
    return _blended(vision.adjust_sharpness(images, 0.0), images, share)


def _posterize(images: Tensor, bits: Tensor, *_: Any) -> Tensor:
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor, *_: Any) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: Tensor, more: Tensor, *_: Any) -> Tensor:
    return torch.where(images < 128, (images + more).clamp(max=255).to(torch.uint8), images)


def _moved(images: Tensor, rows: Sequence[Any], fill: Fill, mode: str) -> Tensor:
    """An affine map of images [n, C, H, W]: the output at (x, y) is the input at (a x + b y + c, d x + e y + f).

    Coordinates are in pixels, 0 being the left or upper edge. Each of the six numbers in `rows` is [n, 1, 1, 1] or a
    number. What is outside the input gets the values of `fill`.
    """
    height, width = images.shape[2:]
    one = images.new_ones((len(images), 1, 1, 1), dtype=torch.float32)
    a, b, c, d, e, f = (one * each for each in rows)
    # In grid_sample -1 and 1 are the edges.
    b, d = b * height / width, d * width / height
    first = torch.cat([a, b, a + b + 2 * c / width - 1], -1)
    second = torch.cat([d, e, d + e + 2 * f / height - 1], -1)
    grid = F.affine_grid(torch.cat([first, second], 2)[:, 0], list(images.shape), align_corners=False)
    found = F.grid_sample(images.float(), grid, mode, "border", align_corners=False).round_().clamp_(0, 255)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    border = torch.stack([torch.full_like(inside[0, 0], value, dtype=torch.float32) for value in fill])
    return torch.where(inside, found, border).to(torch.uint8)


def _rotate(images: Tensor, degrees: Tensor, fill: Fill, mode: str) -> Tensor:
    x, y = images.shape[3] / 2, images.shape[2] / 2
    angle = -degrees * math.pi / 180
    cosine, sine = angle.cos(), angle.sin()
    rows = (cosine, sine, x - x * cosine - y * sine, -sine, cosine, y + x * sine - y * cosine)
    return _moved(images, rows, fill, mode)


def _shear_x(images: Tensor, factor: Tensor, fill: Fill, mode: str) -> Tensor:
    return _moved(images, (1, factor, 0, 0, 1, 0), fill, mode)


def _shear_y(images: Tensor, factor: Tensor, fill: Fill, mode: str) -> Tensor:
    return _moved(images, (1, 0, 0, factor, 1, 0), fill, mode)


def _translate_x(images: Tensor, share: Tensor, fill: Fill, mode: str) -> Tensor:
    return _moved(images, (1, 0, share * images.shape[3], 0, 1, 0), fill, mode)


def _translate_y(images: Tensor, share: Tensor, fill: Fill, mode: str) -> Tensor:
    return _moved(images, (1, 0, 0, 0, 1, share * images.shape[2]), fill, mode)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Fill, str], Tensor]] = {
    "AutoContrast": lambda images, *_: vision.autocontrast(images),
    "Equalize": lambda images, *_: vision.equalize(images),
    "Invert": lambda images, *_: 255 - images,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "SolarizeAdd": _solarize_add,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
"""Operations by timm's names, of which `Increasing` and `Original` are left out: images uint8 [n, 3, H, W], strengths
[n, 1, 1, 1], the colour outside and the interpolation to images."""
