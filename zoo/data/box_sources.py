"""Sources of images with objects: a class for each format of files, and generated shapes. `SOURCES` lists them."""

import contextlib
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data.box_entries import SPLITS, BoxSource, Entry, Faults, MissingSplit, Table, first_file, folder_at, read_text
from zoo.data.coco_sources import Coco, CocoExport
from zoo.data.packed_boxes import Packed
from zoo.data.shards import is_packed
from zoo.inputs.folders import files_below
from zoo.inputs.images import EXTENSIONS, convert_image
from zoo.outputs.label_map import LabelMap
from zoo.text import one_line, reason

if TYPE_CHECKING:
    from PIL.Image import Image


class Yolo(BoxSource):
    """YOLO's `data.yaml`, with `names` and the images of `train`, `val` and `test`: a folder, a text file that lists
    them, or several. The labels of `images/a.jpg` are in `labels/a.txt`, or beside the image.

    A line of labels is a category and the relative centre x, centre y, width and height of its box; or a category and
    the corners of a polygon, whose box is taken. An image without a label file has no objects. The ids of images
    count them from 1.
    """

    def __init__(self, root: str, split: str) -> None:
        path = Path(root).expanduser()
        path = path if path.is_file() else first_file([folder_at(root) / name for name in YAMLS], "data.yaml")
        values = _yaml(path)
        try:
            labels = LabelMap.from_names(values.get("names"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if "nc" in values and values["nc"] != len(labels):
            raise ValueError(f"{path}: nc is {one_line(values['nc'], 60)}, but there are {len(labels)} names")
        faults = Faults()
        images = _yolo_images(path, values, split, faults)
        entries = [Entry(image, number, None) for number, image in enumerate(images, 1)]
        indices = {id: index for index, (_, id) in enumerate(labels)}
        table, texts = Table("line", relative=True), set()
        for row, image in enumerate(images):
            text = _labels_of(image)
            if text is None:
                faults.add("kept as background", "images without a label file", image)
                continue
            texts.add(text)
            for number, line in enumerate(read_text(text).splitlines(), 1):
                if not line.strip():
                    continue
                table.given += 1
                try:
                    category, box = _yolo_line(line)
                except ValueError as error:
                    faults.add("omitted", "malformed lines", f"{text}, line {number}: {error}")
                    continue
                if category in indices:
                    table.add(row, indices[category], box, number)
                else:
                    faults.add("omitted", "objects of an unknown category", f"{text}, line {number}: {category}")
        for folder in sorted({os.path.dirname(text) for text in texts}):
            for name in sorted(os.listdir(folder)):
                orphan = os.path.join(folder, name)
                if name.endswith(".txt") and name != "classes.txt" and orphan not in texts and not _image_of(orphan):
                    faults.add("omitted", "label files without an image", orphan)
        if images and not texts:
            looked = " or ".join(_label_paths(images[0]))
            raise ValueError(f"{path}: no image of {split!r} has a label file; looked for {looked}, for example")
        super().__init__(f"{path} ({split})", labels, entries, table, faults)


class Voc(BoxSource):
    """Pascal VOC: `Annotations/NAME.xml`, `JPEGImages/NAME.jpg`, and a split's names in `ImageSets/Main/SPLIT.txt`; or,
    as Roboflow exports it, both files of an image in the folder `SPLIT`.

    Pixels are counted from 1. In the challenge both corners belong to the box; in an export the right and bottom edges
    are those behind it, so that its boxes are those of the COCO export. Objects marked difficult are crowds here. The
    categories are those of `classes.txt`, one name a line, or else all names in the annotations in alphabetical order;
    their ids count them from 1, and so do those of images.
    """

    def __init__(self, root: str, split: str) -> None:
        base = folder_at(root)
        listed, stems, notes, pictures = _voc_places(base, split)
        behind = int(notes == pictures)
        faults = Faults()
        images = {os.path.splitext(name)[0]: name for name in sorted(os.listdir(pictures)) if is_image(name)}
        labels = _voc_labels(base, notes)
        entries, table = [], Table("object")
        for stem in _once(stems, "repeated names", faults):
            path = notes / f"{stem}.xml"
            try:
                tree = _xml(path)
                if tree.tag != "annotation":
                    raise ValueError(f"{path}: its outermost element must be annotation, got {one_line(tree.tag, 60)}")
                size = _voc_size(tree)
            except ValueError as error:
                kind = "unreadable annotations" if path.exists() else "missing annotations"
                faults.add("omitted", kind, str(error))
                continue
            for number, each in enumerate(tree.findall("object"), 1):
                table.given += 1
                try:
                    name, box, difficult = _voc_object(each, behind)
                except ValueError as error:
                    faults.add("omitted", "malformed objects", f"{path}, object {number}: {error}")
                    continue
                if name in labels.names:
                    table.add(len(entries), labels.index_of_name(name), box, number, difficult)
                else:
                    said = f"{path}, object {number}: {one_line(repr(name), 60)}"
                    faults.add("omitted", "objects of an unknown category", said)
            image = str(pictures / images.get(stem, f"{stem}.jpg"))
            entries.append(Entry(image, len(entries) + 1, size))
        super().__init__(str(listed), labels, entries, table, faults)


class Shapes(BoxSource):
    """Generated images of 64 to 96 pixels a side with up to four rectangles, ellipses and triangles of random colour on
    noise; one image in sixteen has none. `root` is not used."""

    counts = {"train": 256, "val": 64, "test": 64}

    def __init__(self, root: str, split: str) -> None:
        self.place, self.labels = f"shapes ({split})", LabelMap.from_names(("rectangle", "ellipse", "triangle"), 1)
        self.split, drawn, table = (
            split,
            _all_drawn(list(self.counts).index(split), self.counts[split]),
            Table("object"),
        )
        self.images = [values for values, _ in drawn]
        for row, (_, objects) in enumerate(drawn):
            for number, (label, box) in enumerate(objects, 1):
                table.add(row, label, box, number)
        self.ids = np.arange(1, len(self.images) + 1)
        self.sizes = np.array([values.shape[:2] for values in self.images], dtype=np.int64)
        self._fill(np.arange(len(self.images)), table, Faults())

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def image(self, index: int, channels: int = 3) -> "Image":
        from PIL import Image

        return convert_image(Image.fromarray(self.images[index]), channels)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(EXTENSIONS)


def _yaml(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {one_line(error, 150)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping with names, train and val")
    return values


def _yolo_images(path: Path, values: dict[Any, Any], split: str, faults: Faults) -> list[str]:
    """The paths of a split's images."""
    given = next((values[name] for name in SPLITS[split] if values.get(name) is not None), None)
    if given is None:
        raise MissingSplit(f"{path} has no {split!r}, the folder of its images")
    listed = given if isinstance(given, list) else [given]
    home = values.get("path")
    if not all(isinstance(each, str) and "\0" not in each for each in [*listed, home or ""]):
        raise ValueError(f"{path}: path and {split} must be paths of folders or of text files that list images")
    bases = [path.parent / home, path.parent] if home else [path.parent]
    images: list[str] = []
    for each in listed:
        # Exports say ../train/images where they mean train/images.
        names = [each, each.removeprefix("../")] if each.startswith("../") else [each]
        looked = [Path(os.path.normpath(base / name)) for base in bases for name in names]
        place = next((one for one in looked if one.exists()), None)
        if place is None:
            raise ValueError(
                f"{path}: the images of {split!r} were not found; looked for {', '.join(map(str, looked))}"
            )
        if place.is_dir():
            found, links = files_below(place, is_image)
            images += [os.path.join(folder, name) for folder, names in found.items() for name in names]
            for link in links:
                faults.add("omitted", "links to files already used", link)
        else:
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip() and "\0" not in line]
            images += [os.path.normpath(place.parent / line) for line in lines]
    return _once(images, "repeated images", faults)


def _once(values: list[str], kind: str, faults: Faults) -> list[str]:
    """The values without repetitions, which are faults."""
    for value, times in Counter(values).items():
        if times > 1:
            faults.add("omitted", kind, value)
    return list(dict.fromkeys(values))


def _label_paths(image: str) -> list[str]:
    """Where the labels of an image may be."""
    stem = os.path.splitext(image)[0]
    head, found, tail = stem.rpartition(f"{os.sep}images{os.sep}")
    beside = [f"{head}{os.sep}labels{os.sep}{tail}.txt"] if found else []
    return [*beside, f"{stem}.txt"]


def _labels_of(image: str) -> str | None:
    return next((path for path in _label_paths(image) if os.path.isfile(path)), None)


def _image_of(text: str) -> bool:
    """Whether a label file has an image, in this split or another."""
    stem = os.path.splitext(text)[0]
    head, found, tail = stem.rpartition(f"{os.sep}labels{os.sep}")
    stems = [stem, f"{head}{os.sep}images{os.sep}{tail}"] if found else [stem]
    return any(os.path.exists(f"{each}{extension}") for each in stems for extension in EXTENSIONS)


def _yolo_line(line: str) -> tuple[int, list[float]]:
    """A category and the relative left, top, right and bottom of a box."""
    words = line.split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"must be numbers, got {one_line(repr(line), 60)}") from None
    if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
        raise ValueError(f"must have 5 numbers, or 7 or more of a polygon, got {len(numbers)}")
    if not (math.isfinite(numbers[0]) and numbers[0].is_integer() and 0 <= numbers[0] < 2**31):
        raise ValueError(f"must begin with the number of a category, got {one_line(repr(words[0]), 60)}")
    x, y = numbers[1::2], numbers[2::2]
    if len(numbers) > 5:
        finite = all(map(math.isfinite, numbers))
        return int(numbers[0]), [min(x), min(y), max(x), max(y)] if finite else [math.nan] * 4
    (left, width), (top, height) = x, y
    return int(numbers[0]), [left - width / 2, top - height / 2, left + width / 2, top + height / 2]


def _voc_places(base: Path, split: str) -> tuple[Path, list[str], Path, Path]:
    """What lists the images of a split, their names without extension, and the folders of annotations and images."""
    if beside := [base / name for name in SPLITS[split] if any((base / name).glob("*.xml"))]:
        names = (os.path.splitext(name) for name in os.listdir(beside[0]) if is_image(name) or name.endswith(".xml"))
        return beside[0], sorted({stem for stem, _ in names}), beside[0], beside[0]
    sets = base / "ImageSets" / "Main"
    try:
        listed = first_file([sets / f"{name}.txt" for name in SPLITS[split]], split)
    except ValueError as error:
        raise MissingSplit(f"{error}, {', '.join(str(base / name / '*.xml') for name in SPLITS[split])}") from None
    places = (base / "Annotations", base / "JPEGImages")
    for place in places:
        if not place.is_dir():
            raise ValueError(f"{place} is not a folder; Pascal VOC has Annotations, JPEGImages and ImageSets/Main")
    return listed, [line.strip() for line in read_text(listed).splitlines() if line.strip()], *places


def _voc_labels(base: Path, notes: Path) -> LabelMap:
    path = base / "classes.txt"
    if path.is_file():
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        path = notes
        folders = {notes, *(base / name for each in SPLITS.values() for name in each)}
        names = sorted({name for folder in folders for name in _voc_names(folder)})
    try:
        return LabelMap.from_names(names, 1)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _voc_names(folder: Path) -> Iterator[str]:
    for path in folder.glob("*.xml"):
        with contextlib.suppress(ValueError):  # reported with its split
            yield from (name for name in (_text(each, "name") for each in _xml(path).findall("object")) if name)


def _xml(path: Path) -> Any:
    """The root of an XML file without declared entities; ValueError with the file and the reason."""
    from defusedxml.ElementTree import fromstring

    try:
        return fromstring(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {reason(error)}") from error
    except Exception as error:  # a parse error, a forbidden entity, an unknown encoding
        raise ValueError(f"{path} is not safe XML: {one_line(error, 100)}") from error


def _text(element: Any, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _voc_size(tree: Any) -> tuple[int, int] | None:
    sides = [_text(tree, f"size/{name}") for name in ("height", "width")]
    if not all(side.isascii() and side.isdigit() and 0 < int(side) < 2**31 for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def _voc_object(element: Any, behind: int) -> tuple[str, list[float], bool]:
    name, corners = _text(element, "name"), []
    if not name:
        raise ValueError("it has no name")
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(element, f"bndbox/{corner}")
        try:
            corners.append(float(text))
        except ValueError:
            raise ValueError(f"{corner} must be a number, got {one_line(repr(text), 60)}") from None
    left, top, right, bottom = corners
    return name, [left - 1, top - 1, right - behind, bottom - behind], _text(element, "difficult") == "1"


Drawing = tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]


@functools.cache
def _all_drawn(seed: int, count: int) -> list[Drawing]:
    return [_drawn(np.random.default_rng([seed, row])) for row in range(count)]


def _drawn(generator: np.random.Generator) -> Drawing:
    """An image uint8 [H, W, 3], and the label and box of each object."""
    from PIL import Image, ImageDraw

    height, width = generator.integers(64, 97, 2).tolist()
    values = generator.integers(0, 256, 3) * 0.5 + generator.normal(64, 16, (height, width, 3))
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(0 if generator.integers(16) == 0 else generator.integers(1, 5)):
        label = int(generator.integers(3))
        high, wide = (generator.uniform(0.2, 0.45, 2) * (height, width)).astype(int).tolist()
        top, left = int(generator.integers(0, height - high)), int(generator.integers(0, width - wide))
        box = (left, top, left + wide, top + high)
        if any(_touch(box, other) for _, other in objects):
            continue
        mask = Image.new("L", (width, height))
        draw, corners = ImageDraw.Draw(mask), (left, top, left + wide - 1, top + high - 1)
        if label == 0:
            draw.rectangle(corners, fill=255)
        elif label == 1:
            draw.ellipse(corners, fill=255)
        else:
            peak = left + int(generator.integers(wide))
            draw.polygon([(peak, top), (left, corners[3]), (corners[2], corners[3])], fill=255)
        colour = generator.integers(0, 256, 3) * 0.5 + generator.choice([0, 128], 3)
        values = np.where(np.asarray(mask)[..., None] > 0, colour + generator.normal(0, 8, values.shape), values)
        found = mask.getbbox()
        assert found is not None
        objects.append((label, found))
    return values.clip(0, 255).astype(np.uint8), objects


def _touch(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def recognised(root: str) -> str:
    """The name in `SOURCES` of the format of a folder, from what is in it; ValueError if it is none of them."""
    base = Path(root).expanduser()
    if is_packed(root):
        return "shards"
    if not base.exists():
        raise ValueError(f"folder not found: {base}")
    splits = [base / name for names in SPLITS.values() for name in names]
    signs = [
        ("yolo", base.is_file() or any((base / name).is_file() for name in YAMLS)),
        ("voc", (base / "Annotations").is_dir() and (base / "JPEGImages").is_dir()),
        ("coco", (base / "annotations").is_dir()),
        ("coco_export", any(base.glob("*/_annotations.coco.json"))),
        ("voc", any(path for split in splits for path in split.glob("*.xml"))),
    ]
    for name, found in signs:
        if found:
            return name
    wanted = "data.yaml, Annotations and JPEGImages, annotations/*.json, */_annotations.coco.json, or train/*.xml"
    raise ValueError(f"no COCO, YOLO or Pascal VOC annotations in {base}; it needs {wanted}")


YAMLS = ("data.yaml", "data.yml", "dataset.yaml")
SOURCES: dict[str, Callable[[str, str], BoxSource]] = {
    "coco": Coco,
    "coco_export": CocoExport,
    "yolo": Yolo,
    "voc": Voc,
    "shards": Packed,
    "shapes": Shapes,
}
