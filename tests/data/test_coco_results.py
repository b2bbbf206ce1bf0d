import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from box_cases import coco, write_coco, write_voc, write_yolo
from zoo.data.box_entries import BoxSource
from zoo.data.box_sources import SOURCES, Coco
from zoo.data.coco_results import Result, average_precision, coco_json
from zoo.outputs import LabelMap


def perfect(source: BoxSource) -> list[Result]:
    """A result for each object that is not a crowd."""
    found = []
    for index, image in enumerate(source.ids.tolist()):
        objects = source.objects(index)
        for label, box, crowd in zip(objects.labels.tolist(), objects.boxes, objects.crowd, strict=True):
            found += [] if crowd else [Result(image, label, 0.9, box)]
    return found


@pytest.mark.parametrize("name", ["coco", "yolo", "voc"])
@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (4, 17, 90)])
def test_ids_go_round(name: str, ids: tuple[int, int, int], tmp_path: Path):
    """The file's own ids are written, and results that equal the objects are perfect."""
    if name == "voc":
        write_voc(tmp_path)
        ids = (1, 2, 3)
    elif name == "yolo":
        write_yolo(tmp_path, ids)
    else:
        write_coco(tmp_path, coco(ids, parent=99))
    source = SOURCES[name](str(tmp_path), "train")
    results = perfect(source)
    written = json.loads(json.dumps(coco_json(results, source.labels)))
    images = [10, 10, 20] if name == "coco" else [1, 1, 2]
    wanted = [
        (images[0], ids[0], [4, 2, 10, 10]),
        (images[1], ids[2], [20, 0, 20, 20]),
        (images[2], ids[1], [0, 0, 12, 6]),
    ]
    for row, (image, category, box) in zip(written, wanted, strict=name != "yolo"):
        assert row["image_id"] == image and row["category_id"] == category and row["score"] == 0.9
        np.testing.assert_allclose(row["bbox"], box, atol=1e-4)
    found = average_precision(results, source, source.labels)
    assert (found.ap, found.ap50, found.small, found.medium) == (
        pytest.approx(1),
        pytest.approx(1),
        pytest.approx(1),
        None,
    )
    assert set(found.classes) == {"bird", "cat", "dog"} and found.objects == len(results)
    if name == "coco":
        again = average_precision(results, tmp_path / "annotations/instances_train.json", source.labels)
        assert again == found


def test_a_case_computed_by_hand(tmp_path: Path):
    """Category bird: two objects of 10 x 10 in one image. In order of score: one hit with IoU 0.8, one miss, one hit
    with IoU 1. At thresholds up to 0.8 (7 of 10) precision is 1 up to recall 0.5 (51 of 101 places) and 2/3 up to 1 (50
    places). Above, the first is a miss: only one hit in three, so precision 1/3 up to recall 0.5.
    """
    values = coco()
    values["annotations"] = [
        {"id": 0, "image_id": 10, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 7, "image_id": 10, "category_id": 1, "bbox": [20, 0, 10, 10]},
        {"id": 8, "image_id": 20, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 5000},
    ]
    path = write_coco(tmp_path, values)
    source = Coco(str(tmp_path), "train")
    results = [
        Result(10, 0, 0.9, (0, 0, 10, 8)),
        Result(10, 0, 0.8, (0, 12, 10, 20)),
        Result(10, 0, 0.7, (20, 0, 30, 10)),
    ]
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    bird, bird50 = 0.7 * low + 0.3 * high, low
    for truth in (source, path):
        found = average_precision(reversed(results), truth, source.labels)
        assert found.classes["bird"] == pytest.approx((bird, bird50)) and found.classes["cat"] == (0, 0)
        assert found.classes["dog"] is None and found.objects == 3
        assert (found.ap, found.ap50) == pytest.approx((bird / 2, bird50 / 2)) and found.ap75 == pytest.approx(low / 2)
        assert found.small == pytest.approx(bird) and found.medium == 0 and found.large is None


def test_classes_of_an_unordered_label_map(tmp_path: Path):
    write_coco(tmp_path, coco((30, 10, 20)))
    source = Coco(str(tmp_path), "train")
    labels = LabelMap(("bird", "cat", "dog"), (30, 10, 20))
    found = average_precision([Result(10, 0, 0.5, (4, 2, 14, 12))], source, labels)
    assert found.classes == {"bird": (pytest.approx(1), pytest.approx(1)), "cat": (0, 0), "dog": (0, 0)}


def test_detections_in_a_crowd_do_not_count(tmp_path: Path):
    write_coco(tmp_path)
    source = Coco(str(tmp_path), "train")
    crowd = [Result(20, 1, 0.95, (7, 11, 12, 20)), Result(20, 1, 0.94, (12, 11, 20, 20))]
    found = average_precision(crowd + perfect(source), source, source.labels)
    assert found.ap == pytest.approx(1) and found.objects == 3


def test_no_results_are_zero_and_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_coco(tmp_path)
    source = Coco(str(tmp_path), "train")
    found = average_precision([], source, source.labels)
    assert (found.ap, found.ap50, found.ap75, found.small) == (0, 0, 0, 0) and found.classes["dog"] == (0, 0)
    assert coco_json([], source.labels) == [] and capsys.readouterr() == ("", "")


def test_no_objects_are_reported(tmp_path: Path):
    values = coco()
    values["annotations"] = [values["annotations"][3]]  # the crowd
    path = write_coco(tmp_path, values)
    source = Coco(str(tmp_path), "train")
    for truth in (source, path):
        with pytest.raises(
            ValueError, match=r"instances_train.json has no objects to find, so average precision is not"
        ):
            average_precision([], truth, source.labels)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result(99, 0, 0.5, (0, 0, 1, 1)), r"results are of image 99, which .*json does not have"),
        (Result(10, 3, 0.5, (0, 0, 1, 1)), r"image 10 has label 3, but there are 3 categories"),
        (Result(10, -1, 0.5, (0, 0, 1, 1)), r"label -1"),
        (Result(10, 0, float("nan"), (0, 0, 1, 1)), r"NaN or infinite: score nan"),
        (Result(10, 0, 0.5, (0, 0, float("inf"), 1)), r"NaN or infinite"),
    ],
)
def test_bad_results(result: Result, words: str, tmp_path: Path):
    write_coco(tmp_path)
    source = Coco(str(tmp_path), "train")
    with pytest.raises(ValueError, match=words):
        average_precision([result], source, source.labels)


def test_a_malformed_json_of_the_truth(tmp_path: Path):
    values: Any = coco()
    del values["annotations"][0]["bbox"]
    path = write_coco(tmp_path, values)
    with pytest.raises(ValueError, match=r"json has a malformed image or annotation: KeyError\('bbox'\)"):
        average_precision([], path, LabelMap(("a",), (1,)))
