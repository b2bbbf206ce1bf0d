"""What `zoo shard` finds in a folder: its kind of data, its splits, and their files in a random order."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.data.image_sources import imagefolder
from zoo.data.packing import Split
from zoo.data.strings import Strings
from zoo.inputs.images import ImagePreprocess
from zoo.text import one_line

SEED = 0


class Layout(NamedTuple):
    """Data to pack; `ids` are the numbers of the categories of boxes."""

    kind: str
    classes: list[str]
    ids: list[int]
    splits: list[Split]


def layout(folder: Path, wanted: Iterable[str] | None = None) -> Layout:
    """The data in a folder, all splits or the wanted ones.

    Raises:
        ValueError: the folder has none of the known layouts, a split is missing, or the data is invalid.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder} is empty")
    places = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    return _images(folder, _chosen(folder, places, wanted))


def _chosen(folder: Path, found: list[str], wanted: Iterable[str] | None) -> list[str]:
    chosen = found if wanted is None else list(dict.fromkeys(wanted))
    if missing := [name for name in chosen if name not in found]:
        raise ValueError(f"{folder} has no split {one_line(repr(missing[0]), 60)}; it has {', '.join(found)}")
    return chosen


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(count)


def _relative(paths: Iterable[str], folder: Path) -> Strings:
    start = os.path.join(folder, "")
    return Strings(path.removeprefix(start) for path in paths)


def _images(folder: Path, names: list[str]) -> Layout:
    splits, classes = [], []
    for name in names:
        source = imagefolder(name, ImagePreprocess(), str(folder), 0.0)
        order = _shuffled(len(source.labels))
        paths, labels, classes = source.paths[order], source.labels[order], source.classes
        decoded = Strings(map(os.fsdecode, paths))
        splits.append(
            Split(name, decoded, _relative(map(os.fsdecode, paths), folder), {"label": labels}, Classes(labels))
        )
    return Layout("images", classes, [], splits)


class Classes:
    """Beside an image, its class as WebDataset writes it."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels

    def __call__(self, number: int) -> dict[str, bytes]:
        return {"cls": b"%d" % self.labels[number]}
