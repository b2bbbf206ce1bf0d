"""Input: files to batches on one core, against timm's loader, plain torchvision and plain torchaudio."""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from warnings import catch_warnings

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks.measure import Row, interleaved, markdown, milliseconds, ratio_cell, timed
from zoo.data.feature_cache import FeatureCache
from zoo.data.images import Images
from zoo.data.layouts import layout
from zoo.data.packing import pack
from zoo.inputs.audio import RECIPES, read_audio

FILES, SIDES = 32, (375, 500)  # images in a batch, and their height and width, about ImageNet's mean
SMALL_FILES = 100_000
SECONDS, CLIPS = 15.0, 8  # of an utterance, and how many
RATE = 16000
TRAIN: dict[str, Any] = {"flip": 0.5, "erasing": 0.0}
AUGMENT = "rand-m9-mstd0.5-inc1"


def photos(root: Path, number: int, sides: tuple[int, int]) -> None:
    """JPEG files in ImageNet's layout, of coarse and fine noise, so that they have a photo's size."""
    draw = np.random.default_rng(0)
    height, width = sides
    for split in ("train", "val"):
        for index in range(number):
            folder = root / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (height // 25, width // 25, 3), np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
            image = (smooth + draw.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{index:04}.jpg", quality=90)


def by_zoo(
    root: Path, split: str, side: int, number: int, augment: str | None, dataset: str, place: Any = "workers"
) -> Callable[[], Any]:
    data = Images(dataset=dataset, root=str(root), size=side, randaugment=augment, augment=place, **TRAIN)
    items = data.items(split)
    return lambda: items.__getitems__([(0, index) for index in range(number)])


def by_timm(root: Path, split: str, side: int, number: int, augment: str | None) -> Callable[[], Any]:
    from timm.data.dataset import ImageDataset
    from timm.data.transforms_factory import create_transform

    options: dict[str, Any] = {"is_training": split == "train", "interpolation": "bicubic", "color_jitter": None}
    items = ImageDataset(str(root / split), transform=create_transform(side, auto_augment=augment, **options))

    def batch() -> Any:
        with catch_warnings(action="ignore", category=ResourceWarning):  # timm leaves files open
            return default_collate([items[index] for index in range(number)])

    return batch


def by_torchvision(root: Path, split: str, side: int, number: int, augment: str | None) -> Callable[[], Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    steps: list[Any] = [v2.Resize(round(side / 0.875), bicubic), v2.CenterCrop(side)]
    if split == "train":
        steps = [v2.RandomResizedCrop(side, interpolation=bicubic), v2.RandomHorizontalFlip()]
        steps += [] if augment is None else [v2.RandAugment(interpolation=bicubic)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    items = ImageFolder(str(root / split), v2.Compose(steps))
    return lambda: default_collate([items[index] for index in range(number)])


def images(options: argparse.Namespace) -> Iterator[Row]:
    """A batch of images from JPEG files, decoded, augmented and normalised."""
    number, side = options.files, options.side
    with tempfile.TemporaryDirectory() as folder:
        root, tars = Path(folder, "loose"), Path(folder, "tars")
        photos(root, number, SIDES)
        pack(tars, layout(root), 1 << 28, "")
        for name, split, augment, place in (
            ("crop and flip", "train", None, "workers"),
            ("crop, flip and RandAugment", "train", AUGMENT, "workers"),
            ("the same, what workers do of it with augment=device", "train", AUGMENT, "device"),
            ("evaluation", "val", None, "workers"),
        ):
            given = (split, side, number, augment)
            calls = {
                "zoo": by_zoo(root, *given, "imagefolder", place),
                "shards": by_zoo(tars, *given, "shards", place),
                "timm": by_timm(root, *given),
                "torchvision": by_torchvision(root, *given),
            }
            taken = interleaved(calls, calls["zoo"], options)
            speeds: Row = {
                "ms": milliseconds(taken["zoo"]),
                "images_per_second": number / median(taken["zoo"]),
            }
            ratios = [timed(f"by_{rival}", taken["zoo"], taken[rival]) for rival in ("timm", "torchvision")]
            ratios += [timed("shards_by_files", taken["shards"], taken["zoo"])]
            row: Row = {"images": f"{name}, {SIDES[1]} x {SIDES[0]} to {side} px"}
            for each in (speeds, *ratios, timed("noise", taken["again"], taken["zoo"])):
                row |= each
            yield row


def reading(options: argparse.Namespace) -> Iterator[Row]:
    """Many small images in an order of training: their bytes alone, and decoded, in files and in shards."""
    number, distinct = options.small_files, min(1000, options.small_files)
    draw = np.random.default_rng(0)
    blobs = []
    for _ in range(distinct):
        blob = io.BytesIO()
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(blob, "JPEG", quality=80)
        blobs.append(blob.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        root, tars = Path(folder, "loose"), Path(folder, "tars")
        for index in range(number):
            place = root / "train" / f"class{index // 1000:03}"
            if index % 1000 == 0:
                place.mkdir(parents=True)
            (place / f"{index:06}.jpg").write_bytes(blobs[index % distinct])
        pack(tars, layout(root), 1 << 28, "")
        files = Images(dataset="imagefolder", root=str(root)).source("train")
        shards = Images(dataset="shards", root=str(tars)).source("train")
        order = draw.permutation(number).tolist()
        paths = [files.name(index) for index in order]
        numbers = [shards.shards.kept.item(index) for index in order]
        for name, calls in (
            (
                "bytes",
                {
                    "files": lambda: [Path(path).read_bytes() for path in paths],
                    "shards": lambda: [shards.shards.read(index) for index in numbers],
                },
            ),
            (
                "images",
                {
                    "files": lambda: [files.image(index) for index in order],
                    "shards": lambda: [shards.image(index) for index in order],
                },
            ),
        ):
            taken = interleaved(calls, calls["files"], options)
            row: Row = {"what": f"{number:,} JPEG files of {len(blobs[0]):,} bytes, {name}"}
            row |= {"ms": milliseconds(taken["files"]), "files_per_second": number / median(taken["files"])}
            row |= timed("shards_by_files", taken["shards"], taken["files"])
            yield row | timed("noise", taken["again"], taken["files"])


def reading_table(rows: Sequence[Row]) -> str:
    header = ["reading", "loose files/s", "shards / files", "noise"]
    lines = [
        [
            str(row["what"]),
            f"{row['files_per_second']:.0f}",
            ratio_cell(row, "shards_by_files"),
            ratio_cell(row, "noise"),
        ]
        for row in rows
    ]
    return markdown(header, lines)


def image_table(rows: Sequence[Row]) -> str:
    header = ["images", "images/s", "zoo / timm", "zoo / torchvision v2", "shards / files", "noise"]
    names = ("by_timm", "by_torchvision", "shards_by_files", "noise")
    lines = [
        [str(row["images"]), f"{row['images_per_second']:.0f}", *(ratio_cell(row, name) for name in names)]
        for row in rows
    ]
    return markdown(header, lines)


def audio(options: argparse.Namespace) -> Iterator[Row]:
    """Utterances from FLAC files to log-mel features, against soundfile and torchaudio's MelSpectrogram."""
    import soundfile
    from torchaudio.transforms import MelSpectrogram

    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{index}.flac") for index in range(options.clips)]
        for path in paths:
            wave = np.cumsum(draw.normal(0, 1, round(SECONDS * RATE)))
            wave -= np.convolve(wave, np.ones(400) / 400, "same")
            soundfile.write(path, (0.1 * wave / wave.std()).clip(-1, 1), RATE)
        for recipe, cached in (("nemo", False), ("squeezeformer", False), ("nemo", True)):
            preprocess = RECIPES[recipe]
            kept = FeatureCache(str(Path(folder, "cache")), preprocess) if cached else None
            plain = MelSpectrogram(RATE, n_fft=512, win_length=400, hop_length=160, n_mels=preprocess.mels)

            def ours(preprocess: Any = preprocess, kept: FeatureCache | None = kept) -> Any:
                if kept is not None:
                    return [kept.read(path.name) for path in paths]
                return [preprocess(read_audio(path, RATE)) for path in paths]

            def theirs(plain: Any = plain) -> Any:
                return [
                    (plain(torch.from_numpy(soundfile.read(path, dtype="float32")[0])) + 1e-5).log() for path in paths
                ]

            if kept is not None:
                for path in paths:
                    kept.write(path.name, preprocess(read_audio(path, RATE)), False, False)
            taken = interleaved({"zoo": ours, "plain": theirs}, ours, options)
            hours = options.clips * SECONDS / 3600
            yield (
                {
                    "audio": f"{recipe}, {SECONDS:g} s each{', from data.cache' if cached else ''}",
                    "ms": milliseconds(taken["zoo"]),
                    "hours_per_second": hours / median(taken["zoo"]),
                }
                | timed("by_torchaudio", taken["zoo"], taken["plain"])
                | timed("noise", taken["again"], taken["zoo"])
            )


def audio_table(rows: Sequence[Row]) -> str:
    header = ["features", "hours of audio/s", "zoo / soundfile and torchaudio", "noise"]
    lines = [
        [
            str(row["audio"]),
            f"{row['hours_per_second']:.2f}",
            ratio_cell(row, "by_torchaudio"),
            ratio_cell(row, "noise"),
        ]
        for row in rows
    ]
    return markdown(header, lines)
