"""Data to train a generator on: images as they are, but for flips, with values from -1 to 1; or latents of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.data.image_sources import SOURCES
from zoo.data.images import ImageDataset, Images
from zoo.data.latents import INDEX, LatentDataset, Latents, read_index
from zoo.data.shards import is_packed
from zoo.inputs import Preprocess
from zoo.inputs.latents import LatentPreprocess


def _latents(split: str, preprocess: Any, root: str | None, fraction: float) -> Latents:
    return Latents(root or "", split)


class WholeImages(Images):
    """Labelled images for a diffusion model: the largest centred square, resized; values from -1 to 1. Or latents of
    such images, normalised per channel; each epoch draws new ones, and validation takes their means.

    Args:
        dataset: `digits`, `fashion_mnist`, `imagefolder`, `shards` or `synthetic`, as for `zoo classify`; or `latents`,
            a folder that `zoo generate encode` wrote.
        root: folder of an imagefolder, of Fashion-MNIST or of latents; that of shards, or their address.
        size: side of the images in pixels; null for that of the checkpoint, or 32. Latents have their own.
        channels: 3 for RGB, 1 for grey; null for that of the checkpoint, or 3. Latents have their own.
        batch: images in a batch, per device.
        workers: processes that read images; 0 reads in the main process; null for one per core if images are files.
        seed: seed of order, flips and draws, together with epoch and index; null for that of seed_everything.
        fraction: share of the digits that is held out for validation and test.
        flip: probability of mirroring left and right.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos; null for that of the checkpoint, or bicubic.
        changed: `ok` to resume a run on other data than it was started on; `refuse` otherwise.
    """

    sources = {**SOURCES, "latents": _latents}
    folders = (*Images.folders, "latents")

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
        changed: Literal["refuse", "ok"] = "refuse",
    ):
        given = {"size": size, "channels": channels, "interpolation": interpolation}
        if dataset == "latents" and (wrong := [name for name, value in given.items() if value is not None]):
            raise ValueError(f"dataset 'latents' takes no {wrong[0]}; it is set by `zoo generate encode`")
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
            crop=None if dataset == "latents" else 1.0,
            interpolation=interpolation,
            changed=changed,
        )

    @classmethod
    def measuring(  # pyright: ignore[reportIncompatibleMethodOverride] (it takes no options of classes)
        cls, known: Any, *, root: str | None = None, split: str = "val", batch: int = 64, workers: int | None = None
    ) -> dict[str, Any]:
        """The data to evaluate a checkpoint on, by split: a folder in ImageNet's layout, shards, latents, or digits."""
        kind = "digits"
        if root is not None:
            kind = "shards" if is_packed(root) else "latents" if Path(root, INDEX).is_file() else "imagefolder"
        return {split: cls(dataset=kind, root=root, batch=batch, workers=workers)}

    def prepared(self, base: Preprocess | None) -> Preprocess:
        if self.dataset == "latents":
            return self._of_latents(base)
        found: Any = super().prepared(base)
        if not isinstance(found.size, int):
            raise ValueError(f"generation needs square images, got size {found.size[0]} x {found.size[1]}")
        if base is not None:
            return found
        half = (0.5,) * found.channels
        return replace(found, mean=half, std=half)

    def _of_latents(self, base: Preprocess | None) -> LatentPreprocess:
        """That of the folder, with the statistics of the checkpoint if there is one."""
        own = read_index(self.root or "").preprocess()
        if base is None:
            return own
        if not isinstance(base, LatentPreprocess):
            raise ValueError("the checkpoint takes images, and dataset 'latents' gives latents")
        if base.channels != own.channels:
            raise ValueError(
                f"the checkpoint takes latents of {base.channels} channels, {self.root} has {own.channels}"
            )
        return replace(own, mean=base.mean, std=base.std)

    def items(self, split: str) -> Any:
        if split != "train":
            return self.plain(split)
        if self.dataset == "latents":
            return LatentDataset(self.source(split), self.preprocess, self.flip, self.seed)
        return super().items(split)

    def plain(self, split: str) -> Any:
        """The data set of a split without flips or draws, that of `train` too."""
        source, preprocess = self.source(split), self.preprocess
        if isinstance(preprocess, LatentPreprocess):
            return LatentDataset(source, preprocess)
        return ImageDataset(source, preprocess.cut, preprocess)

    def example(self) -> tuple[tuple[Tensor, ...], str]:
        (images,), named = super().example()
        return (images, torch.zeros(1)), named
