"""Faults of COCO files: what is omitted and reported, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from box_cases import check, coco, write_coco
from zoo.data.box_sources import Coco
from zoo.inputs.images import UnreadableImage


def fault(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = coco()
    change(values)
    path.write_text(json.dumps(values))


def first(values: dict[str, Any], **changes: Any) -> None:
    values["annotations"][0].update(changes)


OBJECTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "zero width": (lambda v: first(v, bbox=[1, 1, 0, 5]), r"1 boxes of zero or neg.*annotation 1 of .*a.png"),
    "negative": (lambda v: first(v, bbox=[9, 9, -3, 5]), r"1 boxes of zero or negative width or height"),
    "NaN": (
        lambda v: first(v, bbox=[1, 1, float("nan"), 5]),
        r"1 boxes that are NaN .*annotation 1 of .*a.png",
    ),
    "infinite": (lambda v: first(v, bbox=[1, 1, float("inf"), 5]), r"1 boxes that are NaN or infinite"),
    "outside": (lambda v: first(v, bbox=[50, 1, 5, 5]), r"1 boxes outside their image .*annotation 1 of .*a.png"),
    "three numbers": (
        lambda v: first(v, bbox=[1, 1, 5]),
        r"1 malformed anno.*number 0: bbox must be 4 numbers",
    ),
    "text": (lambda v: first(v, bbox=[1, 1, 5, "6"]), r"number 0: bbox must be 4 numbers"),
    "huge": (lambda v: first(v, bbox=[1, 1, 5, 10**400]), r"number 0: bbox must be 4 numbers"),
    "no image id": (
        lambda v: v["annotations"][0].pop("image_id"),
        r"image_id must be an integer >= 0, got None",
    ),
    "no object": (lambda v: v["annotations"].__setitem__(0, 7), r"number 0: must be a JSON object, got int"),
    "crowd": (lambda v: first(v, iscrowd="no"), r"number 0: iscrowd must be 0 or 1"),
    "unknown": (lambda v: first(v, category_id=9), r"1 annotations of an unknown category .*id 1 of category 9"),
    "orphan": (lambda v: first(v, image_id=9), r"1 annotations of images that are not listed .*id 1 of image 9"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_bad_object_of_coco_is_omitted_and_reported(name: str, tmp_path: Path):
    change, words = OBJECTS[name]
    path = write_coco(tmp_path)
    fault(path, change)
    with pytest.warns(UserWarning, match=rf"instances_train.json: omitted .*{words}") as said:
        source = Coco(str(tmp_path), "train")
    assert len(said) == 1 and len(source) == 3 and str(said[0].message).isprintable()
    assert source.objects(0).labels.tolist() == [2] and source.objects(1).labels.tolist() == [1, 1]


def test_a_repeated_annotation_id_is_omitted(tmp_path: Path):
    path = write_coco(tmp_path)
    fault(path, lambda values: values["annotations"][1].update(id=1))
    with pytest.warns(UserWarning, match=r"omitted 1 annotations with the id of an earlier one \(such as id 1\)"):
        assert Coco(str(tmp_path), "train").objects(0).labels.tolist() == [0]


def test_a_box_over_the_edge_is_clipped(tmp_path: Path):
    path = write_coco(tmp_path)
    fault(path, lambda values: first(values, bbox=[-4, -2, 14, 50]))
    with pytest.warns(UserWarning, match=r"clipped 1 boxes that reach over the edge .*annotation 1 of .*a.png\)$"):
        source = Coco(str(tmp_path), "train")
    assert source.objects(0).boxes[0].tolist() == [0, 0, 10, 20] and source.objects(0).area[0] == 100
    fault(path, lambda values: first(values, bbox=[-0.01, 0, 14, 20]))
    assert Coco(str(tmp_path), "train").objects(0).boxes[0, 0] == 0  # rounding is not reported


def test_areas_come_from_the_file_if_they_can(tmp_path: Path):
    path = write_coco(tmp_path)
    fault(path, lambda values: first(values, area=61.5))
    assert Coco(str(tmp_path), "train").objects(0).area.tolist() == [61.5, 400]
    fault(path, lambda values: values["annotations"][0].pop("area"))
    assert Coco(str(tmp_path), "train").objects(0).area.tolist() == [100, 400]
    fault(path, lambda values: first(values, area=-1))
    with pytest.warns(UserWarning, match=r"replaced 1 areas that are not numbers >= 0 .*-1 of annotation 1\)"):
        assert Coco(str(tmp_path), "train").objects(0).area.tolist() == [100, 400]


IMAGE_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda v: v["images"][0].update(file_name="x.png"), r"1 missing image files .*x.png"),
    "size": (
        lambda v: v["images"][0].update(height=40, width=20),
        r"1 images whose .*a.png, id 10, 20 x 40, not 40 x 20",
    ),
    "id": (
        lambda v: v["images"][0].update(id="10"),
        r"1 malformed images .*0: id must be an integer >= 0, got '10'",
    ),
    "name": (lambda v: v["images"][0].update(file_name=7), r"number 0: file_name must be a path, got 7"),
    "sides": (lambda v: v["images"][0].update(height=0), r"number 0: height and width must be integers >= 1"),
}


@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_a_bad_image_of_coco_is_omitted_and_reported(name: str, tmp_path: Path):
    change, words = IMAGE_FAULTS[name]
    fault(write_coco(tmp_path), change)
    with pytest.warns(UserWarning, match=words) as said:
        source = Coco(str(tmp_path), "train")
    assert len(said) == 1 and source.ids.tolist() == [20, 30] and source.objects(0).labels.tolist() == [1, 1]


def test_images_that_share_an_id(tmp_path: Path):
    path = write_coco(tmp_path)
    fault(path, lambda values: values["images"][2].update(id=10))
    with pytest.warns(UserWarning, match=r"2 images that share their id with another \(such as .*a.png, id 10\)"):
        assert Coco(str(tmp_path), "train").ids.tolist() == [20]
    fault(path, lambda values: values["images"].append(values["images"][0]))
    with pytest.warns(UserWarning, match=r"1 repeated images \(such as a.png, id 10\)"):
        check(Coco(str(tmp_path), "train"))


def test_broken_image_files(tmp_path: Path):
    write_coco(tmp_path)
    (tmp_path / "images/train/a.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"omitted 1 unreadable images \(such as .*a.png: not an image"):
        assert Coco(str(tmp_path), "train").ids.tolist() == [20, 30]
    for path in (tmp_path / "images/train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"json: no image can be used; omitted 3 unreadable images .*the file is empty"
    ):
        Coco(str(tmp_path), "train")


def test_sizes_are_those_after_the_rotation_of_exif(tmp_path: Path):
    write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.zeros((40, 20, 3), dtype=np.uint8)
    values[:20] = 255
    Image.fromarray(values).save(tmp_path / "images/train/a.png", exif=exif)  # 20 x 40 when it is upright
    source = Coco(str(tmp_path), "train")
    upright = np.asarray(source.image(0))
    assert upright.shape == (20, 40, 3) and upright[:, 20:].min() == 255 and upright[:, :20].max() == 0
    Image.fromarray(values.transpose(1, 0, 2)).save(tmp_path / "images/train/a.png", exif=exif)
    with pytest.warns(UserWarning, match=r"a.png, id 10, 40 x 20, not 20 x 40"):
        assert len(Coco(str(tmp_path), "train")) == 2


def test_an_image_that_changes_later_is_unreadable(tmp_path: Path):
    write_coco(tmp_path)
    source = Coco(str(tmp_path), "train")
    Image.new("RGB", (5, 5)).save(tmp_path / "images/train/a.png")
    with pytest.raises(UnreadableImage, match=r"a.png: 5 x 5 pixels, but 20 x 40 in its header"):
        source.image(0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"instances_train.json is not JSON: Expecting"),
        ("[" * 100_000, r"is not JSON: "),
        ("[]", r"not a COCO json of objects: it has no list 'images'"),
        ('{"images": [], "annotations": {}}', r"it has no list 'annotations'"),
        ('{"images": [], "images": []}', r"key 'images' appears twice"),
        (json.dumps(coco() | {"categories": [{"id": 1}]}), r"instances_train.json: a category lacks its name"),
        (json.dumps(coco((1, 1, 2))), r"2 categories have the same id 1"),
        (json.dumps(coco() | {"images": []}), r"no image can be used"),
    ],
    ids=range(8),
)
def test_a_json_that_cannot_be_used(text: str, words: str, tmp_path: Path):
    write_coco(tmp_path).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        Coco(str(tmp_path), "train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_no_object_can_be_used(tmp_path: Path):
    changes = {"boxes outside": {"bbox": [500, 500, 5, 5]}, "malformed annotations": {"category_id": "1"}}
    for words, change in changes.items():
        values = coco()
        for each in values["annotations"]:
            each.update(change)
        write_coco(tmp_path, values)
        with (
            pytest.warns(UserWarning, match=f"omitted 4 {words}"),
            pytest.raises(ValueError, match=rf"none of its 4 objects can be used; omitted 4 {words}"),
        ):
            Coco(str(tmp_path), "train")


def test_a_name_that_is_too_long_for_the_file_system(tmp_path: Path):
    fault(write_coco(tmp_path), lambda values: values["images"][0].update(file_name="a" * 5000))
    with pytest.warns(UserWarning, match="omitted 1 missing image files"):
        assert len(Coco(str(tmp_path), "train")) == 2
