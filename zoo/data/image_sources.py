"""Sources of labelled images: one row of `SOURCES` for each kind of data set."""

import gzip
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from zoo.data.fingerprint import fingerprint
from zoo.data.shards import Shards
from zoo.inputs.folders import files_below, leads_above
from zoo.inputs.images import EXTENSIONS, ImagePreprocess, UnreadableImage, convert_image, read_image
from zoo.text import plain, reason

if TYPE_CHECKING:
    from PIL.Image import Image


class Source(Protocol):
    """Labelled images before any transform."""

    classes: list[str]
    labels: np.ndarray

    def image(self, index: int) -> "Image":
        """A PIL image of mode "RGB" or "L"; raises UnreadableImage."""
        ...

    def name(self, index: int) -> str:
        """The name of the image in a message: its path, if it is a file."""
        ...


def enlarged(array: np.ndarray, preprocess: ImagePreprocess) -> "Image":
    """A grey image of uint8 [H, W] at the size and in the mode that the model takes."""
    from PIL import Image

    (height, width), method = preprocess.shape, Image.Resampling[preprocess.interpolation.upper()]
    return convert_image(Image.fromarray(array).resize((width, height), method), preprocess.channels)


class _Digits:
    classes = list("0123456789")

    def __init__(self, split: str, preprocess: ImagePreprocess, root: str | None, fraction: float):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        values, labels = load_digits(return_X_y=True)
        parts = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=0, stratify=labels)
        kept = parts[0] if split == "train" else parts[1]
        arrays = np.rint(values[kept].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels: np.ndarray = np.asarray(labels[kept], np.int64)
        self.split, self.images = split, [enlarged(array, preprocess) for array in arrays]

    def image(self, index: int) -> "Image":
        return self.images[index]

    def name(self, index: int) -> str:
        return f"digits/{self.split}/{index}"


class Files:
    """Images in files, as (path, label)."""

    def __init__(self, classes: list[str], samples: list[tuple[str, int]], channels: int):
        self.classes, self.channels = classes, channels
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        # One array of bytes: worker processes share it, where a list of strings would be copied.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.fingerprint = fingerprint(self.paths, self.labels)

    def image(self, index: int) -> "Image":
        return read_image(self.name(index), self.channels)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


class Packed:
    """Images in shards."""

    def __init__(self, split: str, preprocess: ImagePreprocess, root: str | None, fraction: float):
        self.shards, self.channels = Shards(root or "", split, "images", UnreadableImage), preprocess.channels
        self.classes: list[str] = self.shards.index.classes
        self.fingerprint, self.groups = self.shards.fingerprint, self.shards.groups
        self.numbers = self.shards.kept
        self.labels: np.ndarray = self.shards.arrays["label"][self.numbers]
        if not ((self.labels >= 0) & (self.labels < len(self.classes))).all():
            raise ValueError(f"{root} has labels that are none of its {len(self.classes)} classes")

    def image(self, index: int) -> "Image":
        number = int(self.numbers[index])
        return read_image(self.shards.name(number), self.channels, self.shards.read(number))

    def name(self, index: int) -> str:
        return self.shards.name(int(self.numbers[index]))


class _Synthetic:
    """Gratings of random phase, frequency and noise; the class is the angle to the vertical."""

    classes = ["0 degrees", "30 degrees", "60 degrees", "90 degrees"]
    counts = {"train": 512, "val": 128, "test": 128}

    def __init__(self, split: str, preprocess: ImagePreprocess, root: str | None, fraction: float):
        self.split, self.preprocess = split, preprocess
        self.labels = np.arange(self.counts[split], dtype=np.int64) % len(self.classes)

    def image(self, index: int) -> "Image":
        from PIL import Image

        generator = np.random.default_rng([list(self.counts).index(self.split), index])
        angle = math.radians(30 * int(self.labels[index]))
        height, width = self.preprocess.shape
        y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
        along = x * math.cos(angle) + y * math.sin(angle)
        wave = np.sin(2 * math.pi * (generator.uniform(3, 5) * along + generator.uniform()))
        values = 128 + 80 * wave + generator.normal(0, 20, wave.shape)
        return convert_image(Image.fromarray(values.clip(0, 255).astype(np.uint8)), self.preprocess.channels)

    def name(self, index: int) -> str:
        return f"synthetic/{self.split}/{index}"


class _FashionMNIST:
    """Fashion-MNIST's files as published, gzipped or not, in one folder (Xiao et al. 2017, arXiv:1708.07747). The last
    5,000 of its 60,000 training images are for validation."""

    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    held_out = 5000

    def __init__(self, split: str, preprocess: ImagePreprocess, root: str | None, fraction: float):
        self.split, self.preprocess = split, preprocess
        base, part = Path(root or "").expanduser(), "t10k" if split == "test" else "train"
        images, labels = (_idx(base / f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or len(images) != len(labels) or labels.max(initial=0) >= len(self.classes):
            raise ValueError(f"{base} does not hold Fashion-MNIST: {len(images)} images and {len(labels)} labels")
        kept = {"train": slice(-self.held_out), "val": slice(-self.held_out, None), "test": slice(None)}[split]
        self.images, self.labels = images[kept], labels[kept].astype(np.int64)
        if not len(self.labels):
            raise ValueError(f"{base} holds {len(labels)} images of Fashion-MNIST, too few for the split {split}")

    def image(self, index: int) -> "Image":
        return enlarged(self.images[index], self.preprocess)

    def name(self, index: int) -> str:
        return f"fashion_mnist/{self.split}/{index}"


def is_fashion_mnist(folder: Path) -> bool:
    """Whether a folder holds the test images of Fashion-MNIST; MNIST's files have the same names."""
    return any((folder / f"t10k-images-idx3-ubyte{end}").is_file() for end in ("", ".gz"))


_LARGEST = 1 << 28  # bytes read of a file that may claim any size; the largest of Fashion-MNIST has 47 MB


def _idx(path: Path) -> np.ndarray:
    """The bytes in a file of MNIST's format, gzipped if only that is there: big-endian sizes, then uint8 values."""
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(_LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from None
    axes = data[3] if len(data) > 3 else 0
    sizes = np.frombuffer(data[4 : 4 + 4 * axes], ">u4").astype(np.int64) if len(data) >= 4 + 4 * axes else [-1]
    if data[:3] != b"\0\0\x08" or not axes or len(data) != 4 + 4 * axes + math.prod(map(int, sizes)):
        raise ValueError(f"{path} is not a file of MNIST's format, or is truncated")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(*sizes)


def imagefolder(split: str, preprocess: ImagePreprocess, root: str | None, fraction: float) -> Source:
    base = Path(root or "").expanduser()
    if split == "test" and not (base / "test").exists():
        raise ValueError(f"{base} has no test folder; `validate` measures {base / 'val'}")
    train, folder = base / "train", base / split
    if split != "train" and not train.exists():
        train = folder  # evaluation needs no training images
    for place in (train, folder):
        if not place.is_dir():
            layout = "root/train/<class>/* and root/val/<class>/*"
            raise ValueError(f"{place} is not a folder; the layout of an imagefolder is {layout}")
    classes, found = _class_folders(train), _class_folders(folder)
    if not classes:
        raise ValueError(f"{train} has no class folders; put the images of each class into {train}{os.sep}<class>")
    if found != classes:
        missing = sorted(set(classes) - set(found))
        extra = sorted(set(found) - set(classes))
        lists = {"without": missing, "with": extra}
        differ = ", ".join(f"{word} {_few(names)}" for word, names in lists.items() if names)
        raise ValueError(f"the classes of {folder} differ from those of {train}: {differ}")
    numbers = {name: label for label, name in enumerate(classes)}
    listed, omitted = files_below(folder, is_image)
    if omitted:
        count = f"{len(omitted)} link{'s' * (len(omitted) > 1)} to files already used"
        rank_zero_warn(plain(f"{folder}: omitted {count} (such as {omitted[0]})"))
    samples: list[tuple[str, int]] = []
    for place, names in listed.items():
        inside = Path(place).relative_to(folder).parts
        if inside and inside[0] in numbers:
            samples += [(os.path.join(place, name), numbers[inside[0]]) for name in names]
    samples.sort(key=lambda sample: (sample[1], os.path.split(sample[0])))
    empty = sorted(set(classes) - {classes[label] for _, label in samples})
    if empty:
        kinds = " ".join(EXTENSIONS)
        raise ValueError(f"{folder} has class folders without images of their own ({kinds}): {_few(empty)}")
    return Files(classes, samples, preprocess.channels)


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(EXTENSIONS)


def _class_folders(folder: Path) -> list[str]:
    home = os.path.realpath(folder)
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if os.path.isdir(entry.path) and not entry.name.startswith(".")]
    return sorted(entry.name for entry in found if not (entry.is_symlink() and leads_above(entry.path, home)))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


SOURCES: dict[str, Callable[[str, ImagePreprocess, str | None, float], Source]] = {
    "digits": _Digits,
    "fashion_mnist": _FashionMNIST,
    "imagefolder": imagefolder,
    "shards": Packed,
    "synthetic": _Synthetic,
}
