"""Denoising queries: where they stand, how much noise they have, and a batch without objects."""

import pytest
import torch

from helpers import random_boxes, random_truth
from zoo.models.detection import Predicted, Trained
from zoo.outputs.boxes import Truth
from zoo.tasks.detect.denoise import denoising_queries
from zoo.tasks.detect.losses import detection_loss, positives

CLASSES = 7


@pytest.mark.parametrize("number, groups", [(100, 20), (9, 1), (4, 1), (1, 1), (10, 2)])
def test_groups_share_the_number_and_hold_each_object_twice(number, groups):
    truth = random_truth([5, 2, 0], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=number, label_noise=0.0, box_noise=0.0)
    assert noised.groups == groups
    for given, wanted in zip(noised[:3], truth, strict=True):
        parts = given.unflatten(1, (groups, 2, 5))
        assert parts.dtype == wanted.dtype
        if given is noised.boxes:
            parts = parts * truth.valid[:, None, None, :, None]
            assert (parts - wanted[:, None, None]).abs().max() < 1e-6
        else:
            assert (parts == wanted[:, None, None]).all()


def test_sides_move_by_less_than_half_the_size_and_those_of_negatives_by_more():
    truth = random_truth([6, 6], CLASSES)
    truth = truth._replace(boxes=truth.boxes * 0.1 + torch.tensor([0.4, 0.4, 0.0, 0.0]))  # nothing is clipped
    for scale in (1.0, 0.4):
        noised = denoising_queries(truth, CLASSES, number=6000, box_noise=scale)
        boxes = noised.boxes.unflatten(1, (noised.groups, 2, 6))
        wanted = truth.boxes[:, None, None]
        low, high = (boxes[..., :2] + sign * boxes[..., 2:] / 2 for sign in (-1, 1))
        shifts = torch.stack(
            [low - wanted[..., :2] + wanted[..., 2:] / 2, high - wanted[..., :2] - wanted[..., 2:] / 2]
        )
        shifts = shifts / (wanted[..., 2:] * scale / 2)
        positive, negative = shifts[:, :, :, 0], shifts[:, :, :, 1]
        assert positive.abs().max() < 1.001 and 0.45 < positive.abs().mean() < 0.55 and positive.mean().abs() < 0.02
        crossed = (boxes[:, :, 1, :, 2:] == 0).any(-1)
        assert crossed.any() == (scale == 1.0)
        negative = negative[:, ~crossed]
        assert negative.abs().min() > 0.999 and negative.abs().max() < 2.001
        assert (negative > 0).any() and (negative < 0).any()


def test_boxes_stay_within_the_image():
    truth = random_truth([40], CLASSES)
    edges = truth.boxes.clone()
    edges[:, :20, :2], edges[:, 20:, :2] = edges[:, :20, 2:] / 2, 1 - edges[:, 20:, 2:] / 2
    boxes = denoising_queries(truth._replace(boxes=edges), CLASSES, number=1000).boxes
    assert (boxes[..., :2] - boxes[..., 2:] / 2).min() > -1e-6 and (
        boxes[..., :2] + boxes[..., 2:] / 2
    ).max() < 1 + 1e-6
    assert boxes.min() >= 0.0


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_labels_are_replaced_at_random(noise):
    truth = random_truth([10], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=20_000, label_noise=noise)
    before = truth.labels.repeat(1, 2 * noised.groups)
    assert (noised.labels != before).float().mean() == pytest.approx(noise / 2 * (1 - 1 / CLASSES), abs=0.01)
    assert noised.labels.min() == 0 and noised.labels.max() == CLASSES - 1 or noise == 0.0


def test_queries_that_are_not_valid_have_a_box_of_the_whole_image():
    noised = denoising_queries(random_truth([4, 1], CLASSES), CLASSES, number=4)
    assert noised.valid.tolist() == [[True] * 8, [True, False, False, False] * 2]
    assert (noised.boxes[~noised.valid] == torch.tensor([0.5, 0.5, 1.0, 1.0])).all()
    assert not noised.labels[~noised.valid].any()


@pytest.mark.parametrize("most", [0, 2])
def test_a_batch_without_objects_has_a_group_that_is_not_valid(most):
    truth = Truth(torch.zeros(3, most).long(), torch.zeros(3, most, 4), torch.zeros(3, most).bool())
    noised = denoising_queries(truth, CLASSES, number=1)
    assert noised.groups == 1 and noised.labels.shape == (3, 2 * max(1, most)) and noised.boxes.dtype == torch.float32
    assert noised.labels.dtype == torch.long and noised.valid.dtype == torch.bool
    assert not noised.valid.any() and not noised.labels.any() and noised.boxes.isfinite().all()


def test_noise_is_a_function_of_the_seed():
    truth = random_truth([4, 1], CLASSES)
    first, again, other = (torch.manual_seed(seed) and denoising_queries(truth, CLASSES) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.boxes, other.boxes)


def test_positives_are_those_that_stand_for_their_objects():
    truth = random_truth([3, 0, 2], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=6, label_noise=0.0, box_noise=0.01)
    found = positives(noised, truth.valid.nonzero().T, 2)
    assert len(set(zip(*(each.tolist() for each in found), strict=True))) == len(found.layer) == 2 * noised.groups * 5
    at = (found.image, found.query)
    assert noised.valid[at].all() and torch.equal(noised.labels[at], truth.labels[found.image, found.object])
    assert (noised.boxes[at] - truth.boxes[found.image, found.object]).abs().max() < 0.005
    size = noised.labels.shape[1] // noised.groups
    assert (found.query % size < size // 2).all()


def test_predicting_the_objects_from_their_queries_costs_nothing():
    truth = random_truth([3, 0, 2], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=6)
    boxes = truth.boxes.repeat(1, 2 * noised.groups, 1).where(noised.valid[..., None], 0.5)[None]
    sure = 2 * torch.nn.functional.one_hot(truth.labels, CLASSES).repeat(1, 2 * noised.groups, 1)[None] - 1
    negative = (torch.arange(noised.labels.shape[1]) // 3 % 2 == 1)[:, None]
    logits = (30.0 * sure).masked_fill(negative, -30.0)
    given = Trained(Predicted(torch.randn(1, 3, 4, CLASSES), random_boxes(1, 3, 4)), None, Predicted(logits, boxes))
    terms = detection_loss(given, noised, truth)
    for kind in ("class", "l1", "giou"):
        assert terms[f"noised_{kind}"].abs() < 1e-4 < terms[f"layers_{kind}"]
