"""Non-maximum suppression: a naive loop, whatever shares the batch, and boxes that are not there."""

import pytest
import torch
import torchvision
from torch import Tensor

from zoo.kernels import suppressed

INF = float("inf")


def crowded(images: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes around a few places, in pixels, their scores and groups."""
    places = torch.randint(4, (images, number))
    low = 40.0 * torch.stack([places // 2, places % 2], -1) + 3 * torch.rand(images, number, 2)
    boxes = torch.cat([low, low + 20 + 5 * torch.rand(images, number, 2)], -1)
    return boxes, torch.randn(images, number), torch.randint(3, (images, number))


def naive(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, tried: int) -> tuple[list[int], list[int]]:
    """The boxes that are kept, and all others that are there, each from the best one on."""
    order = sorted((n for n in range(len(scores)) if scores[n] > -INF), key=lambda n: -scores[n].item())
    table = torchvision.ops.box_iou(boxes.double(), boxes.double())
    kept: list[int] = []
    for box in order[:tried]:
        if all(groups[box] != groups[other] or table[box, other] <= overlap for other in kept):
            kept.append(box)
    return kept, [box for box in order if box not in kept]


@pytest.mark.parametrize("overlap", [0.3, 0.7])
@pytest.mark.parametrize("tried", [60, 15])
@pytest.mark.parametrize("far", [False, True])
def test_ranks_are_those_of_a_naive_loop(overlap: float, tried: int, far: bool):
    """Also of small boxes in a large image, in groups with large numbers."""
    boxes, scores, groups = crowded(3, 60)
    if far:
        boxes, groups = boxes + 5000, 10_000 * groups
    scores[1, 20:] = -INF
    ranks = suppressed(boxes, scores, groups, overlap, tried)
    assert ranks.dtype == torch.float32
    for row, *image in zip(ranks, boxes, scores, groups, strict=True):
        kept, others = naive(*image, overlap, tried)
        assert len(kept) > 3 and others
        order = row.argsort(descending=True).tolist()
        assert order[: len(kept) + len(others)] == kept + others
        assert (row > 0).sum() == len(kept) and torch.equal(row == -INF, image[1] == -INF)
        assert len(set(row[row > -INF].tolist())) == len(kept) + len(others)


def test_what_shares_the_batch_changes_nothing():
    """Nor do boxes far away, or more of them with a score of -inf."""
    boxes, scores, groups = crowded(2, 60)
    wanted = suppressed(boxes[:1, :40], scores[:1, :40], groups[:1, :40], 0.5, 30)[0]
    scores[0, 40:] = -INF
    boxes[1], groups[1] = boxes[1] * 1e6, groups[1] * 1000
    found = suppressed(boxes, scores, groups, 0.5, 30)[0, :40]
    assert torch.equal(found > 0, wanted > 0) and torch.equal(found.argsort(), wanted.argsort())


def test_equal_scores_keep_their_order():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(1, 5, 4)
    ranks = suppressed(boxes, torch.zeros(1, 5), torch.tensor([[0, 0, 1, 0, 1]]), 0.9, 5)
    assert ranks.tolist() == [[5, -1, 3, -3, -4]]


def test_no_boxes_and_boxes_that_are_not_there():
    assert suppressed(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).long(), 0.5, 9).shape == (2, 0)
    boxes, scores, groups = crowded(1, 4)
    assert suppressed(boxes, scores - INF, groups, 0.5, 9).tolist() == [[-INF] * 4]


def test_the_operator_is_as_it_is_declared():
    torch.library.opcheck(suppressed, (*crowded(2, 10), 0.5, 8))
