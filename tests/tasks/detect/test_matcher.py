"""Matching: costs as in the full matrix of a batch, assignments as transformers finds them or a naive loop, and inputs
that are empty, NaN or many."""

import itertools
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import listed, random_boxes, random_truth
from zoo.models.detection import Predicted, Tokens
from zoo.outputs.boxes import Truth
from zoo.tasks.detect import matcher
from zoo.tasks.detect.matcher import Matches, cheapest, hungarian, iou, overlapping, overlaps, pairwise, united

CLASSES = 5


def predictions(*shape: int, classes: int = CLASSES) -> Predicted:
    return Predicted(2 * torch.randn(*shape, classes), random_boxes(*shape))


def tokens(images: int, number: int, real: Tensor | None = None) -> Tokens:
    return Tokens(predictions(images, number), random_boxes(images, number), real)


def pairs_of(matches: Matches) -> set[tuple[int, ...]]:
    found = list(zip(*(each.tolist() for each in matches), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


def published(predicted: Predicted, truth: Truth, softmax: bool = False) -> set[tuple[int, ...]]:
    """What transformers' matcher finds, layer by layer."""
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    options = {"matcher_class_cost": 1.0 if softmax else 2.0, "matcher_bbox_cost": 5.0, "matcher_giou_cost": 2.0}
    options |= {"use_focal_loss": not softmax, "matcher_alpha": 0.25, "matcher_gamma": 2.0}
    theirs = RTDetrHungarianMatcher(SimpleNamespace(**options))
    places = [valid.nonzero()[:, 0] for valid in truth.valid]
    found = set()
    for layer, (logits, boxes) in enumerate(zip(*predicted, strict=True)):
        answer = theirs({"logits": logits, "pred_boxes": boxes}, listed(truth))
        for image, (queries, objects) in enumerate(answer):
            known = places[image][objects].tolist()
            found |= {(layer, image, *pair) for pair in zip(queries.tolist(), known, strict=True)}
    return found


def united_naively(parts: list[np.ndarray]) -> set[tuple[int, ...]]:
    """The pairs of all parts, counted one by one; of those of a query the most frequent one, of equals the first."""
    counts = Counter(tuple(pair) for part in parts for pair in part[1:].T.tolist())
    best: dict[tuple[int, ...], tuple[int, ...]] = {}
    for pair in sorted(counts):
        if pair[:2] not in best or counts[pair] > counts[best[pair[:2]]]:
            best[pair[:2]] = pair
    return {(0, *pair) for pair in best.values()}


@pytest.mark.parametrize("number", [0, 3, 40])
def test_matches_of_all_layers_are_united(number):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, (1, 2, 4, 3), (number, 4)).T for _ in range(5)]
    found = united(parts)
    assert found.shape[0] == 4 and {tuple(pair) for pair in found.T.tolist()} == united_naively(parts)
    assert found.shape[1] == len(united_naively(parts))


def test_the_union_holds_each_query_once_and_the_matches_that_agree():
    truth, given = random_truth([3, 0, 2], CLASSES), predictions(4, 3, 9)
    proposals = Predicted(*(each[:1] for each in predictions(1, 3, 9)))
    found = hungarian(given, proposals, None, truth)
    assert found.proposals is not None
    wanted = united_naively([torch.stack([*part]).numpy() for part in (found.layers, found.proposals)])
    assert pairs_of(found.union) == wanted and len(wanted) > 5
    same = Predicted(*(each[:1].repeat(4, *[1] * (each.ndim - 1)) for each in given))
    again = hungarian(same, None, None, truth)
    assert pairs_of(again.union) == {pair for pair in pairs_of(again.layers) if pair[0] == 0}


def test_overlaps_are_those_of_torchvision():
    one, other = random_boxes(40).double(), random_boxes(40).double()
    other[:3] = one[:3]
    corners = [torchvision.ops.box_convert(each, "cxcywh", "xyxy") for each in (one, other)]
    ours = overlaps(one[:, None], other[None])
    theirs = torchvision.ops.box_iou(*corners), torchvision.ops.generalized_box_iou(*corners)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).abs().max() < 1e-12
    assert (ours[1] < 0).any() and (ours[0] == 0).any()


def full_matrix(predicted: Predicted, truth: Truth, softmax: bool) -> Tensor:
    """The costs of each layer for all queries of the batch [B Q] and all its objects, those of other images too."""
    logits, boxes = (each.flatten(1, 2) for each in predicted)
    labels, objects = truth.labels.flatten(), truth.boxes.flatten(0, 1)
    if softmax:
        classes = -logits.softmax(-1)[..., labels]
    else:
        chosen = logits[..., labels]
        negative = -logsigmoid(-chosen)
        score = (chosen - negative).exp()
        classes = 2.0 * (0.25 * (1.0 - score) ** 2 * (negative - chosen) - 0.75 * score**2 * negative)
    l1 = torch.cdist(boxes, objects, p=1)
    return classes + 5.0 * l1 - 2.0 * overlaps(boxes[:, :, None], objects)[1]


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("chunk", [1, 2**16])
def test_costs_are_bit_for_bit_those_of_the_full_matrix(softmax, chunk, monkeypatch):
    monkeypatch.setattr(matcher, "PAIRS", chunk)  # one layer at a time, or all
    images, queries, most = 3, 37, 6
    predicted, truth = predictions(4, images, queries), random_truth([6, 2, 4], CLASSES)
    got = pairwise(predicted, truth, lambda predicted, truth: matcher.cost(predicted, truth, softmax))
    full = full_matrix(predicted, truth, softmax).view(4, images, queries, images, most)
    for image in range(images):
        assert torch.equal(got[:, image], full[:, image, :, image].mT)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("counts", [[5, 0, 2], [1, 9, 3]])
def test_layers_and_proposals_are_matched_as_by_transformers(softmax, counts):
    """More objects than queries, images without objects, and places that are not valid before some that are."""
    layers, proposals, truth = predictions(3, 3, 7), predictions(1, 3, 8), random_truth(counts, CLASSES)
    truth = Truth(*(each.flip(1) for each in truth))
    found = hungarian(layers, proposals, None, truth, softmax)
    assert found.proposals is not None
    assert pairs_of(found.layers) == published(layers, truth, softmax)
    assert pairs_of(found.proposals) == published(proposals, truth, softmax)
    assert found.objects.T.tolist() == truth.valid.nonzero().tolist()
    assert len(found.layers.query) == 3 * sum(min(7, count) for count in counts)


@pytest.mark.parametrize("most", [0, 3])
def test_a_batch_without_objects_matches_nothing(most):
    truth = Truth(torch.zeros(2, most).long(), torch.zeros(2, most, 4), torch.zeros(2, most).bool())
    for assigner in (hungarian, iou):
        found = assigner(predictions(2, 2, 6), predictions(1, 2, 6), tokens(2, 8), truth)
        assert found.proposals is not None and found.objects.shape == (2, 0)
        assert all(each.shape == (0,) and each.dtype == torch.long for each in (*found.layers, *found.proposals))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_predictions_that_are_not_finite_are_matched_only_where_nothing_else_is_left(value):
    predicted, truth = predictions(1, 2, 6), random_truth([4, 3], CLASSES)
    predicted.boxes[0, 0, :2] = value  # four other queries for four objects
    predicted.logits[0, 1, :4] = float("nan")  # two others for three
    predicted.logits[0, 1, 4:] *= 100
    found = hungarian(predicted, None, None, truth).layers
    assert sorted(found.query[found.image == 0].tolist()) == [2, 3, 4, 5]
    queries = found.query[found.image == 1].tolist()
    assert {4, 5} < set(queries) and len(queries) == 3
    predicted.boxes[:] = value
    assert len(hungarian(predicted, None, None, truth).layers.query) == 7


def test_the_least_cost_is_found_beside_costs_that_are_not_finite():
    """The best of all permutations, a cost that is not finite being worse than any number of finite ones."""
    generator = np.random.default_rng(0)
    for trial in range(60):
        costs = generator.uniform(-3, 30, (3, 4)).astype(np.float32)
        costs = costs if trial % 2 else 10.0**costs
        costs[generator.random((3, 4)) < 0.3] = generator.choice([np.nan, np.inf, -np.inf])
        objects, queries = cheapest(costs)

        def judged(order: tuple[int, ...], costs: np.ndarray = costs) -> tuple[int, float]:
            chosen = costs[range(3), order].astype(np.float64)
            return int((~np.isfinite(chosen)).sum()), float(chosen[np.isfinite(chosen)].sum())

        best = min(judged(order) for order in itertools.permutations(range(4), 3))
        assert objects.tolist() == [0, 1, 2]
        assert judged(tuple(queries)) == pytest.approx(best)


def naive_overlapping(table: list[list[float]], threshold: float) -> set[tuple[int, int]]:
    """The pairs (object, query) of the assignment by overlap, query by query, for the IoU of each object and query."""
    objects, queries = range(len(table)), range(len(table[0]))
    found: dict[int, list[tuple[float, int]]] = {number: [] for number in objects}
    for query in queries:
        overlap = {number: table[number][query] for number in objects}
        claims = [number for number in objects if overlap[number] == max(table[number]) > 0]
        favourite = max(claims or objects, key=lambda number: overlap[number])
        if claims or overlap[favourite] >= threshold:
            found[favourite].append((-overlap[favourite], query))
    return {(number, query) for number, each in found.items() for _, query in sorted(each)[:4]}


def table_of(boxes: Tensor, objects: Tensor) -> list[list[float]]:
    """The IoU of each object [G, 4] and box [Q, 4] in fp64, pair by pair, by corners."""

    def area(low: list[float], high: list[float]) -> float:
        return max(0.0, high[0] - low[0]) * max(0.0, high[1] - low[1])

    def overlap(one: list[float], other: list[float]) -> float:
        shared = area([max(one[0], other[0]), max(one[1], other[1])], [min(one[2], other[2]), min(one[3], other[3])])
        return shared / (area(one[:2], one[2:]) + area(other[:2], other[2:]) - shared)

    corners = [torchvision.ops.box_convert(each.double(), "cxcywh", "xyxy").tolist() for each in (objects, boxes)]
    return [[overlap(one, other) for other in corners[1]] for one in corners[0]]


def near(truth: Truth, number: int, spread: float) -> Tensor:
    """Boxes [B, number, 4], most of them about objects; the others anywhere."""
    boxes = random_boxes(len(truth.labels), number)
    about = truth.boxes[:, torch.arange(number - 5) % truth.labels.shape[1]]
    boxes[:, 5:] = torch.where(about.sum(-1, keepdim=True) > 0, about * (1 + spread * torch.randn_like(about)), 0.3)
    return boxes


def test_queries_and_tokens_are_assigned_by_overlap_as_by_a_naive_loop():
    """An image without objects, one with padding among its tokens; many overlaps lie between the thresholds."""
    counts, real = (4, 0, 2), torch.ones(3, 60, dtype=torch.bool)
    real[2, 30:] = False
    truth = random_truth([*counts], CLASSES)
    proposals = Predicted(torch.randn(1, 3, 30, CLASSES), near(truth, 30, 0.06)[None])
    every = tokens(3, 60, real)._replace(anchors=near(truth, 60, 0.15))
    found = iou(predictions(2, 3, 30), proposals, every, truth)
    assert found.proposals is not None and found.counted is not None
    queries, chosen, kinds = set(), set(), Counter()
    for image, count in enumerate(counts):
        places = real[image].nonzero()[:, 0].tolist()
        pairs: set[tuple[int, int]] = set()
        most = [0.0] * len(places)
        if count:
            objects = truth.boxes[image, :count]
            naive = naive_overlapping(table_of(proposals.boxes[0, image], objects), 0.6)
            queries |= {(image, query, number) for number, query in naive}
            table = table_of(every.anchors[image, places], objects)
            most = [max(column) for column in zip(*table, strict=True)]
            pairs = naive_overlapping(table, 0.7)
            chosen |= {(0, image, places[query], number) for number, query in pairs}
        positive = {query for _, query in pairs}
        wanted = [place for at, place in enumerate(places) if at in positive or most[at] < 0.3]
        assert found.counted[image].nonzero()[:, 0].tolist() == wanted
        kinds.update("positive" if at in positive else "negative" if most[at] < 0.3 else "ignored" for at in places)
    assert pairs_of(found.proposals) == chosen
    assert pairs_of(found.union) == {(0, *each) for each in queries}
    assert pairs_of(found.layers) == {(layer, *each) for layer in (0, 1) for each in queries}
    assert found.objects.T.tolist() == truth.valid.nonzero().tolist()
    assert min(kinds["positive"], kinds["negative"], kinds["ignored"]) > 5
    assert torch.bincount(found.union.image * 4 + found.union.object).max() == 4


def test_an_object_keeps_the_query_that_overlaps_it_most():
    """Also where that overlaps another object more, and where nothing overlaps it well; a query has one object."""
    given = [[0.1, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [0.7, np.nan, 0.8, 0.0], [0.9, 0.0, 0.95, 0.0]]
    found = overlapping(torch.tensor([given]), 0.6)
    assert pairs_of(found) == {(0, 0, 1, 0), (0, 0, 2, 3), (0, 0, 0, 3)}
    small = torch.tensor([[[0.1, 0.0], [0.5, 0.9]]])
    assert pairs_of(overlapping(small, 0.6)) == {(0, 0, 0, 0), (0, 0, 1, 1)}
    assert pairs_of(overlapping(small.flip(1), 0.6)) == {(0, 0, 0, 1), (0, 0, 1, 0)}


@pytest.mark.parametrize("shift", [0.0, 0.013])
def test_of_the_anchors_inside_a_large_object_the_one_nearest_to_its_centre_is_taken(shift):
    at = (torch.arange(20) + 0.5) / 20
    centres = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).flatten(0, 1)
    anchors = torch.cat([centres, torch.full_like(centres, 0.05)], -1)[None]
    truth = Truth(torch.zeros(1, 1).long(), torch.tensor([[[0.42 + shift, 0.61, 0.5, 0.6]]]), torch.ones(1, 1).bool())
    found = iou(predictions(1, 1, 4), predictions(1, 1, 4), tokens(1, 400)._replace(anchors=anchors), truth)
    assert found.proposals is not None
    wanted = (centres - truth.boxes[0, 0, :2]).norm(dim=1).argmin()
    assert found.proposals.query.tolist() == [wanted]


def test_what_shares_the_batch_and_padding_change_no_assignment():
    """Neither more objects in another image, whatever stands beside the own ones, nor tokens of no image."""
    truth = random_truth([6, 2], CLASSES)
    truth.boxes[1, 2:] = truth.boxes[1, :1] * 1.01
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, 40:] = False
    proposals = Predicted(torch.randn(1, 2, 30, CLASSES), near(truth, 30, 0.06)[None])
    every = tokens(2, 60, real)._replace(anchors=near(truth, 60, 0.15))
    together = iou(predictions(1, 2, 30), proposals, every, truth)
    alone = iou(
        predictions(1, 1, 30),
        Predicted(*(each[:, 1:] for each in proposals)),
        Tokens(Predicted(*(each[1:, :40] for each in every.predicted)), every.anchors[1:, :40], None),
        Truth(*(each[1:, :2] for each in truth)),
    )
    for name in ("proposals", "union"):
        one, other = (getattr(each, name) for each in (together, alone))
        own = {(0, 0, *pair[2:]) for pair in pairs_of(one) if pair[1] == 1}
        assert own == pairs_of(other) and own
    assert together.counted is not None and alone.counted is not None
    assert torch.equal(together.counted[1, :40], alone.counted[0]) and not together.counted[1, 40:].any()


def test_assignment_by_overlap_needs_proposals():
    with pytest.raises(ValueError, match="^the iou assigner needs a model with proposals; use hungarian$"):
        iou(predictions(1, 1, 3), None, None, random_truth([1], CLASSES))


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that is computed."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.number = max(self.number, each.untyped_storage().nbytes() // each.element_size())
        return result


def test_memory_is_linear_in_boxes_and_in_images():
    """The costs themselves, 500 objects an image, are the largest tensor; other tensors hold a few layers of them."""
    for images, most in ((1, 250), (1, 500), (2, 500)):
        predicted, truth = predictions(2, images, 40), random_truth([most] * images, CLASSES)
        with Largest() as largest:
            hungarian(predicted, None, None, truth)
        assert largest.number == 2 * images * 40 * most + images * most


@pytest.mark.slow
def test_matching_is_five_times_as_fast_as_by_the_full_matrix():
    predicted, truth = predictions(6, 8, 300, classes=80), random_truth([7] * 8, 80)

    def seconds(call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    ours, theirs = ([], [])
    for _ in range(8):
        ours.append(seconds(lambda: hungarian(predicted, None, None, truth)))
        theirs.append(seconds(lambda: published(predicted, truth)))
    assert min(theirs) >= 5 * min(ours)
