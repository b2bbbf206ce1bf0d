"""Feed-forward layers: each token by itself."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Layer, Place, Site
from zoo.tensors import gelu, linear, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "relu": relu,
    "silu": silu,
}
"""What each gives of a tensor that the caller gives up."""


class StarReLU(nn.Module):
    """scale * relu(x)^2 + bias, both learned scalars (Yu et al. 2022, arXiv:2210.13452)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, relu(x).square(), self.scale)


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name; `star_relu` has parameters of its own."""
    if name == "star_relu":
        return StarReLU()
    if name not in ACTIVATIONS:
        raise ValueError(f"there is no activation '{name}'; choose from: {', '.join(ACTIVATIONS)}, star_relu")
    return ACTIVATIONS[name]


class MLP(Layer):
    """W2 activation(W1 x), ratio times as wide inside (Vaswani et al. 2017, arXiv:1706.03762). bias=False leaves both
    biases away, out_bias=False that of W2; dropout is the rate at which training drops what W2 reads."""

    def __init__(
        self,
        dim: int,
        place: Place = ANYWHERE,
        *,
        ratio: float = 4.0,
        activation: str = "gelu",
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = self.hidden(dim, ratio)
        if dropout >= 1.0:
            raise ValueError(f"mlp takes a dropout below 1, not {dropout}")
        self.dropout = dropout
        self.activation = activation_of(activation)
        self.expand, self.out = linear(dim, hidden, bias), linear(hidden, dim, bias and out_bias)
        self.inner: Layer | None = None

    @staticmethod
    def hidden(dim: int, ratio: float) -> int:
        """The width inside."""
        if (hidden := int(dim * ratio)) < 1:
            raise ValueError(f"mlp has no hidden channel at ratio {ratio} of dim {dim}")
        return hidden

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, ratio: float = 4.0, **options: Any) -> dict[str, Site]:
        return {"inner": Site(cls.hidden(dim, ratio))}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = F.dropout(self.activation(self.expand(x)), self.dropout, self.training)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class SwiGLU(Layer):
    """W3 (silu(W1 x) * W2 x), W1 and W2 stored as one (Shazeer 2020, arXiv:2002.05202).

    The width inside is ratio * dim, rounded up to a multiple of 8; the default keeps the size of an MLP of ratio 4.
    """

    def __init__(self, dim: int, place: Place = ANYWHERE, *, ratio: float = 8 / 3, bias: bool = True) -> None:
        super().__init__()
        hidden = self.hidden(dim, ratio)
        self.expand, self.out = linear(dim, 2 * hidden, bias), linear(hidden, dim, bias)
        self.inner: Layer | None = None

    @staticmethod
    def hidden(dim: int, ratio: float) -> int:
        """The width inside."""
        return -int(-dim * ratio // 8) * 8

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, ratio: float = 8 / 3, **options: Any) -> dict[str, Site]:
        return {"inner": Site(cls.hidden(dim, ratio))}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate, value = self.expand(x).chunk(2, -1)
        y = silu(gate) * value
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


FFNS: dict[str, type[Layer]] = {"mlp": MLP, "swiglu": SwiGLU}
"""Each row is constructed as row(dim, place, *, options)."""
