"""Which parts of an image support a class: they are hidden, and the change of the log odds is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 8  # of the map along a side; what is hidden at once is two cells wide
BATCH = 27  # images at once


def contributions(logits: Callable[[Sequence[Tensor]], Tensor], image: Tensor, index: int) -> Tensor:
    """By how much the log odds of a class fall where a part of the image is hidden under the median of its channels
    (occlusion, Zeiler and Fergus 2014, arXiv:1311.2901).

    Args:
        logits: from images [C, H, W] to logits [B, classes].
        image: [C, H, W], as the model takes it.
        index: of the class.

    Returns:
        [cells, cells], at most `CELLS` along a side: for each, the mean over the parts that hid it.
    """
    height, width = image.shape[1:]
    rows, columns = min(CELLS, height), min(CELLS, width)
    hidden = image.flatten(1).median(1).values[:, None, None]
    places = [(row, column) for row in range(-1, rows) for column in range(-1, columns)]
    images = [image]
    for row, column in places:
        part = image.clone()
        part[:, slice(*_edges(row, rows, height)), slice(*_edges(column, columns, width))] = hidden
        images.append(part)
    made = torch.cat([logits(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])
    odds = log_odds(made, index)
    falls = (odds[0] - odds[1:]).view(rows + 1, columns + 1)
    return F.avg_pool2d(falls[None], 2, 1)[0]  # a cell is in four of the parts


def _edges(cell: int, cells: int, pixels: int) -> tuple[int, int]:
    """The pixels of this cell and the next along one side."""
    first, last = max(0, cell), min(cells, cell + 2)
    return first * pixels // cells, last * pixels // cells


def log_odds(logits: Tensor, index: int) -> Tensor:
    """log p / (1 - p) of a class [B] from logits [B, classes]; its logit where there is no other class."""
    others = torch.cat([logits[:, :index], logits[:, index + 1 :]], 1)
    return logits[:, index] - (others.logsumexp(1) if others.shape[1] else 0.0)
