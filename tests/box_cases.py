"""A small data set of objects, written in each format of files, and drawn shapes to augment."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from zoo.data.box_entries import BoxSource
from zoo.data.boxes import BoxDataset, Boxes

NAMES = ("bird", "cat", "dog")
# For each image: name, (height, width), and its objects: index of a category, (left, top, right, bottom), crowd.
IMAGES: list[tuple[str, tuple[int, int], list[tuple[int, tuple[int, int, int, int], bool]]]] = [
    ("a", (20, 40), [(0, (4, 2, 14, 12), False), (2, (20, 0, 40, 20), False)]),
    ("b", (30, 24), [(1, (0, 0, 12, 6), False), (1, (6, 10, 24, 30), True)]),
    ("c", (16, 16), []),
]


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, size, _) in enumerate(IMAGES):
        values = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{name}.png")


def coco(ids: Sequence[int] = (1, 2, 3), parent: int | None = None) -> dict[str, Any]:
    """The COCO json; with a parent category of that id if one is given."""
    images, annotations = [], []
    categories = [{"id": id, "name": name, "supercategory": "animal"} for id, name in zip(ids, NAMES, strict=True)]
    if parent is not None:
        categories.append({"id": parent, "name": "animal", "supercategory": "none"})
    for number, (name, (height, width), objects) in enumerate(IMAGES):
        images.append({"id": 10 * number + 10, "file_name": f"{name}.png", "height": height, "width": width})
        for label, (left, top, right, bottom), crowd in objects:
            box = [left, top, right - left, bottom - top]
            each = {"id": len(annotations) + 1, "image_id": 10 * number + 10, "category_id": ids[label], "bbox": box}
            annotations.append(each | {"area": box[2] * box[3], "iscrowd": int(crowd)})
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, values: dict[str, Any] | None = None, split: str = "train") -> Path:
    write_images(root / "images" / split)
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco() if values is None else values))
    return path


def write_export(root: Path, values: dict[str, Any] | None = None, split: str = "train") -> Path:
    write_images(root / split)
    path = root / split / "_annotations.coco.json"
    path.write_text(json.dumps(coco() if values is None else values))
    return path


def write_yolo(root: Path, ids: Sequence[int] = (0, 1, 2), split: str = "train") -> Path:
    write_images(root / "images" / split)
    (root / "labels" / split).mkdir(parents=True)
    for name, (height, width), objects in IMAGES:
        lines = []
        for label, (left, top, right, bottom), _ in objects:
            x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
            lines.append(f"{ids[label]} {x:.8f} {y:.8f} {(right - left) / width:.8f} {(bottom - top) / height:.8f}\n")
        (root / "labels" / split / f"{name}.txt").write_text("".join(lines))
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({split: f"images/{split}", "names": dict(zip(ids, NAMES, strict=True))}))
    return path


def write_xml(folder: Path, behind: int = 0) -> None:
    """Pascal VOC's annotations; right and bottom are the last pixels of a box, or `behind` pixels further."""
    folder.mkdir(exist_ok=True)
    for name, (height, width), objects in IMAGES:
        text = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        for label, (left, top, right, bottom), crowd in objects:
            corners = f"<xmin>{left + 1}</xmin><xmax>{right + behind}</xmax>"
            corners += f"<ymin>{top + 1}</ymin><ymax>{bottom + behind}</ymax>"
            text += f"<object><name>{NAMES[label]}</name><difficult>{int(crowd)}</difficult>"
            text += f"<bndbox>{corners}</bndbox></object>"
        (folder / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")


def write_voc(root: Path, split: str = "train") -> Path:
    write_images(root / "JPEGImages")
    write_xml(root / "Annotations")
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name, _, _ in IMAGES))
    return path


def write_voc_export(root: Path, split: str = "train") -> Path:
    """As Roboflow exports it."""
    write_images(root / split)
    write_xml(root / split, behind=1)
    return root / split


def check(source: BoxSource, crowd: bool = True) -> None:
    """The source holds the objects of `IMAGES`."""
    assert source.labels.names == NAMES and len(source) == len(IMAGES)
    assert [Path(source.name(index)).stem for index in range(3)] == ["a", "b", "c"]
    for index, (_, size, wanted) in enumerate(IMAGES):
        found = source.objects(index)
        assert tuple(source.sizes[index]) == size and found.boxes.shape == (len(wanted), 4)
        assert found.labels.tolist() == [label for label, _, _ in wanted]
        if wanted:
            np.testing.assert_allclose(found.boxes, [box for _, box, _ in wanted], atol=1e-5)
        assert found.crowd.tolist() == [crowd and many for _, _, many in wanted]
        np.testing.assert_allclose(
            found.area, [(box[2] - box[0]) * (box[3] - box[1]) for _, box, _ in wanted], rtol=1e-5
        )
        assert np.asarray(source.image(index)).shape == (*size, 3)


OFF: dict[str, Any] = {"flip": 0.0, "photometric": 0.0, "zoom": 0.0, "iou_crop": 0.0}
UNIT: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}


def drawn(dataset: BoxDataset, epoch: int, index: int) -> tuple[Tensor, Tensor, list[int]]:
    """The image, boxes and labels of one sample."""
    batch = dataset[epoch, index]
    assert batch.truth.valid.all()
    return batch.images[0], batch.truth.boxes[0], batch.truth.labels[0].tolist()


def shapes(**options: Any) -> Any:
    return Boxes(**({"size": 64} | UNIT | OFF | options)).train_dataloader().dataset
