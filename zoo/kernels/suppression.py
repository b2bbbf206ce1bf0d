"""Non-maximum suppression of a batch; the result has a fixed size, so that models compile as one graph."""

import torch
from torch import Tensor


@torch.library.custom_op("zoo::suppressed", mutates_args=())
def suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, tried: int) -> Tensor:
    """Ranks of the boxes of each image [B, N] float32: > 0 for boxes that overlap no better one of their group too
    much, the best one first, and <= 0 for the others, in the same order. Those with a score of -inf keep it.

    Overlaps are computed in fp64, image by image.

    Args:
        boxes: [B, N, 4], (left, top, right, bottom).
        scores: [B, N].
        groups: [B, N] int64.
        overlap: the largest IoU of two boxes of a group that are both kept.
        tried: number of boxes with the highest scores that may be kept.
    """
    from torchvision.ops import batched_nms

    size = scores.shape[1]
    ranks = scores.new_empty(scores.shape, dtype=torch.float32)
    orders = scores.argsort(dim=1, descending=True, stable=True)
    for row, order, *image in zip(ranks, orders, boxes, scores, groups, strict=True):
        box, score, group = (each[order[:tried]] for each in image)
        row[order] = -torch.arange(size, device=row.device, dtype=row.dtype)
        row[order[batched_nms(box.double(), score.double(), group, overlap)]] += size
    return ranks.masked_fill_(scores == -torch.inf, -torch.inf)


@suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, tried: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.float32)
