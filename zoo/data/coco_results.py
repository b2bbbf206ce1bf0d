"""Results of a detector in COCO's json, and their average precision."""

import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.box_entries import BoxSource
from zoo.data.coco_sources import read_coco
from zoo.outputs.label_map import LabelMap


class Result(NamedTuple):
    """A predicted object."""

    image: int  # the id of the image in the data set
    label: int  # the index of a category
    score: float
    box: Sequence[float]  # left, top, right, bottom in pixels of the original image


class Precision(NamedTuple):
    """Average precision in 0..1, with at most 100 detections an image; None where there are no objects to find."""

    ap: float  # mean over categories and over IoU thresholds 0.5, 0.55, ... 0.95
    ap50: float  # at IoU 0.5
    ap75: float
    small: float | None  # of objects of less than 32 x 32 pixels
    medium: float | None
    large: float | None  # of 96 x 96 pixels or more
    classes: dict[str, tuple[float, float] | None]  # (ap, ap50) by the name of the category
    objects: int  # to find, without crowds


def coco_json(results: Iterable[Result], labels: LabelMap) -> list[dict[str, Any]]:
    """COCO's list of results, with the data set's own ids and boxes as left, top, width and height.

    Raises:
        ValueError: a label is not an index of a category, or a score or a box is NaN or infinite.
    """
    rows = []
    for image, label, score, (left, top, right, bottom) in results:
        if not 0 <= label < len(labels):
            raise ValueError(f"a result of image {image} has label {label}, but there are {len(labels)} categories")
        box = [float(left), float(top), float(right) - float(left), float(bottom) - float(top)]
        if not all(map(math.isfinite, (score, *box))):
            raise ValueError(f"a result of image {image} is NaN or infinite: score {score}, box {box}")
        rows.append({"image_id": int(image), "category_id": labels.ids[label], "bbox": box, "score": float(score)})
    return rows


def average_precision(
    results: Iterable[Result],
    truth: BoxSource | str | os.PathLike[str],
    labels: LabelMap,
    images: Collection[int] | None = None,
) -> Precision:
    """COCO's average precision of results on images of a set; 0 if there are no results.

    Args:
        results: the predicted objects of the whole set, in any order.
        truth: the objects to find: a source, or the path of a COCO json, whose images and annotations are taken as
            they are.
        labels: the categories that the results' labels stand for; others in the truth are not counted.
        images: ids of the images that count; None for all.

    Raises:
        ValueError: there are no objects to find, a result is of an image that the truth lacks, or see `coco_json`.
    """
    evaluation, objects = _evaluation(results, truth, labels, images)
    evaluation.evaluate()
    evaluation.accumulate()
    table = np.asarray(evaluation.eval["precision"])[..., -1]  # [threshold, recall, category by id, area]
    thresholds = evaluation.params.iouThrs.round(2).tolist()
    at50, at75 = table[thresholds.index(0.5)], table[thresholds.index(0.75)]
    classes: dict[str, tuple[float, float] | None] = {}
    for place, name in enumerate(name for _, name in sorted((id, name) for name, id in labels)):
        ap, ap50 = _mean(table[:, :, place, 0]), _mean(at50[:, place, 0])
        classes[name] = None if ap is None or ap50 is None else (ap, ap50)
    ap, small, medium, large = (_mean(table[..., area]) for area in range(4))
    ap50, ap75 = _mean(at50[..., 0]), _mean(at75[..., 0])
    assert ap is not None and ap50 is not None and ap75 is not None  # there are objects
    return Precision(ap, ap50, ap75, small, medium, large, classes, objects)


def matching(
    results: Iterable[Result], truth: BoxSource, labels: LabelMap, images: Collection[int] | None = None
) -> Any:
    """COCO's evaluation of objects of any size that has matched the detections of each image; arguments as of
    `average_precision`."""
    evaluation, _ = _evaluation(results, truth, labels, images, separate_eval=True)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    evaluation.evaluate()
    return evaluation


def _evaluation(
    results: Iterable[Result],
    truth: BoxSource | str | os.PathLike[str],
    labels: LabelMap,
    images: Collection[int] | None,
    **options: Any,
) -> tuple[Any, int]:
    """COCO's evaluation, before it has computed anything, and the number of objects; as in `average_precision`."""
    from faster_coco_eval import COCO, COCOeval_faster

    place = truth.place if isinstance(truth, BoxSource) else os.fspath(truth)
    known = _from_source(truth) if isinstance(truth, BoxSource) else _from_json(Path(truth))
    known["annotations"] = [each for each in known["annotations"] if each["category_id"] in labels.ids]
    if images is not None:
        seen = set(images)
        known["images"] = [each for each in known["images"] if each["id"] in seen]
        known["annotations"] = [each for each in known["annotations"] if each["image_id"] in seen]
    known["categories"] = [{"id": id, "name": name} for name, id in labels]
    objects = sum(not each["iscrowd"] for each in known["annotations"])
    if not objects:
        raise ValueError(f"{place} has no objects to find, so average precision is not defined")
    rows = coco_json(results, labels)
    if strange := {row["image_id"] for row in rows} - {each["id"] for each in known["images"]}:
        raise ValueError(f"results are of image {min(strange)}, which {place} does not have")
    base = COCO(known)
    found = COCO({"images": known["images"], "categories": known["categories"], "annotations": _detections(rows)})
    evaluation = COCOeval_faster(base, found, "bbox", **options)
    evaluation.params.catIds = list(labels.ids)
    return evaluation, objects


def _mean(precisions: np.ndarray) -> float | None:
    """The mean where there are objects, which COCO marks with values >= 0."""
    defined = precisions[precisions > -1]
    return float(defined.mean()) if defined.size else None


def _detections(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As annotations of COCO; its function that loads results fails if there are none."""
    return [
        row | _annotation(id, row["image_id"], row["category_id"], row["bbox"], 0, None)
        for id, row in enumerate(rows, 1)
    ]


def _from_source(source: BoxSource) -> dict[str, list[dict[str, Any]]]:
    annotations = []
    for index, image in enumerate(source.ids.tolist()):
        labels, boxes, crowd, area, _ = source.objects(index)
        for label, (left, top, right, bottom), many, size in zip(labels, boxes.tolist(), crowd, area, strict=True):
            box = [left, top, right - left, bottom - top]
            annotations.append(_annotation(len(annotations) + 1, image, source.labels.ids[label], box, many, size))
    return {"images": [{"id": image} for image in source.ids.tolist()], "annotations": annotations}


def _from_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    read = read_coco(path)
    try:
        annotations = [
            _annotation(
                id, each["image_id"], each["category_id"], each["bbox"], each.get("iscrowd", 0), each.get("area")
            )
            for id, each in enumerate(read["annotations"], 1)
        ]
        return {"images": [{"id": each["id"]} for each in read["images"]], "annotations": annotations}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a malformed image or annotation: {error!r}") from None


def _annotation(id: int, image: int, category: int, box: Sequence[float], crowd: Any, area: Any) -> dict[str, Any]:
    """With an id from 1 on, because the evaluation takes id 0 for no match."""
    left, top, width, height = map(float, box)
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": width * height if area is None else float(area),
        "iscrowd": int(bool(crowd)),
    }
