"""Images with one class each: embedded digits, folders in ImageNet's layout, generated ones."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.image_sources import SOURCES, Source
from zoo.data.image_transforms import training_transform
from zoo.data.loading import DataModule, check_numbers, make_loader
from zoo.data.sampling import EpochSampler, EvenBatches, WholeBatches, global_seed, kept_generators, reseed
from zoo.inputs import Preprocess
from zoo.inputs.images import ImagePreprocess, UnreadableImage, default_statistics

if TYPE_CHECKING:
    from PIL.Image import Image

    from zoo.data.device_augment import DeviceAugment, Plan


class Batch(NamedTuple):
    """Images of one step.

    `images` is float32 [B, channels, height, width], `labels` int64 [B]. `skipped` holds the paths of
    images that could not be read; they are missing from the other two, and if every image
    of a batch is unreadable, B is 0.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...]


class Pixels(NamedTuple):
    """Images of one training step before `DeviceAugment`.

    `images` is uint8 [B, channels, height, width], `labels` int64 [B]. `plan` is what is to be done to the images.
    `skipped` as in `Batch`.
    """

    images: Tensor
    labels: Tensor
    plan: "Plan"
    skipped: tuple[str, ...]


class ImageDataset(Dataset[Batch]):
    """A source's images, transformed; a key is (epoch, index), and several keys make a batch.

    With a seed the transform is random, as a function of seed, epoch and index alone.

    Args:
        source: the images.
        transform: from a PIL image to one of the size and mode that the model takes.
        preprocess: normalises the transformed images.
        erase: changes each image [channels, height, width] of a batch at the end, in place; None for no change.
        seed: seed of random transforms; None if there are none.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[["Image"], "Image"],
        preprocess: ImagePreprocess,
        erase: Callable[[Tensor], Any] | None = None,
        seed: int | None = None,
    ):
        self.source, self.transform, self.preprocess = source, transform, preprocess
        self.erase, self.seed = erase, seed

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        images, read, skipped = self.cut(keys)
        batch = self.preprocess.normalized(images)
        if self.erase is not None:
            with kept_generators():
                for image, (epoch, index) in zip(batch, read, strict=True):
                    reseed(self.seed or 0, epoch, index, 1)
                    self.erase(image)
        return Batch(batch, self.labels(read), skipped)

    def cut(self, keys: list[tuple[int, int]]) -> tuple[list["Image"], tuple[tuple[int, int], ...], tuple[str, ...]]:
        """The transformed images, their keys, and the paths of images that could not be read."""
        images, read, skipped = [], [], []
        with contextlib.nullcontext() if self.seed is None else kept_generators():
            for epoch, index in keys:
                try:
                    image = self.source.image(index)
                except UnreadableImage:
                    skipped.append(self.source.name(index))
                    continue
                if self.seed is not None:
                    reseed(self.seed, epoch, index)
                images.append(self.transform(image))
                read.append((epoch, index))
        return images, tuple(read), tuple(skipped)

    def labels(self, keys: Iterable[tuple[int, int]]) -> Tensor:
        """The labels of images, int64 [B]."""
        return torch.tensor([int(self.source.labels[index]) for _, index in keys], dtype=torch.int64)


class PixelDataset(ImageDataset):
    """A source's images, cut and not normalised, with a plan for `finish`; several keys make `Pixels`."""

    def __init__(self, source: Source, transform: Callable[["Image"], "Image"], finish: "DeviceAugment"):
        super().__init__(source, transform, finish.preprocess, seed=finish.seed)
        self.finish = finish

    def __getitems__(self, keys: list[tuple[int, int]]) -> Pixels:
        cut, read, skipped = self.cut(keys)
        images = self.preprocess.stacked(cut)
        plan = self.finish.plan(read, (images.shape[2], images.shape[3]))
        return Pixels(images, self.labels(read), plan, skipped)


def as_it_is(batch: Batch) -> Batch:
    """Returns the batch that `ImageDataset` has made; nothing is left to collate."""
    return batch


class Images(DataModule):
    """Labelled images for training, validation and test, in batches of type `Batch`.

    Images that cannot be read are omitted from their batch and listed in it. The Trainer must run
    with `use_distributed_sampler=False`: the samplers split the set over ranks by themselves.

    Args:
        dataset: `digits` (scikit-learn's 1797 handwritten digits; validation and test are the same
            stratified, fixed part), `fashion_mnist` (its four files; the last 5,000 training images are for
            validation), `imagefolder` (ImageNet's layout: `root/train/<class>/*`, `root/val/<class>/*` and, if there
            is one, `root/test/<class>/*`), `shards` (an imagefolder that `zoo shard` has packed), or `synthetic`
            (generated gratings of four directions).
        root: folder of an imagefolder, of Fashion-MNIST or of shards, whose address may be given: http, https, or
            `pipe:` and a command that ends in a folder, as in `pipe:ssh host cat /data`.
        size: side of the images that the model takes in pixels, or height and width; null for that of the checkpoint,
            or 32.
        channels: 3 for RGB, 1 for grey; null for that of the checkpoint, or 3.
        batch: images in a batch, per device.
        workers: processes that read images; 0 reads in the main process; null for one per core if images are files.
        seed: seed of order and augmentation, together with epoch and index; null for that of seed_everything.
        fraction: share of the digits that is held out for validation and test.
        randaugment: timm's description of RandAugment or AutoAugment; null for none.
        flip: probability of mirroring left and right.
        scale: smallest and largest share of the area that a random crop keeps; 1.0 and 1.0 cut out
            the largest centred square.
        jitter: strength of random brightness, contrast and saturation, after randaugment.
        erasing: probability of erasing a random rectangle with noise.
        crop: share of the resized short side that evaluation keeps; null for that of the checkpoint, or 0.875.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos; null for that of the checkpoint, or bicubic.
        mean: mean per channel, subtracted on the scale 0..1; null for that of the checkpoint, or ImageNet's.
        std: standard deviation per channel, which divides; null for that of the checkpoint, or ImageNet's.
        augment: `workers` to augment each image in the process that reads it. `device`: workers decode, crop and flip;
            randaugment, jitter, erasing and normalisation run on uint8 batches on the training device. Use it when the
            GPU waits for data.
        changed: `ok` to resume a run on other data than it was started on; `refuse` otherwise.

    Attributes:
        preprocess: the preprocessing of an image in evaluation.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    sources: ClassVar[Mapping[str, Callable[[str, Any, str | None, float], Any]]] = SOURCES
    folders: ClassVar[tuple[str, ...]] = ("fashion_mnist", "imagefolder", "shards")  # the rows that take a root

    preprocess: Any

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        batch: int = 64,
        workers: int | None = None,
        seed: int | None = None,
        fraction: float = 0.2,
        randaugment: str | None = "rand-m9-mstd0.5-inc1",
        flip: float = 0.5,
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: float = 0.0,
        erasing: float = 0.25,
        crop: float | None = None,
        interpolation: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Literal["workers", "device"] = "workers",
        changed: Literal["refuse", "ok"] = "refuse",
    ):
        super().__init__(changed)
        if dataset not in self.sources:
            raise ValueError(f"unknown dataset {dataset!r}; allowed: {', '.join(self.sources)}")
        if root is not None and dataset not in self.folders:
            raise ValueError(f"dataset {dataset!r} takes no root; for your own images set dataset to imagefolder")
        if root is None and dataset in self.folders:
            raise ValueError(f"dataset {dataset!r} needs root, a folder")
        check_numbers({"batch": (batch, 1), "workers": (workers, 0)}, {"flip": flip, "erasing": erasing})
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two increasing numbers > 0 and <= 1, got {scale}")
        if augment not in ("workers", "device"):
            raise ValueError(f"augment must be workers or device, got {augment!r}")
        if jitter < 0:
            raise ValueError(f"jitter must be >= 0, got {jitter}")
        fields = {"size": size, "channels": channels, "crop": crop, "interpolation": interpolation}
        fields |= {"mean": None if mean is None else tuple(mean), "std": None if std is None else tuple(std)}
        self.given = {name: value for name, value in fields.items() if value is not None}
        self.dataset, self.root, self.batch = dataset, root, batch
        self.preprocess = self.prepared(None)
        self.workers = workers
        self.seed = global_seed() if seed is None else seed
        self.fraction, self.randaugment, self.flip = fraction, randaugment, flip
        self.scale, self.jitter, self.erasing = (scale[0], scale[1]), jitter, erasing
        self.augment = augment
        self.finish: DeviceAugment | None = None

    def prepared(self, base: Preprocess | None) -> Preprocess:
        """The preprocessing `base`, or the default at 32 pixels, with the fields that were given replaced."""
        if base is not None and not isinstance(base, ImagePreprocess):
            raise ValueError(f"the checkpoint takes latents, and dataset '{self.dataset}' gives images")
        fields: dict[str, Any] = {"size": 32} if base is None else base.to_dict()
        if base is None or self.given.get("channels", base.channels) != base.channels:
            fields["mean"], fields["std"] = default_statistics(self.given.get("channels", 3))
        return ImagePreprocess.from_dict(fields | self.given)

    @classmethod
    def measuring(
        cls,
        known: Any,
        *,
        root: str | None = None,
        split: str | None = None,
        labels: str | None = None,
        names: str | None = None,
        skip_unknown: bool = False,
        batch: int = 64,
        workers: int | None = None,
    ) -> dict[str, Any]:
        """The data to evaluate a checkpoint on, by split; arguments as of `Benchmark`."""
        from zoo.data.benchmarks import Benchmark

        found = Benchmark(known, root, split, labels, names, skip_unknown, batch, workers)
        return {found.part: found}

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the labels; reads the folders if need be."""
        return list((next(iter(self._sources.values()), None) or self.source("val")).classes)

    @property
    def labelled(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def described(self) -> str:
        """The training data of a run, in one line."""
        train, val = (f"{len(self.source(split).labels):,}" for split in ("train", "val"))
        return f"{self.dataset}: {train} images to train on, {val} to validate, {self.labelled} classes"

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [B, classes] and labels [B] that accuracy compares."""
        return logits, labels

    def example(self) -> tuple[tuple[Tensor, ...], str]:
        """An input of the model, to count its multiply-adds, and the name of such an input."""
        shape = (self.preprocess.channels, *self.preprocess.shape)
        return (torch.zeros(1, *shape),), f"an image of {shape[0]} x {shape[1]} x {shape[2]}"

    def find(self, stage: str) -> None:
        """Finds the images of a stage, and their faults, before the first step."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.source(split)
        if stage == "fit":
            self.items("train")

    def source(self, split: str) -> Any:
        """The images, a `Source`, of split `train`, `val` or `test` before any transform.

        Raises:
            ValueError: the folders of an imagefolder are invalid.
        """
        if split not in self._sources:
            build = self.sources[self.dataset]
            self._sources[split] = build(split, self.preprocess, self.root, self.fraction)
        return self._sources[split]

    def items(self, split: str) -> Any:
        """The data set of a split: augmented for `train`, else as in evaluation."""
        source = self.source(split)
        if split != "train":
            return ImageDataset(source, self.preprocess.cut, self.preprocess)
        if self.augment == "device":
            from zoo.data.device_augment import device_transform

            cut, self.finish = device_transform(self)
            return PixelDataset(source, cut, self.finish)
        transform, erase = training_transform(self)
        return ImageDataset(source, transform, self.preprocess, erase, self.seed)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments the images of a training step where they are, if that is not done by workers."""
        if not isinstance(batch, Pixels):
            return batch
        assert self.finish is not None
        images = self.finish(batch)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return Batch(images, batch.labels, batch.skipped)

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented images in random order, each once in an epoch."""
        dataset = self.items("train")
        sampler = EpochSampler(len(dataset), training=True, seed=self.seed, groups=self.groups())
        return make_loader(
            dataset, WholeBatches(sampler, self.batch), as_it_is, self.processes(self.dataset in self.folders)
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every image of the validation set once, in its order."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every image of the test set once, in its order."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        dataset = self.items(split)
        sampler = EpochSampler(len(dataset), training=False)
        return make_loader(
            dataset, EvenBatches(sampler, self.batch), as_it_is, self.processes(self.dataset in self.folders)
        )
