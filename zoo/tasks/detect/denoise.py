"""Denoising queries: objects of the batch with noise, for which no matching is needed."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

from zoo.models.detection import Noised
from zoo.outputs.boxes import Truth


def denoising_queries(
    truth: Truth, classes: int, number: int = 100, label_noise: float = 0.5, box_noise: float = 1.0
) -> Noised:
    """Labels and boxes of a batch's objects with noise, drawn from torch's generator of their device.

    There are max(1, number // G) groups, where G is the number of objects of the image with most. In each group an
    object stands twice. Each side of the first box is shifted by up to half of the object's width or height times
    `box_noise`, inwards or outwards; those of the second by between once and twice of that. Boxes are clipped to the
    image; one whose sides would cross has no width or height there. A label is replaced by a random one with
    probability label_noise / 2.

    Without objects there is one group of two queries that are not valid.

    Args:
        truth: the objects of the batch.
        classes: how many classes there are.
        number: of queries with little noise for each image, about.
        label_noise: from 0 to 2.
        box_noise: 1 for published models.
    """
    labels, boxes, valid = truth
    if not labels.shape[1]:
        labels, boxes, valid = (each.new_zeros(len(each), 1, *each.shape[2:]) for each in truth)
    most = labels.shape[1]
    groups = max(1, number // most)
    labels, boxes, valid = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1), valid.repeat(1, 2 * groups)
    noise = boxes.new_zeros(groups, 2, most)
    noise[:, 1] = 1.0
    replaced = torch.rand_like(boxes[..., 0]) < label_noise / 2
    labels = torch.where(replaced & valid, torch.randint_like(labels, classes), labels)
    shift = (torch.rand_like(boxes) + noise.view(-1, 1)) * _signs(boxes) * box_noise / 2
    corners = box_convert(boxes, "cxcywh", "xyxy") + shift * boxes[..., 2:].repeat(1, 1, 2)
    corners = corners.clamp(0.0, 1.0)
    low, high = corners.split(2, -1)
    moved = torch.cat([(low + high) / 2, (high - low).clamp(min=0.0)], -1)
    whole = boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
    return Noised(labels, moved.where(valid[..., None], whole), valid, groups)


def _signs(like: Tensor) -> Tensor:
    return 2.0 * torch.randint_like(like, 2) - 1.0
