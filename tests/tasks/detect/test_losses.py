"""Losses: those of transformers on the same predictions, without objects, on two ranks, in half precision."""

import os
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from helpers import listed, random_truth, relative
from predicted import CLASSES, LAYERS, QUERIES, all_tokens, predictions
from zoo.models.detection import Noised, Predicted, Trained
from zoo.outputs.boxes import Truth
from zoo.tasks.detect.denoise import denoising_queries
from zoo.tasks.detect.losses import (
    CLASS_LOSSES,
    Weights,
    detection_loss,
)
from zoo.tasks.detect.matcher import ASSIGNERS


def trained(truth: Truth, noised: Noised | None) -> Trained:
    """Predictions of every part, in which gradients end."""
    images = len(truth.labels)
    return Trained(
        predictions(LAYERS, images, QUERIES),
        predictions(images, QUERIES),
        None if noised is None else predictions(LAYERS, *noised.labels.shape),
    )


def leaves(given: Trained) -> list[Tensor]:
    return [each for part in given if part is not None for each in part]


def gradients(loss: Tensor, given: Trained) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves(given)))


def published(given: Trained, noised: Noised, truth: Truth) -> Tensor:
    """The loss of transformers' RT-DETRv2."""
    from transformers import RTDetrV2Config
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    assert given.proposals is not None and given.noised is not None
    most = truth.labels.shape[1]
    first = 2 * most * torch.arange(noised.groups)[:, None]
    positive = [(first + valid.nonzero()[:, 0]).flatten() for valid in truth.valid]
    number = noised.labels.shape[1]
    meta = {"dn_positive_idx": positive, "dn_num_group": noised.groups, "dn_num_split": [number, QUERIES]}
    # Ours leaves queries out that stand for no object, theirs cannot.
    silent = given.noised.logits.where(noised.valid[..., None], -60.0)
    logits = torch.cat([silent, given.layers.logits], 2).transpose(0, 1)
    boxes = torch.cat([given.noised.boxes, given.layers.boxes], 2).transpose(0, 1)
    config = RTDetrV2Config(num_labels=CLASSES)
    last = (logits[:, -1], listed(truth), "cpu", boxes[:, -1], config)
    return RTDetrForObjectDetectionLoss(*last, logits, boxes, *given.proposals, meta)[0]


@pytest.mark.parametrize("counts", [[3, 0, 2], [1, 12, 4], [2]])
def test_the_loss_and_its_gradients_are_those_of_rt_detr(counts):
    truth = random_truth(counts, CLASSES)
    noised = denoising_queries(truth, CLASSES, number=20)
    given = trained(truth, noised)
    ours, theirs = detection_loss(given, noised, truth)["total"], published(given, noised, truth)
    assert relative(ours, theirs) < 1e-6
    for one, other in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        assert relative(one, other) < 1e-5


def test_terms_are_named_by_part_and_add_up():
    truth = random_truth([3, 1], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=6)
    given = trained(truth, noised)
    terms = detection_loss(given, noised, truth, weights=Weights(1.0, 1.0, 1.0))
    total = terms.pop("total")
    parts, kinds = ("layers", "proposals", "noised"), ("class", "l1", "giou")
    assert list(terms) == [f"{part}_{kind}" for part in parts for kind in kinds]
    assert relative(sum(terms.values()), total) < 1e-6
    weighted = detection_loss(given, noised, truth, weights=Weights(3.0, 5.0, 7.0))
    for part in parts:
        for kind, weight in zip(kinds, (3.0, 5.0, 7.0), strict=True):
            assert relative(weighted[f"{part}_{kind}"], weight * terms[f"{part}_{kind}"]) < 1e-6


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_layers_add_up(loss):
    truth = random_truth([3, 0, 2], CLASSES)
    given = trained(truth, None).layers
    whole = detection_loss(Trained(given, None, None), None, truth, loss=loss)["total"]
    layers = [Predicted(*(each[layer : layer + 1] for each in given)) for layer in range(LAYERS)]
    parts = [detection_loss(Trained(each, None, None), None, truth, loss=loss)["total"] for each in layers]
    assert relative(sum(parts), whole) < 1e-6


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0], [4]])
def test_the_loss_and_its_gradients_are_those_of_detr(counts):
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    truth = random_truth(counts, CLASSES)
    given = Trained(predictions(LAYERS, len(counts), QUERIES, classes=CLASSES + 1), None, None)
    config = DetrConfig(num_labels=CLASSES, auxiliary_loss=True, decoder_layers=LAYERS)
    logits, boxes = given.layers
    last = (logits[-1], listed(truth), "cpu", boxes[-1], config)
    theirs: Any = ForObjectDetectionLoss(*last, logits, boxes)[0]
    ours = detection_loss(given, None, truth, loss="softmax")["total"]
    assert relative(ours, theirs) < 1e-6
    for one, other in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        assert (one - other).abs().max() < 1e-6


def class_loss(name: str, given: Predicted, truth: Truth, found: Any) -> Tensor:
    """A row of CLASS_LOSSES as transformers has it, over the layers."""
    from transformers import Deimv2Config, LwDetrConfig, RTDetrV2Config
    from transformers.loss.loss_deimv2 import Deimv2Loss
    from transformers.loss.loss_for_object_detection import sigmoid_focal_loss
    from transformers.loss.loss_lw_detr import LwDetrImageLoss
    from transformers.loss.loss_rt_detr import RTDetrLoss

    config: Any = RTDetrV2Config(num_labels=CLASSES)
    kind: Any = RTDetrLoss(config)
    if name == "mal":
        kind = Deimv2Loss(Deimv2Config(num_labels=CLASSES))
        kind.gamma = 1.5  # as published
    if name == "ia_bce":
        kind = LwDetrImageLoss(None, CLASSES, LwDetrConfig().focal_alpha, ["labels"], 1)
    targets, number = listed(truth), truth.valid.sum().item()
    label = {"ia_bce": "labels"}.get(name, name)
    total = torch.zeros(())
    for layer, (logits, boxes) in enumerate(zip(*given, strict=True)):
        at = found.layer == layer
        pairs = [
            tuple(each[at & (found.image == image)] for each in (found.query, found.object))
            for image in range(len(targets))
        ]
        if name == "focal":  # theirs for the whole batch does not run
            target = torch.zeros_like(logits)
            image, query, place = (each[at] for each in found[1:])
            target[image, query, truth.labels[image, place]] = 1.0
            total = total + sigmoid_focal_loss(logits, target, number) * QUERIES
            continue
        (term,) = kind.get_loss(label, {"logits": logits, "pred_boxes": boxes}, targets, pairs, number).values()
        total = total + term
    return total


@pytest.mark.parametrize("name", ["focal", "vfl", "mal", "ia_bce"])
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_losses_of_classes_are_those_of_transformers(name, assigner):
    truth = random_truth([3, 0, 2], CLASSES)
    given = trained(truth, None)
    assert given.proposals is not None
    with torch.no_grad():
        given.proposals.boxes[:, :3] = truth.boxes[:, :3] + 0.01
    proposals = Predicted(*(each[None] for each in given.proposals))
    given = given._replace(tokens=all_tokens(truth))
    found = ASSIGNERS[assigner](given.layers, proposals, given.tokens, truth, False)
    ours = detection_loss(given, None, truth, loss=name, assigner=assigner)["layers_class"]
    theirs = class_loss(name, given.layers, truth, found.layers)
    assert len(found.layers.query) and relative(ours, theirs) < 1e-5
    (one,), (other,) = (torch.autograd.grad(each, [given.layers.logits]) for each in (ours, theirs))
    assert relative(one, other) < 1e-5


def test_tokens_learn_from_their_own_objects_as_by_a_naive_loop():
    """Focal loss of every token that is not ignored, and boxes of those with an object; the others get no gradient."""
    truth, real = random_truth([3, 0, 2], CLASSES), torch.ones(3, 40, dtype=torch.bool)
    real[2, 30:] = False
    tokens = all_tokens(truth, real)
    given = trained(truth, None)._replace(tokens=tokens)
    assert given.proposals is not None
    proposals = Predicted(*(each[None] for each in given.proposals))
    found = ASSIGNERS["iou"](given.layers, proposals, tokens, truth, False)
    assert found.proposals is not None and found.counted is not None
    terms = detection_loss(given, None, truth, loss="focal", assigner="iou", weights=Weights(1.0, 1.0, 1.0))
    objects = {(image, query): place for _, image, query, place in zip(*map(Tensor.tolist, found.proposals))}  # noqa: B905
    wanted: dict[str, Any] = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for image in range(3):
        for query in found.counted[image].nonzero()[:, 0].tolist():
            place = objects.get((image, query))
            target = torch.zeros(CLASSES)
            if place is not None:
                target[truth.labels[image, place]] = 1.0
                box, other = tokens.predicted.boxes[image, query], truth.boxes[image, place]
                wanted["l1"] += (box - other).abs().sum() / 5
                corners = [torchvision.ops.box_convert(each[None], "cxcywh", "xyxy") for each in (box, other)]
                wanted["giou"] += (1.0 - torchvision.ops.generalized_box_iou(*corners).sum()) / 5
            logits = tokens.predicted.logits[image, query]
            wanted["class"] += torchvision.ops.sigmoid_focal_loss(logits, target, reduction="sum") / 5
    assert len(objects) > 5 and (real & ~found.counted).sum() > 0
    for name, value in wanted.items():
        assert relative(terms[f"proposals_{name}"], value) < 1e-5
    logits, boxes = torch.autograd.grad(terms["total"], list(tokens.predicted))
    assert torch.equal(logits.any(-1), found.counted)
    assert set(map(tuple, boxes.any(-1).nonzero().tolist())) == set(objects)
    assert torch.autograd.grad(terms["total"], list(given.proposals), allow_unused=True) == (None, None)


@pytest.mark.parametrize("counts", [[0, 0], [2, 0]])
def test_assignment_by_overlap_without_objects_has_finite_gradients_and_is_exact_in_half_precision(counts):
    truth = random_truth(counts, CLASSES)
    given = Trained(*trained(truth, None)[:3], tokens=all_tokens(truth))
    assert given.tokens is not None
    terms = detection_loss(given, None, truth, assigner="iou")
    reached = torch.autograd.grad(terms["total"], [*given.layers, *given.tokens.predicted])
    assert all(each.isfinite().all() for each in reached)
    assert (terms["proposals_l1"] == 0.0) == (sum(counts) == 0) and terms["proposals_class"] > 0.0

    def cast(part: Predicted | None, kind: torch.dtype) -> Any:
        return part and Predicted(*(each.detach().to(torch.bfloat16).to(kind) for each in part))

    def every(kind: torch.dtype) -> Trained:
        assert given.tokens is not None
        tokens = given.tokens._replace(predicted=cast(given.tokens.predicted, kind))
        return Trained(cast(given.layers, kind), cast(given.proposals, kind), None, tokens=tokens)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = detection_loss(every(torch.bfloat16), None, truth, assigner="iou")
    for name, value in detection_loss(every(torch.float32), None, truth, assigner="iou").items():
        assert got[name].dtype == torch.float32 and torch.equal(got[name], value)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("counts", [[0, 0], [2, 0]])
def test_without_objects_gradients_are_finite_and_reach_every_prediction(loss, counts):
    truth = random_truth(counts, CLASSES)
    noised = denoising_queries(truth, CLASSES, number=4)
    given = trained(truth, noised)
    terms = detection_loss(given, noised, truth, loss=loss)
    for gradient in gradients(terms["total"], given):  # which is an error where one is missing
        assert gradient.isfinite().all()
    empty = [value.item() for name, value in terms.items() if name.endswith(("l1", "giou"))]
    assert (max(empty) == 0.0) == (sum(counts) == 0)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_denoising_queries_of_no_object_do_not_count(loss):
    """Nor does an image's loss depend on how many objects another one has."""
    truth = random_truth([1, 4], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=8)
    given = trained(truth, noised)
    assert given.noised is not None and not noised.valid.all()
    total = detection_loss(given, noised, truth, loss=loss)["total"]
    logits, boxes = torch.autograd.grad(total, list(given.noised))
    assert not logits[:, ~noised.valid].any() and not boxes[:, ~noised.valid].any()
    assert logits[:, noised.valid].any(-1).all()
    changed = Predicted(given.noised.logits.where(noised.valid[..., None], 50.0), given.noised.boxes)
    again = detection_loss(given._replace(noised=changed), noised, truth, loss=loss)["total"]
    assert torch.equal(again, total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_half_precision_is_exact_from_the_predictions_on(dtype, loss):
    truth = random_truth([3, 0], CLASSES)
    noised = denoising_queries(truth, CLASSES, number=6)
    given = trained(truth, noised)
    halves = Trained(*(part and Predicted(*(each.detach().to(dtype) for each in part)) for part in given))
    wide = Trained(*(part and Predicted(*(each.float() for each in part)) for part in halves))
    with torch.autocast("cpu", dtype=dtype):
        got = detection_loss(halves, noised, truth, loss=loss)
    for name, value in detection_loss(wide, noised, truth, loss=loss).items():
        assert got[name].dtype == torch.float32 and torch.equal(got[name], value)


def test_a_prediction_that_is_nan_makes_the_loss_nan_and_raises_no_error():
    truth = random_truth([3, 1], CLASSES)
    given = trained(truth, None)
    with torch.no_grad():
        given.layers.boxes[0] = float("nan")
        given.layers.logits[1, 0, 0] = float("nan")
    terms = detection_loss(given, None, truth)
    assert terms["layers_l1"].isnan() and terms["layers_class"].isnan() and terms["proposals_l1"].isfinite()


def test_confident_predictions_have_finite_gradients():
    """Also boxes without any area, and logits whose score rounds to 0 or 1."""
    truth = random_truth([3, 1], CLASSES)
    for loss in CLASS_LOSSES:
        given = trained(truth, None)
        with torch.no_grad():
            given.layers.logits.mul_(1e3)
            given.layers.boxes[..., 2:] = 0.0
        for gradient in gradients(detection_loss(given, None, truth, loss=loss)["total"], given):
            assert gradient.isfinite().all()


def test_unknown_names_and_missing_queries_are_one_clear_error():
    truth = random_truth([1], CLASSES)
    given = trained(truth, None)
    with pytest.raises(ValueError, match="^unknown loss 'vlf'; did you mean vfl"):
        detection_loss(given, None, truth, loss="vlf")
    with pytest.raises(ValueError, match="^unknown assigner 'greedy'; choose from: hungarian, iou$"):
        detection_loss(given, None, truth, assigner="greedy")
    with pytest.raises(ValueError, match="must be given together$"):
        detection_loss(given, denoising_queries(truth, CLASSES), truth)


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    given, truth = torch.load(f"{folder}/rank{rank}.pt", weights_only=False)
    noised = denoising_queries(truth, CLASSES, number=4)
    own = given._replace(noised=predictions(LAYERS, *noised.labels.shape))
    terms = detection_loss(own, noised, truth)
    torch.save((terms, gradients(terms["total"], own)), f"{folder}/result{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down, after all is computed and written


@pytest.mark.slow
def test_two_ranks_of_which_one_has_no_object_equal_one_process(tmp_path):
    truth = random_truth([3, 2, 0, 0], CLASSES)
    given = trained(truth, None)
    halves = [slice(0, 2), slice(2, 4)]
    for rank, half in enumerate(halves):
        layers = Predicted(*(each.detach()[:, half].requires_grad_() for each in given.layers))
        assert given.proposals is not None
        proposals = Predicted(*(each.detach()[half].requires_grad_() for each in given.proposals))
        own = Truth(*(each[half, : 3 * (1 - rank)] for each in truth))
        torch.save((Trained(layers, proposals, None), own), tmp_path / f"rank{rank}.pt")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)  # pyright: ignore
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = detection_loss(given, None, truth)
    for name in set(whole) - {"total"}:
        assert relative(sum(terms[name] for terms, _ in results) / 2, whole[name]) < 1e-5
    for number, wanted in enumerate(gradients(whole["total"], given)):
        parts = [each[number] / 2 for _, each in results]  # as DistributedDataParallel averages
        assert relative(torch.cat(parts, 1 if number < 2 else 0), wanted) < 1e-5
    for _, found in results:
        assert len(found) == 6 and all(each.isfinite().all() for each in found)
    assert not results[1][1][4].any() and results[0][1][4].any()
