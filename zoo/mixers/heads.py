"""Softmax attention whose heads share projections, keys or values, or get them in another way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Chunks, Context, Fold, Place
from zoo.mixers.attention import DotProduct
from zoo.tensors import linear, zeroed
from zoo.text import unknown


class Symmetric(DotProduct):
    """softmax(k k^T / sqrt(d) + bias) v: keys are their own queries, so scores are symmetric (Key-Value Transformer,
    Borji 2023, arXiv:2305.19129). Positions that turn or bias the scores make them asymmetric."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads, sources="kkv")


class Subspace(DotProduct):
    """softmax(u u^T / sqrt(d) + bias) u with one projection u of queries, keys and values: each head compresses the
    tokens in a subspace (MSSA of CRATE, Yu et al. 2023, arXiv:2306.01129). That projection has no bias."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads, bias=False, sources="uuu")
        self.out = linear(dim, dim)


class Optimized(DotProduct):
    """softmax(q k^T / sqrt(d) + bias) x: values are the tokens themselves, since the output linear can do what their
    projection does (Hosseini and Hosseini 2024, arXiv:2403.01643). key=False uses the tokens as keys as well
    (Efficient Attention there)."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, key: bool = True) -> None:
        super().__init__(dim, heads, sources="qkx" if key else "qxx")


class GroupedQuery(DotProduct):
    """Softmax attention whose `kv_heads` keys and values are each the mean of neighbouring heads (GQA, Ainslie et al.
    2023, arXiv:2305.13245).

    Its projections are those of `softmax`, whose weights it can load; `zoo.fuse` puts the means into them.

    merge='weighted' multiplies each head by a learned weight before the mean (WGQA, Chinnakonduru and Mohapatra 2024,
    arXiv:2407.10855).

    groups says which queries read which keys. `even`: all key heads have the same number of queries. `key_norm`: in
    each sample, a head's number of queries is in proportion to the norm of its keys, of all real tokens, minus the
    smallest such norm, so that one head mostly has none (KDGQA, Khan et al. 2024, arXiv:2408.08454). DGQA there, which
    regroups during training, is left out.
    """

    undecayed = ("shares",)

    MERGES = ("mean", "weighted")
    GROUPS = ("even", "key_norm")

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        kv_heads: int = 1,
        merge: str = "mean",
        groups: str = "even",
    ) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads)
        if merge not in self.MERGES:
            raise ValueError(unknown("merge", merge, self.MERGES))
        if groups not in self.GROUPS:
            raise ValueError(unknown("groups", groups, self.GROUPS))
        self.by_norm, self.merged = groups == "key_norm", False
        self.qkv = linear(dim, 3 * heads * self.head_dim)
        self.shares = nn.Parameter(torch.ones(2, heads)) if merge == "weighted" else None

    @classmethod
    def reads_of(cls, *, groups: str = "even", **options: Any) -> frozenset[str]:
        whole = {"visible", "order"} if groups == "key_norm" else set()  # norms are those of all tokens
        return cls.reads - whole

    def merge(self, rows: Tensor) -> Tensor:
        """The rows of the projection, or its biases, with those of keys and values merged to `kv_heads` heads."""
        query, *others = rows.split(self.heads * self.head_dim)
        means = []
        for number, each in enumerate(others):
            of_heads = each.unflatten(0, (self.heads, -1))
            if self.shares is not None:
                of_heads = of_heads * self.shares[number].view(-1, *[1] * each.ndim)
            means.append(of_heads.unflatten(0, (self.kv_heads, -1)).mean(1).flatten(0, 1))
        return torch.cat([query, *means])

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if self.merged:
            return super().project(x, context)
        if callable(self.qkv.weight):
            raise ValueError("gqa: a quantized projection cannot be merged; fuse the model before quantizing it")
        weight, bias, split = self.merge(self.qkv.weight), self.merge(self.qkv.bias), sum(self.widths[:2])
        coded = x if context.code is None else x + context.code
        q, k = F.linear(coded, weight[:split], bias[:split]).split(self.widths[:2], -1)
        return self.split(q, k, F.linear(x, weight[split:], bias[split:]), context)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        if self.by_norm:
            index = self.groups(key, context)[:, None, :, None]
            key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
        return super().mix(query, key, value, context)

    def groups(self, key: Tensor, context: Context) -> Tensor:
        """The key head of each query head: [B, H], from keys [B, N, K, d]."""
        wide = torch.promote_types(key.dtype, torch.float32)
        norms = zeroed(key, context.mask).detach().to(wide).square().sum((1, 3)).sqrt()
        more = norms - norms.amin(-1, keepdim=True)
        total = more.sum(-1, keepdim=True)
        shares = torch.where(total > 0, more / total.clamp(min=1e-30), 1 / self.kv_heads)
        counts = (shares * self.heads).round()
        heads = torch.arange(self.kv_heads, device=key.device)
        for _ in range(self.kv_heads // 2):  # as far as rounding can be off in sum
            over = counts.sum(-1, keepdim=True) - self.heads
            most, least = (pick[:, None] == heads for pick in (counts.argmax(-1), counts.argmin(-1)))
            counts = counts - (most & (over > 0)).to(wide) + (least & (over < 0)).to(wide)
        queries = torch.arange(self.heads, device=key.device)
        return (queries[:, None] >= counts.cumsum(-1)[:, None]).sum(-1)

    @torch.no_grad()
    def fold(self) -> list[Fold]:
        self.qkv.weight, self.qkv.bias = (nn.Parameter(self.merge(x)) for x in (self.qkv.weight, self.qkv.bias))
        self.qkv.out_features, self.shares, self.merged = len(self.qkv.weight), None, True
        return [Fold("merge", "the projection"), *super().fold()]


class Shifted(DotProduct):
    """Softmax attention to keys a k_i + b k_(i-1) and values c v_i + d v_(i-1), with four learned numbers for each head
    (KV shifting, Xu et al. 2024, arXiv:2411.19574).

    The token i - 1 is the frame before, or the left neighbour in an image. Where there is none, and for prefix tokens,
    zeros take its place. a and c start at random in 0..1, with a + b = c + d = 1.
    """

    undecayed = ("shares",)

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)
        start = torch.empty(2, heads)
        nn.init.uniform_(start)
        self.shares = nn.Parameter(torch.stack([start, 1 - start]))  # of the token and the one before; key and value

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        last = {slot: like.new_zeros(batch, 1, self.heads, self.head_dim) for slot in ("last_key", "last_value")}
        return super().state(batch, visible, like) | last

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        own, before = self.shares[..., None]
        key = key * own[0] + self.before(key, context, "last_key") * before[0]
        value = value * own[1] + self.before(value, context, "last_value") * before[1]
        return super().mix(query, key, value, context)

    def before(self, x: Tensor, context: Context, slot: str) -> Tensor:
        """What x [B, N, H, d] is at the token before each; in a stream, at its last token before these, first."""
        if context.cache is not None:
            return self.extended(self.recall(context, slot), x)[:, :-1]
        rows = x[:, context.prefix :].unflatten(1, (*[1] * (2 - len(context.grid)), *context.grid))
        rows = F.pad(rows[:, :, :-1], (0, 0, 0, 0, 1, 0)).flatten(1, 2)
        return F.pad(rows, (0, 0, 0, 0, context.prefix, 0))


class HeadEmbedding(DotProduct):
    """Softmax attention whose heads share one projection, of the width of a head, and differ by learned embeddings of
    queries, keys and values (MHE, Xue and Aletras 2023, arXiv:2310.07911).

    how='add' adds a head's embedding e to what is projected; `multiply` multiplies by 1 + e.
    """

    HOW = ("add", "multiply")

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, how: str = "add") -> None:
        super().__init__(dim, heads)
        if how not in self.HOW:
            raise ValueError(unknown("how", how, self.HOW))
        self.adds = how == "add"
        self.embeddings = nn.Parameter(torch.empty(3, heads, self.head_dim))
        nn.init.trunc_normal_(self.embeddings, std=0.02)

    @property
    def widths(self) -> list[int]:
        return [self.head_dim] * 3

    def split(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            part + embedding if self.adds else part * (1 + embedding)
            for part, embedding in zip(super().split(q, k, v, context), self.embeddings, strict=True)
        )
        return q, k, v
