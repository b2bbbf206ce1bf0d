"""Losses of detectors: classes and boxes, on every decoder layer, the proposals and the denoising queries."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sampling import rank_and_world
from zoo.models.detection import Noised, Predicted, Refined, Tokens, Trained, wide
from zoo.outputs.boxes import Truth
from zoo.tasks.detect.matcher import ASSIGNERS, Matches, distances, overlaps, repeated
from zoo.text import unknown


class Weights(NamedTuple):
    """How much each loss counts."""

    classes: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    fgl: float = 0.15
    ddf: float = 1.5


class Matched(NamedTuple):
    """Queries that answer for an object, flat."""

    at: tuple[Tensor, Tensor, Tensor]  # their layers, images and numbers, each [M]
    labels: Tensor  # [M], the class of the object
    quality: Tensor  # [M], the IoU of prediction and object; it has no gradient


class Part(NamedTuple):
    """Predictions [L, B, Q, ...] with their objects: those of their classes, and those of their boxes."""

    predicted: Predicted
    matches: Matches
    number: Tensor  # by which the loss of classes is divided
    boxed: Matches
    boxes: Tensor  # by which the losses of boxes are divided
    real: Tensor | None = None  # [B, Q], queries that count; None if all do
    refined: Refined | None = None


# From logits [L, B, Q, classes], which queries are real [B, Q] or None, what is matched, and the number of objects.
ClassLoss = Callable[[Tensor, Tensor | None, Matched, Tensor], Tensor]


def _binary(
    logits: Tensor,
    real: Tensor | None,
    matched: Matched,
    number: Tensor,
    negative: Callable[[Tensor], Tensor],
    positive: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The sum of `negative` over all classes of all queries but those of their objects, for which `positive` counts."""
    every = negative(logits)
    if real is not None:
        every = every.where(real[..., None], 0.0)
    own = logits[*matched.at, matched.labels]
    return (every.sum() + (positive(own, matched.quality) - negative(own)).sum()) / number


def focal(logits: Tensor, real: Tensor | None, matched: Matched, number: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, arXiv:1708.02002) with alpha 0.25 and gamma 2."""
    return _binary(
        logits,
        real,
        matched,
        number,
        lambda logits: 0.75 * logits.sigmoid().square() * F.softplus(logits),
        lambda logits, quality: 0.25 * (-logits).sigmoid().square() * F.softplus(-logits),
    )


def vfl(logits: Tensor, real: Tensor | None, matched: Matched, number: Tensor) -> Tensor:
    """Varifocal loss (Zhang et al. 2021, arXiv:2008.13367) with alpha 0.75 and gamma 2: the score learns the IoU."""
    return _binary(
        logits,
        real,
        matched,
        number,
        lambda logits: 0.75 * logits.detach().sigmoid().square() * F.softplus(logits),
        lambda logits, quality: quality * (F.softplus(logits) - quality * logits),
    )


def mal(logits: Tensor, real: Tensor | None, matched: Matched, number: Tensor) -> Tensor:
    """Matchability-aware loss (DEIM, Huang et al. 2025, arXiv:2412.04234) with gamma 1.5."""
    return _binary(
        logits,
        real,
        matched,
        number,
        lambda logits: logits.detach().sigmoid().pow(1.5) * F.softplus(logits),
        lambda logits, quality: F.softplus(logits) - quality.pow(1.5) * logits,
    )


def ia_bce(logits: Tensor, real: Tensor | None, matched: Matched, number: Tensor) -> Tensor:
    """IoU-aware cross-entropy (Align-DETR, Cai et al. 2023, arXiv:2304.07527; RF-DETR) with alpha 0.25 and gamma 2."""

    def positive(logits: Tensor, quality: Tensor) -> Tensor:
        target = (logits.detach().sigmoid().pow(0.25) * quality.pow(0.75)).clamp(min=0.01)
        return F.softplus(logits) - target * logits

    return _binary(
        logits,
        real,
        matched,
        number,
        lambda logits: logits.sigmoid().square() * F.softplus(logits),
        positive,
    )


def softmax(logits: Tensor, real: Tensor | None, matched: Matched, number: Tensor) -> Tensor:
    """Cross-entropy with a last class for no object, of weight 0.1 (DETR, Carion et al. 2020, arXiv:2005.12872).

    The weighted mean over all queries of a layer, whatever the number of objects; summed over layers.
    """
    classes = logits.shape[-1]
    target = torch.full(logits.shape[:-1], classes - 1, device=logits.device)
    target[matched.at] = matched.labels
    weight = logits.new_ones(classes)
    weight[-1] = 0.1
    weights = weight[target]
    if real is not None:
        weights = weights.where(real, 0.0)
    losses = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(weights)
    return ((losses * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=0.1)).sum()


CLASS_LOSSES: dict[str, ClassLoss] = {"focal": focal, "vfl": vfl, "mal": mal, "ia_bce": ia_bce, "softmax": softmax}


def detection_loss(
    trained: Trained,
    noised: Noised | None,
    truth: Truth,
    *,
    loss: str = "vfl",
    assigner: str = "hungarian",
    weights: Weights = Weights(),  # noqa: B008 (it is immutable)
) -> dict[str, Tensor]:
    """The weighted losses of each part of what a detector predicts, and their sum as `total`.

    The parts are `layers`, `proposals` and `noised`; each has the terms `class`, `l1` and `giou`, as in `layers_class`.
    Where boxes are refined by distributions, layers and denoising queries also have `fgl` and `ddf` (see
    `interpolation_loss` and `distillation_loss`), and all boxes of layers and proposals learn from the matches of
    all of them, united, by whose number their losses are divided (D-FINE, Peng et al. 2024, arXiv:2410.13842).
    With the assigner iou, the proposals are those of all tokens, and each part learns from its own matches (DETA,
    Ouyang-Zhang et al. 2022, arXiv:2212.06137).
    All are computed in float32 at least, also under autocast; they are summed over layers and divided by the number of
    objects (the mean over ranks, at least 1), those of the denoising queries also by that of their groups. Without
    objects, boxes have losses of 0 that still reach every prediction.

    Args:
        trained: what the model predicts.
        noised: its denoising queries, where trained.noised is given.
        truth: the objects of the batch.
        loss: a row of CLASS_LOSSES.
        assigner: a row of ASSIGNERS.
        weights: of the terms.
    """
    for name, table in ((loss, CLASS_LOSSES), (assigner, ASSIGNERS)):
        if name not in table:
            raise ValueError(unknown("loss" if table is CLASS_LOSSES else "assigner", name, table))
    if (trained.noised is None) != (noised is None):
        raise ValueError("the predictions of denoising queries and the queries themselves must be given together")
    layers, proposals, denoised = map(_exact, (trained.layers, trained.proposals, trained.noised))
    assert layers is not None
    if proposals is not None:
        proposals = Predicted(*(each[None] for each in proposals))
    kind = layers.boxes.dtype
    truth = truth._replace(boxes=truth.boxes.to(kind))
    tokens = None if trained.tokens is None else _all(trained.tokens)
    assigned = ASSIGNERS[assigner](layers, proposals, tokens, truth, loss == "softmax")
    number = mean_over_ranks(truth.valid.sum()).to(kind)
    united, boxes = assigned.layers, number
    if trained.refined is not None:
        united = repeated(assigned.union, len(layers.boxes))
        boxes = mean_over_ranks(number.new_tensor(len(assigned.union.layer))).to(kind)
    parts = {"layers": Part(layers, assigned.layers, number, united, boxes, refined=trained.refined)}
    if tokens is not None and assigned.proposals is not None and assigned.counted is not None:
        every = Predicted(*(each[None] for each in tokens.predicted))
        own = assigned.proposals
        parts["proposals"] = Part(every, own, number, own, number, assigned.counted)
    elif proposals is not None and assigned.proposals is not None:
        own = assigned.proposals if trained.refined is None else assigned.union
        parts["proposals"] = Part(proposals, assigned.proposals, number, own, boxes)
    if denoised is not None and noised is not None:
        own, each = positives(noised, assigned.objects, len(denoised.boxes)), number * noised.groups
        parts["noised"] = Part(denoised, own, each, own, each, noised.valid, trained.refined_noised)
    terms: dict[str, Tensor] = {}
    for name, part in parts.items():
        for term, value in _terms(part, truth, CLASS_LOSSES[loss]).items():
            terms[f"{name}_{term}"] = getattr(weights, "classes" if term == "class" else term) * value
    return terms | {"total": torch.stack(list(terms.values())).sum()}


def _terms(part: Part, truth: Truth, loss: ClassLoss) -> dict[str, Tensor]:
    """The losses of a part, without weights."""
    boxes, objects = _pairs(part.predicted, part.boxed, truth)
    iou, giou = overlaps(boxes, objects)
    quality = iou if part.boxed is part.matches else overlaps(*_pairs(part.predicted, part.matches, truth))[0]
    labels = truth.labels[part.matches.image, part.matches.object]
    matched = Matched((part.matches.layer, part.matches.image, part.matches.query), labels, quality.detach())
    terms = {
        "class": loss(part.predicted.logits, part.real, matched, part.number),
        "l1": distances(boxes, objects).sum() / part.boxes,
        "giou": (1.0 - giou).sum() / part.boxes,
    }
    if part.refined is None:
        return terms
    fgl, ddf = refinement_losses(part.refined, part.predicted.logits[-1], part.boxed, objects, iou.detach())
    return terms | {"fgl": fgl / part.boxes, "ddf": ddf}


def _pairs(predicted: Predicted, matches: Matches, truth: Truth) -> tuple[Tensor, Tensor]:
    """The boxes of matched predictions [M, 4], and those of their objects."""
    return (
        predicted.boxes[matches.layer, matches.image, matches.query],
        truth.boxes[matches.image, matches.object],
    )


def refinement_losses(
    refined: Refined, logits: Tensor, matches: Matches, objects: Tensor, quality: Tensor
) -> tuple[Tensor, Tensor]:
    """The interpolation loss of all layers, summed over their boxes, and the distillation loss of all but the last one.

    Args:
        refined: the distributions of L layers.
        logits: the class logits of the last layer [B, Q, classes].
        matches: the same in each of L + 1 layers, of which the first has no distributions, one after the other.
        objects: the boxes of their objects [M, 4].
        quality: the IoU of their predictions and objects [M].
    """
    layers, size = len(refined.bins), len(matches.layer) // (1 + len(refined.bins))
    layer, image, query, _ = (each[size:] for each in matches)
    bins, first, offsets = (wide(each) for each in (refined.bins, refined.first, refined.offsets))
    objects, quality = objects[size:], quality[size:]
    chosen = bins[layer - 1, image, query]
    fgl = interpolation_loss(chosen, first[image, query], objects, quality, offsets, refined.scale)
    ddf = fgl.new_zeros(())
    at, best = (image[:size], query[:size]), logits.detach().sigmoid().amax(-1)
    matched = torch.zeros_like(best, dtype=torch.bool).index_put(at, torch.ones_like(at[0], dtype=torch.bool))
    for each, own in zip(bins[:-1], quality.view(layers, size), strict=False):
        ddf = ddf + distillation_loss(each, bins[-1], best.index_put(at, own), matched, refined.real)
    return fgl, ddf


def _exact(predicted: Predicted | None) -> Predicted | None:
    """In float32, or float64 if it is."""
    if predicted is None:
        return None
    return Predicted(*(each.to(torch.promote_types(each.dtype, torch.float32)) for each in predicted))


def _all(tokens: Tokens) -> Tokens:
    predicted = _exact(tokens.predicted)
    assert predicted is not None
    return tokens._replace(predicted=predicted, anchors=tokens.anchors.to(predicted.boxes.dtype))


def mean_over_ranks(number: Tensor) -> Tensor:
    """The mean of a number over ranks, at least 1."""
    number, (_, world) = number.float(), rank_and_world()
    if world > 1:
        torch.distributed.all_reduce(number)
    return (number / world).clamp(min=1)


def positives(noised: Noised, objects: Tensor, layers: int) -> Matches:
    """The queries with little noise, each with its object: g of group k is query 2 G k + g.

    Args:
        noised: the denoising queries.
        objects: the image of each real object and its place there [2, N].
        layers: how many layers predict.
    """
    size = noised.labels.shape[1] // noised.groups
    layer, group = (torch.arange(number, device=objects.device) for number in (layers, noised.groups))
    layer, group, (image, place) = layer[:, None, None], group[:, None], objects
    each = torch.broadcast_tensors(layer, image, size * group + place, place)
    return Matches(*(indices.flatten() for indices in each))


def interpolation_loss(
    logits: Tensor, references: Tensor, boxes: Tensor, quality: Tensor, offsets: Tensor, scale: float = 4.0
) -> Tensor:
    """Fine-grained localisation loss (D-FINE, Peng et al. 2024, arXiv:2410.13842), summed over boxes.

    The distance of a box's left, top, right or bottom side from the centre of its reference, in units of the
    reference's width or height / scale, less scale / 2, lies between two bins. The loss is the cross-entropy towards
    both, weighted by how near they are and by the box's quality. A distance beyond the ends counts for the last bin.

    Args:
        logits: of the bins of each side [M, 4, bins].
        references: [M, 4] (centre x, centre y, width, height).
        boxes: of the matched objects [M, 4], likewise.
        quality: the IoU of predictions and objects [M].
        offsets: of the bins, increasing [bins].
        scale: of the unit of distances.
    """
    centre, size = references.detach().split(2, -1)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], -1)
    sign = corners.new_tensor([-1.0, -1.0, 1.0, 1.0])
    wanted = sign * (corners - centre.repeat(1, 2)) / (size.repeat(1, 2) / scale + 1e-16) - scale / 2
    wanted = wanted.clamp(offsets[0], offsets[-1]).contiguous()
    below = (torch.searchsorted(offsets, wanted) - 1).clamp(0, len(offsets) - 2)
    low, high = offsets[below], offsets[below + 1]
    share = (wanted - low) / (high - low)
    chosen = logits.log_softmax(-1).gather(-1, torch.stack([below, below + 1], -1))
    losses = -(chosen * torch.stack([1.0 - share, share], -1)).sum(-1)
    return (losses * quality.detach()[:, None]).sum()


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    weight: Tensor,
    matched: Tensor,
    real: Tensor | None = None,
    temperature: float = 5.0,
) -> Tensor:
    """Decoupled distillation focal loss (D-FINE, Peng et al. 2024, arXiv:2410.13842) of a layer towards the last one.

    The weighted divergence of the bins of each side is averaged over matched and over other queries; the two means
    count by the square roots of how many there are.

    Args:
        logits: of the bins of each side [B, Q, 4, bins].
        teacher: those of the last layer; they get no gradient.
        weight: of each query [B, Q]: the IoU with its object if matched, else the last layer's largest score.
        matched: whether a query has an object [B, Q].
        real: whether a query counts [B, Q]; None if all do.
        temperature: by which both logits are divided.
    """
    wanted, found = ((each / temperature).log_softmax(-1) for each in (teacher.detach(), logits))
    divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean(-1)
    losses = temperature**2 * weight.detach() * divergence
    total = roots = losses.new_zeros(())
    for chosen in (matched, ~matched if real is None else real & ~matched):
        number = chosen.sum()
        root = number.sqrt()
        total = total + losses.where(chosen, 0.0).sum() / number.clamp(min=1) * root
        roots = roots + root
    return total / roots.clamp(min=1.0)
