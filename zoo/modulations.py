"""Modulation: how a condition, such as a timestep or a class, changes the input and the output of a residual branch."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Layer, Place


class Modulation(Layer):
    """forward(y, context) -> (y changed by `context.cond`, the gate of the branch's result or None).

    `cond` describes what the Context must hold for this row.
    """

    reads = frozenset({"cond"})
    cond: ClassVar[str] = ""

    def read(self, context: Context) -> Tensor:
        """The condition; ValueError if it is missing."""
        if context.cond is None:
            raise ValueError(f"a modulated block needs cond in the Context: {self.cond}")
        return context.cond


class NoModulation(Modulation):
    """No modulation."""

    reads = frozenset()

    def __init__(self, dim: int, place: Place = ANYWHERE) -> None:
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, None]:  # pyright: ignore
        return x, None


class AdaLN(Modulation, nn.Linear):
    """y * (1 + scale) + shift, and a gate on the branch; a linear of silu(cond), zero at the start, predicts all three,
    so that a block starts as the identity (adaLN-Zero, Peebles and Xie 2023, arXiv:2212.09748)."""

    cond = "[B, 1 or N, dim]"

    def __init__(self, dim: int, place: Place = ANYWHERE) -> None:
        nn.Linear.__init__(self, dim, 3 * dim)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:  # pyright: ignore
        shift, scale, gate = F.linear(F.silu(self.read(context)), self.weight, self.bias).chunk(3, -1)
        return x * (1 + scale) + shift, gate


MODULATIONS: dict[str, type[Modulation]] = {"none": NoModulation, "adaln": AdaLN}
"""Each row is constructed as row(dim, place, *, options)."""
