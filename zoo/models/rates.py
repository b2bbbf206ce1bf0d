"""Modules of speech encoders that change the frame rate between blocks."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.block import Block
from zoo.config import BlockConfig
from zoo.fusion import fold_in, not_affine
from zoo.layer import Context, Fold, check, filtered, halved, linear, make, zeroed
from zoo.mixers import CONVS
from zoo.mixers.local import StridedConvolution
from zoo.norms import NORMS, Norm


class Reduce(nn.Module):
    """Halves the frame rate: a depthwise convolution of 5 frames and stride 2, then a linear. `left` zeros stand in
    front of the first frame."""

    def __init__(self, dim: int, left: int) -> None:
        super().__init__()
        self.left = left
        self.conv = nn.Conv1d(dim, dim, 5, stride=2, groups=dim)
        self.point = linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        frames = F.pad(zeroed(x, context.mask), (0, 0, self.left, 4 - self.left))
        x = self.point(filtered(frames, (x.shape[1],), self.conv.weight, self.conv.bias, 0, 2))
        return x, halved(context)


class Strided(nn.Module):
    """A Conformer block whose convolution has stride 2 and leads to another width; its shortcut takes every second
    token and maps it by a linear."""

    def __init__(self, before: BlockConfig, after: BlockConfig, drop: float) -> None:
        super().__init__()
        unused = {"conv": "glu", "conv_norm": "batchnorm"}
        self.front = Block(replace(before, layout=("half", "mixer"), **unused), drop)
        self.norm: Norm | None = make(NORMS, before.norm, before.dim)
        kernel = check(CONVS, after.conv)["kernel"]
        self.conv = StridedConvolution(before.dim, after.dim, after.conv_norm, kernel=kernel)
        self.shortcut = linear(before.dim, after.dim)
        self.back = Block(replace(after, layout=("half", "norm"), mixer="relative", **unused), drop)
        self.dropout = before.dropout

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        x = self.front(x, context)
        y = self.conv(x if self.norm is None else self.norm(x, context), context)
        context = halved(context)
        x = self.shortcut(x[:, ::2]) + F.dropout(y, self.dropout, self.training)
        return self.back(x, context), context

    def fold(self) -> list[Fold]:
        if self.norm is None:
            return []
        if (affine := self.norm.affine()) is None:
            return [Fold("norm", None, not_affine(self.norm))]
        fold_in(self.conv.expand, *affine)
        self.norm = None
        return [Fold("norm", "the branch's input linears")]
