"""The bootstrap over images of COCO's average precision: each image is matched once, and draws weigh the matches."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from zoo.data.box_entries import BoxSource
from zoo.data.coco_results import Result, matching
from zoo.outputs.label_map import LabelMap

DRAWS = 1000
HELD = 2**24  # weights that are held at once


class Matches(NamedTuple):
    """The detections of one category in all images, the most certain first, and its objects."""

    images: np.ndarray  # [D], the place of each detection's image
    right: np.ndarray  # [thresholds, D] bool: matched with an object that counts
    ignored: np.ndarray  # [thresholds, D] bool: matched with a crowd
    objects: np.ndarray  # [images], those that count


def category_matches(
    results: Iterable[Result], truth: BoxSource, labels: LabelMap, images: Collection[int]
) -> tuple[list[Matches], int]:
    """The matches of each category with objects, and the number of images; arguments as of `average_precision`."""
    evaluation = matching(results, truth, labels, images)
    thresholds, number = len(evaluation.params.iouThrs), len(evaluation.params.imgIds)
    # (matched ids, ids of objects, scores, whether objects are ignored, whether detections are), by category and image
    states = [each.__getstate__() for each in evaluation._evalImgs_cpp]
    found = []
    for first in range(0, len(states), number):
        part = states[first : first + number]
        objects = np.array([sum(not ignored for ignored in each[3]) for each in part], dtype=np.int64)
        scores = np.concatenate([np.asarray(each[2], dtype=np.float64) for each in part])
        order = np.argsort(-scores, kind="stable")
        matched, ignored = (
            np.concatenate([np.asarray(each[at], dtype=np.int64).reshape(thresholds, -1) for each in part], 1)[:, order]
            for at in (0, 4)
        )
        places = np.repeat(np.arange(number), [len(each[2]) for each in part])[order]
        if objects.any():
            found.append(Matches(places, (matched > 0) & (ignored == 0), ignored > 0, objects))
    return found, number


def weighted_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """The average precision [thresholds, draws] where each image counts several times; NaN without objects.

    Args:
        matches: those of one category.
        weights: how often each image counts, integers [draws, images].
    """
    recalls, eps = np.linspace(0.0, 1.0, 101), np.spacing(1)
    objects = weights @ matches.objects
    each = weights[:, matches.images]
    seen = each.cumsum(1, dtype=np.int32)
    found = np.zeros((len(matches.right), len(weights)))
    for row, (right, ignored) in enumerate(zip(matches.right, matches.ignored, strict=True)):
        at = np.flatnonzero(right)  # precision need only be known where recall rises
        if len(at) == 0:
            continue
        hits, all_seen = each[:, at].cumsum(1, dtype=np.int32), seen[:, at]
        if len(out := np.flatnonzero(ignored)):
            before = np.pad(each[:, out].cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))
            all_seen = all_seen - before[:, np.searchsorted(out, at)]
        precision = hits / (all_seen + eps)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        recall = hits / np.maximum(objects, 1)[:, None]
        passed = np.searchsorted(recalls, recall.ravel(), side="right").reshape(recall.shape)
        found[row] = (precision * np.diff(passed, axis=1, prepend=0)).sum(1) / len(recalls)
    found[:, objects == 0] = np.nan
    return found


def precision_intervals(
    results: Iterable[Result], truth: BoxSource, labels: LabelMap, images: Collection[int]
) -> dict[str, tuple[float, float]] | None:
    """The 95 % intervals of `ap`, `ap50` and `ap75` by the bootstrap over images: the percentiles of 1,000 draws, which
    are the same in every call. None for fewer than two images. Arguments as of `average_precision`."""
    matches, number = category_matches(results, truth, labels, images)
    if number < 2:
        return None
    generator, most = np.random.default_rng(0), max(len(each.images) for each in matches)
    drawn = []
    for first in range(0, DRAWS, step := max(1, HELD // max(most, number))):
        rows = min(step, DRAWS - first)
        weights = np.stack(
            [np.bincount(generator.integers(number, size=number), minlength=number) for _ in range(rows)]
        ).astype(np.int32)
        drawn.append(np.stack([weighted_precision(each, weights) for each in matches]))
    values = np.concatenate(drawn, 2)  # [categories, thresholds, draws]
    values = values[..., ~np.isnan(values).all((0, 1))]  # a draw may have no objects at all
    by_name = {"ap": np.nanmean(values, (0, 1)), "ap50": np.nanmean(values[:, 0], 0)}
    by_name["ap75"] = np.nanmean(values[:, 5], 0)
    ends = {name: np.percentile(each, (2.5, 97.5)).tolist() for name, each in by_name.items()}
    return {name: (low, high) for name, (low, high) in ends.items()}
