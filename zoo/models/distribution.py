"""How a decoder refines boxes from layer to layer: by a difference of their logits, or by distributions of their sides
(D-FINE, Peng et al. 2024, arXiv:2410.13842)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.cache import table
from zoo.models.detection import MLP, logit, wide

LIMIT = 10.0  # of the code of a query's box
STATISTICS = 4  # bins of each side that the quality of a box is estimated from
HIDDEN = 64  # channels of that estimate


class Boxes(NamedTuple):
    """The boxes behind a decoder layer [B, Q, 4] (centre x, centre y, width, height)."""

    boxes: Tensor
    first: Tensor | None = None  # what the bins refine
    bins: Tensor | None = None  # logits of the offsets of each side [B, Q, 4, bins]
    tokens: Tensor | None = None  # the queries behind the layer, without gradient


class Delta(nn.ModuleList):
    """Each layer adds to the logits of the box of the layer before, as in DINO (Zhang et al. 2023,
    arXiv:2203.03605)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__(MLP(dim, dim, 4, 3, zero=True) for _ in range(depth))

    def forward(self, number: int, x: Tensor, before: Boxes) -> Boxes:
        return Boxes((wide(self[number](x)) + logit(before.boxes)).sigmoid())

    def coded(self, code: Tensor) -> Tensor:
        """The code of a query's box, as the decoder reads it."""
        return code

    def scored(self, number: int, logits: Tensor, found: Boxes) -> Tensor:
        """The class logits of a layer, given its boxes."""
        return logits


class Distribution(nn.Module):
    """The first layer's box is refined: each layer adds to the logits of the bins of each side, and the side moves
    outward by the mean of their offsets, in units of the box's width or height / scale (see `offsets_of`). The class
    logits get an estimate of the box's quality, from the largest shares of the bins."""

    def __init__(self, dim: int, depth: int, *, bins: int = 32, scale: float = 4.0) -> None:
        super().__init__()
        if bins < 4 or bins % 2 or bins > 1024:
            raise ValueError(f"bins must be even, from 4 to 1024, got {bins}")
        if scale <= 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.bins, self.scale = bins, scale
        self.first = MLP(dim, dim, 4, 3, zero=True)
        self.heads = nn.ModuleList(MLP(dim, dim, 4 * (bins + 1), 3, zero=True) for _ in range(depth))
        size = 4 * (STATISTICS + 1)
        self.quality = nn.ModuleList(MLP(size, HIDDEN, 1, 2, zero=True) for _ in range(depth))

    def forward(self, number: int, x: Tensor, before: Boxes) -> Boxes:
        if before.first is None or before.bins is None or before.tokens is None:
            first = (wide(self.first(x)) + logit(before.boxes)).sigmoid()
            bins = wide(self.heads[number](x)).unflatten(-1, (4, -1))
        else:
            first = before.first
            bins = before.bins + wide(self.heads[number](x + before.tokens)).unflatten(-1, (4, -1))
        return Boxes(self.moved(first.detach(), bins), first, bins, x.detach())

    def offsets(self, like: Tensor) -> Tensor:
        """The offsets of the bins [bins + 1], in the dtype and on the device of `like`."""
        return table(offsets_of, self.bins, self.scale, like.dtype, device=like.device)

    def moved(self, first: Tensor, bins: Tensor) -> Tensor:
        """The boxes [B, Q, 4] whose sides have been moved."""
        out = (bins.softmax(-1) * self.offsets(bins)).sum(-1) / self.scale  # left, top, right, bottom
        centre, size = first.split(2, -1)
        low, high = out.split(2, -1)
        return torch.cat([centre + size * (high - low) / 2, size * (1 + low + high)], -1)

    def coded(self, code: Tensor) -> Tensor:
        """The code of a query's box, as the decoder reads it."""
        return code.clamp(-LIMIT, LIMIT)

    def scored(self, number: int, logits: Tensor, found: Boxes) -> Tensor:
        """The class logits of a layer, given its boxes."""
        assert found.bins is not None
        most = found.bins.softmax(-1).topk(STATISTICS, -1).values
        shares = torch.cat([most, most.mean(-1, keepdim=True)], -1).flatten(-2)
        return logits + self.quality[number](shares.to(logits.dtype))


def offsets_of(bins: int, scale: float, kind: torch.dtype, device: torch.device) -> Tensor:
    """The offsets of bins + 1 bins: 0 in the middle, from there ever farther apart to scale / 2 before each end, and
    scale at the ends."""
    base = (scale / 2 + 1) ** (2 / (bins - 2))
    steps = [base**number - 1 for number in range(1, bins // 2)]
    values = [-scale, *(-each for each in reversed(steps)), 0.0, *steps, scale]
    return torch.tensor(values, dtype=kind, device=device)


BOXES: dict[str, type[Delta | Distribution]] = {"delta": Delta, "distribution": Distribution}
"""Each row is constructed as row(dim, depth, *, options)."""
