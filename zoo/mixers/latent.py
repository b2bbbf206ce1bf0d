"""Attention whose queries, keys and values differ in width: reduced, or from a latent, or with relations beside."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion import fold_norm, fold_site, keep
from zoo.layer import ANYWHERE, Chunks, Context, Fold, Layer, Place, Site
from zoo.mixers.projected import Attention, Headed, rotate
from zoo.mixers.scored import Pairs, Scored
from zoo.norms import RMSNorm
from zoo.tensors import linear


class Reduced(Scored):
    """g W softmax(q k^T + bias) v, where queries and keys have a `reduction`-th of the channels, at least one for each
    head, and g is a learned number that starts at 0 (SAGAN, Zhang et al. 2018, arXiv:1805.08318). Scores are not
    scaled, and positions do not turn them. The paper has one head."""

    reads = Scored.reads - {"rotary"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, reduction: int = 8) -> None:
        width = self.head_width_of(dim, heads, reduction=reduction)
        Attention.__init__(self, dim, heads, head_dim=width, value_dim=dim // heads)
        self.gain = nn.Parameter(torch.zeros(1))

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, head_dim: int = 0, reduction: int = 8, **options: Any) -> int:
        return head_dim or max(1, super().head_width_of(dim, heads) // reduction)

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        whole = {"value": Site(dim // heads), "inner": Site(dim, heads)}
        return super().sites_of(dim, heads, **options) | whole

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        return self.biased(query @ key.transpose(-1, -2), pairs)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.gain * super().forward(x, context)

    def outputs(self) -> list[nn.Linear] | str:
        return "its gain is behind the output linear"

    def fold(self) -> list[Fold]:
        return [*super().fold(), *fold_norm(self, "inner", self.out, "output linear")]


class Latent(Scored):
    """Softmax attention whose keys and values are projected from a normalized latent of `rank` channels (MLA of
    DeepSeek-V2, 2024, arXiv:2405.04434). A rank above 64 must be at most dim.

    Queries and keys have `rotary` further channels for the position, which alone are turned by rotary angles; keys have
    them in common in all heads. No linear has a bias. As in DeepSeek-V2-Lite, queries have no latent of their own.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, rank: int = 64, rotary: int = 16) -> None:
        Headed.__init__(self)
        if rotary % 2:
            raise ValueError(f"rotary must be even, got {rotary}")
        if rank > max(64, dim):
            raise ValueError(f"mla: rank must be at most {max(64, dim)} at dim {dim}, got {rank}")
        self.heads = self.kv_heads = heads
        self.value_dim, self.head_dim, self.rank = Scored.head_width_of(dim, heads), rotary, rank
        self.key_dim = self.value_dim + rotary
        self.qkv = linear(dim, heads * self.key_dim + rank + rotary, bias=False)
        self.latent_norm = RMSNorm(rank, place)
        self.raise_latent = linear(rank, 2 * dim, bias=False)
        self.out = linear(dim, dim, bias=False)
        self.query: Layer | None = None
        self.key: Layer | None = None
        self.value: Layer | None = None
        self.inner: Layer | None = None

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, rotary: int = 16, **options: Any) -> int:
        super().head_width_of(dim, heads)
        return rotary

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, rotary: int = 16, **options: Any) -> dict[str, Site]:
        width = Scored.head_width_of(dim, heads)
        keys = dict.fromkeys(("query", "key"), Site(width + rotary))
        return keys | {"value": Site(width), "inner": Site(dim, heads)}

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        keys = like.new_zeros(batch, visible.left, self.heads, self.key_dim)
        return super().state(batch, visible, like) | {"key": keys}

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if context.code is None:
            q, k, v = self.raised(x, context)
        else:
            (q, k, _), (_, _, v) = self.raised(x + context.code, context), self.raised(x, context)
        return self.at_sites(q, k, v, context)

    def raised(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens, by head."""
        q, latent, common = self.qkv(x).split([self.heads * self.key_dim, self.rank, self.head_dim], -1)
        k, v = self.raise_latent(self.latent_norm(latent, context)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        k = torch.cat([k, common[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return q.unflatten(-1, (self.heads, -1)), k, v

    def turned(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        plain, turning = x.split([self.value_dim, self.head_dim], -1)
        return x if rotary is None else torch.cat([plain, rotate(turning, rotary)], -1)

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv]

    def fold(self) -> list[Fold]:
        done = fold_site(self, "query", self.qkv, slice(0, self.heads * self.key_dim))
        done += fold_site(self, "value", self.raise_latent, slice(self.heads * self.value_dim, None))
        return done if self.key is None else [*done, keep(self, "key", "its channels are from two projections")]


class Relational(Scored):
    """Softmax attention in which some heads collect relations and symbols in place of values: sum_j a_ij (W r_ij + s_j)
    (Dual Attention Transformer, Altabaa and Lafferty 2024, arXiv:2405.16727).

    r_ij are `relations` products q_i . k_j / sqrt(d) of further queries and keys, 0 for as many as there are relational
    heads; with symmetric=True these queries are the keys. The symbol s_j is a mean of `symbols` learned vectors,
    weighted by a softmax of a linear map of x_j. relational_heads=0 means half of the heads, rounded up; the others
    have values. Rotary angles do not turn relations.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        relational_heads: int = 0,
        relations: int = 0,
        symbols: int = 16,
        symmetric: bool = False,
    ) -> None:
        Attention.__init__(self, dim, heads)
        if relational_heads > heads:
            raise ValueError(f"relational_heads must be at most the {heads} heads, got {relational_heads}")
        self.relational = relational_heads or -(-heads // 2)
        self.relations, self.symmetric = relations or self.relational, symmetric
        width = self.head_dim
        queries, keys = heads + (0 if symmetric else self.relations), heads + self.relations
        self.parts_of = [queries * width, keys * width, (heads - self.relational) * width, symbols]
        self.qkv = linear(dim, sum(self.parts_of))
        self.library = nn.Parameter(torch.empty(symbols, self.relational * width))
        nn.init.normal_(self.library, std=0.02 * math.sqrt(dim))
        self.relate = nn.Parameter(torch.empty(self.relational, self.relations, width))
        nn.init.uniform_(self.relate, -1 / math.sqrt(self.relations), 1 / math.sqrt(self.relations))

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        keys = like.new_zeros(batch, visible.left, self.heads + self.relations, self.head_dim)
        return super().state(batch, visible, like) | {"key": keys}

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = self.qkv(x).split(self.parts_of, -1)
        return q, k, torch.cat([v, weights.softmax(-1) @ self.library], -1)

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if context.code is None:
            q, k, v = self.parts(x)
        else:
            (q, k, _), (_, _, v) = self.parts(x + context.code), self.parts(x)
        q, k, v = self.split(q, k, v, context)
        return torch.cat([q, k[:, :, self.heads :]], 2) if self.symmetric else q, k, v

    def turned(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        if rotary is None:
            return x
        return torch.cat([rotate(x[:, :, : self.heads], rotary), x[:, :, self.heads :]], 2)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        """Scores of the heads, then relations: [B, H + relations, n, M]."""
        products = (query * self.head_dim**-0.5) @ key.transpose(-1, -2)
        return torch.cat([self.biased(products[:, : self.heads], pairs), products[:, self.heads :]], 1)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        return torch.cat([super().weights(scores[:, : self.heads], pairs), scores[:, self.heads :]], 1)

    def collect(self, weights: Tensor, value: Tensor, pairs: Pairs) -> Tensor:
        shares, relations = weights[:, : self.heads], weights[:, self.heads :]
        y = shares @ value
        plain = self.heads - self.relational
        related = shares[:, plain:].transpose(1, 2) @ relations.permute(0, 2, 3, 1)  # [B, n, heads, relations]
        return torch.cat([y[:, :plain], y[:, plain:] + related.transpose(1, 2) @ self.relate], 1)

    def note(self, context: Context, name: str, value: Tensor) -> None:
        super().note(context, name, value[:, : self.heads])

    def fold(self) -> list[Fold]:
        queries, keys, *_ = self.parts_of
        done = fold_site(self, "query", self.qkv, slice(0, queries))
        done += fold_site(self, "key", self.qkv, slice(queries, queries + keys))
        return done if self.value is None else [*done, keep(self, "value", "symbols are among its values")]
