"""Which query answers for which object, for all layers of a decoder at once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import logsigmoid

from zoo.models.detection import Predicted, Tokens
from zoo.outputs.boxes import Truth

QUERY, TOKEN, BACKGROUND = 0.6, 0.7, 0.3  # IoU of a query and of a token with its object, and of a negative token
PAIRS = 2**16  # of queries and objects that are computed at a time; more would not fit a cache, and take memory


class Matches(NamedTuple):
    """Pairs of a query and an object: four index tensors [M] int64."""

    layer: Tensor
    image: Tensor
    query: Tensor
    object: Tensor


class Assigned(NamedTuple):
    """What an assigner finds."""

    layers: Matches
    proposals: Matches | None  # their layer is 0
    objects: Tensor  # [2, N] int64, the image of each real object and its place there
    union: Matches  # those of any layer or of the proposals (see `united`); their layer is 0
    counted: Tensor | None = None  # [B, M], where the proposals are all tokens, those that the loss of classes counts


def overlaps(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019, arXiv:1902.09630) of boxes [..., 4] that broadcast.

    Boxes are (centre x, centre y, width, height); a negative width or height counts as 0. Both are NaN where two boxes
    have no area in the same place.
    """
    intersection = hull = None
    one = other = 1.0  # areas
    for axis in (0, 1):
        (centre, size), (at, extent) = ((each[..., axis], each[..., axis + 2].clamp(min=0)) for each in (boxes, others))
        one, other = one * size, other * extent
        low = torch.maximum(centre - size / 2, at - extent / 2)
        shared = torch.minimum(centre + size / 2, at + extent / 2) - low
        total = size + extent
        spanned = total - shared
        shared = shared.clamp(min=0)
        intersection = shared if intersection is None else intersection * shared
        hull = spanned if hull is None else hull * spanned
    assert intersection is not None and hull is not None
    union = one + other - intersection
    iou = intersection / union
    return iou, iou + union / hull - 1.0


def distances(boxes: Tensor, others: Tensor) -> Tensor:
    """The sum of absolute differences of boxes [..., 4] that broadcast."""
    result = (boxes[..., 0] - others[..., 0]).abs()
    for number in (1, 2, 3):
        result = result + (boxes[..., number] - others[..., number]).abs()
    return result


def pairwise(predicted: Predicted, truth: Truth, measure: Callable[[Predicted, Truth], Tensor]) -> Tensor:
    """What `measure` gives for each object and query of the same image: [L, B, G, Q].

    It gets predictions [l, B, 1, Q, 4] and objects [B, G, 1, 4] whose four planes are contiguous; few enough layers l
    at a time to be quick on a CPU and to bound the memory.
    """
    layers, images, queries = predicted.boxes.shape[:3]
    most = truth.labels.shape[1]
    step = max(1, PAIRS // max(1, images * queries * most))
    found = truth._replace(boxes=_planes(truth.boxes)[:, :, None])
    parts = []
    for start in range(0, layers, step):
        logits, boxes = (each[start : start + step] for each in predicted)
        parts.append(measure(Predicted(logits, _planes(boxes)[:, :, None]), found))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _planes(boxes: Tensor) -> Tensor:
    return boxes.movedim(-1, 0).contiguous().movedim(0, -1)


def cost(predicted: Predicted, truth: Truth, softmax: bool = False) -> Tensor:
    """The cost of each pair [L, B, G, Q]: 5 L1 - 2 GIoU, and what the class adds.

    That is 2 (focal(positive) - focal(negative)) with alpha 0.25 and gamma 2 (Deformable DETR, Zhu et al. 2021,
    arXiv:2010.04159); with softmax, minus the probability (DETR, Carion et al. 2020, arXiv:2005.12872).
    """
    layers, queries = predicted.boxes.shape[0], predicted.boxes.shape[3]
    logits = predicted.logits.softmax(-1) if softmax else predicted.logits
    index = truth.labels[None, :, :, None].expand(layers, -1, -1, queries)
    logits = logits.mT.gather(2, index)
    if softmax:
        classes = -logits
    else:
        # On a CPU softplus and sigmoid round the last numbers of a tensor differently, logsigmoid and exp do not.
        negative = -logsigmoid(-logits)
        positive = negative - logits
        score = (-positive).exp()
        classes = 2.0 * (0.25 * (1.0 - score).square() * positive - 0.75 * score.square() * negative)
    _, giou = overlaps(predicted.boxes, truth.boxes)
    return classes + 5.0 * distances(predicted.boxes, truth.boxes) - 2.0 * giou


def cheapest(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects and queries of the assignment of least total cost (the Hungarian method), for costs [G, Q].

    Costs that are NaN or infinite count as more than all others together, so they are chosen only where nothing else is
    left.
    """
    bad = ~np.isfinite(costs)
    if bad.any():
        finite = costs[~bad].astype(np.float64)
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        costs = np.where(bad, high + (high - low + 1.0) * min(costs.shape), costs)
    return linear_sum_assignment(costs)


def overlapping(iou: Tensor, threshold: float, most: int = 4) -> Matches:
    """The assignment by overlap (DETA, Ouyang-Zhang et al. 2022, arXiv:2212.06137), for the IoU [B, G, Q].

    A query that overlaps an object most of all queries takes it, of several such objects the one that it overlaps most.
    Any other query takes the object that it overlaps most, if by the threshold or more. Of the queries of an object
    the `most` best remain. An IoU that is NaN or <= 0 is no overlap.
    """
    _, objects, queries = iou.shape
    if not objects:
        return Matches(*iou.new_zeros(4, 0, dtype=torch.long))
    iou = iou.nan_to_num()
    closest = (iou == iou.amax(2, keepdim=True)) & (iou > 0)
    claimed = closest.any(1)
    best, taken = iou.where(closest | ~claimed[:, None], -1.0).max(1)
    positive = claimed | (best >= threshold)
    own = (taken[:, None] == torch.arange(objects, device=iou.device)[:, None]) & positive[:, None]
    values, chosen = iou.where(own, -1.0).topk(min(most, queries), 2)
    image, place, rank = (values > 0).nonzero(as_tuple=True)
    return Matches(torch.zeros_like(image), image, chosen[image, place, rank], place)


def united(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The matches [4, M] of several parts together, each once and with layer 0 (D-FINE, Peng et al. 2024,
    arXiv:2410.13842).

    A query that was matched to several objects keeps the one that it was matched to most often, of equals the first.
    """
    pairs, counts = np.unique(np.concatenate([each[1:] for each in parts], 1), axis=1, return_counts=True)
    pairs = pairs[:, np.lexsort((-counts, pairs[1], pairs[0]))]
    first = np.ones(pairs.shape[1], bool)
    first[1:] = (pairs[:2, 1:] != pairs[:2, :-1]).any(0)
    return np.concatenate([np.zeros_like(pairs[:1, first]), pairs[:, first]])


def repeated(matches: Matches, layers: int) -> Matches:
    """The same matches in so many layers, one layer after the other."""
    layer = torch.arange(layers, device=matches.layer.device).repeat_interleave(len(matches.layer))
    return Matches(layer, *(each.repeat(layers) for each in matches[1:]))


def _assign(costs: Sequence[Tensor], truth: Truth) -> tuple[list[Matches], Tensor]:
    """Finds the cheapest matches for the [G, Q] of each layer and image; one copy to the host, and one back. The last
    matches are those of all parts, united."""
    valid = truth.valid
    copied = torch.cat([*(each.flatten() for each in costs), valid.flatten().to(costs[0])]).cpu().numpy()
    *flat, known = np.split(copied, np.cumsum([each.numel() for each in costs]))
    real = known.reshape(valid.shape) > 0
    places = [np.flatnonzero(row) for row in real]
    pairs = [np.stack(np.nonzero(real))]
    for each, values in zip(costs, flat, strict=True):
        matrices = values.reshape(each.shape)
        found = [np.zeros((4, 0), np.int64)]
        for layer, of_layer in enumerate(matrices):
            for image, place in enumerate(places):
                if len(place):
                    objects, queries = cheapest(of_layer[image, place])
                    constant = np.full_like(queries, layer), np.full_like(queries, image)
                    found.append(np.stack([*constant, queries, place[objects]]))
        pairs.append(np.concatenate(found, 1))
    pairs.append(united(pairs[1:]))
    joined = torch.from_numpy(np.concatenate([each.ravel() for each in pairs])).to(valid.device, non_blocking=True)
    objects, *matched = (
        part.view(each.shape) for part, each in zip(joined.split([e.size for e in pairs]), pairs, strict=True)
    )
    return [Matches(*each) for each in matched], objects


@torch.no_grad()
def hungarian(
    layers: Predicted, proposals: Predicted | None, tokens: Tokens | None, truth: Truth, softmax: bool = False
) -> Assigned:
    """One query for each object, of least total cost; the layers, and the proposals, each on their own.

    Where there are more objects than queries, some remain without.
    """
    parts = [layers, *([proposals] if proposals is not None else [])]
    costs = [pairwise(part, truth, lambda predicted, truth: cost(predicted, truth, softmax)) for part in parts]
    matched, objects = _assign(costs, truth)
    return Assigned(matched[0], matched[1] if proposals is not None else None, objects, matched[-1])


@torch.no_grad()
def iou(
    layers: Predicted, proposals: Predicted | None, tokens: Tokens | None, truth: Truth, softmax: bool = False
) -> Assigned:
    """Up to 4 queries, and up to 4 tokens, for each object, by overlap (see `overlapping`).

    Queries are assigned by the boxes that they start from, from an IoU of 0.6, the same in all layers. Tokens are
    assigned by their anchors, from an IoU of 0.7; of equal ones by the distance of the centres. The other tokens count
    in the loss of classes if they overlap no object by 0.3 or more.

    ValueError for a model without proposals.
    """
    if proposals is None or tokens is None:
        raise ValueError("the iou assigner needs a model with proposals; use hungarian")
    valid = truth.valid[:, :, None]
    overlap = pairwise(proposals, truth, lambda predicted, truth: overlaps(predicted.boxes, truth.boxes)[0])[0]
    own = overlapping(overlap.where(valid, 0.0), QUERY)
    real = valid if tokens.real is None else valid & tokens.real[:, None]
    near = pairwise(Predicted(tokens.predicted.logits[None], tokens.anchors[None]), truth, nearness)[0].where(real, 0.0)
    first = overlapping(near, TOKEN)
    counted = (near < BACKGROUND).all(1)
    if tokens.real is not None:
        counted = counted & tokens.real
    counted = counted.index_put((first.image, first.query), torch.ones_like(first.image, dtype=torch.bool))
    objects = torch.stack(truth.valid.nonzero(as_tuple=True))
    return Assigned(repeated(own, len(layers.boxes)), first, objects, own, counted)


def nearness(predicted: Predicted, truth: Truth) -> Tensor:
    """The IoU of each pair, less a ten thousandth of the distance of their centres: the anchors inside a large object
    all have the same IoU."""
    between = (predicted.boxes - truth.boxes)[..., :2].square().sum(-1).sqrt()
    return overlaps(predicted.boxes, truth.boxes)[0] - 1e-4 * between


ASSIGNERS: dict[str, Callable[[Predicted, Predicted | None, Tokens | None, Truth, bool], Assigned]] = {
    "hungarian": hungarian,
    "iou": iou,
}
