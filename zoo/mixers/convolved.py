"""Softmax attention whose queries, keys or values are filtered along the grid."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Chunks, Context, Place
from zoo.mixers.attention import DotProduct
from zoo.mixers.local import depthwise
from zoo.norms import RMSNorm
from zoo.spec import LARGEST
from zoo.tensors import filtered, zeroed


class ConvProjection(DotProduct):
    """Softmax attention whose queries, keys and values are sums of depthwise convolutions of several widths, `kernels`,
    with learned weights that sum to one (ConvFormer for poses, Diaz-Arias and Shin 2023, arXiv:2304.02147).

    `of` names what is filtered: some of the letters q, k and v. Prefix tokens are not. Under `visible` the convolutions
    are causal.

    Even kernels stand for another filter, which is causal: (2, 2) of 'qk' is that of Yuan 2.0 (Wu et al. 2023,
    arXiv:2311.15786). Convolutions of all channels, of half as many between them, follow each other in front of the
    projections: RMSNorm(x + filter(x)). In an image they run along its rows.
    """

    @classmethod
    def reads_of(cls, *, kernels: tuple[int, ...] = (3, 5, 7), **options: Any) -> frozenset[str]:
        around = any(each % 2 for each in kernels if isinstance(each, int))
        return cls.reads - {"order"} if around else cls.reads

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        kernels: tuple[int, ...] = (3, 5, 7),
        of: str = "qkv",
    ) -> None:
        super().__init__(dim, heads)
        sizes = all(type(each) is int and 1 <= each <= LARGEST["kernel"] for each in kernels)
        if not kernels or not sizes or len({each % 2 for each in kernels}) > 1:
            raise ValueError(f"kernels must be a tuple of odd widths, or one of even widths, got {kernels!r}")
        if not of or list(of) != [letter for letter in "qkv" if letter in of]:
            raise ValueError(f"of must be some of the letters 'qkv' in this order, got {of!r}")
        self.kernels, self.of = kernels, of
        self.filters = self.chain = None
        if kernels[0] % 2:
            width = len(of) * dim
            self.filters = nn.ModuleList(depthwise(width, each, place.axes, bias=True) for each in kernels)
            self.shares = nn.Parameter(torch.zeros(len(of), len(kernels)))
        else:
            self.widths_of_chain = [dim, *[max(1, dim // 2)] * (len(kernels) - 1)]
            pairs = zip(self.widths_of_chain, [*self.widths_of_chain[1:], dim], kernels, strict=True)
            self.chain = nn.ModuleList(nn.Conv1d(before, after, each) for before, after, each in pairs)
            self.chain_norm = RMSNorm(dim, place)

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        if self.chain is None:
            past = {"past": (max(self.kernels), len(self.of) * self.qkv.in_features)}
        else:
            past = {f"past{at}": (each, self.widths_of_chain[at]) for at, each in enumerate(self.kernels)}
        before = {slot: like.new_zeros(batch, kernel - 1, width) for slot, (kernel, width) in past.items()}
        return super().state(batch, visible, like) | before

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if self.chain is not None:
            y = self.preceded(x, self.chain, context)
            q, k, v = (y if letter in self.of else x for letter in "qkv")
            if context.code is not None:
                q, k = q + context.code, k + context.code
            weights, biases = self.qkv.weight.split(self.widths), self.qkv.bias.split(self.widths)
            q, k, v = map(F.linear, (q, k, v), weights, biases)
            return self.split(q, k, v, context)
        parts = dict(zip("qkv", super().project(x, context), strict=True))
        y = torch.cat([parts[letter].flatten(2) for letter in self.of], -1)
        y = self.mixed(zeroed(y, context.mask), context).unflatten(-1, (len(self.of), self.heads, -1))
        q, k, v = (parts | dict(zip(self.of, y.unbind(2), strict=True))).values()
        return q, k, v

    def mixed(self, y: Tensor, context: Context) -> Tensor:
        """The sum of the depthwise convolutions of y [B, N, C], which are one as wide as the widest."""
        widest, causal, convs = max(self.kernels), context.visible is not None, cast(Any, self.filters)
        weights, biases = [], []
        for conv, kernel, share in zip(convs, self.kernels, self.shares.softmax(-1).unbind(-1), strict=True):
            share = share.repeat_interleave(self.qkv.in_features)
            less = widest - kernel
            margins = (less, 0) if causal else (less // 2, less // 2) * (conv.weight.ndim - 2)
            weights.append(F.pad(conv.weight * share.view(-1, *[1] * (conv.weight.ndim - 1)), margins))
            biases.append(conv.bias * share)
        weight, bias = torch.stack(weights).sum(0), torch.stack(biases).sum(0)
        if causal:
            y = self.after(y, context, "past", widest - 1)
            return filtered(y, (y.shape[1],), weight, bias, 0)
        near = filtered(y[:, context.prefix :], context.grid, weight, bias, widest // 2)
        return torch.cat([y[:, : context.prefix], near], 1)

    def preceded(self, x: Tensor, chain: nn.ModuleList, context: Context) -> Tensor:
        """RMSNorm(x + the causal convolutions of x, one after the other)."""
        rows = x[:, context.prefix :].unflatten(1, (*[1] * (2 - len(context.grid)), *context.grid)).flatten(0, 1)
        for at, conv in enumerate(chain):
            rows = self.after(rows, context, f"past{at}", self.kernels[at] - 1)
            rows = conv(rows.transpose(1, 2)).transpose(1, 2)
        y = rows.unflatten(0, (-1, 1 if len(context.grid) == 1 else context.grid[0])).flatten(1, 2)
        return self.chain_norm(x + F.pad(y, (0, 0, context.prefix, 0)), context)

    def after(self, y: Tensor, context: Context, slot: str, number: int) -> Tensor:
        """y [B, N, C] behind the `number` tokens of the stream before it, or zeros."""
        if context.cache is None:
            return F.pad(y, (0, 0, number, 0))
        return self.extended(self.recall(context, slot), y)

    def inputs(self) -> list[nn.Linear] | str:
        return super().inputs() if self.chain is None else "its filter reads the tokens"
