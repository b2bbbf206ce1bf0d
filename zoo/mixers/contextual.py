"""Softmax attention whose scores know positions through queries and keys: learned vectors of offsets, and positions
that are counted by what a query looks for."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Chunks, Context, Place, Site
from zoo.mixers.scored import Pairs, Scored
from zoo.tensors import single
from zoo.text import unknown

UNTURNED = Scored.reads - {"rotary"}  # of attention that has positions of its own


def vectors(*shape: int) -> nn.Parameter:
    """Learned vectors, truncated normal with standard deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def coordinates(places: Tensor, context: Context) -> list[Tensor]:
    """The coordinates [n] along each axis of the grid of the tokens at these places [n]."""
    places = places - context.prefix
    if len(context.grid) == 1:
        return [places]
    return [places // context.grid[1], places % context.grid[1]]


def on_grid(queries: Tensor, keys: Tensor, context: Context) -> Tensor:
    """Whether neither the queries [n] nor the keys [M], given by their places, are prefix tokens: [n, M]."""
    return (queries >= context.prefix)[:, None] & (keys >= context.prefix)


class Offsets(Scored):
    """The base of scores with learned vectors of the offset from a key to its query.

    (q_i . k_j + sum_t q_i . a_t[b_t(i - j)] + sum_t k_j . c_t[b_t(i - j)]) * scale, and if values have vectors too,
    sum_j w_ij (v_j + sum_t e_t[b_t(i - j)]). A subclass gives the buckets b_t of offsets, one for each table t.
    Pairs with a prefix token have the last vector of each table.

    Args:
        tables: number of tables.
        buckets: vectors in each, without the one for prefix tokens.
        on: which of queries (letter k, for the vectors stand beside keys), keys (q) and values (v) have vectors.
        apart: whether each head has its own.
    """

    reads = UNTURNED

    def __init__(self, dim: int, heads: int, tables: int, buckets: int, on: str, apart: bool = False) -> None:
        super().__init__(dim, heads)
        self.buckets, self.scale = buckets, self.head_dim**-0.5
        shape = (tables, heads if apart else 1, buckets + 1, self.head_dim)
        self.on_keys = vectors(*shape) if "k" in on else None
        self.on_queries = vectors(*shape) if "q" in on else None
        self.on_values = vectors(*shape) if "v" in on else None

    def bucketed(self, offsets: list[Tensor]) -> list[Tensor]:
        """The bucket in each table of the offsets [n, M] along each axis, rows and columns on images."""
        raise TypeError(f"{type(self).__name__} has no bucketed")

    def places(self, pairs: Pairs, scores: Tensor) -> list[Tensor]:
        """The row of each table for every pair: [n, M]."""
        queries, keys = pairs.places(scores)
        axes = zip(coordinates(queries, pairs.context), coordinates(keys, pairs.context), strict=True)
        inside = on_grid(queries, keys, pairs.context)
        offsets = [own[:, None] - other for own, other in axes]
        return [bucket.where(inside, self.buckets) for bucket in self.bucketed(offsets)]

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        query = query * self.scale
        scores = query @ key.transpose(-1, -2)
        places = self.places(pairs, scores)
        if self.on_keys is not None:
            scores = scores + products(query, self.on_keys, places)
        if (table := self.beside_queries()) is not None:
            turned = [place.transpose(0, 1) for place in places]
            scores = scores + products(key * self.scale, table, turned).transpose(-1, -2)
        return self.biased(scores, pairs)

    def beside_queries(self) -> Tensor | None:
        """The vectors that keys are multiplied by."""
        return self.on_queries

    def collect(self, weights: Tensor, value: Tensor, pairs: Pairs) -> Tensor:
        y = weights @ value
        if self.on_values is None:
            return y
        finer = single(weights)
        for table, place in zip(self.on_values, self.places(pairs, weights), strict=True):
            empty = finer.new_zeros(*weights.shape[:-1], self.buckets + 1)
            shares = empty.scatter_add(-1, place.expand(weights.shape), finer)
            y = y + shares.to(weights.dtype) @ table
        return y


def products(x: Tensor, tables: Tensor, places: list[Tensor]) -> Tensor:
    """sum_t x_i . tables_t[places_t(i, j)] of x [B, H, n, d], tables [T, 1 or H, L, d] and T places [n, M]:
    [B, H, n, M]."""
    parts = []
    for table, place in zip(tables, places, strict=True):
        every = x @ table.transpose(-1, -2)
        parts.append(every.gather(-1, place.expand(*every.shape[:-1], -1)))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class Shaw(Offsets):
    """softmax(q_i . (k_j + a_{j - i}) / sqrt(d)), a learned vector for each offset, clipped to `span` on either side
    (Shaw et al. 2018, arXiv:1803.02155).

    On images a is the sum of a vector of the rows and one of the columns, as in Bottleneck Transformers (Srinivas et
    al. 2021, arXiv:2101.11605), and `span` clips each. The vectors are shared between heads. on='qk' adds k_j . a_{j -
    i} (method 4 of Huang et al. 2020, arXiv:2009.13658). values=True adds vectors of offsets to the values, too. Pairs
    with a prefix token have a vector of their own.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        span: int = 16,
        on: str = "k",
        values: bool = False,
    ) -> None:
        if on not in ("k", "qk"):
            raise ValueError(unknown("on", on, ("k", "qk")))
        super().__init__(dim, heads, place.axes, 2 * span + 1, "kv" if values else "k")
        self.span, self.both = span, on == "qk"

    def bucketed(self, offsets: list[Tensor]) -> list[Tensor]:
        return [(self.span - offset).clamp(0, 2 * self.span) for offset in offsets]

    def beside_queries(self) -> Tensor | None:
        return self.on_keys if self.both else None


class Disentangled(Offsets):
    """softmax((q_i . k_j + q_i . a_b + k_j . c_b) / sqrt(3 d)), b the offset i - j clipped to -span..span - 1, a and c
    learned: content to content, content to position, position to content (DeBERTa, He et al. 2020, arXiv:2006.03654).

    Each head has its own vectors. On images they are sums of one of the rows and one of the columns. DeBERTa
    projects them from embeddings that all layers share; here they are learned directly. Pairs with a prefix token have
    vectors of their own.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, span: int = 64) -> None:
        super().__init__(dim, heads, place.axes, 2 * span, "qk", apart=True)
        self.span, self.scale = span, (3 * self.head_dim) ** -0.5

    def bucketed(self, offsets: list[Tensor]) -> list[Tensor]:
        return [(offset + self.span).clamp(0, 2 * self.span - 1) for offset in offsets]


METHODS = ("product", "cross", "euclidean")
ON = ("k", "qk", "qkv")


class IRPE(Offsets):
    """softmax(q_i . (k_j + r_b) / sqrt(d)), r learned for each bucket b of offsets: exact near the query, wider with
    distance (iRPE in contextual mode, Wu et al. 2021, arXiv:2107.14222).

    An offset x along an axis is in bucket g(x) = x if |x| <= a, else sign(x) min(round(a + a ln(|x| / a) / ln 8), 2 a),
    rounded down to integers, with a = `ratio`, from 0.5 to 32. method: `product` has a vector for every pair of buckets
    of row and column, `cross` sums one of the row and one of the column, `euclidean` has one for g of the rounded
    distance. on: `k`, `qk` adds k_j times other vectors, `qkv` adds vectors to the values, too. Heads share them. Pairs
    with a prefix token have vectors of their own.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        method: str = "product",
        on: str = "k",
        ratio: float = 1.9,
    ) -> None:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
        if on not in ON:
            raise ValueError(unknown("on", on, ON))
        if not 0.5 <= ratio <= 32:
            raise ValueError(f"ratio must be from 0.5 to 32, got {ratio}")
        self.method, self.ratio, self.most = method, ratio, int(2 * ratio)
        side = 2 * self.most + 1
        buckets = {"product": side**place.axes, "cross": side, "euclidean": self.most + 1}
        super().__init__(dim, heads, place.axes if method == "cross" else 1, buckets[method], on)

    def bucket(self, offset: Tensor) -> Tensor:
        """g of offsets."""
        distance = offset.abs().float()
        far = self.ratio + self.ratio / math.log(8) * (distance.clamp(min=self.ratio) / self.ratio).log()
        near = distance.where(distance <= self.ratio, far).round().clamp(max=self.most)
        return (offset.sign() * near).long()

    def bucketed(self, offsets: list[Tensor]) -> list[Tensor]:
        if self.method == "euclidean":
            squares = [offset.square() for offset in offsets]
            return [self.bucket(sum(squares[1:], squares[0]).float().sqrt().round())]
        buckets = [self.bucket(offset) + self.most for offset in offsets]
        if self.method == "cross" or len(buckets) == 1:
            return buckets
        return [buckets[0] * (2 * self.most + 1) + buckets[1]]


class CoPE(Scored):
    """softmax(q_i . (k_j + e[p_ij]) / sqrt(d)), where the position p_ij of a key is counted from the query: the sum
    over the tokens m from j to i of sigmoid(q_i . k_m / sqrt(d)) (CoPE, Golovneva et al. 2024, arXiv:2405.18719).

    Positions are clipped to `positions` - 1, and e is interpolated between integers. causal=True is the paper's form
    and needs a ViT with causal=True; else keys behind the query are counted, too, and have an e of their own.
    Masked tokens are not counted. Pairs with a prefix token have no position. The paper's gates of keys of their own,
    or of values, are left out.
    """

    reads = UNTURNED

    def __init__(
        self, dim: int, heads: int, place: Place = ANYWHERE, *, positions: int = 64, causal: bool = False
    ) -> None:
        super().__init__(dim, heads)
        if positions < 2:
            raise ValueError(f"positions must be >= 2, got {positions}")
        self.causal, self.positions = causal, positions  # pyright: ignore[reportAttributeAccessIssue]
        self.table = vectors(positions if causal else 2 * positions, self.head_dim)

    @classmethod
    def causal_of(cls, *, causal: bool = False, **options: Any) -> bool:
        return causal

    @classmethod
    def reads_of(cls, *, causal: bool = False, **options: Any) -> frozenset[str]:
        return cls.reads - {"visible"} if causal else cls.reads

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-1, -2)
        queries, keys = pairs.places(scores)
        inside = on_grid(queries, keys, pairs.context)
        counted = inside if pairs.allowed is None else inside & pairs.allowed
        gates = single(scores).sigmoid().masked_fill(~counted, 0.0)
        totals = gates.cumsum(-1)
        own = queries[:, None].expand(*scores.shape[:-1], 1)
        position, first = totals.gather(-1, own) - totals + gates, 0
        if not self.causal:
            behind = keys > queries[:, None]
            position = torch.where(behind, totals - totals.gather(-1, own) + gates.gather(-1, own), position)
            first = self.positions * behind
        position = position.clamp(0, self.positions - 1)
        every = query @ self.table.transpose(0, 1)
        low, high = (every.gather(-1, first + each.long()) for each in (position.floor(), position.ceil()))
        terms = low + (position - position.floor()).to(low.dtype) * (high - low)
        return self.biased(scores + terms.masked_fill(~inside, 0.0), pairs)


class CoCA(Scored):
    """softmax(sum_p |q_ip|^2 t_jp cos(theta_p (i - j)) / sqrt(d)), p a pair of channels that rotary positions turn by
    theta_p, t = relu(W x): keys q_i * t_j, collinear with the query until they are turned (CoCA, Zhu et al. 2023,
    arXiv:2309.08646). Keys are half as wide as queries. Without rotary positions the cosine is 1."""

    paired = True

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        width = cls.head_width_of(dim, heads, **options)
        return super().sites_of(dim, heads, **options) | {"key": Site(width // 2)}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    @property
    def widths(self) -> list[int]:
        return [self.heads * self.head_dim, self.heads * self.head_dim // 2, self.heads * self.value_dim]

    def split(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        q, k, v = self.at_sites(q, k, v, context)
        first, second = q.chunk(2, -1)
        return first.square() + second.square(), F.relu(k), v

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        key = like.new_zeros(batch, visible.left, self.heads, self.head_dim // 2)
        return super().state(batch, visible, like) | {"key": key}

    def turned(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """The pairs (x, 0), turned; their dot products are those of x times the cosines of the differences."""
        if rotary is None:
            return x
        cosine, sine = rotary[..., -x.shape[1] :, None, :]
        return torch.cat([x * cosine, x * sine], -1).to(x.dtype)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        return self.biased((query * self.head_dim**-0.5) @ key.transpose(-1, -2), pairs)


class ThresholdRelative(Scored):
    """Causal attention to keys of positive score alone, s_ij + c_ij log sigmoid(w . x_i), with s_ij = q_i . k_j /
    sqrt(d) of normalized q and k, and c_ij the number of such keys from j to i (TRA, Opper et al. 2025,
    arXiv:2503.23174). Line by line on images. It needs a ViT with causal=True. A query without such a key gets zeros. w
    is a further channel of the queries of each head."""

    reads = UNTURNED - {"bias", "visible"}
    causal = True

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        sites = super().sites_of(dim, heads, **options)
        return {site: sites[site] for site in ("value", "inner")}  # queries and keys have norms of their own

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    @property
    def widths(self) -> list[int]:
        return [self.heads * (self.head_dim + 1), self.heads * self.head_dim, self.heads * self.value_dim]

    def split(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        normalized = [F.rms_norm(part, part.shape[-1:], eps=1e-6) for part in (q[..., :-1], k)]
        if self.value is not None:
            v = self.value(v, context)
        return torch.cat([normalized[0], q[..., -1:]], -1), normalized[1], v

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        scores = (query[..., :-1] * key.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        kept = scores > 0
        if pairs.allowed is not None:
            kept = kept & pairs.allowed
        # In the order in which tokens see each other, prefix tokens are the last.
        ordered = single(kept).roll(-pairs.context.prefix, -1)
        count = ordered.flip(-1).cumsum(-1).flip(-1).roll(pairs.context.prefix, -1)
        decay = F.logsigmoid(single(query[..., -1:])) * count
        return (single(scores) + decay).to(scores.dtype).masked_fill(~kept, -torch.inf)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        none = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
