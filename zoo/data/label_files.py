"""Files that give the labels of images: a line per image, a table, or the sets of labels of ImageNet ReaL."""

import csv
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from zoo.inputs.images import EXTENSIONS
from zoo.text import from_json, one_line, plain, reason

IMAGE, LABEL = (
    ("imageid", "image_id", "image", "filename", "file_name", "file", "path", "name", "id"),
    (
        "label",
        "predictionstring",
        "class",
        "classid",
        "wnid",
        "synset",
        "target",
    ),
)


class Given(NamedTuple):
    """A label of an image as its file has it: names or numbers of classes, any of which is right."""

    labels: tuple[str, ...]
    line: str  # where it is, for errors, such as "line 7"


class LabelFile(NamedTuple):
    """The labels in a file: `by_name`, by the images' names without folder and extension; or `in_order` of the images.
    Where `sets`, an image may have several labels or none."""

    path: Path
    by_name: dict[str, Given]
    in_order: list[Given]
    sets: bool = False

    def of(self, images: list[str]) -> list[Given | None]:
        """The labels of images, given by their paths in order; None for an image that the file omits.

        Images named as ILSVRC2012_val_00000001.JPEG have their number's line.

        Raises:
            ValueError: the file has another number of lines, or two images have the same name.
        """
        stems = [stem_of(image) for image in images]
        if self.by_name:
            twice, times = Counter(stems).most_common(1)[0]
            if times > 1:
                raise ValueError(plain(f"two images are called {twice}, so {self.path} cannot tell them apart"))
            return [self.by_name.get(stem) for stem in stems]
        numbers = [re.fullmatch(r"ILSVRC2012_(?:val|test)_(\d{8})", stem) for stem in stems]
        if all(numbers):
            places = [int(each[1]) - 1 for each in numbers if each]
            if max(places) >= len(self.in_order) or min(places) < 0:
                most = len(self.in_order)
                raise ValueError(f"{self.path} has labels of {most:,} images, but there is image {max(places) + 1:,}")
            return [self.in_order[place] for place in places]
        if len(images) != len(self.in_order):
            raise ValueError(f"{self.path} has {len(self.in_order):,} labels, but there are {len(images):,} images")
        return [*self.in_order]


def stem_of(path: str) -> str:
    """The name of an image without folder, and without extension if it is one of an image."""
    name = path.replace("\\", "/").rpartition("/")[2]
    stem, dot, extension = name.rpartition(".")
    return stem if dot and f".{extension.lower()}" in EXTENSIONS else name


def read_labels(path: Path) -> LabelFile:
    """The labels in a file: a text with `IMAGE LABEL` or only `LABEL` per line; a CSV with a header, such as
    `ImageId,label`; or JSON, a list with the labels of each image or an object by image.

    Raises:
        ValueError: the file cannot be read, or a line is not as the others.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: {reason(error)}") from error
    readers = {".json": _from_json, ".csv": _from_csv}
    try:
        found = readers.get(path.suffix.lower(), _from_lines)(path, text)
    except csv.Error as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not found.by_name and not found.in_order:
        raise ValueError(f"{path} has no labels")
    return found


def _from_lines(path: Path, text: str) -> LabelFile:
    found = LabelFile(path, {}, [])
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        image, label = " ".join(parts[:-1]), Given((parts[-1],), f"line {number}")
        if bool(image) != bool(found.by_name) and (found.by_name or found.in_order):
            raise ValueError(f"{path}, line {number}: must be like the first line, got {one_line(line, 60)!r}")
        if image:
            _add(found, image, label)
        else:
            found.in_order.append(label)
    return found


def _add(found: LabelFile, image: str, label: Given) -> None:
    if found.by_name.setdefault(stem_of(image), label) is not label:
        raise ValueError(plain(f"{found.path}, {label.line}: {image} has a label already"))


def _from_csv(path: Path, text: str) -> LabelFile:
    rows = csv.reader(text.splitlines())
    header = [cell.strip().lower() for cell in next(rows, [])]
    places = [[header.index(name) for name in names if name in header] for names in (IMAGE, LABEL)]
    if not all(places):
        raise ValueError(
            f"{path}: the header must name image and label, such as ImageId,label; got {','.join(header)!r}"
        )
    (image, *_), (label, *_) = places
    found = LabelFile(path, {}, [])
    for row in rows:
        if not row:
            continue
        where = f"line {rows.line_num}"
        if len(row) <= max(image, label) or not row[image].strip() or not row[label].strip():
            raise ValueError(f"{path}, {where}: must have an image and a label, got {one_line(','.join(row), 60)!r}")
        given = row[label].strip()
        if header[label] == "predictionstring":  # a class, then boxes
            given = given.split()[0]
        _add(found, row[image].strip(), Given((given,), where))
    return found


def _from_json(path: Path, text: str) -> LabelFile:
    try:
        values = from_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(values, list | dict):
        raise ValueError(f"{path}: must be a list with the labels of each image, or an object by image")
    entries: list[Any] = [*(values.items() if isinstance(values, dict) else enumerate(values))]
    sets = any(isinstance(each, list) for _, each in entries)
    found = LabelFile(path, {}, [], sets)
    for key, each in entries:
        given = each if isinstance(each, list) else [each]
        if not all(isinstance(one, int | str) and not isinstance(one, bool) for one in given):
            raise ValueError(f"{path}, entry {key}: labels must be numbers or names, got {one_line(repr(each), 60)}")
        label = Given(tuple(map(str, given)), f"entry {key}")
        if isinstance(values, dict):
            _add(found, key, label)
        else:
            found.in_order.append(label)
    return found
