"""Modules of speech encoders that change the frame rate between blocks."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.block import Block
from zoo.choices import BlockConfig
from zoo.fusion import fold_norm
from zoo.layer import Context, Fold, halved
from zoo.mixers import CONVS
from zoo.mixers.local import StridedConvolution
from zoo.norms import NORMS, Norm
from zoo.spec import check, make
from zoo.tensors import filtered, linear, zeroed


class Reduce(nn.Module):
    """Halves the frame rate: a depthwise convolution of 5 frames and stride 2, then a linear. `left` zeros come
    before the first frame."""

    def __init__(self, dim: int, left: int) -> None:
        super().__init__()
        self.left = left
        self.conv = nn.Conv1d(dim, dim, 5, stride=2, groups=dim)
        self.point = linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Tokens [B, N, D] to [B, (N + 1) // 2, D], and their Context."""
        frames = F.pad(zeroed(x, context.mask), (0, 0, self.left, 4 - self.left))
        x = self.point(filtered(frames, (x.shape[1],), self.conv.weight, self.conv.bias, 0, 2))
        return x, halved(context)


class Strided(nn.Module):
    """A Conformer block whose convolution has stride 2 and leads to another width; its shortcut takes every second
    token and maps it by a linear. Later blocks use `halved(context)`."""

    stride = 2

    def __init__(self, before: BlockConfig, after: BlockConfig, drop: float) -> None:
        super().__init__()
        self.front = Block(replace(before, layout=("half", "mixer")), drop)
        self.norm: Norm | None = make(NORMS, before.norm, before.dim, before.place)
        kernel = check(CONVS, after.conv)["kernel"]
        self.conv = StridedConvolution(before.dim, after.dim, after.place, kernel=kernel)
        self.conv.norm = make(NORMS, after.conv_norm, after.dim, after.place)
        self.shortcut = linear(before.dim, after.dim)
        self.back = Block(replace(after, layout=("half", "norm")), drop)
        self.dropout = before.dropout

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Tokens [B, N, D] to [B, (N + 1) // 2, D']."""
        x = self.front(x, context)
        y = self.conv(x if self.norm is None else self.norm(x, context), context)
        context = halved(context)
        x = self.shortcut(x[:, ::2]) + F.dropout(y, self.dropout, self.training)
        return self.back(x, context)

    def fold(self) -> list[Fold]:
        return fold_norm(self, "norm", self.conv.expand, "branch's input linear")

    def fold_last(self, reader: nn.Linear, into: str) -> list[Fold]:
        return [fold._replace(layer=f"back.{fold.layer}") for fold in self.back.fold_last(reader, into)]
