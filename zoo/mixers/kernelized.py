"""Attention without a score for each pair of tokens: softmax taken apart, sums reweighted or gated, landmarks."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import exponential_attention, linear_attention, mean_attention
from zoo.layer import ANYWHERE, Context, Place, Site
from zoo.mixers.linear import nearby
from zoo.mixers.local import depthwise
from zoo.mixers.projected import Projected, rotate
from zoo.norms import LayerNorm
from zoo.spec import options_of
from zoo.tensors import elu1, linear, real_mean, relu, shortfall, silu, to_map, to_tokens, unmixed, zeroed


class Efficient(Projected):
    """softmax(q) (softmax(k)^T v), the first softmax over the channels of a query, the second over the tokens
    (Efficient Attention, Shen et al. 2018, arXiv:1812.01243). The weights of a query sum to one."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return exponential_attention(query, key, value, context.mask, joint=False)


class Narrow(Projected):
    """The base of mixers whose queries and keys have the width that the option `narrow` states, and whose values have
    dim / heads."""

    narrow: ClassVar[str] = "width"

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__(dim, heads, width, value_dim=dim // heads)

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, head_dim: int = 0, **options: Any) -> int:
        super().head_width_of(dim, heads)
        return head_dim or (options_of(cls) | options)[cls.narrow]

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        own = {"value": Site(dim // heads), "inner": Site(dim, heads)}
        return super().sites_of(dim, heads, **options) | own


class Latte(Narrow):
    """softmax(q) (softmax(k)^T v), the first softmax over latents, the second over the tokens (Latte, Dolga et al.
    2024, arXiv:2402.17512). A head has `latents` latents: the width of its queries and keys. More than 32 must be at
    most the number of tokens."""

    narrow = "latents"

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, latents: int = 32) -> None:
        most = max(32, math.prod(place.grid) + place.prefix)
        if place.grid and latents > most:
            raise ValueError(f"latte: latents must be at most {most}, as there are few tokens, got {latents}")
        super().__init__(dim, heads, latents)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return exponential_attention(query, key, value, context.mask, joint=False)


class Galerkin(Projected):
    """q (norm(k)^T norm(v)) / N over the N real tokens, without softmax (Galerkin attention, Cao 2021,
    arXiv:2105.14995). The norms are LayerNorms, shared by the heads. The paper's projections start small, with a
    multiple of the identity added; here they start as those of the other mixers."""

    normed: ClassVar[tuple[str, str]] = ("key", "value")

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)
        for site in self.normed:
            setattr(self, site, LayerNorm(self.head_dim, place))

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        return {site: size for site, size in super().sites_of(dim, heads, **options).items() if site not in cls.normed}

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return mean_attention(query, key, value, context.mask)


class Fourier(Galerkin):
    """(norm(q) norm(k)^T) v / N over the N real tokens, without softmax (Fourier attention, Cao 2021,
    arXiv:2105.14995). The norms are LayerNorms, shared by the heads. The products are taken in the cheaper order."""

    normed = ("query", "key")


class Separable(Projected):
    """relu(v) * sum_j softmax_j(s) k_j, with one score s per token and head (MobileViTv2, Mehta and Rastegari 2022,
    arXiv:2206.02680). The paper has one head. Its softmax over the patches of a map, for each place inside a patch, is
    here over all tokens."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        sites = super().sites_of(dim, heads, **options)
        del sites["query"]
        return sites

    @property
    def widths(self) -> list[int]:
        return [self.heads, self.heads * self.head_dim, self.heads * self.value_dim]

    def split(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().split(k, k, v, context)
        return q[..., None], k, v

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        pooled = exponential_attention(torch.zeros_like(query[:, :1]), query, key, context.mask)
        return relu(value) * pooled


class SparseChannel(Projected):
    """relu(t q^T k) v with q and k of unit length along the tokens: attention between the channels of a head without
    softmax (DLGSANet, Li et al. 2023, arXiv:2301.02031). The temperature t of each head is learned. Tokens are mixed
    only through the scores of the channels. The paper's depthwise convolution of q, k and v is left out."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)
        self.temperature = nn.Parameter(torch.ones(heads))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        query, key = (self.unit(zeroed(each, context.mask)) for each in (query, key))
        scores = query.permute(0, 2, 3, 1) @ key.transpose(1, 2)  # [B, H, d, d]
        weights = F.relu(scores * self.temperature[:, None, None]).to(value.dtype)
        return (value.transpose(1, 2) @ weights.transpose(-1, -2)).transpose(1, 2)

    @staticmethod
    def unit(x: Tensor) -> Tensor:
        """x [B, N, H, d], each channel of length one along the tokens."""
        wide = torch.promote_types(x.dtype, torch.float32)
        length = x.to(wide).norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (x / length).to(x.dtype)


class Gated(Projected):
    """The base of linear attention with a depthwise convolution of the values and an elementwise gate, a linear map of
    the tokens. A subclass defines `mix` and `gated`."""

    reads = Projected.reads | {"rotary"}

    def __init__(self, dim: int, heads: int, place: Place, kernel: int) -> None:
        super().__init__(dim, heads)
        self.local = depthwise(dim, kernel, place.axes, bias=True)
        self.gate: nn.Linear | None = linear(dim, dim)

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """The mixed tokens and the linear map of the tokens, both [B, N, D] -> [B, N, D]."""
        return y * gate

    def near(self, value: Tensor, context: Context) -> Tensor:
        return nearby(value, context, self.local.weight, self.local.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.mix(*self.project(x, context), context).flatten(2)
        if self.gate is not None:
            y = self.gated(y, self.gate(x))
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv] if self.gate is None else [self.qkv, self.gate]


class RankAugmented(Gated):
    """(q' (sum_j a_j k'_j^T v_j) / (q' sum_j a_j k'_j) + depthwise(v)) * W x, with q' = elu(q) + 1, k' likewise and
    a = softmax(mean(q') k' / sqrt(d)) over the tokens (RALA, Fan et al. 2024, arXiv:2411.07635).

    The weights a and the gate W x raise the rank of linear attention's sums and of its output; weighted=False and
    gate=False omit them. Rotary positions are applied only to the numerator. The convolution is `kernel` tokens wide;
    prefix tokens are not filtered.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        kernel: int = 5,
        weighted: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__(dim, heads, place, kernel)
        self.weighted = weighted
        if not gate:
            self.gate = None

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        mask, value = context.mask, zeroed(value, context.mask)
        query, key = elu1(query), elu1(key)
        if self.weighted:
            key = key * self.importance(query, key, mask).to(key.dtype)
        turned = None
        if context.rotary is not None:
            turned = rotate(query, context.rotary), rotate(key, context.rotary)
        return linear_attention(query, key, value, mask, turned, onto=self.near(value, context))

    def importance(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """exp(s - max(s)) of the scores s of the keys against the mean query: [B, N, H, 1]."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (key * (real_mean(query, mask) * self.head_dim**-0.5)).sum(-1, keepdim=True, dtype=wide)
        if mask is not None:
            scores = scores.masked_fill(~(mask | ~mask.any(1, keepdim=True))[:, :, None, None], -torch.inf)
        return (scores - scores.detach().amax(1, keepdim=True)).exp()


class NormAware(Gated):
    """norm(q' (k'^T v) / (q' sum k') + depthwise(v)) * silu(W x), where q' is the direction of q to a power that grows
    with the length of q (NaLaFormer, Meng et al. 2025, arXiv:2506.21137).

    q' = [relu(u)^p, relu(-u)^p] with u = q / |q| and p = power (1/2 + tanh |q|), so that long queries are sharp; k' =
    [relu(k)^power, relu(-k)^power]. Rotary positions are applied only to the numerator, to each half. The convolution
    is `kernel` tokens wide; prefix tokens are not filtered. The norm is a LayerNorm over all channels.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, power: float = 3.0, kernel: int = 5) -> None:
        super().__init__(dim, heads, place, kernel)
        # Below 2, p of a query of zeros is below 1, and its gradient infinite; high powers overflow in half precision.
        if not 2 <= power <= 5:
            raise ValueError(f"nala: power must be from 2 to 5, got {power}")
        self.power = power
        self.mixed_norm = nn.LayerNorm(dim)

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.mixed_norm(y) * silu(gate)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        mask, value, kind = context.mask, zeroed(value, context.mask), query.dtype
        wide = torch.promote_types(kind, torch.float32)
        query, key = query.to(wide), zeroed(key, mask).to(wide)
        length = query.norm(dim=-1, keepdim=True)
        query = query / length.clamp(min=1e-6)
        key = key / key.detach().abs().amax((1, 3), keepdim=True).clamp(min=1e-6)  # powers of about 1
        parts = [
            [half.to(kind) for half in self.halves(each, power)]
            for each, power in ((query, self.power * (0.5 + length.tanh())), (key, self.power))
        ]
        turned = None
        if context.rotary is not None:
            q, k = (torch.cat([rotate(half, context.rotary) for half in each], -1) for each in parts)
            turned = q, k
        query, key = (torch.cat(each, -1) for each in parts)
        return linear_attention(query, key, value, mask, turned, onto=self.near(value, context))

    @staticmethod
    def halves(x: Tensor, power: Tensor | float) -> tuple[Tensor, Tensor]:
        """relu(x)^power and relu(-x)^power."""
        size, positive = x.abs() ** power, x > 0
        return size * positive, size * ~positive


class Soft(Projected):
    """G(q, l) G(l, l)^-1 G(l, q) v + depthwise(v), with the Gaussian kernel G(a, b) = exp(-|a - b|^2 / 2), queries that
    are the keys too, and landmarks l (SOFT, Lu et al. 2021, arXiv:2110.11945; Lu et al. 2022, arXiv:2207.03341).

    Landmarks are gelu(LayerNorm(conv(q))) with a convolution of `stride` x `stride` tokens, or of `stride` along time,
    at that stride. Queries are divided by d^(1/4). The inverse, of G(l, l) with 0.01 on its diagonal, is approximated
    by `steps` of Newton's method; close landmarks need more. Its gradient is that of an inverse. normalize=True
    divides it on both sides by the square roots of the row sums of G(l, l), as in the later paper. The depthwise
    filter, `kernel` tokens wide, is shared by the channels of a head; prefix tokens are neither filtered nor part of
    landmarks. The number of landmarks grows with that of tokens, so memory is quadratic, over stride^2 (stride along
    time). Kernels and inverse are computed in at least single precision, in mixed precision too.
    """

    quadratic = True

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        stride: int = 4,
        steps: int = 20,
        kernel: int = 3,
        normalize: bool = True,
    ) -> None:
        super().__init__(dim, heads, sources="kkv")
        self.stride, self.steps, self.normalize = stride, steps, normalize
        conv, width = nn.Conv1d if place.axes == 1 else nn.Conv2d, self.head_dim
        self.landmark = conv(width, width, stride, stride, bias=False)
        self.landmark_norm = nn.LayerNorm(width)
        self.local = depthwise(heads, kernel, place.axes, bias=False)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        value, root = zeroed(value, context.mask), self.head_dim**-0.25
        marks, real = self.landmarks(zeroed(query, context.mask) * root, context)
        with unmixed(query):
            mixed = self.through(marks.to(torch.promote_types(query.dtype, torch.float32)), real, query, key, value)
        return mixed + nearby(value, context, self.local.weight.repeat_interleave(self.value_dim, 0), None)

    def through(self, marks: Tensor, real: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The sum over the landmarks [B, H, m, d], in their dtype; given in that of the values [B, N, H, e]."""
        same, wide, root = self.query is None and self.key is None, marks.dtype, self.head_dim**-0.25
        near_query = self.gaussian(query, marks, root)
        near_key = near_query if same else self.gaussian(key, marks, root)
        between = self.kernel(marks, marks)
        if real is not None:  # windows of padding: landmarks that meet only themselves
            near_query, near_key = (each.masked_fill(~real[:, None, None], 0.0) for each in (near_query, near_key))
            outside = torch.eye(marks.shape[2], dtype=torch.bool, device=marks.device)
            between = torch.where((real[:, None] & real[:, :, None])[:, None], between, outside.to(wide))
        inverse = self.inverse(between)
        if self.normalize:
            root_sum = between.sum(-1, keepdim=True).rsqrt()
            inverse = root_sum * inverse * root_sum.transpose(-1, -2)
        summed = near_key.transpose(-1, -2) @ value.transpose(1, 2).to(wide)
        return (near_query @ (inverse @ summed)).transpose(1, 2).to(value.dtype)

    def landmarks(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The landmarks [B, H, m, d] of x [B, N, H, d], and which of them have real tokens, [B, m]; None for all."""
        margin = [side for size in reversed(context.grid) for side in (0, shortfall(size, self.stride))]
        maps = x[:, context.prefix :].transpose(1, 2).flatten(0, 1)
        maps = F.pad(to_map(maps, context.grid), margin)
        marks = F.gelu(self.landmark_norm(to_tokens(self.landmark(maps))))
        mask = context.grid_mask
        if mask is not None:  # real tokens are a top-left rectangle
            mask = mask.unflatten(1, context.grid)
            mask = mask[(slice(None), *(slice(None, None, self.stride) for _ in context.grid))].flatten(1)
        return marks.unflatten(0, (x.shape[0], x.shape[2])), mask

    def gaussian(self, x: Tensor, marks: Tensor, scale: float) -> Tensor:
        """The kernel between scale * x [B, N, H, d] and the landmarks [B, H, m, d]: [B, H, N, m]."""
        return self.kernel(x.transpose(1, 2).to(marks.dtype) * scale, marks)

    @staticmethod
    def kernel(one: Tensor, other: Tensor) -> Tensor:
        """exp(-|a - b|^2 / 2) for a of one [B, H, n, d] and b of other [B, H, m, d]: [B, H, n, m]."""
        squares = one.square().sum(-1)[..., None] + other.square().sum(-1)[..., None, :]
        return ((one @ other.transpose(-1, -2)) - 0.5 * squares).clamp(max=0.0).exp()

    def inverse(self, matrix: Tensor) -> Tensor:
        """Nearly the inverse of positive matrices [B, H, m, m] with 0.01 on their diagonals, by Newton's method. Only
        its last step has a gradient, which is that of an inverse."""
        start = 1.8 / matrix.detach().sum(-1).amax(-1).square()
        matrix = matrix + 0.01 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        fixed = matrix.detach()
        found = start[..., None, None] * fixed
        for _ in range(self.steps - 1):
            found = 2 * found - found @ fixed @ found
        return 2 * found - found @ matrix @ found
