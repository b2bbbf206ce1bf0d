"""Losses of boxes as distributions: those of D-FINE, without objects, in half precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import listed, random_boxes, random_truth, relative
from predicted import CLASSES, LAYERS, QUERIES, all_tokens, predictions
from zoo.models.detection import Noised, Predicted, Refined, Trained
from zoo.models.distribution import offsets_of
from zoo.outputs.boxes import Truth
from zoo.tasks.detect.denoise import denoising_queries
from zoo.tasks.detect.losses import (
    detection_loss,
    distillation_loss,
    interpolation_loss,
    positives,
)
from zoo.tasks.detect.matcher import ASSIGNERS, Matches, overlaps, repeated


def distributions() -> SimpleNamespace:
    """Two layers of D-FINE's bins, and what its loss of transformers needs."""
    from transformers import DFineConfig
    from transformers.loss.loss_d_fine import DFineLoss, weighting_function

    config: Any = DFineConfig(num_labels=CLASSES)
    truth = random_truth([3, 0, 2], CLASSES)
    with torch.no_grad():
        layers = predictions(2, 3, QUERIES)
        layers.boxes[0, :, :2] = truth.boxes[:, :2] * 1.1
    references = random_boxes(3, QUERIES)
    references[0, :4] = truth.boxes[0, [0, 0, 1, 2]] * (1 + 0.1 * torch.randn(4, 4))
    references[0, 0] = truth.boxes[0, 0]  # sides in the middle of a bin
    references[2, :2, 2:] = 0.01  # far too small: beyond the last bin
    bins = torch.randn(2, 3, QUERIES, 4 * 33)
    pairs = [(torch.tensor([2, 0, 3]), torch.tensor([1, 0, 2])), (torch.zeros(0).long(),) * 2]
    pairs += [(torch.tensor([0, 5]), torch.tensor([0, 1]))]
    offsets = weighting_function(config.max_num_bins, torch.tensor([config.up]), config.reg_scale)
    outputs = {"logits": layers.logits[0], "pred_boxes": layers.boxes[0], "pred_corners": bins[0].requires_grad_()}
    outputs |= {"ref_points": references, "teacher_corners": bins[1], "teacher_logits": layers.logits[1]}
    theirs: Any = DFineLoss(config).loss_local(outputs, listed(truth), pairs, 5.0)
    image = torch.cat([torch.full_like(queries, number) for number, (queries, _) in enumerate(pairs)])
    query, place = (torch.cat(each) for each in zip(*pairs, strict=True))
    return SimpleNamespace(**locals())


def test_interpolation_between_bins_is_that_of_d_fine():
    at = distributions()
    logits = at.bins[0].detach().unflatten(-1, (4, 33)).requires_grad_()
    boxes = at.truth.boxes[at.image, at.place]
    quality = overlaps(at.layers.boxes[0][at.image, at.query], boxes)[0]
    chosen = logits[at.image, at.query]
    loss = interpolation_loss(chosen, at.references[at.image, at.query], boxes, quality, at.offsets) / 5.0
    assert quality.max() > 0 and relative(loss, at.theirs["loss_fgl"]) < 1e-5
    (wanted,) = torch.autograd.grad(at.theirs["loss_fgl"], [at.outputs["pred_corners"]], retain_graph=True)
    assert relative(torch.autograd.grad(loss, [logits])[0].flatten(-2), wanted) < 1e-5


def test_a_distance_between_two_bins_is_shared_by_how_near_they_are():
    """By hand: a box twice as wide as its reference has its sides 1 width from the centre, which is 4 - 2 = 2 units."""
    offsets = torch.tensor([-4.0, 0.0, 1.0, 5.0, 9.0])
    reference, box = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    loss = interpolation_loss(logits, reference, box, torch.tensor([0.5]), offsets)
    assert loss.item() == pytest.approx(0.5 * 4 * torch.tensor(5.0).log().item())
    loss.backward()
    assert logits.grad is not None
    wide, high = logits.grad[0, 0], logits.grad[0, 1]
    assert (0.2 - wide / 0.5).tolist() == pytest.approx([0.0, 0.0, 0.75, 0.25, 0.0], abs=1e-5)  # 2 of 1 .. 5
    assert (0.2 - high / 0.5).tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0, 0.0], abs=1e-5)  # 0


@pytest.mark.parametrize("some", [True, False])
def test_distillation_of_bins_is_that_of_d_fine(some):
    at = distributions()
    matched = torch.zeros(3, QUERIES).bool()
    weight = at.layers.logits[1].sigmoid().amax(-1)
    logits, teacher = (each.detach().unflatten(-1, (4, 33)) for each in at.bins)
    if some:
        matched[at.image, at.query] = True
        weight[matched] = 0.0
        quality = overlaps(at.layers.boxes[0][at.image, at.query], at.truth.boxes[at.image, at.place])[0]
        weight[at.image, at.query] = quality
        wanted = at.theirs["loss_ddf"]
    else:
        from transformers.loss.loss_d_fine import DFineLoss

        nothing: Any = [(torch.zeros(0).long(),) * 2] * 3
        objects: Any = [{"boxes": torch.zeros(0, 4)}] * 3
        wanted = DFineLoss(at.config).loss_local(at.outputs, objects, nothing, 1.0)["loss_ddf"]
    logits.requires_grad_()
    loss = distillation_loss(logits, teacher, weight, matched)
    assert loss > 0 and relative(loss, wanted) < 1e-5
    (theirs,) = torch.autograd.grad(wanted, [at.outputs["pred_corners"]])
    assert relative(torch.autograd.grad(loss, [logits])[0].flatten(-2), theirs) < 1e-5
    assert distillation_loss(teacher, teacher, weight, matched).abs() < 1e-6


BINS = 32


def refined(truth: Truth, noised: Noised | None) -> Trained:
    """Predictions of D-FINE: one more of each layer, distributions, and boxes that they refine."""
    images, offsets = len(truth.labels), offsets_of(BINS, 4.0, torch.float32, torch.device("cpu"))

    def distributions(queries: int, real: Tensor | None) -> Refined:
        bins = torch.randn(LAYERS, images, queries, 4, BINS + 1).requires_grad_()
        return Refined(bins, random_boxes(images, queries), real, offsets, 4.0)

    return Trained(
        predictions(LAYERS + 1, images, QUERIES),
        predictions(images, QUERIES),
        None if noised is None else predictions(LAYERS + 1, *noised.labels.shape),
        distributions(QUERIES, None),
        None if noised is None else distributions(noised.labels.shape[1], noised.valid),
    )


def ends(given: Trained) -> list[Tensor]:
    """All that has a gradient."""
    distributions = [each.bins for each in given[3:] if each is not None]
    return [*(each for part in given[:3] if part is not None for each in part), *distributions]


def pairs_of(matches: Matches, layer: int, images: int) -> list[tuple[Tensor, ...]]:
    """The queries and objects of each image, as transformers takes them."""
    at = [(matches.layer == layer) & (matches.image == image) for image in range(images)]
    return [(matches.query[chosen], matches.object[chosen]) for chosen in at]


def fine_terms(predicted: Predicted, found: Refined | None, truth: Truth, own: Any, boxed: Any, numbers: Any) -> Any:
    """The weighted terms of transformers' D-FINE for a part, over its layers."""
    from transformers import DFineConfig
    from transformers.loss.loss_d_fine import DFineLoss

    config: Any = DFineConfig(num_labels=CLASSES)
    theirs: Any = DFineLoss(config)
    names = {"loss_vfl": "class", "loss_bbox": "l1", "loss_giou": "giou", "loss_fgl": "fgl", "loss_ddf": "ddf"}
    targets, images, terms = listed(truth), len(truth.labels), dict[str, Any]()
    for layer, (logits, boxes) in enumerate(zip(*predicted, strict=True)):
        outputs = {"logits": logits, "pred_boxes": boxes}
        if found is not None and layer > 0:
            outputs |= {"pred_corners": found.bins[layer - 1].flatten(-2), "ref_points": found.first}
            outputs |= {"teacher_corners": found.bins[-1].flatten(-2), "teacher_logits": predicted.logits[-1]}
        for name in ("vfl", "boxes", "local"):
            matches, number = (own, numbers[0]) if name == "vfl" else (boxed, numbers[1])
            losses = theirs.get_loss(name, outputs, targets, pairs_of(matches, layer, images), number)
            for each, value in losses.items():
                terms[names[each]] = terms.get(names[each], 0.0) + theirs.weight_dict[each] * value
    return terms


@pytest.mark.parametrize("counts", [[3, 3], [1, 4], [2]])
def test_every_loss_and_its_gradient_is_that_of_d_fine(counts):
    """With the matches of all layers and proposals together for boxes, which transformers does not form."""
    truth = random_truth(counts, CLASSES)
    noised = denoising_queries(truth, CLASSES, number=20) if min(counts) == max(counts) else None
    given = refined(truth, noised)
    assert given.proposals is not None and given.refined is not None
    proposals = Predicted(*(each[None] for each in given.proposals))
    assigned = ASSIGNERS["hungarian"](given.layers, proposals, None, truth, False)
    objects, number = float(sum(counts)), len(assigned.union.layer)
    assert number > objects
    united = repeated(assigned.union, LAYERS + 1)
    theirs = {"layers": fine_terms(given.layers, given.refined, truth, assigned.layers, united, (objects, number))}
    theirs["proposals"] = fine_terms(proposals, None, truth, assigned.proposals, assigned.union, (objects, number))
    if noised is not None and given.noised is not None:
        own, share = positives(noised, assigned.objects, LAYERS + 1), objects * noised.groups
        theirs["noised"] = fine_terms(given.noised, given.refined_noised, truth, own, own, (share, share))
    wanted = {f"{part}_{name}": value for part, terms in theirs.items() for name, value in terms.items()}
    ours = detection_loss(given, noised, truth)
    assert {*ours} == {*wanted, "total"}
    for name, value in wanted.items():
        assert value > 0 and relative(ours[name], value) < 1e-5, name
    total = sum(wanted.values())
    assert relative(ours["total"], total) < 1e-5
    for one, other in zip(
        torch.autograd.grad(ours["total"], ends(given)), torch.autograd.grad(total, ends(given)), strict=True
    ):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("counts", [[0, 0], [2, 0]])
def test_distributions_without_objects_have_finite_gradients_everywhere(counts, assigner):
    truth = random_truth(counts, CLASSES)
    noised = denoising_queries(truth, CLASSES, number=4)
    given = refined(truth, noised)
    reached = ends(given)
    if assigner == "iou":  # all tokens learn instead of those that were selected
        given, tokens = given._replace(tokens=all_tokens(truth)), ends(given._replace(proposals=None))
        assert given.tokens is not None
        reached = [*tokens, *given.tokens.predicted]
    terms = detection_loss(given, noised, truth, assigner=assigner)
    for gradient in torch.autograd.grad(terms["total"], reached):  # which is an error where one is missing
        assert gradient.isfinite().all()
    assert (terms["layers_fgl"] == 0) == (sum(counts) == 0) and terms["layers_ddf"] > 0


def test_boxes_of_negative_size_have_finite_losses():
    """Distributions can move the sides of a box past each other; its L1 loss moves them back."""
    truth = random_truth([3, 1], CLASSES)
    given = refined(truth, None)
    with torch.no_grad():
        given.layers.boxes[1:, :, :, 2:] *= -1
    terms = detection_loss(given, None, truth)
    gradient = torch.autograd.grad(terms["total"], [given.layers.boxes])[0]
    assert all(value.isfinite() for value in terms.values()) and gradient.isfinite().all()
    found = gradient[1:, ..., 2:]
    assert found.any() and (found <= 0).all()


def test_denoising_queries_of_no_object_have_no_distributions():
    truth = random_truth([1, 4], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=8)
    given = refined(truth, noised)
    assert given.refined_noised is not None and not noised.valid.all()
    terms = detection_loss(given, noised, truth)
    (gradient,) = torch.autograd.grad(terms["total"], [given.refined_noised.bins])
    assert not gradient[:, ~noised.valid].any() and gradient[:, noised.valid].any()
    bins = given.refined_noised.bins.where(noised.valid[..., None, None], 9.0)
    again = detection_loss(given._replace(refined_noised=given.refined_noised._replace(bins=bins)), noised, truth)
    assert torch.equal(again["total"], terms["total"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distributions_in_half_precision_are_exact_from_the_predictions_on(dtype):
    truth = random_truth([3, 0], CLASSES)
    given = refined(truth, None)
    assert given.refined is not None

    def cast(part: Any, kind: torch.dtype) -> Any:
        return part._replace(**{name: getattr(part, name).detach().to(kind) for name in ("logits", "boxes")})

    def both(kind: torch.dtype, part: Trained) -> Trained:
        assert part.refined is not None
        fine = part.refined._replace(bins=part.refined.bins.detach().to(kind), first=part.refined.first.to(kind))
        return Trained(cast(part.layers, kind), cast(part.proposals, kind), None, fine)

    halves = both(dtype, given)
    with torch.autocast("cpu", dtype=dtype):
        got = detection_loss(halves, None, truth)
    for name, value in detection_loss(both(torch.float32, halves), None, truth).items():
        assert got[name].dtype == torch.float32 and torch.equal(got[name], value)
