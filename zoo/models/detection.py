"""What detectors share: the predictions of queries, padded images, heads and places of boxes.

Boxes are (centre x, centre y, width, height) in 0..1 of each image's own extent.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.stems.images import checked, padding_of
from zoo.tensors import exporting, relu


class Predicted(NamedTuple):
    """Predictions of queries."""

    logits: Tensor  # [..., B, Q, classes]
    boxes: Tensor  # [..., B, Q, 4]


class Noised(NamedTuple):
    """Denoising queries: the labels and boxes of objects, with noise (DN-DETR, Li et al. 2022, arXiv:2203.01305).

    They come in groups that do not see each other. `Truth` objects g = 0 .. G - 1 stand in each group twice: with
    little noise at g, with much at G + g (contrastive denoising, DINO, Zhang et al. 2023, arXiv:2203.03605).
    """

    labels: Tensor  # [B, groups * 2 G] int64, the index of a class
    boxes: Tensor  # [B, groups * 2 G, 4]
    valid: Tensor  # [B, groups * 2 G], False where an image has fewer than G objects
    groups: int


class Refined(NamedTuple):
    """The distributions by which decoder layers refine boxes (D-FINE, Peng et al. 2024, arXiv:2410.13842)."""

    bins: Tensor  # logits of the offsets of each side after each layer: [L, B, Q, 4, bins]
    first: Tensor  # the boxes that they refine [B, Q, 4]
    real: Tensor | None  # [B, Q], False for queries that an image has no token or object for; None if all are real
    offsets: Tensor  # of the bins [bins], in units of the width or height of `first` / scale
    scale: float


class Trained(NamedTuple):
    """What a detector predicts in training, for its losses.

    Where boxes are refined by distributions, the first of the layers is their start, and the others belong to those of
    `refined`.
    """

    layers: Predicted  # after each decoder layer: [L, B, Q, ...]
    proposals: Predicted | None  # of the tokens that the queries start from: [B, Q, ...]
    noised: Predicted | None  # of the denoising queries after each decoder layer: [L, B, groups * 2 G, ...]
    refined: Refined | None = None  # of the layers
    refined_noised: Refined | None = None  # of the denoising queries


def xavier(inputs: int, outputs: int, bias: float = 0.0) -> nn.Linear:
    """A linear map with Xavier's uniform weights, and this bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return layer


def class_head(dim: int, classes: int) -> nn.Linear:
    """From a query to its class logits, all of which start near a probability of 0.01."""
    return xavier(dim, classes, -math.log((1 - 0.01) / 0.01))


class MLP(nn.Module):
    """`depth` linear maps with ReLU between them, `hidden` channels wide; with zero=True the result is 0 at first."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int, zero: bool = False) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(xavier(one, other) for one, other in zip(sizes[:-1], sizes[1:], strict=True))
        if zero:
            nn.init.zeros_(self.layers[-1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)


def wide(x: Tensor) -> Tensor:
    """x in at least single precision, for boxes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logit(boxes: Tensor, eps: float = 1e-5) -> Tensor:
    """The inverse of the sigmoid, of values clamped to eps from 0 and 1."""
    boxes = boxes.clamp(0, 1)
    return torch.log(boxes.clamp(min=eps) / (1 - boxes).clamp(min=eps))


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x [1 or B, M, D] at index [B, Q]: [B, Q, D]."""
    return x.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def padded(images: Tensor, mask: Tensor | None, channels: int, stride: int) -> tuple[Tensor, Tensor | None]:
    """The images and the mask with sides that the stride divides, zeros and False at the right and the bottom. The
    mask is None if every pixel is real."""
    images = checked(images, mask, channels)
    padding = padding_of(images.shape[2:], stride)
    if not exporting() and not any(padding):
        return images, mask
    if mask is None:
        mask = torch.ones_like(images[:, 0], dtype=torch.bool)
    return F.pad(images, padding), F.pad(mask, padding)


def shares(mask: Tensor) -> Tensor:
    """How much of the width and of the height of each mask [B, H, W] is real: [B, 2] in 0..1."""
    return torch.stack([mask.any(1).float().mean(1), mask.any(2).float().mean(1)], -1)
