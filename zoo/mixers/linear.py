"""Mixers whose cost grows linearly with the number of tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import linear_attention
from zoo.layer import ANYWHERE, Context, Place
from zoo.mixers.projected import Projected, rotate
from zoo.tensors import elu1, filtered, linear, relu, zeroed


class SimplifiedLinear(Projected):
    """Linear attention q' (k'^T v) / (q' sum k') + depthwise(v) with q' = relu(q) and k' = relu(k) (SLAB, Guo et al.
    2024, arXiv:2405.11582).

    It is stable in half precision at any number of tokens. Rotary positions are applied only to the numerator. The
    depthwise filter, `kernel` tokens wide, has the channels of one head and is shared by all heads; prefix tokens are
    not filtered. Unlike in the paper, no learned table is added to the keys, which would tie the layer to one
    resolution.
    """

    reads = Projected.reads | {"rotary"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, kernel: int = 5) -> None:
        super().__init__(dim, heads)
        if kernel % 2 == 0:
            raise ValueError(f"sla: kernel must be odd, got {kernel}")
        self.weight = nn.Parameter(torch.empty(self.head_dim, 1, *[kernel] * place.axes))
        self.bias = nn.Parameter(torch.zeros(self.head_dim))
        bound = 1 / math.sqrt(kernel**place.axes)
        nn.init.uniform_(self.weight, -bound, bound)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        query, key, value = relu(query), relu(key), zeroed(value, context.mask)
        turned = None
        if context.rotary is not None:
            turned = rotate(query, context.rotary), rotate(key, context.rotary)
        return linear_attention(query, key, value, context.mask, turned, onto=self.local(value, context))

    def local(self, value: Tensor, context: Context) -> Tensor:
        """The depthwise convolution of the grid's values, zeros for the prefix: [B, N, H, d]."""
        weight, bias = self.weight.repeat(self.heads, *[1] * (self.weight.ndim - 1)), self.bias.repeat(self.heads)
        return nearby(value, context, weight, bias)


def nearby(value: Tensor, context: Context, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The depthwise convolution of the grid's values [B, N, H, e], zeros for the prefix: [B, N, H, e]."""
    near = filtered(value[:, context.prefix :].flatten(2), context.grid, weight, bias, weight.shape[-1] // 2)
    if context.prefix:
        near = F.pad(near, (0, 0, context.prefix, 0))
    return near.unflatten(-1, value.shape[2:])


class LinFusion(Projected):
    """Linear attention q' (k'^T v) / (q' sum k') with q' = elu(W_q (x + f(x))) + 1, and k' likewise with a network of
    its own (LinFusion, Liu et al. 2024, arXiv:2409.02097). f is a linear layer, LayerNorm, a leaky ReLU and a linear.

    Sums over keys are means, so the result does not change with the number of tokens. hidden is the width inside f; 0
    means dim. lift=False omits f.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, hidden: int = 0, lift: bool = True) -> None:
        super().__init__(dim, heads)
        width = hidden or dim
        if width < 0:
            raise ValueError(f"linfusion: hidden must be >= 0, got {hidden}")

        def network() -> nn.Sequential:
            return nn.Sequential(linear(dim, width), nn.LayerNorm(width), nn.LeakyReLU(), linear(width, dim))

        self.lifts = nn.ModuleList([network(), network()]) if lift else None

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if self.lifts is None:
            return super().project(x, context)
        if callable(self.qkv.weight):
            raise ValueError("linfusion: a quantized projection cannot be split; do not quantize its qkv")
        coded = x if context.code is None else x + context.code
        sources = *(coded + lift(coded) for lift in self.lifts), x
        weights = self.qkv.weight.split(self.widths)
        biases = self.qkv.bias.split(self.widths)
        query, key, value = map(F.linear, sources, weights, biases)
        return self.split(query, key, value, context)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        query, key = elu1(query), elu1(key)
        return linear_attention(query, key, zeroed(value, context.mask), context.mask)

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv] if self.lifts is None else "its networks read it"


class ChannelGroups(Projected):
    """Attention between the channels of a group, softmax(k^T v / sqrt(d)) applied to q (DaViT, Ding et al. 2022,
    arXiv:2204.03645). Tokens are mixed only through the scores of the channels."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        key = zeroed(key, context.mask) * self.head_dim**-0.5
        value = zeroed(value, context.mask)
        scores = key.permute(0, 2, 3, 1) @ value.transpose(1, 2)  # [B, H, d, d]
        share = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        return (query.transpose(1, 2) @ share.transpose(-1, -2)).transpose(1, 2)
