"""COCO's annotations of objects: as released, and beside their images."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.data.box_entries import SPLITS, BoxSource, Entry, Faults, Table, first_file, folder_at, read_text
from zoo.inputs.base import is_number
from zoo.outputs.label_map import LabelMap, is_id
from zoo.text import from_json, one_line


class Coco(BoxSource):
    """COCO as released: `root/annotations/instances_SPLIT.json` and images in `root/images/SPLIT`, `root/SPLIT` or
    `root/images`, where SPLIT may end in a year, as in `train2017`."""

    def __init__(self, root: str, split: str) -> None:
        base = folder_at(root)
        names = [f"{name}{year}" for name in SPLITS[split] for year in ("", "2017", "2014")]
        path = first_file([base / "annotations" / f"instances_{name}.json" for name in names], split)
        folders = [place for name in names for place in (base / "images" / name, base / name)]
        super().__init__(*_from_coco(path, [*folders, base / "images", base]))
        self.annotations = path


class CocoExport(BoxSource):
    """A COCO json beside its images: `root/SPLIT/_annotations.coco.json`, as Roboflow exports it."""

    def __init__(self, root: str, split: str) -> None:
        base = folder_at(root)
        path = first_file([base / name / "_annotations.coco.json" for name in SPLITS[split]], split)
        super().__init__(*_from_coco(path, [path.parent]))
        self.annotations = path


def _from_coco(path: Path, folders: Sequence[Path]) -> tuple[str, LabelMap, list[Entry], Table, Faults]:
    read = read_coco(path)
    faults = Faults()
    entries = _coco_images(read["images"], faults)
    folder = _folder_of([entry.path for entry in entries], folders, path)
    entries = [entry._replace(path=os.path.join(folder, entry.path)) for entry in entries]
    rows = {entry.id: row for row, entry in enumerate(entries)}
    listed = {each["id"] for each in read["images"] if isinstance(each, dict) and is_id(each.get("id"))}
    found = (each.get("category_id") for each in read["annotations"] if isinstance(each, dict))
    try:
        labels = LabelMap.from_coco(read["categories"], {id for id in found if is_id(id)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    categories = {id: index for index, (_, id) in enumerate(labels)}
    table, seen = Table("annotation"), set()
    table.given = len(read["annotations"])
    for number, each in enumerate(read["annotations"]):
        try:
            box, id, crowd, area = _coco_object(each, faults)
        except ValueError as error:
            faults.add("omitted", "malformed annotations", f"number {number}: {error}")
            continue
        image, category = each["image_id"], each["category_id"]
        if id in seen:
            faults.add("omitted", "annotations with the id of an earlier one", f"id {id}")
        elif image not in listed:
            faults.add("omitted", "annotations of images that are not listed", f"id {id} of image {image}")
        elif category not in categories:
            faults.add("omitted", "annotations of an unknown category", f"id {id} of category {category}")
        elif image in rows:
            table.add(rows[image], categories[category], box, id, crowd, area)
        seen.add(id)
    return str(path), labels, entries, table, faults


def read_coco(path: Path) -> dict[str, list[Any]]:
    """The images, annotations and categories of a COCO json; ValueError if one of them is no list."""
    try:
        read = from_json(read_text(path))
    except (ValueError, RecursionError) as error:
        said = str(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path} is not JSON: {one_line(error)}") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(read, dict) or not isinstance(read.get(name), list):
            raise ValueError(f"{path} is not a COCO json of objects: it has no list {name!r}")
    return read


def _coco_images(images: list[Any], faults: Faults) -> list[Entry]:
    found: list[Entry] = []
    for number, each in enumerate(images):
        try:
            found.append(_coco_image(each))
        except ValueError as error:
            faults.add("omitted", "malformed images", f"number {number}: {error}")
    for entry, times in Counter(found).items():
        if times > 1:
            faults.add("omitted", "repeated images", f"{entry.path}, id {entry.id}")
    unique = list(dict.fromkeys(found))
    times = Counter(entry.id for entry in unique)
    for entry in unique:
        if times[entry.id] > 1:
            faults.add("omitted", "images that share their id with another", f"{entry.path}, id {entry.id}")
    return [entry for entry in unique if times[entry.id] == 1]


def _coco_image(values: Any) -> Entry:
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, got {type(values).__name__}")
    id, name = values.get("id"), values.get("file_name")
    if not is_id(id):
        raise ValueError(f"id must be an integer >= 0, got {one_line(repr(id), 60)}")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"file_name must be a path, got {one_line(repr(name), 60)}")
    height, width = values.get("height"), values.get("width")
    if height is None and width is None:
        return Entry(name, id, None)
    if not (is_id(height) and is_id(width) and min(height, width) > 0):
        raise ValueError(f"height and width must be integers >= 1, got {one_line(repr((height, width)), 60)}")
    return Entry(name, id, (height, width))


def _coco_object(values: Any, faults: Faults) -> tuple[list[float], int, bool, float]:
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, got {type(values).__name__}")
    for name in ("id", "image_id", "category_id"):
        if not is_id(values.get(name)):
            raise ValueError(f"{name} must be an integer >= 0, got {one_line(repr(values.get(name)), 60)}")
    box, crowd, area = values.get("bbox"), values.get("iscrowd", 0), values.get("area")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_float(each) for each in box):
        raise ValueError(f"bbox must be 4 numbers, got {one_line(repr(box), 60)}")
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd must be 0 or 1, got {one_line(repr(crowd), 60)}")
    if area is not None and not (is_number(area) and area >= 0):
        said = f"{one_line(repr(area), 60)} of annotation {values['id']}"
        faults.add("replaced", "areas that are not numbers >= 0 by those of the boxes", said)
        area = None
    left, top, width, height = box
    return [left, top, left + width, top + height], values["id"], crowd == 1, math.nan if area is None else area


def _folder_of(names: list[str], folders: Sequence[Path], json: Path) -> Path:
    """The folder that has most of the images."""
    some = names[:100]
    counts = {folder: sum(os.path.isfile(folder / name) for name in some) for folder in folders if folder.is_dir()}
    best = max(counts, key=lambda folder: counts[folder], default=None)
    if best is None or (some and not counts[best]):
        example = f", such as {some[0]}" if some else ""
        raise ValueError(f"the images of {json}{example}, are in none of: {', '.join(map(str, folders))}")
    return best


def _is_float(value: object) -> bool:
    """A number that fits in a float; it may be NaN."""
    return isinstance(value, float) or isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
