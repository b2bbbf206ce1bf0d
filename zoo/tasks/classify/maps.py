"""What an image classifier attends to, by the rollout of its attention weights, and the figure of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.models.maps import rollout
from zoo.tasks import maps
from zoo.tasks.classify import answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zoo.tasks.classify.answers import Classifier

SPACE = 16  # pixels between an image and its map


class Attended(NamedTuple):
    """A map [rows, columns] whose mean is 1, the height and width in pixels that it covers, and how it was made."""

    values: Tensor
    covered: tuple[int, int]
    about: str


def attended(answer: Classifier, image: Tensor) -> Attended:
    """How much the answer to an image [C, H, W] depends on each place of the grid, by attention weights alone.

    The rollout of the layers with explicit weights in the last stage that has some; the mean of its rows that the head
    reads, which are those of class tokens or of the grid. The columns of tokens before the grid are omitted.

    Raises:
        ValueError: no layer has explicit weights.
    """
    model: Any = answer.model
    config = model.config
    found = maps.weights_of(model, image[None], answer.precision)
    stage, blocks = next(
        (stage, blocks)
        for stage in reversed(range(len(config.stages)))
        if (blocks := _of_blocks(found, [config.path(stage, index) for index in range(config.stages[stage].depth)]))
    )
    product = rollout([weights for layers in blocks for weights in layers])[0]
    prefix, stride = config.prefix_of(stage), model.strides[stage]
    rows = product[: config.tokens_read] if config.tokens_read else product[prefix:]
    values = rows.mean(0)[prefix:]
    high, wide = (-(-side // stride) for side in image.shape[1:])
    covered = (high * stride, wide * stride)  # beyond an image whose sides the stride does not divide
    return Attended((values / values.mean()).view(high, wide), covered, _about(config, stage, len(blocks)))


def _of_blocks(found: dict[str, Tensor], paths: Sequence[str]) -> list[list[Tensor]]:
    """The weights of each layer of each block that has some. Mixers side by side are one layer, in which they count
    alike, whatever the weights of the blend."""
    blocks = []
    for path in paths:
        layers: dict[str, list[Tensor]] = {}
        for name, weights in found.items():
            if name.startswith(f"{path}."):
                layers.setdefault(re.sub(r"\.mixers\.\d+$", "", name), []).append(weights)
        blocks.append([each[0] if len(each) == 1 else torch.cat([*map(_shares, each)], 1) for each in layers.values()])
    return [each for each in blocks if each]


def _shares(weights: Tensor) -> Tensor:
    """The mean over the heads of weights [B, H, N, N] by size, with rows that sum to one: [B, 1, N, N]."""
    mean = weights.abs().mean(1, keepdim=True)
    return mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)


def _about(config: Any, stage: int, number: int) -> str:
    depth, stages = config.stages[stage].depth, len(config.stages)
    which, others = f"all {depth} blocks" if depth > 1 else "the only block", ""
    if number < depth:
        which, others = f"{number} of {depth} blocks", " (the others have no attention weights)"
    where = f" of stage {stage + 1} of {stages}" if stages > 1 else ""
    whose = {0: "the grid's tokens attend to on average", 1: "the class token attends to"}
    said = whose.get(config.tokens_read, "the class and distillation tokens attend to")
    return f"Attention rollout over {which}{where}{others}: what {said}, from grey (least) to red (most)"


def draw(entries: list[dict[str, Any]], shown: Sequence[tuple[dict[str, Any], Any]], answer: Classifier) -> Figure:
    """Each shown image as the model sees it, beside the same under its map, from its least value, grey, to its largest
    one, red."""
    from PIL import Image

    pairs, lines, about = [], [], ""
    for entry, _ in shown:
        image = answer.preprocess.read(entry["path"])
        found = attended(answer, answer.preprocess(image))
        image, about = maps.seen(answer.preprocess, image), found.about
        low, high = float(found.values.min()), float(found.values.max())
        mapped = np.asarray(maps.drawn(found.values - low, image, found.covered))
        space = np.full((len(mapped), SPACE, 3), 255, np.uint8)
        pair = Image.fromarray(np.concatenate([np.asarray(maps.enlarged(image)), space, mapped], 1))
        pair.thumbnail((2 * answers.SIDE + SPACE, answers.SIDE))
        pairs.append((entry, pair))
        lines.append(f"{low:.2f} to {high:.2f} times the mean")
    return answers.draw(entries, pairs, 2.0, lines, about)
