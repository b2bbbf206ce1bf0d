"""What training does to an image: timm's random crop, flip, RandAugment and jitter, and erasing."""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from zoo.inputs.fits import resized

if TYPE_CHECKING:
    from PIL.Image import Image

MOVING = ("nearest", "bilinear", "bicubic")  # interpolations for rotating, shearing and shifting; others become bicubic


def training_steps(data: Any) -> tuple[list[Any], list[Any]]:
    """timm's training transforms of `Images`: random crop and flip; and RandAugment and jitter.

    Each takes and returns a PIL image, the later ones an RGB image of the model's size.

    Raises:
        ValueError: timm cannot parse `randaugment`.
    """
    from timm.data.transforms_factory import transforms_imagenet_train

    wanted = data.preprocess
    repeat = 3 if wanted.channels == 1 else 1
    try:
        cut, augment, _ = cast(Any, transforms_imagenet_train)(
            wanted.shape,
            scale=data.scale,
            hflip=data.flip,
            auto_augment=data.randaugment,
            color_jitter=data.jitter or None,
            force_color_jitter=True,
            interpolation=wanted.interpolation,
            mean=wanted.mean * repeat,  # RandAugment fills with it
            std=wanted.std * repeat,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm cannot parse randaugment={data.randaugment!r}") from error
    for operation in itertools.chain(*map(operations, augment.transforms)):
        _repair(operation, wanted.interpolation)
    whole = data.scale == (1.0, 1.0)
    first = [Whole(wanted.shape, wanted.interpolation), *cut.transforms[1:]] if whole else cut.transforms
    return [*first], [*augment.transforms]


def training_transform(data: Any) -> tuple[Callable[["Image"], "Image"], Callable[[Tensor], Any] | None]:
    """All of `training_steps` on one image; and erasing, if enabled.

    Grey images are augmented as RGB, because timm's operations need RGB, and are grey again afterwards.

    Returns:
        From a PIL image to one of the model's size; and what erases a part of a normalised image [channels, height,
        width] in place.

    Raises:
        ValueError: timm cannot parse `randaugment`.
    """
    from timm.data.random_erasing import RandomErasing
    from torchvision.transforms import Compose, Grayscale

    first, later = training_steps(data)
    steps = [*first, *later]
    if data.preprocess.channels == 1:
        steps = [Grayscale(3), *steps, Grayscale(1)]
    erase = RandomErasing(data.erasing, mode="pixel", device="cpu") if data.erasing else None
    return Compose(steps), erase


class Whole:
    """Cuts the largest centred rectangle of the model's shape out of an image and resizes it to height and width.

    The result is that of a random crop of the whole area, at a fraction of the cost.
    """

    def __init__(self, sides: tuple[int, int], interpolation: str):
        self.sides, self.interpolation = sides, interpolation

    def __call__(self, image: "Image") -> "Image":
        (high, wide), (width, height) = self.sides, image.size
        share = min(width / wide, height / high)
        width, height = max(1, round(wide * share)), max(1, round(high * share))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return resized(image.crop((left, top, left + width, top + height)), self.sides, self.interpolation, "pil")


def operations(transform: Any) -> list[Any]:
    """timm's operations in its RandAugment or AutoAugment; none in other transforms."""
    return [*getattr(transform, "ops", ()), *itertools.chain(*getattr(transform, "policy", ()))]


def _repair(operation: Any, interpolation: str) -> None:
    """Changes what Pillow refuses of timm's operations: posterizing to 0 bits, which gave black before version 13, and
    interpolations that are for resizing alone."""
    if operation.name.startswith("Posterize"):
        operation.level_fn = functools.partial(_at_least_one_bit, operation.level_fn)
    if interpolation not in MOVING:
        from PIL.Image import Resampling

        operation.kwargs["resample"] = Resampling.BICUBIC


def _at_least_one_bit(bits: Callable[[float, dict], tuple[int]], magnitude: float, hparams: dict) -> tuple[int]:
    return (max(1, *bits(magnitude, hparams)),)
