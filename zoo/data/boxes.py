"""Images with objects for detection: COCO, YOLO and Pascal VOC files, generated shapes."""

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.box_entries import BoxSource, relabelled
from zoo.data.box_sources import SOURCES, recognised
from zoo.data.box_transforms import Augmentation, Made, Sample, augmented, resized, shrunk
from zoo.data.images import as_it_is
from zoo.data.loading import DataModule, check_numbers, make_loader
from zoo.data.sampling import (
    EpochSampler,
    EvenBatches,
    WholeBatches,
    global_seed,
    hashed,
    kept_generators,
    reseed,
)
from zoo.inputs import Preprocess
from zoo.inputs.boxes import BoxPreprocess, on_canvas
from zoo.inputs.images import UnreadableImage, default_statistics
from zoo.outputs.boxes import Truth
from zoo.outputs.label_map import LabelMap

MULTIPLE = 32  # of the sides of a batch
MIB = 2**20


class Batch(NamedTuple):
    """Images of one step. H and W are the least multiples of 32 that hold them; each is at the top left, with zeros
    around it."""

    images: Tensor  # [B, channels, H, W] float32, normalised
    mask: Tensor | None  # [B, H, W], True on the pixels of images; None if there are no others
    truth: Truth  # without crowds
    ids: Tensor  # [B] int64, of the images in the data set
    sizes: Tensor  # [B, 2] int64, height and width of the original images in pixels
    skipped: tuple[str, ...]  # names of images that could not be read, which are missing from the rest


class BoxDataset(Dataset[Batch]):
    """A source's images with their objects; a key is (epoch, index) or (epoch, index, side), several make a batch.

    With an augmentation a sample is random, as a function of seed, epoch, index and side alone.

    Args:
        source: the images and objects.
        preprocess: the preprocessing in evaluation; a key's side replaces its size.
        augmentation: None in evaluation.
        seed: of the augmentation.
        plain_from: the first of the last epochs, which have flips and turns only.
        largest: most pixels of a side in a batch; larger images are shrunk to twice that before they are augmented.
        cache: bytes of decoded images that are kept in memory, by each process.
    """

    def __init__(
        self,
        source: BoxSource,
        preprocess: BoxPreprocess,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        plain_from: float = float("inf"),
        largest: int = 0,
        cache: int = 0,
    ) -> None:
        self.source, self.preprocess, self.augmentation = source, preprocess, augmentation
        self.seed, self.plain_from, self.largest = seed, plain_from, largest
        self.cache, self.free = dict[int, Sample](), cache

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, ...]) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, ...]]) -> Batch:
        made, read, skipped = [], [], []
        with kept_generators():
            for epoch, index, *side in keys:
                try:
                    made.append(self.made(epoch, index, *side))
                    read.append(index)
                except UnreadableImage:
                    skipped.append(self.source.name(index))
        images, mask = self.batched([each.image for each in made])
        ids, sizes = torch.from_numpy(self.source.ids[read]), torch.from_numpy(self.source.sizes[read])
        return Batch(images, mask, truth_of(made), ids, sizes, tuple(skipped))

    def made(self, epoch: int, index: int, side: int | None = None) -> Made:
        """One sample at the model's size; raises UnreadableImage."""
        preprocess = self.preprocess if side is None else _sided(self.preprocess, side)
        sample = self.sample(index)
        if self.augmentation is None:
            return resized(sample, preprocess)
        reseed(self.seed, epoch, index)
        options = self.augmentation if epoch < self.plain_from else self.augmentation.plain()
        return augmented(sample, self.other, options, preprocess)

    def other(self) -> Sample | None:
        """A random sample, None if it is unreadable."""
        try:
            return self.sample(random.randrange(len(self)))
        except UnreadableImage:
            return None

    def sample(self, index: int) -> Sample:
        """An image with its objects, crowds excluded, before augmentation; in training not much larger than the
        model's input. Raises UnreadableImage."""
        if index in self.cache:
            return self.cache[index]
        image = np.array(self.source.image(index, self.preprocess.channels))
        objects = self.source.objects(index)
        boxes, labels = objects.boxes[~objects.crowd], objects.labels[~objects.crowd]
        sample = Sample(image.reshape(*image.shape[:2], -1), boxes.astype(np.float32), labels)
        if self.largest:
            sample = shrunk(sample, 2 * self.largest, self.preprocess)
        if sample.image.nbytes <= self.free:
            self.free -= sample.image.nbytes
            self.cache[index] = sample
        return sample

    def batched(self, images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Normalised images on one canvas, and the mask."""
        if not images:
            return torch.zeros(0, self.preprocess.channels, self.preprocess.size, self.preprocess.size), None
        shapes = {tuple(image.shape[1:]) for image in images}
        if len(shapes) == 1 and not any(side % MULTIPLE for side in next(iter(shapes))):  # normalised all at once
            return self.preprocess.scaled(torch.stack(images)), None
        return on_canvas([self.preprocess.scaled(image) for image in images], MULTIPLE)


@functools.cache
def _sided(preprocess: BoxPreprocess, side: int) -> BoxPreprocess:
    return dataclasses.replace(preprocess, size=side)


def truth_of(made: Sequence[Made]) -> Truth:
    """The objects of a batch, padded with label 0 and the box 0."""
    most = max((len(each.labels) for each in made), default=0)
    labels = torch.zeros(len(made), most, dtype=torch.int64)
    boxes, valid = torch.zeros(len(made), most, 4), torch.zeros(len(made), most, dtype=torch.bool)
    for row, each in enumerate(made):
        count = len(each.labels)
        labels[row, :count], boxes[row, :count], valid[row, :count] = each.labels, each.boxes, True
    return Truth(labels, boxes, valid)


class Sides(Sampler[list[tuple[int, int, int]]]):
    """Batches whose images have one side, drawn for each batch from (seed, epoch, batch) alone, the same on all ranks.

    Args:
        batches: a batch sampler over an `EpochSampler`.
        sides: to draw from, in pixels.
        size: the side from epoch `plain_from` on.
    """

    def __init__(self, batches: Any, sides: Sequence[int], seed: int, size: int, plain_from: float) -> None:
        self.batches, self.sides, self.seed, self.size, self.plain_from = batches, sides, seed, size, plain_from

    @property
    def sampler(self) -> Any:
        return self.batches.sampler

    @property
    def plan(self) -> tuple[Any, ...]:
        return *self.sides, self.seed, *self.batches.plan

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch = self.sampler.epoch
        for number, keys in enumerate(self.batches):
            side = self.sides[hashed(self.seed, epoch, number, 2) % len(self.sides)]
            side = side if epoch < self.plain_from else self.size
            yield [(epoch, index, side) for _, index in keys]

    def __len__(self) -> int:
        return len(self.batches)


class Boxes(DataModule):
    """Images with objects for training, validation and test, in batches of type `Batch`.

    Faults of the files are reported in one warning for each split. Images that cannot be read later are omitted from
    their batch and listed in it. The Trainer must run with `use_distributed_sampler=False`: the samplers split the set
    over ranks by themselves.

    Args:
        dataset: `coco` (root/annotations/instances_SPLIT.json and root/images/SPLIT or root/SPLIT2017), `coco_export`
            (root/SPLIT/_annotations.coco.json beside the images), `yolo` (root/data.yaml), `voc` (root/Annotations,
            JPEGImages, ImageSets/Main/SPLIT.txt; or root/SPLIT/*.xml beside the images), `shards` (any of them,
            packed by `zoo shard`), `shapes` (generated), or `auto` (chosen by what is in root).
        root: folder of the data set; that of shards, or their address: http, https, or `pipe:` and a command that ends
            in a folder.
        size: side of the images that the model takes, in pixels; null for that of the checkpoint, or 640.
        fit: stretch (to size x size), pad (the longest side becomes size, the aspect ratio is kept) or shortest (the
            shortest side does, but the longest has at most 1333, as in DETR); null for that of the checkpoint, or
            stretch.
        channels: 3 for RGB, 1 for grey; null for that of the checkpoint, or 3.
        batch: images in a batch, per device.
        workers: processes that read images; 0 reads in the main process; null for one per core if images are files.
        seed: seed of order and augmentation, besides epoch and index; null for that of seed_everything.
        flip: probability of mirroring left and right, and up and down if turn is set.
        turn: probability of a turn by 90, 180 or 270 degrees, for images without an upright side.
        photometric: probability of each random change of brightness, contrast, saturation, hue and order of channels.
        zoom: probability of zooming out.
        iou_crop: probability of a random crop that keeps a part of an object.
        mosaic: probability of four images in one.
        mixup: probability of the mean of two images.
        scales: sides to draw from for each batch, in pixels, for training at several scales; null for size alone.
        plain_epochs: last epochs with flips and turns as the only augmentation, at the side of size.
        cache: memory of a machine for decoded images in MiB, for training and for evaluation; 0 decodes them each time.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos; null for that of the checkpoint, or
            bilinear.
        mean: mean per channel, subtracted on the scale 0..1; null for that of the checkpoint, or ImageNet's.
        std: standard deviation per channel, which divides; null for that of the checkpoint, or ImageNet's.
        changed: `ok` to resume a run on other data than it was started on; `refuse` otherwise.

    Attributes:
        preprocess: the preprocessing of an image in evaluation.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    preprocess: BoxPreprocess

    def __init__(
        self,
        dataset: str = "shapes",
        root: str | None = None,
        size: int | None = None,
        fit: str | None = None,
        channels: int | None = None,
        batch: int = 16,
        workers: int | None = None,
        seed: int | None = None,
        flip: float = 0.5,
        turn: float = 0.0,
        photometric: float = 0.5,
        zoom: float = 0.5,
        iou_crop: float = 0.8,
        mosaic: float = 0.0,
        mixup: float = 0.0,
        scales: list[int] | None = None,
        plain_epochs: int = 0,
        cache: int = 1024,
        interpolation: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        changed: Literal["refuse", "ok"] = "refuse",
    ):
        super().__init__(changed)
        if dataset != "auto" and dataset not in SOURCES:
            raise ValueError(f"unknown dataset {dataset!r}; allowed: auto, {', '.join(SOURCES)}")
        if root is not None and dataset == "shapes":
            raise ValueError("dataset 'shapes' is generated and takes no root; for your own images set dataset to auto")
        if root is None and dataset != "shapes":
            raise ValueError(f"dataset {dataset!r} needs root, a folder")
        chances = {"flip": flip, "turn": turn, "photometric": photometric, "zoom": zoom, "iou_crop": iou_crop}
        chances |= {"mosaic": mosaic, "mixup": mixup}
        least = {"batch": (batch, 1), "workers": (workers, 0), "plain_epochs": (plain_epochs, 0), "cache": (cache, 0)}
        check_numbers(least, chances)
        self.augmentation = Augmentation(**chances)
        fields = {"size": size, "fit": fit, "channels": channels, "interpolation": interpolation}
        fields |= {"mean": None if mean is None else tuple(mean), "std": None if std is None else tuple(std)}
        self.given = {name: value for name, value in fields.items() if value is not None}
        self.preprocess = self.prepared(None)
        if scales is not None and not scales:
            raise ValueError("scales must have at least one side, or be null")
        for side in scales or ():
            _sided(self.preprocess, side)
        self.dataset = recognised(root) if dataset == "auto" and root is not None else dataset
        self.root, self.batch, self.workers = root, batch, workers
        self.seed = global_seed() if seed is None else seed
        self.scales, self.plain_epochs, self.cache = scales, plain_epochs, cache
        self.known: LabelMap | None = None  # the categories of the checkpoint that is measured

    def prepared(self, base: Preprocess | None) -> BoxPreprocess:
        """The preprocessing `base`, or the default at 640 pixels, with the fields that were given replaced."""
        assert base is None or isinstance(base, BoxPreprocess)
        fields: dict[str, Any] = {} if base is None else base.to_dict()
        if base is None or self.given.get("channels", base.channels) != base.channels:
            fields["mean"], fields["std"] = default_statistics(self.given.get("channels", 3))
        return BoxPreprocess.from_dict(fields | self.given)

    @classmethod
    def measuring(
        cls, known: Any, *, root: str | None = None, split: str = "val", batch: int = 16, workers: int | None = None
    ) -> dict[str, Self]:
        """The data to evaluate a checkpoint on, by split: a folder in any of the formats, or the shapes. Its categories
        are matched by name."""
        return {split: cls(dataset="auto" if root else "shapes", root=root, batch=batch, workers=workers)}

    @property
    def labels(self) -> LabelMap:
        """The categories; reads the annotations if need be."""
        return (next(iter(self._sources.values()), None) or self.source("val")).labels

    @property
    def labelled(self) -> int:
        """How many categories there are."""
        return len(self.labels)

    def described(self) -> str:
        """The training data of a run, in one line."""
        train, val = (
            f"{len(source):,} images with {len(source.labels_of):,} objects"
            for source in (self.source("train"), self.source("val"))
        )
        return f"{self.dataset}: {train} to train on, {val} to validate, {self.labelled} categories"

    def example(self) -> tuple[tuple[Tensor, ...], str]:
        """An input of the model, to count its multiply-adds, and the name of such an input."""
        shape = (self.preprocess.channels, self.preprocess.size, self.preprocess.size)
        return (torch.zeros(1, *shape),), f"an image of {shape[0]} x {shape[1]} x {shape[2]}"

    def find(self, stage: str) -> None:
        """Finds the images and objects of a stage, and their faults, before the first step.

        Raises:
            ValueError: files are missing or invalid, or the training set has no objects.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.source(split)
        if stage == "fit" and not (~self.source("train").crowd).any():
            raise ValueError(f"{self.source('train').place} has no objects to train on")

    def source(self, split: str) -> BoxSource:
        """The images and objects of split `train`, `val` or `test` before any transform.

        Raises:
            ValueError: its files are missing or invalid, or its categories differ from those of another split.
        """
        if split not in self._sources:
            found = SOURCES[self.dataset](self.root or "", split)
            for other in self._sources.values():
                check_equal(other, found)
            self._sources[split] = found if self.known is None else relabelled(found, self.known)
        return self._sources[split]

    def follow(self, start: Any, stage: str) -> list[str]:
        """Also takes the categories of the checkpoint, by name, where it is measured."""
        labels = getattr(start, "labels", None)
        if stage != "fit" and isinstance(labels, LabelMap):
            self.known = labels
            self._sources.clear()
        return super().follow(start, stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented images in random order, each once in an epoch."""
        source, workers = self.source("train"), self.processes(self.files)
        plain_from, size = self._plain_from(), self.preprocess.size
        most = max([size, *(self.scales or ())]) if self.preprocess.fit != "shortest" else self.preprocess.longest
        options = (self.augmentation, self.seed, plain_from, most, self._memory(workers))
        sampler = EpochSampler(len(source), training=True, seed=self.seed, groups=self.groups())
        batches: Any = WholeBatches(sampler, self.batch)
        if self.scales:
            batches = Sides(batches, self.scales, self.seed, size, plain_from)
        return make_loader(BoxDataset(source, self.preprocess, *options), batches, as_it_is, workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every image of the validation set once, in its order."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every image of the test set once, in its order."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        source, workers = self.source(split), self.processes(self.files)
        dataset = BoxDataset(source, self.preprocess, cache=self._memory(workers))
        sampler = EpochSampler(len(source), training=False)
        return make_loader(dataset, EvenBatches(sampler, self.batch), as_it_is, workers)

    @property
    def files(self) -> bool:
        """Whether images are read from files."""
        return self.dataset != "shapes"

    def _memory(self, workers: int) -> int:
        """Bytes of decoded images that each process keeps."""
        return self.cache * MIB // (max(1, workers) * self.local_ranks())

    def _plain_from(self) -> float:
        if not self.plain_epochs or self.trainer is None:
            return float("inf")
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 0:
            raise ValueError("data.plain_epochs needs trainer.max_epochs, to know which epochs are the last")
        return epochs - self.plain_epochs


def check_equal(one: BoxSource, other: BoxSource) -> None:
    """ValueError if two splits of a data set have other categories."""
    if one.labels != other.labels:
        ours, theirs = set(one.labels), set(other.labels)
        lists = {"without": sorted(ours - theirs), "with": sorted(theirs - ours)}
        differ = ", ".join(f"{word} {_few(pairs)}" for word, pairs in lists.items() if pairs) or "another order"
        raise ValueError(f"the categories of {other.place} differ from those of {one.place}: {differ}")


def _few(pairs: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name!r} (id {id})" for name, id in pairs[:5]) + ", ..." * (len(pairs) > 5)
