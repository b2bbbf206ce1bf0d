import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from box_cases import (
    NAMES,
    check,
    coco,
    write_coco,
    write_export,
    write_images,
    write_voc,
    write_voc_export,
    write_yolo,
)
from zoo.data import headers
from zoo.data.box_sources import SOURCES, Coco, CocoExport, Shapes, Voc, Yolo, recognised

WRITERS: dict[str, Callable[[Path], Any]] = {
    "coco": write_coco,
    "coco_export": write_export,
    "yolo": write_yolo,
    "voc": write_voc,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_formats_give_the_same_objects(name: str, tmp_path: Path):
    WRITERS[name](tmp_path)
    check(SOURCES[name](str(tmp_path), "train"), crowd=name != "yolo")
    assert recognised(str(tmp_path)) == name


@pytest.mark.parametrize("parent", [None, 0, 99])
@pytest.mark.parametrize("ids", [(1, 2, 3), (5, 17, 90), (3, 5, 7)])
def test_ids_of_coco_do_not_change_indices(ids: tuple[int, int, int], parent: int | None, tmp_path: Path):
    write_coco(tmp_path / "one", coco(ids, parent))
    write_export(tmp_path / "two", coco(ids, parent))
    for source in (Coco(str(tmp_path / "one"), "train"), CocoExport(str(tmp_path / "two"), "train")):
        check(source)
        assert source.labels.ids == ids and source.ids.tolist() == [10, 20, 30]


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (4, 7, 80)])
def test_ids_of_yolo_do_not_change_indices(ids: tuple[int, int, int], tmp_path: Path):
    write_yolo(tmp_path, ids)
    source = Yolo(str(tmp_path), "train")
    check(source, crowd=False)
    assert source.labels.ids == ids and source.ids.tolist() == [1, 2, 3]


def test_ids_from_zero_in_coco(tmp_path: Path):
    write_coco(tmp_path, coco((0, 1, 2)))
    check(Coco(str(tmp_path), "train"))


def test_names_of_voc_may_be_listed(tmp_path: Path):
    write_voc(tmp_path)
    assert Voc(str(tmp_path), "train").labels.ids == (1, 2, 3)
    (tmp_path / "classes.txt").write_text("dog\ncow\nbird\ncat\n")
    labels = Voc(str(tmp_path), "train").labels
    assert list(labels) == [("dog", 1), ("cow", 2), ("bird", 3), ("cat", 4)]
    (tmp_path / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(ValueError, match=r"classes.txt: 2 categories have the same name 'dog'"):
        Voc(str(tmp_path), "train")


def test_the_exports_of_voc_and_coco_give_the_same(tmp_path: Path):
    """Roboflow's, with the xml files beside the images; one split has names that the other lacks."""
    for split in ("train", "valid"):
        write_voc_export(tmp_path / "voc", split)
    write_export(tmp_path / "coco")
    for name in ("b", "c"):
        (tmp_path / "voc/valid" / f"{name}.xml").unlink()
        (tmp_path / "voc/valid" / f"{name}.png").unlink()
    voc, coco = Voc(str(tmp_path / "voc"), "train"), CocoExport(str(tmp_path / "coco"), "train")
    check(voc)
    assert voc.labels == coco.labels and (voc.boxes == coco.boxes).all() and (voc.areas == coco.areas).all()
    val = Voc(str(tmp_path / "voc"), "val")
    assert val.labels == voc.labels and len(val) == 1 and val.labels_of.tolist() == [0, 2]
    assert recognised(str(tmp_path / "voc")) == "voc" and recognised(str(tmp_path / "coco")) == "coco_export"


def test_a_file_without_its_pair_in_an_export_of_voc(tmp_path: Path):
    folder = write_voc_export(tmp_path)
    (folder / "a.xml").unlink()
    (folder / "c.png").unlink()
    with pytest.warns(UserWarning) as said:
        source = Voc(str(tmp_path), "train")
    (message,) = (str(each.message) for each in said)
    assert "1 missing annotations (such as " in message and "1 missing image files (such as " in message
    assert [Path(source.name(index)).stem for index in range(len(source))] == ["b"]


@pytest.mark.parametrize("place", ["images/train2017", "train2017", "train", "images", "."])
def test_images_of_coco_in_the_usual_places(place: str, tmp_path: Path):
    write_coco(tmp_path)
    (tmp_path / "annotations/instances_train.json").rename(tmp_path / "annotations/instances_train2017.json")
    for path in (tmp_path / "images/train").iterdir():
        target = tmp_path / place / path.name
        target.parent.mkdir(exist_ok=True, parents=True)
        path.rename(target)
    check(Coco(str(tmp_path), "train"))


def test_the_split_of_an_export_may_be_called_valid(tmp_path: Path):
    write_export(tmp_path, split="valid")
    check(CocoExport(str(tmp_path), "val"))


def test_where_it_looked(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        Coco(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match=r"'val' not found; looked for .*instances_val.json, .*instances_val2017.json"):
        Coco(str(tmp_path), "val")
    with pytest.raises(ValueError, match=r"'val' not found; looked for .*val/_annotations.coco.json, .*valid/_annot"):
        CocoExport(str(tmp_path), "val")
    with pytest.raises(ValueError, match=r"looked for .*data.yaml"):
        Yolo(str(tmp_path), "val")
    with pytest.raises(ValueError, match=r"looked for .*ImageSets/Main/val.txt, .*valid/\*.xml"):
        Voc(str(tmp_path), "val")
    with pytest.raises(
        ValueError, match=r"no COCO, YOLO or Pascal VOC annotations in .*; it needs data.yaml, .*, or train/\*.xml"
    ):
        recognised(str(tmp_path))
    write_coco(tmp_path)
    for path in (tmp_path / "images/train").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"the images of .*json, such as a.png, are in none of: .*images/train, "):
        Coco(str(tmp_path), "train")


# Faults of YOLO


def yolo(root: Path, line: str) -> Yolo:
    write_yolo(root)
    (root / "labels/train/c.txt").write_text(f"\n{line}\n")
    return Yolo(str(root), "train")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.1", r"1 malformed lines .*c.txt, line 2: must have 5 numbers, or 7 or more of a polygon, got 4"),
        ("0 0.5 0.5 0.1 0.1 0.9", r"got 6"),
        ("cat 0.5 0.5 0.1 0.1", r"must be numbers, got 'cat 0.5 0.5 0.1 0.1'"),
        ("0.5 0.5 0.5 0.1 0.1", r"must begin with the number of a category, got '0.5'"),
        ("nan 0.5 0.5 0.1 0.1", r"must begin with the number of a category"),
        ("3 0.5 0.5 0.1 0.1", r"1 objects of an unknown category .*c.txt, line 2: 3\)"),
        ("-1 0.5 0.5 0.1 0.1", r"must begin with the number of a category, got '-1'"),
        ("0 0.5 nan 0.1 0.1", r"1 boxes that are NaN or infinite .*line 2 of .*c.png"),
        ("0 0.5 0.5 0 0.1", r"1 boxes of zero or negative width"),
        ("0 5 5 1 1", r"1 boxes outside their image"),
    ],
)
def test_a_bad_line_of_yolo_is_omitted_and_reported(line: str, words: str, tmp_path: Path):
    with pytest.warns(UserWarning, match=words):
        source = yolo(tmp_path, line)
    assert len(source.objects(2).labels) == 0 and len(source.objects(0).labels) == 2


def test_no_line_can_be_used(tmp_path: Path):
    write_yolo(tmp_path)
    for path in (tmp_path / "labels/train").iterdir():
        path.write_text("0,.5,.5,.2,.2\n")
    with (
        pytest.warns(UserWarning, match="omitted 3 malformed lines"),
        pytest.raises(ValueError, match=r"none of its 3 objects can be used; omitted 3 malformed lines"),
    ):
        Yolo(str(tmp_path), "train")


def test_a_polygon_of_yolo_is_its_box(tmp_path: Path):
    source = yolo(tmp_path, "1 0.5 0.25 0.75 0.5 0.25 1.0")
    np.testing.assert_allclose(source.objects(2).boxes, [[4, 4, 12, 16]])


def test_files_of_yolo_without_a_partner(tmp_path: Path):
    write_yolo(tmp_path)
    (tmp_path / "labels/train/c.txt").rename(tmp_path / "labels/train/x.txt")
    with pytest.warns(UserWarning) as said:
        assert len(Yolo(str(tmp_path), "train")) == 3
    (message,) = (str(each.message) for each in said)
    assert "kept as background 1 images without a label file (such as " in message
    assert "omitted 1 label files without an image (such as " in message and "x.txt)" in message


def test_places_of_yolo(tmp_path: Path):
    path = write_yolo(tmp_path / "set")
    text = path.read_text()
    for given in ("../images/train", "images/train/", str(tmp_path / "set/images/train"), "[images/train]"):
        path.write_text(text.replace("images/train", given))
        check(Yolo(str(tmp_path / "set"), "train"), crowd=False)
    path.write_text("path: set\n" + text)
    path.rename(tmp_path / "other.yaml")
    check(Yolo(str(tmp_path / "other.yaml"), "train"), crowd=False)
    (tmp_path / "set/list.txt").write_text("".join(f"./images/train/{name}.png\n" for name in "abca"))
    path.write_text(text.replace("images/train", "list.txt"))
    with pytest.warns(UserWarning, match=r"omitted 1 repeated images \(such as .*a.png\)"):
        check(Yolo(str(tmp_path / "set"), "train"), crowd=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [a]\ntrain: images/none\n", r"images of 'train' were not found; looked for .*images/none"),
        ("names: [a]\n", r"data.yaml has no 'train'"),
        ("names: [a, a]\ntrain: images/train\n", r"data.yaml: 2 categories have the same name 'a'"),
        ("train: images/train\n", r"names of categories must be a list or a mapping, got None"),
        ("names: [a, b]\nnc: 3\ntrain: images/train\n", r"nc is 3, but there are 2 names"),
        ("names: [a]\ntrain: 7\n", r"path and train must be paths"),
        ("[a", r"is not YAML"),
        ("7", r"must be a mapping"),
        ("names: !!python/object/apply:os.system ['touch run']\n", r"is not YAML: could not determine a constructor"),
        ("names: [a]\ntrain: other\n", r"no image of 'train' has a label file; looked for .*other/a.txt"),
    ],
)
def test_a_yaml_that_cannot_be_used(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path).write_text(text)
    write_images(tmp_path / "other")
    with pytest.raises(ValueError, match=words) as error:
        Yolo(str(tmp_path), "train")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# Faults of Pascal VOC

LAUGHS = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><annotation><object><name>&y;</name></object></annotation>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation><name>&x;</name></annotation>'
HALF = "<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object>"
NEW = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>8</ymax></bndbox>"


@pytest.mark.parametrize(
    ("text", "words", "kept"),
    [
        (LAUGHS, r"1 unreadable annotations .*a.xml is not safe XML: EntitiesForbidden", 2),
        (OUTSIDE, r"a.xml is not safe XML: EntitiesForbidden", 2),
        ("<annotation>", r"a.xml is not safe XML", 2),
        (
            f"<annotation>{HALF}</annotation>",
            r"1 malformed objects .*a.xml, object 1: ymin must be a number, got ''",
            3,
        ),
        (f"<annotation><object>{NEW}</object></annotation>", r"a.xml, object 1: it has no name", 3),
        ("<html/>", r"a.xml: its outermost element must be annotation, got html", 2),
    ],
)
def test_a_bad_xml_is_omitted_and_reported(text: str, words: str, kept: int, tmp_path: Path):
    write_voc(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.warns(UserWarning, match=words) as said:
        source = Voc(str(tmp_path), "train")
    assert len(source) == kept and len(said) == 1 and str(said[0].message).isprintable()
    assert source.objects(kept - 2).labels.tolist() == [1, 1]


def test_other_faults_of_voc(tmp_path: Path):
    path = write_voc(tmp_path)
    path.write_text("a\nb\na\nx\n")
    (tmp_path / "classes.txt").write_text("bird\ncat\n")
    with pytest.warns(UserWarning) as said:
        source = Voc(str(tmp_path), "train")
    (message,) = (str(each.message) for each in said)
    assert "1 repeated names (such as a)" in message and "1 missing annotations (such as " in message
    assert "1 objects of an unknown category (such as " in message and "a.xml, object 2: 'dog')" in message
    assert len(source) == 2 and source.objects(0).labels.tolist() == [0]


# Shapes and headers


def test_shapes_are_the_same_each_time_and_differ_by_split():
    one, other, val = Shapes("", "val"), Shapes("", "val"), Shapes("", "test")
    assert len(one) == 64 and one.labels.names == ("rectangle", "ellipse", "triangle")
    assert all((one.images[i] == other.images[i]).all() for i in range(64)) and (one.boxes == other.boxes).all()
    assert one.images[0].shape != val.images[0].shape or (one.images[0] != val.images[0]).any()
    counts = np.diff(one.starts)
    assert counts.min() == 0 and counts.max() >= 3 and np.bincount(one.labels_of).min() > 20
    assert one.image(3).mode == "RGB" and one.image(3, 1).mode == "L" and one.name(3) == "shapes/val/3"


def test_boxes_of_shapes_are_tight():
    """Inside a rectangle colours vary little, just outside they are those of the noise around it."""
    source, inside = Shapes("", "val"), []
    for index in range(len(source)):
        objects, values = source.objects(index), source.images[index].astype(float)
        for label, (left, top, right, bottom) in zip(objects.labels, objects.boxes.astype(int), strict=True):
            assert 0 <= left < right <= values.shape[1] and 0 <= top < bottom <= values.shape[0]
            if label == 0 and left > 0:
                colour = np.median(values[top:bottom, left:right], axis=(0, 1))
                far = [np.abs(values[top:bottom, column] - colour).mean() for column in (left, left - 1)]
                inside.append(far[0] < far[1])
    assert np.mean(inside) > 0.9


def test_sizes_of_many_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "SMALL", 0)
    write_coco(tmp_path)
    check(Coco(str(tmp_path), "train"))
    (kept,) = (tmp_path / "cache").rglob("image sizes-*.npy")
    np.save(kept, np.full((3, 2), 7.0))
    with pytest.raises(ValueError, match="7 x 7, not 20 x 40"):
        Coco(str(tmp_path), "train")
    os.utime(tmp_path / "images/train/a.png", (1, 1))
    check(Coco(str(tmp_path), "train"))
