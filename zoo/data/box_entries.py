"""Images with objects, whatever the format of their files: what is checked, and how faults are reported."""

import copy
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from zoo.data.fingerprint import fingerprint
from zoo.data.headers import measured
from zoo.inputs.images import UnreadableImage, image_size, read_image
from zoo.outputs.label_map import LabelMap
from zoo.text import one_line, plain, reason

if TYPE_CHECKING:
    from PIL.Image import Image

ROUNDING = 0.02  # pixels by which a box may reach over the edge without being reported

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""The names of a split in files and folders."""


class Objects(NamedTuple):
    """The objects of one image. A crowd is a region with many objects of a class: it is not trained on, and detections
    in it count neither as right nor as wrong."""

    labels: np.ndarray  # [N] int64, the index of a category
    boxes: np.ndarray  # [N, 4] float64, (left, top, right, bottom) in pixels of the upright image
    crowd: np.ndarray  # [N] bool
    area: np.ndarray  # [N] float64, square pixels
    ids: np.ndarray  # [N] int64, as in the file


class Entry(NamedTuple):
    """An image as its file of annotations states it."""

    path: str
    id: int
    size: tuple[int, int] | None  # height and width in pixels; None if they are not stated


class Faults:
    """What is wrong with the files of a data set, by what is done about it and by kind."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, list[str]]] = {}

    def add(self, verb: str, kind: str, example: str) -> None:
        """One more fault; the example names its file and id."""
        self.kinds.setdefault(verb, {}).setdefault(kind, []).append(example)

    def report(self, place: str) -> None:
        """Warns in one line."""
        parts = []
        for verb, kinds in self.kinds.items():
            counts = [f"{len(names)} {kind} (such as {names[0]})" for kind, names in kinds.items()]
            parts.append(f"{verb} {', '.join(counts)}")
        if parts:
            rank_zero_warn(plain(f"{place}: {'; '.join(parts)}"))

    @property
    def first(self) -> str:
        """An omitted item and why, to follow an error; nothing if nothing was omitted."""
        for kind, names in self.kinds.get("omitted", {}).items():
            return f"; omitted {len(names)} {kind} (such as {names[0]})"
        return ""


class Table:
    """The objects of all images, row by row, before they are checked."""

    def __init__(self, word: str, relative: bool = False) -> None:
        self.word, self.relative = word, relative  # how a message calls an object; whether boxes are in 0..1
        self.given = 0  # objects in the files, malformed ones too
        self.rows: list[int] = []  # index of the entry
        self.labels: list[int] = []
        self.boxes: list[Sequence[float]] = []  # left, top, right, bottom
        self.crowd: list[bool] = []
        self.areas: list[float] = []  # NaN for that of the box
        self.ids: list[int] = []

    def add(
        self, row: int, label: int, box: Sequence[float], id: int, crowd: bool = False, area: float = math.nan
    ) -> None:
        self.rows.append(row)
        self.labels.append(label)
        self.boxes.append(box)
        self.crowd.append(crowd)
        self.areas.append(area)
        self.ids.append(id)


class BoxSource:
    """Images with objects, before any transform, in a fixed order.

    Images are omitted if their file is missing or is not an image, or if its size (upright, as its EXIF says) is not
    the stated one; objects if their box is NaN or infinite, empty, or outside the image. Boxes that reach over the edge
    are clipped. All this is reported in one warning.

    Args:
        place: the file or folder of the annotations, for messages.
        labels: the categories.
        entries: the images; each path once, each id once.
        table: their objects.
        faults: those found so far.

    Attributes:
        ids: the ids of the images, int64 [N].
        sizes: their height and width in pixels, int64 [N, 2].

    Raises:
        ValueError: no image is left, or there were objects and none is left.
    """

    def __init__(self, place: str, labels: LabelMap, entries: Sequence[Entry], table: Table, faults: Faults) -> None:
        self.place, self.labels = place, labels
        sizes = _sizes([entry.path for entry in entries])
        fits = [_fits(entry, size, faults) for entry, size in zip(entries, sizes, strict=True)]
        kept = np.array(fits, dtype=bool)
        # Arrays of bytes and numbers: worker processes share them, where lists of objects would be copied.
        self.paths = np.array([os.fsencode(entry.path) for entry, keep in zip(entries, kept, strict=True) if keep])
        self.ids = np.array([entry.id for entry, keep in zip(entries, kept, strict=True) if keep], dtype=np.int64)
        self.sizes = sizes[kept].astype(np.int64)
        if not len(self.ids):
            raise ValueError(plain(f"{place}: no image can be used{faults.first}"))
        where = np.where(kept, np.cumsum(kept) - 1, -1)  # from the index of an entry to that of a kept one
        self._fill(where, table, faults)
        faults.report(place)
        self.fingerprint = fingerprint(self.paths, self.sizes, self.starts, self.labels_of, self.boxes, self.crowd)
        if table.given and not len(self.labels_of):
            raise ValueError(plain(f"{place}: none of its {table.given} objects can be used{faults.first}"))

    def _fill(self, where: np.ndarray, table: Table, faults: Faults) -> None:
        rows = where[np.array(table.rows, dtype=np.int64)]
        at = np.flatnonzero(rows >= 0)
        at = at[np.argsort(rows[at], kind="stable")]
        rows = rows[at]
        boxes = np.array(table.boxes, dtype=np.float64).reshape(-1, 4)[at]
        limits = np.tile(self.sizes[rows][:, ::-1], 2).astype(np.float64)  # width, height, width, height
        if table.relative:
            with np.errstate(over="ignore"):  # what becomes infinite is reported below
                boxes = boxes * limits
        finite = np.all(np.isfinite(boxes), axis=1)
        boxes = np.where(finite[:, None], boxes, 0.0)
        empty = finite & (boxes[:, 2:] <= boxes[:, :2]).any(1)
        clipped = boxes.clip(0.0, limits)
        outside = finite & ~empty & (clipped[:, 2:] <= clipped[:, :2]).any(1)
        good = finite & ~empty & ~outside
        over = good & (np.abs(clipped - boxes).max(1, initial=0.0) > ROUNDING)
        ids = np.array(table.ids, dtype=np.int64)[at]
        for verb, kind, mask in (
            ("omitted", "boxes that are NaN or infinite", ~finite),
            ("omitted", "boxes of zero or negative width or height", empty),
            ("omitted", "boxes outside their image", outside),
            ("clipped", "boxes that reach over the edge of their image", over),
        ):
            for index in np.flatnonzero(mask).tolist():
                faults.add(verb, kind, f"{table.word} {ids[index]} of {self.name(rows[index])}")
        areas = np.array(table.areas, dtype=np.float64)[at]
        areas = np.where(np.isnan(areas), np.prod(clipped[:, 2:] - clipped[:, :2], axis=1), areas)
        self.labels_of = np.array(table.labels, dtype=np.int64)[at][good]
        self.boxes, self.areas, self.object_ids = clipped[good], areas[good], ids[good]
        self.crowd = np.array(table.crowd, dtype=bool)[at][good]
        self.starts = np.searchsorted(rows[good], np.arange(len(self.ids) + 1))

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        """The path of an image, or its name if it is not a file."""
        return os.fsdecode(self.paths[index])

    def image(self, index: int, channels: int = 3) -> "Image":
        """A PIL image of mode "RGB" or "L"; raises UnreadableImage."""
        image = read_image(self.name(index), channels, self.content(index))
        if (found := (image.height, image.width)) != (wanted := tuple(self.sizes[index].tolist())):
            raise UnreadableImage(f"{self.name(index)}: {_by(found)} pixels, but {_by(wanted)} in its header")
        return image

    def content(self, index: int) -> bytes | None:
        """The bytes of an image file; None to read them from the path. Raises UnreadableImage."""
        return None

    def objects(self, index: int) -> Objects:
        """The objects of an image, crowds included."""
        part = slice(self.starts[index], self.starts[index + 1])
        return Objects(
            self.labels_of[part], self.boxes[part], self.crowd[part], self.areas[part], self.object_ids[part]
        )


def relabelled(source: BoxSource, labels: LabelMap) -> BoxSource:
    """The source with the categories of a checkpoint, found by name; those that it lacks have no objects.

    Raises:
        ValueError: an object's category is none of them.
    """
    own = source.labels
    if own.names == labels.names:
        return source
    used = [own.names[index] for index in np.unique(source.labels_of)]
    if strange := [name for name in used if name not in labels.names]:
        known = one_line(", ".join(labels.names))
        raise ValueError(plain(f"{source.place}: the checkpoint knows no category {strange[0]!r}; it knows: {known}"))
    found = copy.copy(source)
    ids, spare = dict(own), itertools.count(max(own.ids) + 1)
    found.labels = LabelMap(labels.names, tuple(ids[name] if name in ids else next(spare) for name in labels.names))
    places = np.array([labels.names.index(name) if name in labels.names else -1 for name in own.names])
    found.labels_of = places[source.labels_of]
    return found


def _sizes(paths: list[str]) -> np.ndarray:
    """The height and width of each image, float64 [N, 2]; NaN if it is unreadable."""

    def size(path: str) -> tuple[float, float]:
        try:
            return image_size(path)
        except UnreadableImage:
            return math.nan, math.nan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken metadata
        return measured(paths, size, "image sizes", (2,))


def _fits(entry: Entry, size: np.ndarray, faults: Faults) -> bool:
    if np.isnan(size).any():
        try:
            image_size(entry.path)
            why = f"{entry.path}, which changes"
        except UnreadableImage as error:
            why = one_line(error)
        missing = not os.path.exists(entry.path)
        faults.add("omitted", "missing image files" if missing else "unreadable images", entry.path if missing else why)
        return False
    found = (int(size[0]), int(size[1]))
    if entry.size is not None and entry.size != found:
        said = f"{entry.path}, id {entry.id}, {_by(found)}, not {_by(entry.size)}"
        faults.add("omitted", "images whose height and width differ from the stated ones", said)
        return False
    return True


def _by(size: Any) -> str:
    return f"{size[0]} x {size[1]}"


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8; ValueError with the file and the reason."""
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{os.fspath(path)}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: {reason(error)}") from error


def folder_at(root: str) -> Path:
    """The folder of a data set; ValueError if it is not one."""
    base = Path(root).expanduser()
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder")
    return base


class MissingSplit(ValueError):
    """A data set does not have a split."""


def first_file(paths: Iterable[Path], split: str) -> Path:
    """The first path that is a file; MissingSplit lists them if none is."""
    looked = list(paths)
    for path in looked:
        if path.is_file():
            return path
    raise MissingSplit(f"split {split!r} not found; looked for {', '.join(map(str, looked))}")
