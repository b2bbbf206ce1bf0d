from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from zoo.inputs.boxes import BoxPreprocess
from zoo.outputs import LABELS, Detection, LabelMap
from zoo.outputs.boxes import best, to_pixels


def test_boxes_in_pixels_are_clipped_to_each_image():
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.25], [0.9, 0.1, 0.4, 0.4]]]).expand(2, -1, -1)
    found = to_pixels(boxes, torch.tensor([[100, 200], [40, 20]]))
    assert found[0].tolist() == [[50, 37.5, 150, 62.5], [140, 0, 200, 30]]
    torch.testing.assert_close(found[1], torch.tensor([[5.0, 15, 15, 25], [14, 0, 20, 12]]))
    assert to_pixels(torch.tensor([[[2.0, -3, 1, 1]]]), torch.tensor([[10, 10]])).tolist() == [[[10, 0, 10, 0]]]


def test_the_best_pairs_of_query_and_class():
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0]]])
    boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]])
    found = best(logits, boxes, torch.tensor([[10, 20]]), classes=2, most=3)
    assert found.labels.tolist() == [[1, 0, 0]]  # of query 0, 1, 0
    torch.testing.assert_close(found.scores, torch.tensor([[3.0, 2.0, 0.0]]).sigmoid())
    assert found.boxes.tolist() == [[[0, 0, 10, 5], [10, 5, 20, 10], [0, 0, 10, 5]]]
    every = best(logits, boxes, torch.tensor([[10, 20]]), classes=2, most=100)
    assert every.labels.shape == (1, 4) and every.boxes.shape == (1, 4, 4)  # fewer pairs than asked for


def test_a_class_for_no_object_is_left_out():
    logits = torch.tensor([[[1.0, 0.0, 5.0], [2.0, 3.0, 0.0]]])
    found = best(logits, torch.full((1, 2, 4), 0.5), torch.tensor([[8, 8]]), classes=2)
    probabilities = logits.softmax(-1)[0]
    assert found.labels.tolist() == [[1, 0, 0, 1]]
    wanted = probabilities[[1, 1, 0, 0], [1, 0, 0, 1]]
    torch.testing.assert_close(found.scores[0], wanted)


def test_the_last_class_is_found():
    logits = torch.full((1, 3, 80), -9.0)
    logits[0, 2, 79] = 4.0
    assert best(logits, torch.rand(1, 3, 4), torch.tensor([[8, 8]]), 80, 1).labels.item() == 79


def test_boxes_of_a_class_that_overlap_a_better_one_are_left_out():
    """As a naive loop in fp64 finds them; the places of an image with fewer boxes have a score of -1."""
    logits, boxes = torch.randn(3, 30, 4), 0.3 + 0.04 * torch.randn(3, 30, 4)
    boxes[2] = 0.3
    boxes[2, :10] = torch.tensor([0.8, 0.8, 0.1, 0.1])
    sizes = torch.tensor([[50, 80], [900, 700], [30, 30]])
    found = best(logits, boxes, sizes, 4, 25, overlap=0.7)
    corners = to_pixels(boxes, sizes).double()
    lacking = 0
    for image, (labels, scores, places) in enumerate(zip(*found, strict=True)):
        kept: list[tuple[int, int]] = []
        overlaps = torchvision.ops.box_iou(corners[image], corners[image])
        for place in logits[image].flatten().argsort(descending=True).tolist():
            query, label = divmod(place, 4)
            if all(label != other or overlaps[query, one] <= 0.7 for one, other in kept):
                kept.append((query, label))
        kept = kept[:25]
        real = int((scores >= 0).sum())
        lacking += 25 - real
        assert real == len(kept) and (scores[real:] == -1).all()
        assert labels[:real].tolist() == [label for _, label in kept]
        queries = [query for query, _ in kept]
        torch.testing.assert_close(places[:real].double(), corners[image, queries])
        torch.testing.assert_close(scores[:real], logits[image].sigmoid()[queries, labels[:real]])
        alone = best(*(each[image : image + 1] for each in (logits, boxes, sizes)), 4, 25, overlap=0.7)
        for one, other in zip(alone, found, strict=True):
            torch.testing.assert_close(one[0, :real], other[image, :real])
    assert 0 < lacking < 75
    every = best(logits, boxes, sizes, 4, 120)
    assert all(
        torch.equal(one, other) for one, other in zip(every, best(logits, boxes, sizes, 4, 120, 1.0), strict=True)
    )


def test_what_is_refused():
    boxes, size = torch.rand(1, 2, 4), torch.tensor([[8, 8]])
    with pytest.raises(ValueError, match="logits for 3 classes must have 3 or 4, got 2"):
        best(torch.zeros(1, 2, 2), boxes, size, 3)
    for logits, places in ((torch.full((1, 2, 3), torch.nan), boxes), (torch.zeros(1, 2, 3), boxes / 0)):
        with pytest.raises(ValueError, match="output is NaN or infinite"):
            best(logits, places, size, 3)


class Detector(nn.Module):
    """One query, whose box is the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[[1.0, 2.0]]]))
        self.config: Any = SimpleNamespace(labelled=2, detection_nms=1.0)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        assert images.shape == (1, 3, 16, 32)
        return {"logits": self.logits, "boxes": torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])}


def test_the_answer_is_in_pixels_of_the_original_image():
    prepare, image = BoxPreprocess(size=32, fit="pad"), np.zeros((60, 120, 3), dtype=np.uint8)
    answer = LABELS["categories"].answer
    found = answer(Detector(), prepare.parts(image), LabelMap(("ant", "bee"), (3, 9)))
    high, low = (torch.tensor(logit).sigmoid().item() for logit in (2.0, 1.0))
    box = (0.0, 0.0, 120.0, 60.0)
    assert found == [Detection("bee", pytest.approx(high), box), Detection("ant", pytest.approx(low), box)]
    assert answer(Detector(), prepare.parts(image), None)[0].label == "class 1"


def test_the_answer_leaves_boxes_out_as_the_model_says():
    class Twins(Detector):
        def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(images, mask)
            return {
                "logits": torch.cat([found["logits"], found["logits"] - 1], 1),
                "boxes": found["boxes"].repeat(1, 2, 1),
            }

    prepare, image, model = BoxPreprocess(size=32, fit="pad"), np.zeros((60, 120, 3), dtype=np.uint8), Twins()
    assert len(LABELS["categories"].answer(model, prepare.parts(image), None)) == 4
    model.config.detection_nms = 0.7
    found = LABELS["categories"].answer(model, prepare.parts(image), None)
    assert [each.label for each in found] == ["class 1", "class 0"]
