"""What a detector's losses cost beside its model: matching alone, and all losses with it and the backward pass."""

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import (
    Call,
    NotMeasured,
    Row,
    agree,
    interleaved,
    markdown,
    milliseconds,
    ratio_cell,
    timed,
)
from zoo.models.detection import Predicted, Trained
from zoo.outputs.boxes import Truth
from zoo.tasks.detect.denoise import denoising_queries
from zoo.tasks.detect.losses import detection_loss
from zoo.tasks.detect.matcher import hungarian

CLASSES = 80
SHAPES = ((6, 8, 300, 7), (6, 8, 300, 40), (3, 16, 100, 7))  # layers, images, queries, objects of each image


def boxes(*shape: int) -> Tensor:
    """Boxes (centre, size) within an image."""
    size = 0.05 + 0.4 * torch.rand(*shape, 2)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2), size], -1)


def calls(layers: int, images: int, queries: int, objects: int) -> dict[str, tuple[Call, Call]]:
    """Ours and transformers' for the same predictions, by what they compute.

    ValueError where losses or gradients differ, or queries are matched to other objects.
    """
    try:
        from transformers import RTDetrV2Config
        from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss, RTDetrHungarianMatcher
    except ImportError:
        raise NotMeasured("transformers is not installed") from None
    config: Any = RTDetrV2Config(num_labels=CLASSES)
    valid = torch.ones(images, objects, dtype=torch.bool)
    truth = Truth(torch.randint(CLASSES, (images, objects)), boxes(images, objects), valid)
    targets = [{"class_labels": labels, "boxes": each} for labels, each in zip(truth.labels, truth.boxes, strict=True)]
    noised = denoising_queries(truth, CLASSES)
    extra = noised.labels.shape[1]
    first = 2 * objects * torch.arange(noised.groups)[:, None]
    meta = {"dn_positive_idx": [(first + torch.arange(objects)).flatten()] * images}
    meta |= {"dn_num_group": noised.groups, "dn_num_split": [extra, queries]}
    inputs = [torch.randn(layers, images, extra + queries, CLASSES) - 3, boxes(layers, images, extra + queries)]
    inputs += [torch.randn(images, queries, CLASSES) - 3, boxes(images, queries)]
    for each in inputs:
        each.requires_grad_()
    logits, places, *proposals = inputs
    matcher = RTDetrHungarianMatcher(config)
    own = Predicted(logits[:, :, extra:].detach(), places[:, :, extra:].detach())

    def ours() -> Sequence[Tensor]:
        noise, layer = (
            Predicted(*each) for each in zip(*(each.split([extra, queries], 2) for each in inputs[:2]), strict=True)
        )
        loss = detection_loss(Trained(layer, Predicted(*proposals), noise), noised, truth)["total"]
        return loss, *torch.autograd.grad(loss, inputs)

    def theirs() -> Sequence[Tensor]:
        every, at = logits.transpose(0, 1), places.transpose(0, 1)
        last = (every[:, -1], targets, "cpu", at[:, -1], config)
        loss: Any = RTDetrForObjectDetectionLoss(*last, every, at, *proposals, meta)[0]
        return loss, *torch.autograd.grad(loss, inputs)

    def match() -> Tensor:
        found = hungarian(own, None, None, truth).layers
        result = torch.full((layers, images, objects), -1)
        result[found.layer, found.image, found.object] = found.query
        return result

    def match_theirs() -> Tensor:
        result = torch.full((layers, images, objects), -1)
        for layer, (scores, at) in enumerate(zip(*own, strict=True)):
            for image, (query, place) in enumerate(matcher({"logits": scores, "pred_boxes": at}, targets)):
                result[layer, image, place] = query
        return result

    agree("matching", match().float(), "transformers", match_theirs().float(), 0.0)
    for one, other in zip(ours(), theirs(), strict=True):
        agree("the loss", one, "transformers", other)
    return {"matching": (match, match_theirs), "losses, forward+backward": (ours, theirs)}


def losses(options: argparse.Namespace) -> Iterator[Row]:
    """Time of ours as a share of transformers' RT-DETRv2."""
    for shape in tqdm(options.losses_of, desc="losses"):
        compared = calls(*shape)
        base = f"transformers {version('transformers')} RTDetrV2"
        for what, (ours, theirs) in compared.items():
            taken = interleaved({"ours": ours, "theirs": theirs}, ours, options)
            row: Row = dict(zip(("layers", "batch", "queries", "objects"), shape, strict=True))
            row |= {"what": what, "base": base, "ms": milliseconds(taken["ours"])}
            row |= {"base_ms": milliseconds(taken["theirs"]), "pairs": len(taken["ours"])}
            yield row | timed("ratio", taken["ours"], taken["theirs"]) | timed("noise", taken["again"], taken["ours"])


def loss_table(rows: Sequence[Row]) -> str:
    """A row for each shape and what is computed."""
    header = (
        "what",
        "layers",
        "batch",
        "queries",
        "objects",
        "ms",
        "ms against",
        "ratio (quartiles)",
        "noise (quartiles)",
    )
    lines = []
    for row in rows:
        numbers = [str(row[column]) for column in ("layers", "batch", "queries", "objects")]
        times = [f"{row['ms']:.1f}", f"{row['base_ms']:.1f}"]
        lines.append([str(row["what"]), *numbers, *times, ratio_cell(row, "ratio"), ratio_cell(row, "noise")])
    return f"{markdown(header, lines)}\n\nAgainst {rows[0]['base']}; objects are those of each image."
