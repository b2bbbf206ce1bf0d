"""Mixers that compare tokens: the shared projections, softmax attention, and a decoder's cross-attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion import fold_site
from zoo.layer import ANYWHERE, Chunks, Context, Fold, Layer, Place, Site
from zoo.norms import LayerNorm, Norm, RMSNorm
from zoo.spec import options_of
from zoo.tensors import exporting, linear, shortfall
from zoo.text import unknown


def rotate(x: Tensor, rotary: Tensor | None) -> Tensor:
    """Turns the pairs (first half, second half) of x [B, N, H, d] by the last N angles of rotary [2, keys, d / 2] or
    [2, B, keys, d / 2]."""
    if rotary is None:
        return x
    cosine, sine = rotary[..., -x.shape[1] :, None, :]
    first, second = x.chunk(2, -1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.to(x.dtype)


class Headed(Layer):
    """A layer with queries, keys and values of some heads, which a Block may normalize head by head."""

    mixes = True

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, head_dim: int = 0, **options: Any) -> int:
        if head_dim == 0 and dim % heads:
            other = ", or give head_dim" if "head_dim" in options_of(cls) else ""
            raise ValueError(f"heads must divide dim {dim}, got {heads}; choose heads that do{other}")
        return head_dim or dim // heads

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        width = cls.head_width_of(dim, heads, **options)
        return dict.fromkeys(("query", "key", "value"), Site(width)) | {"inner": Site(heads * width, heads)}


class Projected(Headed):
    """The base of every mixer with queries, keys and values: one projection to all three, `mix`, one output linear.

    A subclass defines `mix`. `code` is added to the input of queries and keys, not of values.
    """

    reads = frozenset({"prefix", "mask", "code"})

    def __init__(self, dim: int, heads: int, head_dim: int = 0, kv_heads: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = self.head_width_of(dim, heads, head_dim=head_dim)
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
        width = heads * self.head_dim
        self.qkv = linear(dim, width + 2 * self.kv_heads * self.head_dim, bias)
        self.out = linear(width, dim, bias)
        self.query: Layer | None = None
        self.key: Layer | None = None
        self.value: Layer | None = None
        self.inner: Layer | None = None

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """query [B, N, H, d], key and value [B, N, K, d] -> [B, N, H, d]."""
        raise TypeError(f"{type(self).__name__} has no mix")

    @property
    def widths(self) -> list[int]:
        """Output rows of `qkv` that are queries, keys and values."""
        return [self.heads * self.head_dim] + [self.kv_heads * self.head_dim] * 2

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if context.code is None:
            q, k, v = self.qkv(x).split(self.widths, -1)
        else:
            split = sum(self.widths[:2])
            weight, bias = self.qkv.weight, self.qkv.bias
            first, last = (None, None) if bias is None else (bias[:split], bias[split:])
            q, k = F.linear(x + context.code, weight[:split], first).split(self.widths[:2], -1)
            v = F.linear(x, weight[split:], last)
        return self.split(q, k, v, context)

    def split(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, width] by head, [B, N, H, d], each normalized if its site is filled."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.query is not None:
            q = self.query(q, context)
        if self.key is not None:
            k = self.key(k, context)
        if self.value is not None:
            v = self.value(v, context)
        return q, k, v

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.mix(*self.project(x, context), context).flatten(2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]

    def fold(self) -> list[Fold]:
        done, start = [], 0
        for site, width in zip(("query", "key", "value"), self.widths, strict=True):
            done += fold_site(self, site, self.qkv, slice(start, start + width))
            start += width
        return done


class Attention(Projected):
    """The base of attention over all that a token may see: all tokens, or its chunk and some before it (`visible`),
    or in a stream the stored keys and the new ones. A subclass defines `mix`."""

    reads = Projected.reads | {"visible"}

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        kept = like.new_zeros(batch, visible.left, self.kv_heads, self.head_dim)
        real = torch.zeros(batch, visible.left, dtype=torch.bool, device=like.device)
        return {"key": kept, "value": kept.clone(), "real": real}

    def seen(self, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values after those stored in the stream, and which of them each query may see:
        None for all, [B, M], or [1 or B, N, M]. New ones are stored."""
        number, mask, visible = key.shape[1], context.mask, context.visible
        if visible is None:
            return key, value, mask
        if context.cache is None:
            places = torch.arange(number, device=key.device)
            allowed = visible.allow(places, places)[None]
            return key, value, allowed if mask is None else allowed & mask[:, None]
        if mask is None:
            mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        key, value, mask = (
            self.extended(self.recall(context, slot), new)
            for slot, new in (("key", key), ("value", value), ("real", mask))
        )
        return key, value, mask

    @staticmethod
    def extended(kept: Tensor, new: Tensor) -> Tensor:
        whole = torch.cat([kept, new], 1)
        kept.copy_(whole[:, whole.shape[1] - kept.shape[1] :])
        return whole


HEAD_NORMS: dict[str, type[Norm] | None] = {"none": None, "layernorm": LayerNorm, "rmsnorm": RMSNorm}


class Softmax(Attention):
    """softmax(q k^T / sqrt(d) + bias) v (Vaswani et al. 2017, arXiv:1706.03762).

    qk_norm normalizes queries and keys per head: `none`, `layernorm` or `rmsnorm` (Dehghani et al. 2023,
    arXiv:2302.05442). kv_heads below `heads` shares keys and values between heads; 0 means `heads` (Shazeer 2019,
    arXiv:1911.02150). head_dim=0 means dim / heads. bias=False omits the biases of both projections.
    """

    reads = Attention.reads | {"rotary", "bias"}

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
    ) -> None:
        super().__init__(dim, heads, head_dim, kv_heads, bias)
        if qk_norm not in HEAD_NORMS:
            raise ValueError(unknown("qk_norm", qk_norm, HEAD_NORMS))
        if (norm := HEAD_NORMS[qk_norm]) is not None:
            self.query, self.key = norm(self.head_dim, place), norm(self.head_dim, place)

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, qk_norm: str = "none", **options: Any) -> dict[str, Site]:
        taken = ("query", "key") if qk_norm != "none" else ()
        return {site: size for site, size in super().sites_of(dim, heads, **options).items() if site not in taken}

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        key, value, allowed = self.seen(key, value, context)
        query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        return attend(query, key, value, allowed, context.bias)


class Window(Projected):
    """Softmax attention inside windows of `size` x `size` tokens, or of `size` tokens along time (Swin without its
    shift, Liu et al. 2021, arXiv:2103.14030; DaViT, Ding et al. 2022, arXiv:2204.03645). The windows start at the
    grid's first corner. The last ones may reach beyond the grid; tokens there are masked."""

    reads = Projected.reads - {"prefix"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, size: int = 7) -> None:
        super().__init__(dim, heads)
        self.size = size

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        size, grid, axes = self.size, context.grid, len(context.grid)
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
        y = attend(q, k, v, mask)
        y = y.flatten(2).unflatten(0, (query.shape[0], *counts)).unflatten(axes + 1, (size,) * axes)
        y = y.permute([order.index(place) for place in range(len(order))])
        for axis in range(axes):
            y = y.flatten(1 + axis, 2 + axis)
        y = y[(slice(None), *(slice(length) for length in grid))]
        return y.flatten(1, axes).unflatten(-1, query.shape[2:])


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

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, self.head_width_of(dim, heads)
        self.queries, self.keys, self.values = (linear(dim, dim) for _ in range(3))
        self.out = linear(dim, dim)
        self.query: Layer | None = None
        self.key: Layer | None = None
        self.value: Layer | None = None
        self.inner: Layer | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory
        if memory is None:
            raise ValueError("cross-attention needs a memory in the Context")
        heads = (-1, self.head_dim)
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
        y = attend(q, k, v, memory.mask).flatten(2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.queries]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]

    def fold(self) -> list[Fold]:
        pairs = (("query", self.queries), ("key", self.keys), ("value", self.values))
        return [fold for site, layer in pairs for fold in fold_site(self, site, layer)]
