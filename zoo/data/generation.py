"""Images to train a generator on: as they are, but for flips, with values from -1 to 1."""

from dataclasses import replace

import torch
from torch import Tensor

from zoo.data.images import Images
from zoo.inputs import Preprocess
from zoo.inputs.images import ImagePreprocess


class WholeImages(Images):
    """Labelled images for a diffusion model: the largest centred square, resized; values from -1 to 1.

    Args:
        dataset: `digits`, `imagefolder` or `synthetic`, as for `zoo classify`.
        root: folder of an imagefolder.
        size: side of the images in pixels; null for that of the checkpoint, or 32.
        channels: 3 for RGB, 1 for grey; null for that of the checkpoint, or 3.
        batch: images in a batch, per device.
        workers: processes that read images; 0 reads in the main process; null for one per core if images are files.
        seed: seed of order and flips, together with epoch and index; null for that of seed_everything.
        fraction: share of the digits that is held out for validation and test.
        flip: probability of mirroring left and right.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos; null for that of the checkpoint, or bicubic.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        size: int | None = None,
        channels: int | None = None,
        batch: int = 64,
        workers: int | None = None,
        seed: int | None = None,
        fraction: float = 0.2,
        flip: float = 0.5,
        interpolation: str | None = None,
    ):
        super().__init__(
            dataset,
            root,
            size,
            channels,
            batch,
            workers,
            seed,
            fraction,
            randaugment=None,
            flip=flip,
            scale=(1.0, 1.0),
            erasing=0.0,
            crop=1.0,
            interpolation=interpolation,
        )

    def prepared(self, base: Preprocess | None) -> ImagePreprocess:
        found = super().prepared(base)
        half = (0.5,) * found.channels
        return replace(found, mean=half, std=half)

    def example(self) -> tuple[tuple[Tensor, ...], str]:
        (images,), named = super().example()
        return (images, torch.zeros(1)), named
