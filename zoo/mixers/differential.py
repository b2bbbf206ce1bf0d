"""Attention by the difference of two softmax maps."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Chunks, Context, Place, Site
from zoo.mixers.scored import Pairs, Scored
from zoo.norms import RMSNorm
from zoo.tensors import real_mean


def first_share(place: Place) -> float:
    """0.8 - 0.6 exp(-0.3 index): the share of the second map that a block starts from."""
    return 0.8 - 0.6 * math.exp(-0.3 * place.index)


class Differential(Scored):
    """(softmax(q1 k1^T) - lambda softmax(q2 k2^T)) v per head, RMS-normalized: what both maps share cancels
    (Differential Transformer, Ye et al. 2024, arXiv:2410.05258; in a ViT DiffCLIP, Hammoud and Ghanem 2025,
    arXiv:2503.06626).

    q1, q2, k1 and k2 are half as wide as the values, and scores are divided by the square root of their width. lambda =
    exp(a1 . b1) - exp(a2 . b2) + lambda0 with learned vectors, lambda0 = 0.8 - 0.6 exp(-0.3 index) by the index of the
    block. The RMS norm of each head has one weight for all heads, and its result is multiplied by 1 - lambda0.
    """

    paired = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        half = self.head_width_of(dim, heads)
        super().__init__(dim, heads, value_dim=2 * half)
        self.start = first_share(place)
        self.vectors = nn.Parameter(torch.zeros(2, 2, half))
        nn.init.normal_(self.vectors, std=0.1)
        self.head_norm = RMSNorm(2 * half, eps=1e-5)

    @classmethod
    def head_width_of(cls, dim: int, heads: int, **options: Any) -> int:
        return super().head_width_of(dim, heads, **options) // 2

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        width = 2 * cls.head_width_of(dim, heads, **options)
        return super().sites_of(dim, heads, **options) | {"value": Site(width), "inner": Site(dim, heads)}

    @property
    def widths(self) -> list[int]:
        return [2 * self.heads * self.head_dim] * 2 + [self.heads * self.value_dim]

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        slots = super().state(batch, visible, like)
        return slots | {"key": slots["key"].repeat(1, 1, 2, 1)}

    def share(self, like: Tensor) -> Tensor:
        """lambda, in the dtype of `like`."""
        vectors = self.vectors.to(torch.promote_types(self.vectors.dtype, torch.float32))
        first, second = (vectors[:, 0] * vectors[:, 1]).sum(-1).exp().unbind()
        return (first - second + self.start).to(like.dtype)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        """Those of both maps of a head follow each other: [B, 2 H, n, M]."""
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if (bias := pairs.bias(scores)) is None:
            return scores
        return (scores.unflatten(1, (-1, 2)) + bias[:, :, None]).flatten(1, 2)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        first, second = super().weights(scores, pairs).unflatten(1, (-1, 2)).unbind(2)
        return first - self.share(first) * second

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return self.normalized(super().mix(query, key, value, context), context)

    def normalized(self, y: Tensor, context: Context) -> Tensor:
        return self.head_norm(y, context) * (1 - self.start)


class Integral(Differential):
    """(A1 - lambda A2 + lambda G) v per head, RMS-normalized, with softmax maps A1 and A2, where every row of G is the
    mean of the rows of A1: tokens that all attend to gain weight, and rows sum to one (DINT, Cang et al. 2025,
    arXiv:2501.17486).

    Widths, lambda and the norm are those of `differential`. The mean is over the real tokens of a sample. A stream is
    refused, for its mean would change with every chunk.
    """

    reads = Differential.reads - {"visible", "order"}

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        return Scored.weights(self, scores, pairs)

    def collect(self, weights: Tensor, value: Tensor, pairs: Pairs) -> Tensor:
        both = weights.unflatten(1, (-1, 2)).flatten(2, 3) @ value
        return both.unflatten(2, (2, -1)).flatten(1, 2)

    def note(self, context: Context, name: str, value: Tensor) -> None:
        """Of the maps A1 and A2 [B, 2 H, N, N] reports A1 - lambda A2 + lambda G."""
        first, second = value.unflatten(1, (-1, 2)).unbind(2)
        whole = real_mean(first.transpose(1, 2), context.mask).transpose(1, 2).to(first.dtype)
        super().note(context, name, first - self.share(first).detach() * (second - whole))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        first, second = Scored.mix(self, query, key, value, context).unflatten(2, (-1, 2)).unbind(3)
        whole = real_mean(first, context.mask)
        return self.normalized(first - self.share(first) * (second - whole.to(first.dtype)), context)
