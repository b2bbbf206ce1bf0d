"""Modulation: how a condition, such as a timestep or a class, changes the input and the output of a residual branch."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Layer, Place


class Modulation(Layer):
    """forward(y, context) -> (y changed by `context.cond`, the gate of the branch's result or None).

    `cond` describes what the Context must hold for this row. `embedded`: whether it is made from the embedding of time
    and label, by `condition`, once for all blocks; if not, it is the logarithm of the signal-to-noise ratio.
    `remembered`: whether the condition is in the memory, as tokens, and not in `cond`.
    """

    reads = frozenset({"cond"})
    cond: ClassVar[str] = ""
    embedded: ClassVar[bool] = True
    remembered: ClassVar[bool] = False

    @classmethod
    def condition(cls, dim: int, branches: int) -> nn.Module:
        """Maps the embedding [B, 1, dim] to the condition of blocks with this many branches."""
        return nn.Identity()

    def read(self, context: Context) -> Tensor:
        """The condition; ValueError if it is missing."""
        if context.cond is None:
            raise ValueError(f"a modulated block needs cond in the Context: {self.cond}")
        return context.cond


class SharedLinear(nn.Linear):
    """A linear of silu(embedding), zero at the start, that serves all blocks."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__(dim, outputs)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, embedding: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(F.silu(embedding))


class NoModulation(Modulation):
    """No modulation."""

    reads = frozenset()
    embedded = False

    def __init__(self, dim: int, place: Place = ANYWHERE) -> None:
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, None]:  # pyright: ignore
        return x, None


class CrossModulation(NoModulation):
    """Does not change the branches: the condition is two tokens of the memory, time and class, which the layout's
    `cross` reads (the cross-attention block of DiT, Peebles and Xie 2023, arXiv:2212.09748; GenTron, Chen et al. 2023,
    arXiv:2312.04557)."""

    cond = "none; the memory holds it"
    embedded = True
    remembered = True


class AdaLN(Modulation, nn.Linear):
    """y * (1 + scale) + shift, and a gate on the branch; a linear of silu(cond), zero at the start, predicts all three,
    so that a block starts as the identity (adaLN-Zero, Peebles and Xie 2023, arXiv:2212.09748). gate=False omits the
    gate."""

    cond = "[B, 1 or N, dim]"

    def __init__(self, dim: int, place: Place = ANYWHERE, *, gate: bool = True) -> None:
        nn.Linear.__init__(self, dim, (2 + gate) * dim)
        self.gated = gate
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:  # pyright: ignore
        shift, scale, *gate = F.linear(F.silu(self.read(context)), self.weight, self.bias).chunk(2 + self.gated, -1)
        return torch.addcmul(x, x, scale) + shift, gate[0] if gate else None


class AdaLNSingle(Modulation):
    """As `adaln`, but one linear predicts the shifts, scales and gates of all branches once for all blocks; each block
    adds a table of its own (PixArt-alpha, Chen et al. 2023, arXiv:2310.00426). gate=False omits the gate."""

    cond = "[B, 1 or N, (3 * branches + 2) * dim]; the last two parts are for the norm behind the last block"

    def __init__(self, dim: int, place: Place = ANYWHERE, *, gate: bool = True) -> None:
        super().__init__()
        self.first, self.gated = 3 * place.branch, gate
        self.table = nn.Parameter(torch.randn(2 + gate, dim) / dim**0.5)

    @classmethod
    def condition(cls, dim: int, branches: int) -> nn.Module:
        return SharedLinear(dim, (3 * branches + 2) * dim)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:  # pyright: ignore
        size = x.shape[-1]
        found = self.read(context)[..., self.first * size : (self.first + 2 + self.gated) * size]
        shift, scale, *gate = (found + self.table.flatten()).chunk(2 + self.gated, -1)
        return torch.addcmul(x, x, scale) + shift, gate[0] if gate else None


class Moving(nn.Module):
    """s * first + (1 - s) * second with s = sigmoid(weight * ratio / 4 + bias), four learned vectors, for ratios
    [B, 1, 1]: [B, 1, dim]. Both ends are `value` at the start."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.first, self.second = nn.Parameter(torch.full((dim,), value)), nn.Parameter(torch.full((dim,), value))

    def forward(self, ratio: Tensor) -> Tensor:
        share = torch.addcmul(self.bias, ratio.to(self.weight.dtype) / 4, self.weight).sigmoid()
        return torch.lerp(self.second, self.first, share)


class TimeDependent(Modulation, Moving):
    """y * (s * first + (1 - s) * second) with s = sigmoid(weight * cond / 4 + bias), four learned vectors: the gain of
    the norm before it moves between two as the noise grows (TD-RMSN of DiMR, Liu et al. 2024, arXiv:2406.09416).
    shift=True adds a shift that moves in the same way (its TD-LN)."""

    cond = "[B, 1, 1], the logarithm of the signal-to-noise ratio"
    embedded = False

    def __init__(self, dim: int, place: Place = ANYWHERE, *, shift: bool = False) -> None:
        Moving.__init__(self, dim, 1.0)
        self.shift = Moving(dim, 0.0) if shift else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, None]:  # pyright: ignore
        ratio = self.read(context)
        y = x * Moving.forward(self, ratio).to(x.dtype)
        return y if self.shift is None else y + self.shift(ratio).to(x.dtype), None


MODULATIONS: dict[str, type[Modulation]] = {
    "none": NoModulation,
    "adaln": AdaLN,
    "adaln_single": AdaLNSingle,
    "tdn": TimeDependent,
    "cross": CrossModulation,
}
"""Each row is constructed as row(dim, place, *, options)."""
