"""Pictures with one class each: embedded digits, folders in ImageNet's layout, generated ones."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import lightning
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from zoo.data.image_sources import SOURCES, Source
from zoo.data.sampling import EpochSampler, EvenBatches, global_seed, seeded
from zoo.inputs.images import ImagePreprocess, UnreadableImage, default_statistics

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Batch(NamedTuple):
    """Pictures of one step.

    `images` is float32 [B, channels, size, size], `labels` int64 [B]. `skipped` holds the paths of
    pictures that could not be read; they are missing from the other two, and where every picture
    of a batch is unreadable, B is 0.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...]


class Pictures(Dataset[tuple[Tensor | None, int, str]]):
    """A source's pictures, transformed; a key is (epoch, index).

    Returns (image [channels, size, size], label, name); image is None where the file is unreadable.
    With a seed the transform is random, as a function of seed, epoch and index alone.
    """

    def __init__(self, source: Source, transform: Callable[["Picture"], Tensor], seed: int | None):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, str]:
        epoch, index = key
        label, name = int(self.source.labels[index]), self.source.name(index)
        try:
            picture = self.source.picture(index)
        except UnreadableImage:
            return None, label, name
        if self.seed is None:
            return self.transform(picture), label, name
        with seeded(self.seed, epoch, index):
            return self.transform(picture), label, name


def collate(samples: list[tuple[Tensor | None, int, str]], shape: tuple[int, int, int]) -> Batch:
    """Stacks what `Pictures` returned; `shape` is that of one image, for a batch without any."""
    images = [image for image, _, _ in samples if image is not None]
    labels = [label for image, label, _ in samples if image is not None]
    skipped = tuple(name for image, _, name in samples if image is None)
    stacked = torch.stack(images) if images else torch.empty(0, *shape)
    return Batch(stacked, torch.tensor(labels, dtype=torch.int64), skipped)


class Images(lightning.LightningDataModule):
    """Labelled pictures for training, validation and test, in batches of type `Batch`.

    Pictures that cannot be read are left out of their batch and named in it. The Trainer must run
    with `use_distributed_sampler=False`: the samplers split the set over ranks by themselves.

    Args:
        dataset: `digits` (scikit-learn's 1797 handwritten digits; validation and test are the same
            stratified, fixed part), `imagefolder` (ImageNet's layout: `root/train/<class>/*`,
            `root/val/<class>/*` and, if there is one, `root/test/<class>/*`), or `synthetic`
            (generated gratings of four directions).
        root: folder of an imagefolder.
        size: side of the pictures that the model takes, in pixels.
        channels: 3 for RGB, 1 for grey.
        batch: pictures in a batch, per device.
        workers: processes that read pictures; 0 reads in the main process.
        seed: what order and augmentation depend on, besides epoch and index; null for that of seed_everything.
        fraction: share of the digits that is held out for validation and test.
        randaugment: timm's description of RandAugment or AutoAugment; null for none.
        flip: probability of mirroring left and right.
        scale: smallest and largest share of the area that a random crop keeps; 1.0 and 1.0 cut out
            the largest centred square.
        jitter: strength of random brightness, contrast and saturation, after randaugment.
        erasing: probability of erasing a random rectangle with noise.
        crop: share of the resized short side that evaluation keeps.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos.
        mean: what is subtracted per channel, on the scale 0..1; null for ImageNet's.
        std: what is divided by per channel; null for ImageNet's.

    Attributes:
        preprocess: what evaluation does to a picture.

    Raises:
        ValueError: an unknown name, or a value out of its range.
    """

    preprocess: ImagePreprocess

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        size: int = 32,
        channels: int = 3,
        batch: int = 64,
        workers: int = 0,
        seed: int | None = None,
        fraction: float = 0.2,
        randaugment: str | None = "rand-m9-mstd0.5-inc1",
        flip: float = 0.5,
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: float = 0.0,
        erasing: float = 0.25,
        crop: float = 0.875,
        interpolation: str = "bicubic",
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ):
        super().__init__()
        if dataset not in SOURCES:
            raise ValueError(f"unknown dataset {dataset!r}; allowed: {', '.join(SOURCES)}")
        if (root is not None) != (dataset == "imagefolder"):
            verb = "takes no root" if root is not None else "needs root, a folder"
            raise ValueError(f"dataset {dataset!r} {verb}")
        for name, value, least in (("batch", batch, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for name, value in (("flip", flip), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, between 0 and 1, not {value}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two rising numbers above 0, at most 1, not {scale}")
        if jitter < 0:
            raise ValueError(f"jitter must be at least 0, not {jitter}")
        means, deviations = default_statistics(channels)
        self.preprocess = ImagePreprocess(
            size=size,
            channels=channels,
            mean=means if mean is None else tuple(mean),
            std=deviations if std is None else tuple(std),
            interpolation=interpolation,
            crop=crop,
        )
        self.dataset, self.root, self.batch, self.workers = dataset, root, batch, workers
        self.seed = global_seed() if seed is None else seed
        self.fraction, self.randaugment, self.flip = fraction, randaugment, flip
        self.scale, self.jitter, self.erasing = (scale[0], scale[1]), jitter, erasing
        self._sources: dict[str, Source] = {}

    @classmethod
    def measuring(
        cls,
        preprocess: ImagePreprocess,
        *,
        root: str | None = None,
        split: str | None = None,
        splits: Sequence[str] | None = None,
        batch: int = 64,
        workers: int = 0,
    ) -> Self:
        """The data to measure a model with that preprocessing on: a folder in ImageNet's layout, or the digits."""
        if splits:
            raise ValueError("--splits is for speech; images take --split val or test")
        return cls(
            dataset="imagefolder" if root else "digits",
            root=root,
            size=preprocess.size,
            channels=preprocess.channels,
            batch=batch,
            workers=workers,
            crop=preprocess.crop,
            interpolation=preprocess.interpolation,
            mean=list(preprocess.mean),
            std=list(preprocess.std),
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of the labels; reads the folders if need be."""
        return list(self.source("val").classes)

    def setup(self, stage: str) -> None:
        """Finds the pictures of a stage, and its faults, before the first step."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.source(split)
        if stage == "fit":
            training_transform(self)

    def source(self, split: str) -> Source:
        """The pictures of split `train`, `val` or `test` before any transform.

        Raises:
            ValueError: the folders of an imagefolder are not as they should be.
        """
        if split not in self._sources:
            build = SOURCES[self.dataset]
            self._sources[split] = build(split, self.preprocess, self.root, self.fraction)
        return self._sources[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented pictures in random order; a last batch that is not full is dropped."""
        dataset = Pictures(self.source("train"), training_transform(self), self.seed)
        sampler = EpochSampler(len(dataset), training=True, seed=self.seed)
        drop_last = len(sampler) >= self.batch
        batches = BatchSampler(cast(Any, sampler), self.batch, drop_last)
        return self._loader(dataset, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every picture of the validation set once, in its order."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every picture of the test set once, in its order; the validation set if there is none."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        dataset = Pictures(self.source(split), self.preprocess, None)
        sampler = EpochSampler(len(dataset), training=False)
        return self._loader(dataset, EvenBatches(sampler, self.batch))

    def _loader(self, dataset: Pictures, batches: Sampler[Any]) -> DataLoader[Any]:
        size, channels = self.preprocess.size, self.preprocess.channels
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=functools.partial(collate, shape=(channels, size, size)),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            # Without its own generator an iterator would draw from the main one.
            generator=torch.Generator().manual_seed(0),
        )


def training_transform(data: Images) -> Callable[["Picture"], Tensor]:
    """timm's training transform: random crop, flip, RandAugment, jitter, normalisation, erasing.

    Grey pictures are augmented as RGB, for timm's operations take no others, and are grey again
    before they are normalised.

    Raises:
        ValueError: timm does not understand `randaugment`.
    """
    from timm.data.transforms_factory import transforms_imagenet_train
    from torchvision.transforms import Compose, Grayscale

    wanted = data.preprocess
    grey = wanted.channels == 1
    create = functools.partial(
        cast(Any, transforms_imagenet_train),
        wanted.size,
        scale=data.scale,
        ratio=(1.0, 1.0) if data.scale == (1.0, 1.0) else None,
        hflip=data.flip,
        auto_augment=data.randaugment,
        color_jitter=data.jitter or None,
        force_color_jitter=True,
        interpolation=wanted.interpolation,
        re_prob=data.erasing,
        re_mode="pixel",
        separate=True,
    )
    # The fill colour of RandAugment is the mean, so what works on RGB is built with three values.
    repeat = 3 if grey else 1
    try:
        cut, augment, finish = create(mean=wanted.mean * repeat, std=wanted.std * repeat)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not understand randaugment={data.randaugment!r}") from error
    _keep_one_bit(augment)
    if not grey:
        return Compose([cut, augment, finish])
    _, _, finish = create(mean=wanted.mean, std=wanted.std)
    return Compose([Grayscale(3), cut, augment, Grayscale(1), finish])


def _keep_one_bit(augment: Any) -> None:
    """Strong posterizing in timm asks for 0 bits, which Pillow refuses from version 13 on; before, it gave black."""
    for transform in augment.transforms:
        operations = [*getattr(transform, "ops", ()), *itertools.chain(*getattr(transform, "policy", ()))]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.level_fn = functools.partial(_at_least_one_bit, operation.level_fn)


def _at_least_one_bit(bits: Callable[[float, dict], tuple[int]], magnitude: float, hparams: dict) -> tuple[int]:
    return (max(1, *bits(magnitude, hparams)),)
