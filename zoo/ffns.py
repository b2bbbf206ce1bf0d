"""Feed-forward layers: each token by itself."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion import keep
from zoo.kernels.routing import (
    Routes,
    apart,
    balance_loss,
    every_expert,
    grouped,
    logits_of,
    route,
    spread,
    to_slots,
)
from zoo.layer import ANYWHERE, Context, Fold, Layer, Place, Site
from zoo.tensors import gelu, linear, relu, silu
from zoo.text import unknown


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), close to GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),  # not a lambda, which cannot be pickled
    "relu": relu,
    "silu": silu,
    "quick_gelu": quick_gelu,
}
"""The same for a tensor that the caller no longer needs."""


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
        raise ValueError(unknown("activation", name, [*ACTIVATIONS, "star_relu"]))
    return ACTIVATIONS[name]


WIDEST = 1_000_000


def hidden_width(dim: int, ratio: float, multiple: int = 1) -> int:
    """ratio * dim, rounded down, or up to a multiple above 1; ValueError if that is not from 1 to WIDEST."""
    exact = dim * ratio
    if not 1 <= exact <= WIDEST:
        raise ValueError(f"ratio must give 1 to {WIDEST:,} hidden channels; {ratio} times dim {dim} is {exact:g}")
    return int(exact) if multiple == 1 else -int(-exact // multiple) * multiple


class MLP(Layer):
    """W2 activation(W1 x) with a hidden width of ratio * dim (Vaswani et al. 2017, arXiv:1706.03762). bias=False omits
    both biases, out_bias=False that of W2; dropout is the dropout rate before W2."""

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
        hidden = hidden_width(dim, ratio)
        if dropout >= 1.0:
            raise ValueError(f"dropout must be < 1, got {dropout}")
        self.dropout = dropout
        self.activation = activation_of(activation)
        self.expand, self.out = linear(dim, hidden, bias), linear(hidden, dim, bias and out_bias)
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, ratio: float = 4.0, **options: Any) -> dict[str, Site]:
        return {"inner": Site(hidden_width(dim, ratio))}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = F.dropout(self.activation(self.expand(x)), self.dropout, self.training)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class SwiGLU(Layer):
    """W3 (silu(W1 x) * W2 x), with W1 and W2 stored as one matrix (Shazeer 2020, arXiv:2002.05202).

    The hidden width is ratio * dim, rounded up to a multiple of `multiple`, or down with multiple=1; the default has
    the size of an MLP of ratio 4.
    """

    activation = staticmethod(silu)

    def __init__(
        self, dim: int, place: Place = ANYWHERE, *, ratio: float = 8 / 3, multiple: int = 8, bias: bool = True
    ) -> None:
        super().__init__()
        hidden = hidden_width(dim, ratio, multiple)
        self.expand, self.out = linear(dim, 2 * hidden, bias), linear(hidden, dim, bias)
        self.inner: Layer | None = None

    @classmethod
    def sites_of(
        cls, dim: int, heads: int, *, ratio: float = 8 / 3, multiple: int = 8, **options: Any
    ) -> dict[str, Site]:
        return {"inner": Site(hidden_width(dim, ratio, multiple))}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate, value = self.expand(x).chunk(2, -1)
        y = self.activation(gate) * value
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class GEGLU(SwiGLU):
    """W3 (gelu(W1 x) * W2 x), with W1 and W2 stored as one matrix (Shazeer 2020, arXiv:2002.05202)."""

    activation = staticmethod(gelu)


class ISTA(Layer):
    """relu(x + step D^T (x - D x) - step * threshold) - x: what a step of sparse coding changes in x, with a learned
    dictionary D [dim, dim] (ISTA of CRATE, Yu et al. 2023, arXiv:2306.01129).

    Placement `crate` adds it to the normalized x that it reads, which leaves the first term, as in the paper. threshold
    is the weight of the L1 norm of the code.
    """

    def __init__(self, dim: int, place: Place = ANYWHERE, *, step: float = 0.1, threshold: float = 0.1) -> None:
        super().__init__()
        self.step, self.threshold = step, threshold
        self.dictionary = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.dictionary)
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        return {"inner": Site(dim)}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = x - F.linear(x, self.dictionary)
        y = F.linear(y if self.inner is None else self.inner(y, context), self.dictionary.t())
        return relu(x + self.step * (y - self.threshold)) - x

    def fold(self) -> list[Fold]:
        return [] if self.inner is None else [keep(self, "inner", "the matrix behind it is in front of it, too")]


class MixtureOfExperts(Layer):
    """A sum of MLPs, the experts: `shared` ones for every token, and the `top` of `experts` others, which a router
    chooses for it, times their probabilities p = softmax(R x) (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066).

    The hidden width of an expert is ratio * dim; many narrow experts are ratio=1.0 with a higher top. gated=True makes
    them activation(W1 x) * W2 x behind the first linear, with W1 and W2 stored as one matrix, as the paper does with
    silu. bias=False omits the biases; that of the output is one for all experts. No token is dropped. In training the
    layer adds a balance loss (see `zoo.kernels.routing.balance_loss`).
    """

    reads = frozenset({"mask"})

    def __init__(
        self,
        dim: int,
        place: Place = ANYWHERE,
        *,
        experts: int = 8,
        top: int = 2,
        shared: int = 0,
        ratio: float = 4.0,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if top > experts:
            raise ValueError(f"top must be at most the {experts} experts, got {top}")
        hidden = hidden_width(dim, ratio)
        self.experts, self.top, self.shared, self.gated = experts, top, shared, gated
        self.activation = activation_of(activation)
        self.router = linear(dim, experts, bias=False)
        self.expand = linear(dim, (shared + experts) * hidden * (2 if gated else 1), bias)
        self.out = linear((shared + experts) * hidden, dim, bias)
        self.reports_loss = top < experts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        routes = route(logits_of(self.router, x), self.top, context.mask)
        if self.wants_loss(context):
            self.add_loss(context, balance_loss(routes, context.mask))
        if self.top == self.experts or every_expert(self.expand, self.out):
            return self.by_all(x, routes)
        return self.by_chosen(x, routes, context.mask)

    def hidden(self, x: Tensor) -> Tensor:
        """What an expert's first linear gives, [..., expanded], as its hidden channels [..., hidden]."""
        if not self.gated:
            return self.activation(x)
        gate, value = x.chunk(2, -1)
        return self.activation(gate) * value

    def by_all(self, x: Tensor, routes: Routes) -> Tensor:
        """All experts on all tokens, those that were not chosen times 0."""
        y = self.hidden(self.expand(x).unflatten(-1, (self.shared + self.experts, -1)))
        gates = spread(routes.gates[..., None], routes.experts, self.experts)
        gates = torch.cat([gates.new_ones(*gates.shape[:2], self.shared, 1), gates], 2)
        return self.out((y * gates.to(y.dtype)).flatten(2))

    def by_chosen(self, x: Tensor, routes: Routes, mask: Tensor | None) -> Tensor:
        """Each expert on the tokens that chose it."""
        number, bias = self.shared + self.experts, self.expand.bias
        first = self.expand.weight.unflatten(0, (number, -1))
        last = self.out.weight.unflatten(1, (number, -1)).movedim(1, 0)
        shifts = None if bias is None else bias.unflatten(0, (number, -1))
        found = grouped(routes.experts, self.experts, mask)
        rows = x.flatten(0, 1)[found.slots // self.top]
        rows = self.hidden(
            apart(rows, first[self.shared :], None if shifts is None else shifts[self.shared :], found.sizes)
        )
        slots = to_slots(apart(rows, last[self.shared :], None, found.sizes), found, routes.experts.shape)
        y = (slots * routes.gates[..., None].to(slots.dtype)).sum(2)
        if not self.shared:
            return y if self.out.bias is None else y + self.out.bias.to(y.dtype)
        units, inputs = self.shared * first.shape[1], self.shared * last.shape[2]
        always = F.linear(x, self.expand.weight[:units], None if bias is None else bias[:units])
        always = self.hidden(always.unflatten(-1, (self.shared, -1))).flatten(2)
        return y + F.linear(always, self.out.weight[:, :inputs], self.out.bias)

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand, self.router]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class Chunked(Layer):
    """W2 activation(W1 x) of each of `parts` chunks of the channels by itself, so weights and cost are a `parts`-th of
    an MLP's (the chunk-level network of EfficientASR, Wang et al. 2024, arXiv:2404.19214). The hidden width of a chunk
    is ratio times its own."""

    def __init__(
        self, dim: int, place: Place = ANYWHERE, *, parts: int = 2, ratio: float = 4.0, activation: str = "gelu"
    ) -> None:
        super().__init__()
        hidden = self.hidden_of(dim, parts, ratio)
        self.activation = activation_of(activation)
        self.expands = nn.ModuleList(linear(dim // parts, hidden) for _ in range(parts))
        self.outs = nn.ModuleList(linear(hidden, dim // parts) for _ in range(parts))
        self.inner: Layer | None = None

    @staticmethod
    def hidden_of(dim: int, parts: int, ratio: float) -> int:
        """The hidden width of a chunk."""
        if dim % parts:
            raise ValueError(f"parts must divide dim {dim}, got {parts}")
        return hidden_width(dim // parts, ratio)

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, parts: int = 2, ratio: float = 4.0, **options: Any) -> dict[str, Site]:
        return {"inner": Site(parts * cls.hidden_of(dim, parts, ratio))}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        number = len(self.outs)
        wide = [expand(part) for expand, part in zip(self.expands, x.chunk(number, -1), strict=True)]
        y = self.activation(torch.cat(wide, -1))
        y = y if self.inner is None else self.inner(y, context)
        return torch.cat([out(part) for out, part in zip(self.outs, y.chunk(number, -1), strict=True)], -1)

    def inputs(self) -> list[nn.Linear] | str:
        return "its linears read chunks of the channels"

    def outputs(self) -> list[nn.Linear] | str:
        return "its linears give chunks of the channels"


FFNS: dict[str, type[Layer]] = {"mlp": MLP, "swiglu": SwiGLU, "geglu": GEGLU, "ista": ISTA, "moe": MixtureOfExperts}
FFNS |= {"chunked": Chunked}
"""Each row is constructed as row(dim, place, *, options)."""
