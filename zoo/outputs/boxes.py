"""Objects of images: what a detector is trained on, and from its output to the best boxes in pixels."""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels import suppressed

TRIED = 10_000  # pairs of a query and a class that take part in non-maximum suppression
MISSING = -1.0  # score of a box that is not there


class Truth(NamedTuple):
    """The objects of a batch, padded to the number of the image with most of them.

    Boxes are (centre x, centre y, width, height) in 0..1 of each image's own extent, without its padding.
    """

    labels: Tensor  # [B, G] int64, the index of a class
    boxes: Tensor  # [B, G, 4] float32
    valid: Tensor  # [B, G], True on real objects


class Found(NamedTuple):
    """The best boxes of each image of a batch, the highest score first. N is at most the number asked for; where
    an image has fewer, the last scores are MISSING."""

    labels: Tensor  # [B, N] int64, the index of a class
    scores: Tensor  # [B, N] float32, 0..1
    boxes: Tensor  # [B, N, 4] float32, (left, top, right, bottom) in pixels of the original image


def to_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """From relative boxes to pixels of the original image, clipped to it.

    Args:
        boxes: [B, N, 4], (centre x, centre y, width, height) in 0..1 of each image.
        sizes: [B, 2], the height and width of each original image in pixels.

    Returns:
        [B, N, 4], (left, top, right, bottom).
    """
    scale = sizes.to(boxes).flip(-1)[:, None]
    centre, half = boxes[..., :2] * scale, boxes[..., 2:] * scale / 2
    low, high = (centre - half).clamp(min=0), (centre + half).clamp(min=0)
    return torch.cat([torch.minimum(low, scale), torch.minimum(high, scale)], -1)


def best(logits: Tensor, boxes: Tensor, sizes: Tensor, classes: int, most: int = 100, overlap: float = 1.0) -> Found:
    """The best pairs of a query and a class; a query may stand for several classes.

    Args:
        logits: [B, Q, classes], whose scores are sigmoids; or [B, Q, classes + 1], where the last one means no object
            and scores are softmax probabilities.
        boxes: [B, Q, 4], relative, as in `to_pixels`.
        sizes: [B, 2], the height and width of each original image in pixels.
        classes: number of classes.
        most: most boxes of an image.
        overlap: the largest IoU of two boxes of a class; 1 for all boxes.

    Raises:
        ValueError: logits do not fit the number of classes, or logits or boxes are NaN or infinite.
    """
    if logits.shape[-1] not in (classes, classes + 1):
        raise ValueError(f"logits for {classes} classes must have {classes} or {classes + 1}, got {logits.shape[-1]}")
    if not bool(logits.isfinite().all()) or not bool(boxes.isfinite().all()):
        raise ValueError("the model's output is NaN or infinite")
    logits = logits.float()
    scores = logits.sigmoid() if logits.shape[-1] == classes else logits.softmax(-1)[..., :classes]
    ranked, places = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    found = to_pixels(boxes.float(), sizes)
    if overlap < 1.0:
        ranked, places = ranked[:, :TRIED], places[:, :TRIED]
        ranks = suppressed(_chosen(found, places // classes), ranked, places % classes, overlap, TRIED)
        ranks, order = ranks.sort(dim=1, descending=True)
        ranked, places = ranked.gather(1, order).masked_fill(ranks <= 0, MISSING), places.gather(1, order)
    ranked, places = ranked[:, :most], places[:, :most]
    return Found(places % classes, ranked, _chosen(found, places // classes))


def _chosen(boxes: Tensor, queries: Tensor) -> Tensor:
    return boxes.gather(1, queries[..., None].expand(-1, -1, 4))
