"""Linear attention by feature maps of queries and keys: exponential, polynomial, random, of cosines, binary."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import table
from zoo.kernels import exponential_attention, feature_attention, linear_attention
from zoo.layer import ANYWHERE, Context, Place
from zoo.mixers.kernelized import Narrow
from zoo.mixers.projected import Projected, rotate
from zoo.tensors import real_mean, zeroed
from zoo.text import unknown

SLOPE, OFFSET = 0.14855178144710912, -0.35487039130661086  # of the log-variance of LLN's weights


class LogNormal(Projected):
    """q' (k'^T v) / (q' sum k') with q' = exp(alpha q) and k' = exp(beta k), whose weights vary as those of softmax do
    (LLN attention, Nahshan et al. 2023, arXiv:2311.13541).

    With the standard deviations s_q and s_k of a head's queries and keys in a sample, alpha = s / s_q and beta = s /
    s_k, where 2 a s^2 + b = (s_q s_k)^2 matches the log-variance of the weights to that of softmax attention;
    a = 0.1486 and b = -0.3549 are the paper's fit. alpha and beta have no gradient. The paper averages the result with
    softmax attention inside blocks, which is left out.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(wide), key.to(wide)
        of_query, of_key = (self.deviation(each.detach(), context.mask) for each in (query, key))
        wanted = (((of_query * of_key).square() - OFFSET) / (2 * SLOPE)).sqrt()
        return exponential_attention(query * (wanted / of_query), key * (wanted / of_key), value, context.mask)

    @staticmethod
    def deviation(x: Tensor, mask: Tensor | None) -> Tensor:
        """The standard deviation of x [B, N, H, d] over real tokens and channels: [B, 1, H, 1]."""
        mean = real_mean(x, mask).mean(3, keepdim=True)
        variance = real_mean((x - mean).square(), mask).mean(3, keepdim=True)
        return variance.sqrt().clamp(min=1e-6)


class Taylor(Narrow):
    """sum_j p(q k_j / sqrt(width)) v_j / sum_j p(q k_j / sqrt(width)) with p(u) = 1 + u + u^2 / 2 in place of the
    exponential (Based, Arora et al. 2024, arXiv:2402.18668; FAST, Gerami et al. 2024, arXiv:2402.07901).

    p is the product of the features [1, x, x x^T / sqrt(2)], so `width`, that of queries and keys, is small. normalize
    is FAST's form: queries, and keys, are centred over their channels and divided by the largest length in the head,
    and u = q k_j. order=1 is p(u) = 1 + u; it needs normalize, without which weights could be negative.
    """

    reads = Narrow.reads | {"rotary"}

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        order: int = 2,
        width: int = 16,
        normalize: bool = False,
    ) -> None:
        if order > 2:
            raise ValueError(f"taylor: order must be 1 or 2, got {order}")
        if order == 1 and not normalize:
            raise ValueError("taylor: order=1 needs normalize=True, or weights may be negative")
        if order == 2 and width > 128:
            raise ValueError(f"taylor: width must be at most 128, as there are width^2 features, got {width}")
        super().__init__(dim, heads, width)
        self.order, self.normalize = order, normalize

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        query, key = (self.scaled(each, context) for each in (query, key))
        return feature_attention(self.features, query, key, value, context.mask)

    def scaled(self, x: Tensor, context: Context) -> Tensor:
        """Queries or keys, whose products are the arguments of p."""
        if self.normalize:
            values = x.to(torch.promote_types(x.dtype, torch.float32))
            values = values - values.mean(-1, keepdim=True)
            largest = zeroed(values.norm(dim=-1, keepdim=True), context.mask).amax(1, keepdim=True)
            x = (values / largest.clamp(min=1e-6)).to(x.dtype)
        else:
            x = x * self.head_dim**-0.25
        return rotate(x, context.rotary)

    def features(self, x: Tensor) -> Tensor:
        """[B, N, H, width] -> [B, N, H, 1 + width + width^2], without the squares for order 1."""
        parts = [torch.ones_like(x[..., :1]), x]
        if self.order == 2:
            parts.append(((x * 0.5**0.5)[..., None] * x[..., None, :]).flatten(-2))
        return torch.cat(parts, -1)


class RandomFeatures(Projected):
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), where phi(x) has features of random directions w, whose distribution
    is learned (KL-Transformer, Chowdhury et al. 2021, arXiv:2110.08323; Performer, Choromanski et al. 2020,
    arXiv:2009.14794).

    kind: `positive`, exp(w x - |x|^2 / 2), or `trigonometric`, cos(w x) and sin(w x). x is divided by d^(1/4). learned:
    a head has w = S w_0 + m and S w_0 - m with a learned matrix S and a learned mean m, and cosines are those of a
    learned stationary kernel. With learned=False w is w_0, and both kinds estimate softmax attention, for which keys
    have the factor exp(|k|^2 / 2) in the trigonometric kind. features: the number of directions w_0, drawn once,
    orthogonal to each other, and kept with the weights. A sum of cosines may be near zero or negative: the denominator
    is at least a hundredth of |phi(q)| |mean phi(k)|.
    """

    undecayed = ("spread",)

    KINDS = ("positive", "trigonometric")
    reads = Projected.reads | {"rotary"}
    directions: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        learned: bool = True,
        kind: str = "positive",
        features: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        if kind not in self.KINDS:
            raise ValueError(unknown("kind", kind, self.KINDS))
        self.learned, self.positive, width = learned, kind == "positive", self.head_dim
        turns, upper = torch.linalg.qr(torch.randn(-(-features // width), width, width))
        turns = turns * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # or they would not be uniform
        lengths = torch.randn(features, width).norm(dim=1, keepdim=True)
        self.register_buffer("directions", turns.flatten(0, 1)[:features] * lengths)
        if learned:
            self.spread = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))
            self.centre = nn.Parameter(torch.empty(heads, width))
            nn.init.uniform_(self.centre, -(width**-0.5), width**-0.5)

    def frequencies(self, kind: torch.dtype) -> Tensor:
        """The directions of the heads: [H or 1, features, d]."""
        directions = self.directions.to(kind)[None]
        if not self.learned:
            return directions
        directions, centre = directions @ self.spread.to(kind).transpose(1, 2), self.centre.to(kind)[:, None]
        return torch.cat([directions + centre, directions - centre], 1)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        mask, wide = context.mask, torch.promote_types(query.dtype, torch.float32)
        query, key = (rotate(each, context.rotary).to(wide) * self.head_dim**-0.25 for each in (query, key))
        across = self.frequencies(wide).transpose(1, 2)
        waves = [(each.transpose(1, 2) @ across).transpose(1, 2) for each in (query, key)]
        half = 0.5 * key.square().sum(-1, keepdim=True)
        if self.positive:  # |q|^2 is in numerator and denominator
            return exponential_attention(waves[0], waves[1] - half, value, mask)
        query, key = (torch.cat([each.cos(), each.sin()], -1) for each in waves)
        if not self.learned:
            key = key * (half - zeroed(half, mask).detach().amax(1, keepdim=True)).clamp(max=0.0).exp()
        query, key = query.to(value.dtype), key.to(value.dtype)
        return linear_attention(query, key, value, mask, (query, key))


class DCTFeatures(Projected):
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) with phi(x) = D exp(T C x), where C is the cosine transform (DiJiang,
    Chen et al. 2024, arXiv:2403.19928).

    T is diagonal and fixed: normal quantiles of evenly spread points in place of random ones (quasi-Monte-Carlo). D is
    learned, one positive factor per feature and head, stored as its logarithm. The authors' models have no denominator
    and take a softmax over the features, a decay and a gate, which are left out.
    """

    reads = Projected.reads | {"rotary"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)
        self.log_weight = nn.Parameter(torch.zeros(heads, self.head_dim))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        waves = table(_waves, self.head_dim, wide, device=query.device)
        query, key = (F.linear(rotate(each, context.rotary).to(wide), waves) + self.log_weight for each in (query, key))
        return exponential_attention(query, key, value, context.mask)


def _waves(width: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """T C: the rows of the orthonormal cosine transform times normal quantiles, [width, width]."""
    places = torch.arange(width, dtype=kind, device=device)
    cosines = torch.cos(math.pi / width * places[:, None] * (places + 0.5)) * (2 / width) ** 0.5
    cosines = torch.where(places[:, None] == 0, width**-0.5, cosines)
    bits = max(1, (width - 1).bit_length())
    points = [(int(f"{place:0{bits}b}"[::-1], 2) + 0.5) / 2**bits for place in range(width)]
    quantiles = torch.erfinv(2 * torch.tensor(points, dtype=kind, device=device) - 1) * 2**0.5
    return quantiles[:, None] * cosines


class HashedCodes(Projected):
    """sum_j (h_i h_j + bits + 1) v_j / sum_j (h_i h_j + bits + 1) with binary codes h = h(q) of +1 and -1 and queries
    that are the keys too (EcoFormer, Liu et al. 2022, arXiv:2209.09004).

    h(x) = sign(A (g(x) - mean g)) for x of unit length, where g(x) = exp(-|x - anchor|^2 / (2 s)) for each of `anchors`
    anchors, s is the mean of |x - anchor|^2, and means are over the real tokens. The sign passes the gradient of values
    between -1 and 1. A and the anchors of each head are learned with the model, where the paper fits A to the order of
    softmax attention's scores and takes tokens as anchors. Products with codes are additions.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, bits: int = 16, anchors: int = 20) -> None:
        super().__init__(dim, heads, sources="kkv")
        self.anchors = nn.Parameter(F.normalize(torch.randn(heads, anchors, self.head_dim), dim=-1))
        self.planes = nn.Parameter(torch.randn(heads, bits, anchors))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        coded = self.features(key, context.mask)
        same = self.query is None and self.key is None
        other = coded if same else self.features(query, context.mask)
        return linear_attention(other, coded, value, context.mask)

    def features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, H, d] -> [B, N, H, 2 bits + 1]: which bits are set, which are not, and sqrt(1/2), so that a product of
        two is (h h' + bits + 1) / 2 and none of them is negative."""
        code = self.code(x, mask)
        constant = torch.full_like(code[..., :1], 0.5**0.5)
        return torch.cat([0.5 + 0.5 * code, 0.5 - 0.5 * code, constant], -1).to(x.dtype)

    def code(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The codes [B, N, H, bits] of x [B, N, H, d]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, anchors = F.normalize(x.to(wide), dim=-1), self.anchors.to(wide)
        inner = (x.transpose(1, 2) @ anchors.transpose(1, 2)).transpose(1, 2)
        far = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1) - 2 * inner  # [B, N, H, anchors]
        scale = real_mean(far, mask).mean(-1, keepdim=True).clamp(min=1e-6)
        near = (far / (-2 * scale)).exp()
        near = near - real_mean(near, mask)
        bits = (near.transpose(1, 2) @ self.planes.to(wide).transpose(1, 2)).transpose(1, 2)
        clipped = bits.clamp(-1.0, 1.0)
        return clipped + (torch.where(bits >= 0, 1.0, -1.0) - clipped).detach()
