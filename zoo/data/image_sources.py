"""Where labelled pictures come from: one row of `SOURCES` for each kind of data set."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from zoo.inputs.images import ImagePreprocess, convert_image, read_image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Source(Protocol):
    """Labelled pictures before any transform."""

    classes: list[str]
    labels: np.ndarray

    def picture(self, index: int) -> "Picture":
        """A PIL picture of mode "RGB" or "L"; raises UnreadableImage."""
        ...

    def name(self, index: int) -> str:
        """What to call the picture in a message: its path, if it is a file."""
        ...


class _Digits:
    classes = list("0123456789")

    def __init__(self, split: str, preprocess: ImagePreprocess, root: str | None, fraction: float):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        values, labels = load_digits(return_X_y=True)
        parts = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=0, stratify=labels)
        kept = parts[0] if split == "train" else parts[1]
        self.arrays = np.rint(values[kept].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels = labels[kept].astype(np.int64)
        self.split, self.preprocess = split, preprocess

    def picture(self, index: int) -> "Picture":
        from PIL import Image

        size, method = self.preprocess.size, self.preprocess.interpolation.upper()
        picture = Image.fromarray(self.arrays[index])
        picture = picture.resize((size, size), Image.Resampling[method])
        return convert_image(picture, self.preprocess.channels)

    def name(self, index: int) -> str:
        return f"digits/{self.split}/{index}"


class _Files:
    def __init__(self, classes: list[str], samples: list[tuple[str, int]], channels: int):
        self.classes, self.channels = classes, channels
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        # One array of bytes: worker processes share it, where a list of strings would be copied.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])

    def picture(self, index: int) -> "Picture":
        return read_image(self.name(index), self.channels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class _Synthetic:
    """Gratings of random phase, frequency and noise; the class is the angle to the vertical."""

    classes = ["0 degrees", "30 degrees", "60 degrees", "90 degrees"]
    counts = {"train": 512, "val": 128, "test": 128}

    def __init__(self, split: str, preprocess: ImagePreprocess, root: str | None, fraction: float):
        self.split, self.preprocess = split, preprocess
        self.labels = np.arange(self.counts[split], dtype=np.int64) % len(self.classes)

    def picture(self, index: int) -> "Picture":
        from PIL import Image

        generator = np.random.default_rng([list(self.counts).index(self.split), index])
        angle = math.radians(30 * int(self.labels[index]))
        y, x = np.mgrid[0 : 1 : 1j * self.preprocess.size, 0 : 1 : 1j * self.preprocess.size]
        along = x * math.cos(angle) + y * math.sin(angle)
        wave = np.sin(2 * math.pi * (generator.uniform(3, 5) * along + generator.uniform()))
        values = 128 + 80 * wave + generator.normal(0, 20, wave.shape)
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return convert_image(picture, self.preprocess.channels)

    def name(self, index: int) -> str:
        return f"synthetic/{self.split}/{index}"


def _imagefolder(split: str, preprocess: ImagePreprocess, root: str | None, fraction: float) -> Source:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    base = Path(root or "").expanduser()
    if split == "test" and not (base / "test").exists():
        split = "val"
    train, folder = base / "train", base / split
    if split != "train" and not train.exists():
        train = folder  # measuring needs no training pictures
    for place in (train, folder):
        if not place.is_dir():
            layout = "root/train/<class>/* and root/val/<class>/*"
            raise ValueError(f"{place} is not a folder; an imagefolder is laid out as {layout}")
    classes, found = _class_folders(train), _class_folders(folder)
    if not classes:
        raise ValueError(f"{train} has no class folders")
    if found != classes:
        missing = sorted(set(classes) - set(found))
        extra = sorted(set(found) - set(classes))
        lists = {"without": missing, "with": extra}
        differ = ", ".join(f"{word} {_few(names)}" for word, names in lists.items() if names)
        raise ValueError(f"{folder} differs in its classes from {train}: {differ}")
    numbers = {name: label for label, name in enumerate(classes)}
    samples = [
        (path, label)
        for path, label in make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=True)
        if f"{os.sep}." not in path.removeprefix(str(folder))
    ]
    empty = sorted(set(classes) - {classes[label] for _, label in samples})
    if empty:
        kinds = " ".join(IMG_EXTENSIONS)
        raise ValueError(f"{folder} has class folders without pictures ({kinds}): {_few(empty)}")
    return _Files(classes, samples, preprocess.channels)


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


SOURCES: dict[str, Callable[[str, ImagePreprocess, str | None, float], Source]] = {
    "digits": _Digits,
    "imagefolder": _imagefolder,
    "synthetic": _Synthetic,
}
