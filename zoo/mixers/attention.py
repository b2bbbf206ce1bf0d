"""Softmax attention: over all tokens, inside windows, and a decoder's cross-attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion import fold_site
from zoo.layer import ANYWHERE, Context, Fold, Layer, Place, Site
from zoo.mixers.projected import Attention, Headed, Projected, bias_between, rotate, visible_keys
from zoo.mixers.scored import ALL, chunks_of
from zoo.norms import LayerNorm, Norm, RMSNorm
from zoo.tensors import exporting, linear, shortfall
from zoo.text import unknown


class Unit(Norm):
    """x / |x| over the last dimension (QKNorm, Henry et al. 2020, arXiv:2010.04245)."""

    def __init__(self, dim: int, place: Place = ANYWHERE) -> None:
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


HEAD_NORMS: dict[str, type[Norm] | None] = {"none": None, "layernorm": LayerNorm, "rmsnorm": RMSNorm, "l2": Unit}
TEMPERATURES = ("none", "learned")


class DotProduct(Attention):
    """The base of softmax attention over all that a token may see: softmax(q k^T / sqrt(d) + bias) v."""

    reads = Attention.reads | {"rotary", "bias"}

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        key, value, real = self.stored(key, value, context)
        return self.attended(query, rotate(key, context.rotary), value, real, context)

    def attended(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, context: Context) -> Tensor:
        """The queries [B, N, H, d] before, and all keys after the rotation.

        What rules say of pairs is made for some queries at a time in inference, so that memory grows linearly.
        """
        query, number, keys = rotate(query, context.rotary), query.shape[1], key.shape[1]
        chunks, parts = [ALL], []
        rules = (context.bias, context.order, context.visible)
        if any(rule is not None for rule in rules) and context.notes is None:
            # Unlike a bias, masks are the same for all heads, and for all samples without padding.
            maps = 1 if real is None else query.shape[0]
            if context.bias is not None:
                maps = query.shape[0] * query.shape[2]
            chunks = chunks_of(number, maps * keys, query.device)
        for rows in chunks:
            allowed = visible_keys(real, number, keys, key.device, context, rows)
            bias = bias_between(context, number, keys, query, rows)
            parts.append(self.compare(query if rows == ALL else query[:, rows], key, value, allowed, bias, context))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def compare(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, bias: Tensor | None, context: Context
    ) -> Tensor:
        """Some queries [B, n, H, d] with all keys [B, M, H, d] and values [B, M, H, e]: [B, n, H, e]."""
        note_weights(self, context, query, key, allowed, bias)
        return attend(query, key, value, allowed, bias)


class Softmax(DotProduct):
    """softmax(q k^T / sqrt(d) + bias) v (Vaswani et al. 2017, arXiv:1706.03762).

    qk_norm normalizes queries and keys per head: `none`, `layernorm` or `rmsnorm` (Dehghani et al. 2023,
    arXiv:2302.05442); `l2` makes them unit vectors, and a learned factor in place of 1 / sqrt(d) starts at
    log2(n^2 - n) for the n tokens of the config, or 256 if it has no size (Henry et al. 2020, arXiv:2010.04245).
    kv_heads below `heads` shares keys and values between heads; 0 means `heads` (Shazeer 2019, arXiv:1911.02150).
    head_dim=0 means dim / heads. bias=False omits the biases of both projections.

    log_n=True multiplies q k^T by log(n), for n real keys that the query sees (Chiang and Cholak 2022,
    arXiv:2202.12172). temperature='learned' multiplies it by a factor for each head, which starts at 1 (Wang et al.
    2024, arXiv:2404.12224). null=True adds a learned key and value for each head, which every query sees, without
    position or norm (Mask-Align, Chen et al. 2020, arXiv:2012.07162). Rotary positions are then refused, for a turned
    query would see that key according to its own place.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        qk_norm: str = "none",
        kv_heads: int = 0,
        head_dim: int = 0,
        bias: bool = True,
        log_n: bool = False,
        temperature: str = "none",
        null: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, kv_heads, bias)
        if qk_norm not in HEAD_NORMS:
            raise ValueError(unknown("qk_norm", qk_norm, HEAD_NORMS))
        if temperature not in TEMPERATURES:
            raise ValueError(unknown("temperature", temperature, TEMPERATURES))
        if (norm := HEAD_NORMS[qk_norm]) is not None:
            self.query, self.key = norm(self.head_dim, place), norm(self.head_dim, place)
        tokens = place.prefix + math.prod(place.grid) if place.grid else 256
        start = math.log2(max(2, tokens * tokens - tokens))
        self.scale = nn.Parameter(torch.tensor([start])) if qk_norm == "l2" else None
        self.temperature = nn.Parameter(torch.ones(heads)) if temperature == "learned" else None
        self.log_n = log_n
        self.null = nn.Parameter(torch.empty(2, self.kv_heads, self.head_dim)) if null else None
        if self.null is not None:
            nn.init.trunc_normal_(self.null, std=0.02)

    @classmethod
    def reads_of(cls, *, null: bool = False, **options: Any) -> frozenset[str]:
        return cls.reads - {"rotary"} if null else cls.reads

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, qk_norm: str = "none", **options: Any) -> dict[str, Site]:
        taken = ("query", "key") if qk_norm != "none" else ()
        return {site: size for site, size in super().sites_of(dim, heads, **options).items() if site not in taken}

    def compare(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, bias: Tensor | None, context: Context
    ) -> Tensor:
        factor = self.factor(key, allowed)
        if factor is not None:
            query = query * factor.to(query.dtype)
        if self.null is not None:
            key, value = (
                torch.cat([each, null.to(each.dtype).expand(each.shape[0], 1, -1, -1)], 1)
                for each, null in zip((key, value), self.null, strict=True)
            )
            allowed = None if allowed is None else F.pad(allowed, (0, 1), value=True)
            bias = None if bias is None else F.pad(bias, (0, 1))
        note_weights(self, context, query, key, allowed, bias, beside=int(self.null is not None))
        return attend(query, key, value, allowed, bias)

    def factor(self, key: Tensor, allowed: Tensor | None) -> Tensor | None:
        """What multiplies the scores beside 1 / sqrt(d), [1 or B, 1 or N, 1 or H, 1] in fp32; None for nothing."""
        factors = []
        if self.scale is not None:
            factors.append(self.scale * self.head_dim**0.5)
        if self.temperature is not None:
            factors.append(self.temperature[:, None])
        if self.log_n:
            number = torch.full((1, 1), key.shape[1], device=key.device) if allowed is None else allowed.sum(-1)
            logarithm = number.clamp(min=1).to(torch.promote_types(key.dtype, torch.float32)).log()
            factors.append(logarithm.view(number.shape[0], -1, 1, 1))
        return math.prod(factors[1:], start=factors[0]) if factors else None


class Window(Projected):
    """Softmax attention inside windows of `size` x `size` tokens, or of `size` tokens along time (Swin without its
    shift, Liu et al. 2021, arXiv:2103.14030; DaViT, Ding et al. 2022, arXiv:2204.03645). The windows start at the
    grid's first corner. The last ones may reach beyond the grid; tokens there are masked."""

    reads = (Projected.reads - {"prefix"}) | {"bias"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, size: int = 7) -> None:
        super().__init__(dim, heads)
        self.size = size

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        size, grid, axes = self.size, context.grid, len(context.grid)
        if context.notes is not None:
            number, same = query.shape[1], together(self.windows(grid, query.device), context.mask)
            note_weights(self, context, query, key, same, bias_between(context, number, number, query))
        missing = [shortfall(length, size) for length in grid]
        counts = [(length + more) // size for length, more in zip(grid, missing, strict=True)]
        margin = [0, 0, *(side for more in reversed(missing) for side in (0, more))]
        order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]

        def cut(x: Tensor) -> Tensor:
            """[B, N, C] -> [B * windows, tokens of a window, C]."""
            x = x.unflatten(1, grid)
            if any(missing):
                x = F.pad(x, margin)
            for axis, count in enumerate(counts):
                x = x.unflatten(1 + 2 * axis, (count, size))
            return x.permute(order).flatten(axes + 1, -2).flatten(0, axes)

        mask = context.mask
        if mask is None and any(missing):
            mask = query.new_ones(1, query.shape[1], dtype=torch.bool)
        if mask is not None:
            mask = cut(mask.expand(query.shape[0], -1)[..., None])[..., 0]
        q, k, v = (cut(part.flatten(2)).unflatten(-1, part.shape[2:]) for part in (query, key, value))
        bias = None
        if context.bias is not None:
            places = cut(torch.arange(query.shape[1], device=query.device)[None, :, None])[..., 0]
            # [1 or B, windows, heads, n, n]
            bias = context.bias.between(places, places).to(query.dtype).transpose(1, 2)
            bias = bias.expand(query.shape[0], *[-1] * 4).flatten(0, 1)
        y = attend(q, k, v, mask, bias)
        y = y.flatten(2).unflatten(0, (query.shape[0], *counts)).unflatten(axes + 1, (size,) * axes)
        y = y.permute([order.index(place) for place in range(len(order))])
        for axis in range(axes):
            y = y.flatten(1 + axis, 2 + axis)
        y = y[(slice(None), *(slice(length) for length in grid))]
        return y.flatten(1, axes).unflatten(-1, query.shape[2:])

    def windows(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """The number of each token's window: [1, N]."""
        rows = [torch.arange(length, device=device) // self.size for length in grid]
        first, *rest = torch.meshgrid(*rows, indexing="ij")
        for each in rest:
            first = first * max(grid) + each
        return first.reshape(1, -1)


def together(groups: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which tokens are in the same group, of the numbers [1 or B, N] of their groups: [1 or B, N, N]. No token sees
    those that the mask [B, N] excludes."""
    same = groups[:, :, None] == groups[:, None]
    return same if mask is None else same & mask[:, None]


def note_weights(
    layer: Layer,
    context: Context,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None = None,
    beside: int = 0,
) -> None:
    """Reports the weights [B, H, N, M] of `attend`, if somebody asks, without those of the last `beside` keys. A query
    that sees no key has zeros."""
    if context.notes is None:
        return
    query, key = query.transpose(1, 2), key.transpose(1, 2).repeat_interleave(query.shape[2] // key.shape[2], 1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~(mask[:, None, None] if mask.ndim == 2 else mask[:, None]), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).detach()
    layer.note(context, "weights", weights[..., : weights.shape[-1] - beside])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of query [B, N, H, d] over key and value [B, M, K, d]: [B, N, H, d].

    mask [B, M] or [1 or B, N, M] is True where a key may be seen, bias [H, N, M] or [B, H, N, M] is added to the
    scores. A query that sees no key gets a finite, meaningless result.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    allowed = None
    if mask is not None:
        allowed = mask | ~mask.any(-1, keepdim=True)
        allowed = allowed[:, None, None] if mask.ndim == 2 else allowed[:, None]
    if bias is not None:
        bias = (bias if bias.ndim == 4 else bias[None]).to(query.dtype)
        allowed = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    shared = bool(key.shape[1] != query.shape[1])  # which torch.jit.trace makes a tensor
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=shared)
    y = y.transpose(1, 2)
    return y.clone(memory_format=torch.contiguous_format) if exporting() else y  # ONNX has another layout


class Cross(Headed):
    """Softmax attention of the tokens to the memory of a decoder (Vaswani et al. 2017; Carion et al. 2020,
    arXiv:2005.12872). Each side's code is added to queries or keys, and not to values."""

    reads = frozenset({"prefix", "mask", "code", "memory"})

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, width: int = 0) -> None:
        """width is that of a head's queries and keys; 0 for dim / heads."""
        super().__init__()
        self.heads, self.head_dim = heads, width or self.head_width_of(dim, heads)
        self.queries, self.keys = (linear(dim, heads * self.head_dim) for _ in range(2))
        self.values, self.out = (linear(dim, dim) for _ in range(2))
        self.query: Layer | None = None
        self.key: Layer | None = None
        self.value: Layer | None = None
        self.inner: Layer | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory
        if memory is None:
            raise ValueError("cross-attention needs a memory in the Context")
        heads = (self.heads, -1)
        q = self.queries(x if context.code is None else x + context.code).unflatten(-1, heads)
        k = self.keys(memory.tokens if memory.code is None else memory.tokens + memory.code).unflatten(-1, heads)
        v = self.values(memory.tokens).unflatten(-1, heads)
        beside = Context(grid=(memory.tokens.shape[1],), mask=memory.mask)
        if self.query is not None:
            q = self.query(q, context)
        if self.key is not None:
            k = self.key(k, beside)
        if self.value is not None:
            v = self.value(v, beside)
        y = self.attend(q, k, v, memory.mask, context).flatten(2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, context: Context) -> Tensor:
        """query [B, N, H, d], key [B, M, H, d], value [B, M, H, e] and a mask [B, M] -> [B, N, H, e]."""
        note_weights(self, context, query, key, mask)
        return attend(query, key, value, mask)

    def inputs(self) -> list[nn.Linear] | str:
        return [self.queries]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]

    def fold(self) -> list[Fold]:
        pairs = (("query", self.queries), ("key", self.keys), ("value", self.values))
        return [fold for site, layer in pairs for fold in fold_site(self, site, layer)]
