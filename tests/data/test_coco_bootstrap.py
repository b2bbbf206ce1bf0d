"""The bootstrap over images of average precision."""

import time

import numpy as np
import pytest

from zoo.data.box_entries import BoxSource
from zoo.data.coco_bootstrap import category_matches, precision_intervals, weighted_precision
from zoo.data.coco_results import Result, average_precision
from zoo.outputs.label_map import LabelMap

LABELS = LabelMap(("cat", "dog", "fish"), (3, 1, 7))


class Made(BoxSource):
    """Objects without files; a tenth are crowds. Images of the same `group` hold the same objects."""

    def __init__(self, groups: list[int], each: int = 5):
        self.place, self.labels, self.ids = "made", LABELS, np.arange(len(groups)) + 10
        draws = [np.random.default_rng(group) for group in groups]
        self.labels_of = np.concatenate([draw.integers(0, 2, each) for draw in draws])  # no fish
        corners = np.concatenate([draw.uniform(0, 80, (each, 2)) for draw in draws])
        self.boxes = np.concatenate([corners, corners + 5 + np.arange(len(corners))[:, None] % each * 9], 1)
        self.crowd = np.concatenate([draw.random(each) < 0.1 for draw in draws])
        self.areas = np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1)
        self.object_ids = np.arange(len(corners)) + 1
        self.starts = np.arange(len(groups) + 1) * each


def results(source: Made, groups: list[int], number: int = 12) -> list[Result]:
    """Some near objects, some anywhere; scores are rounded, so that some are equal."""
    found = []
    for index, group in enumerate(groups):
        draw = np.random.default_rng(100 + group)
        labels, boxes, *_ = source.objects(index)
        for _ in range(number):
            which = draw.integers(len(labels))
            box = boxes[which] + draw.normal(0, 2, 4) * (draw.random() < 0.8)
            label = int(labels[which]) if draw.random() < 0.8 else int(draw.integers(3))
            found.append(Result(int(source.ids[index]), label, round(float(draw.random()), 1), box.tolist()))
    return found


def test_equal_weights_give_the_average_precision():
    groups = [*range(30)]
    source = Made(groups)
    given = results(source, groups)
    matches, number = category_matches(given, source, LABELS, source.ids.tolist())
    wanted = average_precision(given, source, LABELS)
    assert number == 30 and len(matches) == 2 and any(each.ignored.any() for each in matches)
    values = np.stack([weighted_precision(each, np.ones((1, 30), dtype=np.int64)) for each in matches])[..., 0]
    assert values.mean() == pytest.approx(wanted.ap, abs=1e-12)
    assert values[:, 0].mean() == pytest.approx(wanted.ap50, abs=1e-12)
    assert values[:, 5].mean() == pytest.approx(wanted.ap75, abs=1e-12)
    assert wanted.classes["dog"] is not None  # of the lower id, so the first
    assert values[0].mean() == pytest.approx(wanted.classes["dog"][0], abs=1e-12)


@pytest.mark.parametrize("times", [[2, 0, 1, 3, 0, 1], [0, 0, 0, 1, 0, 0], [1, 4, 0, 0, 2, 2]], ids=str)
def test_a_weight_counts_an_image_so_often(times: list[int]):
    """As a data set in which the image occurs so often. Scores differ, as the order of equal ones would matter."""
    source = Made([*range(6)])
    given = [each._replace(score=each.score + index / 1e6) for index, each in enumerate(results(source, [*range(6)]))]
    matches, _ = category_matches(given, source, LABELS, source.ids.tolist())
    values = np.stack([weighted_precision(each, np.array([times])) for each in matches])[..., 0]
    drawn = [group for group, number in enumerate(times) for _ in range(number)]
    repeated = Made(drawn)
    again = [
        each._replace(image=int(repeated.ids[place]))
        for place, group in enumerate(drawn)
        for each in given
        if each.image == source.ids[group]
    ]
    wanted = average_precision(again, repeated, LABELS)
    assert np.nanmean(values) == pytest.approx(wanted.ap, abs=1e-9)
    assert np.nanmean(values[:, 0]) == pytest.approx(wanted.ap50, abs=1e-9)


def test_the_interval_holds_the_value_and_is_the_same_again():
    groups = [*range(40)]
    source = Made(groups)
    given = results(source, groups)
    ids = source.ids.tolist()
    found = precision_intervals(given, source, LABELS, ids)
    assert found is not None and found == precision_intervals(given, source, LABELS, ids)
    wanted = average_precision(given, source, LABELS)
    for name, (low, high) in found.items():
        assert 0 < low < getattr(wanted, name) < high < 1 and high - low < 0.4
    twice = [*groups, *groups]
    larger = Made(twice)
    narrow = precision_intervals(results(larger, twice), larger, LABELS, larger.ids.tolist())
    assert narrow is not None  # of twice as many images
    assert narrow["ap"][1] - narrow["ap"][0] < 0.85 * (found["ap"][1] - found["ap"][0])


def test_what_has_no_interval():
    source = Made([0])
    assert precision_intervals(results(source, [0]), source, LABELS, source.ids.tolist()) is None
    source = Made([0, 1, 2])
    nothing = precision_intervals([], source, LABELS, source.ids.tolist())
    assert nothing == {name: (0.0, 0.0) for name in ("ap", "ap50", "ap75")}


@pytest.mark.slow
def test_the_time_of_five_hundred_images():
    groups = [*range(500)]
    source = Made(groups)
    given = results(source, groups, 100)
    started = time.process_time()
    precision_intervals(given, source, LABELS, source.ids.tolist())
    assert time.process_time() - started < 30
