"""Attention whose weights depend on those of other queries or heads, or on its own result."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Place, Site
from zoo.mixers.attention import DotProduct
from zoo.mixers.differential import first_share
from zoo.mixers.projected import rotate
from zoo.mixers.scored import Pairs, Scored, softmax
from zoo.norms import RMSNorm


class MultiToken(Scored):
    """Softmax attention with a convolution over the scores of neighbouring queries and keys, and one across heads
    behind the softmax (Multi-Token Attention, Golovneva et al. 2025, arXiv:2504.00927).

    Each head has a kernel of `queries` x `keys` weights, centred on the score; that of the paper, a causal model,
    covers only earlier queries. `group` heads that follow each other mix their weights; 0 means all. Both start as
    identities. The result of each head is RMS-normalized and multiplied by 0.2 + 0.6 exp(-0.3 index) by the index of
    the block. Scores of other queries are needed, so memory grows with the square of the number of tokens. It works
    along time only: on an image, tokens that follow each other in a line are no neighbours at its ends. The paper's
    other orders, heads mixed before the softmax and queries and keys behind it, are left out.
    """

    undecayed = ("kernel", "across")

    dimensions = (1,)
    reads = Scored.reads - {"prefix", "visible", "order"}
    quadratic = True

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        queries: int = 5,
        keys: int = 5,
        group: int = 0,
    ) -> None:
        super().__init__(dim, heads)
        group = group or heads
        if queries % 2 == 0 or keys % 2 == 0:
            raise ValueError(f"queries and keys must be odd, got {queries} and {keys}")
        if heads % group:
            raise ValueError(f"group must divide the {heads} heads, got {group}")
        self.start = first_share(place)
        self.kernel = nn.Parameter(torch.zeros(heads, 1, queries, keys))
        nn.init.dirac_(self.kernel, groups=heads)
        self.across = nn.Parameter(torch.eye(group).repeat(heads // group, 1, 1))
        self.head_norm = RMSNorm(self.value_dim, eps=1e-5)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        scores, mask = pairs.masked(super().scores(query, key, pairs), 0.0), pairs.context.mask
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :, None], 0.0)
        padding = [size // 2 for size in self.kernel.shape[2:]]
        return F.conv2d(scores, self.kernel, padding=padding, groups=self.heads)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        groups, group, _ = self.across.shape
        weights = super().weights(scores, pairs).unflatten(1, (groups, group))
        return (self.across @ weights.flatten(3)).view_as(weights).flatten(1, 2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return self.head_norm(super().mix(query, key, value, context), context) * (1 - self.start)


class Selective(Scored):
    """Causal softmax(L - F) v with F_ij = sum_{m < i} relu(L_mj) of the first head: a token may hide others from those
    after it, in all heads (Selective Attention, Leviathan et al. 2024, arXiv:2410.02703).

    L are the scaled scores. The order is line by line on an image. No token hides itself, and none hides the first.
    Prefix tokens come last. It needs a ViT with causal=True. Scores of other queries are needed, so memory grows with
    the square of the number of tokens.
    """

    reads = Scored.reads - {"visible"}
    causal = True
    quadratic = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        context, (queries, keys) = pairs.context, pairs.places(scores)
        hiding = F.relu(pairs.masked(scores[:, :1], 0.0))
        hiding = hiding.masked_fill((queries[:, None] == keys) | (keys == context.prefix), 0.0)
        if context.mask is not None:
            hiding = hiding.masked_fill(~context.mask[:, None, :, None], 0.0)
        hiding = hiding.roll(-context.prefix, 2).to(torch.promote_types(scores.dtype, torch.float32))
        hidden = (hiding.cumsum(2) - hiding).roll(context.prefix, 2)
        return softmax(pairs.masked(scores - hidden.to(scores.dtype)))


class FixedPoint(DotProduct):
    """Softmax attention whose result is its next query: Z <- softmax(Z k^T / sqrt(d)) v from Z = q (SELF-Transformer,
    Mathur et al. 2025, arXiv:2507.13569).

    steps is their number; the paper stops early where Z hardly changes. Gradients pass through the last `backward`
    steps; 0 means all. Queries are not normalized, for Z soon forgets them.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, steps: int = 8, backward: int = 0) -> None:
        super().__init__(dim, heads)
        if backward > steps:
            raise ValueError(f"backward must be at most the {steps} steps, got {backward}")
        self.steps, self.cut = steps, steps - (backward or steps)

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        return {site: size for site, size in super().sites_of(dim, heads, **options).items() if site != "query"}

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        key, value, real = self.stored(key, value, context)
        key = rotate(key, context.rotary)
        for step in range(self.steps):
            if step and step == self.cut:
                query = query.detach()
            query = self.attended(query, key, value, real, context)
        return query
