"""Attention along time: scores that depend on the distance of two frames, and windows that make long audio cheap."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import rows
from zoo.layer import ANYWHERE, Chunks, Context, Place
from zoo.mixers.attention import attend, note_weights
from zoo.mixers.local import along, depthwise
from zoo.mixers.projected import Attention, rotate, visible_keys
from zoo.mixers.scored import ALL, chunks_of
from zoo.tensors import compiling, exporting, linear, shortfall, zeroed


def _offsets(start: int, stop: int, dim: int, device: torch.device) -> Tensor:
    """Alternating sines and cosines of the offsets -start, -start - 1, ..., 1 - stop: [stop - start, dim] fp32."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angles = -torch.arange(start, stop, device=device, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim].float()


def waves_of(first: int, number: int, dim: int, like: Tensor) -> Tensor:
    """Alternating sines and cosines of the offsets first, first - 1, ...: [number, dim]."""
    return rows(_offsets, -first, number - first, dim, device=like.device).to(like.dtype)


def shifted(scores: Tensor, keys: int) -> Tensor:
    """Scores [..., N, keys + N - 1] by falling offset become scores [..., N, keys] by key, the first query's offsets
    beginning N - 1 later than the last one's. A view of the input."""
    queries, width = scores.shape[-2:]
    if exporting():  # a view would fix the program to the traced sizes
        rows, columns = torch.arange(queries, device=scores.device), torch.arange(keys, device=scores.device)
        places = columns + (queries - 1 - rows)[:, None]
        return scores.gather(-1, places.expand(*scores.shape[:-1], -1))
    if queries == 1:
        return scores[..., :keys]
    flat = scores.flatten(-2)[..., queries - 1 : queries - 1 + queries * (width - 1)]
    return flat.unflatten(-1, (queries, width - 1))[..., :keys]


def banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int,
    shared: int = 0,
    bias: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of query [B, N, H, d] over the keys and values [B, N, K, d] that are at most `window` places away.

    The first `shared` tokens see all and are seen by all. mask [B, N] is True on real keys. bias gives, for blocks of
    queries [B', window, H, d], the term added to their scores against the block and its two neighbours
    [B', H, window, 3 * window]. Time and memory grow with N * window (Beltagy et al. 2020, arXiv:2004.05150).
    """
    batch, number = query.shape[:2]
    # An exported program takes any number: at least two blocks, and more places than tokens.
    blocks = number // window + 2 if exporting() else (number - 1) // window + 1
    after = blocks * window - number
    real = torch.ones(1, number, dtype=torch.bool, device=query.device) if mask is None else mask
    alone = torch.arange(number, device=query.device) >= shared

    def cut(x: Tensor) -> Tensor:
        """[B, N, ...] -> [B, blocks, 3 * window, ...]"""
        margin = [0, 0] * (x.ndim - 2) + [window, window + after]
        return F.pad(x, margin).unfold(1, 3 * window, window).movedim(-1, 2)

    places = torch.arange(3 * window, device=query.device)
    band = (places[:window, None] + window - places).abs() <= window
    allowed = band & cut(real & alone)[:, :, None]  # [B, blocks, window, 3 * window]
    keys, values = cut(key).flatten(0, 1), cut(value).flatten(0, 1)
    if shared:
        head = real[:, None, None, :shared].expand(-1, blocks, window, -1)
        allowed = torch.cat([allowed, head], -1)
        keys, values = (
            torch.cat([near, all[:, None, :shared].expand(-1, blocks, -1, -1, -1).flatten(0, 1)], 1)
            for near, all in ((keys, key), (values, value))
        )
    allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1)
    parts = F.pad(query, (0, 0, 0, 0, 0, after)).unfold(1, window, window).movedim(-1, 2).flatten(0, 1)
    added = None if bias is None else bias(parts)
    y = attend(parts, keys, values, allowed, added).unflatten(0, (batch, blocks)).flatten(1, 2)
    y = y.index_select(1, torch.arange(number, device=y.device)) if exporting() else y[:, :number]
    if shared:
        y = torch.cat([attend(query[:, :shared], key, value, mask), y[:, shared:]], 1)
    return y


def within(window: int, key: Tensor, mask: Tensor | None, shared: int = 0) -> Tensor:
    """Which tokens see each other in `banded`: [1 or B, N, N]."""
    places = torch.arange(key.shape[1], device=key.device)
    near = (places[:, None] - places).abs() <= window
    near = near | (places < shared) | (places[:, None] < shared)
    return near[None] if mask is None else near & mask[:, None]


class Relative(Attention):
    """softmax(((q_i + u) . k_j + (q_i + v) . W r(i - j)) / sqrt(d)) v, the relative attention of Transformer-XL, where
    r holds sines and cosines of the offset, and u and v are learned per head (Dai et al. 2019, arXiv:1901.02860; Gulati
    et al. 2020, arXiv:2005.08100).

    With window > 0 a token sees at most `window` tokens on either side, and the cost is linear in time. A model that
    was trained without a window may be used with one. bias=False omits the biases of queries, keys, values and output.

    With conv > 0 a depthwise convolution of that many frames follows the projections of queries, keys and values
    (RCMHA, Sugiharto et al. 2023, arXiv:2308.03429); under `visible` it is causal.
    """

    dimensions = (1,)
    reads = Attention.reads - {"prefix", "order"}

    @classmethod
    def reads_of(cls, *, window: int = 0, **options: Any) -> frozenset[str]:
        return cls.reads - {"visible"} if window else cls.reads  # chunks would replace the window

    def __init__(
        self, dim: int, heads: int, place: Place = ANYWHERE, *, window: int = 0, bias: bool = True, conv: int = 0
    ) -> None:
        super().__init__(dim, heads, bias=bias)
        if conv and conv % 2 == 0:
            raise ValueError(f"conv must be odd, or 0 for none, got {conv}")
        self.window = window
        self.filter = depthwise(3 * dim, conv, 1, bias=True) if conv else None
        self.relative = linear(dim, dim, bias=False)
        self.content = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.offset = nn.Parameter(torch.zeros(heads, self.head_dim))

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        kept = super().state(batch, visible, like)
        if self.filter is None:
            return kept
        return kept | {"past": like.new_zeros(batch, self.filter.kernel_size[0] - 1, self.filter.in_channels)}

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        parts = super().project(x, context)
        if self.filter is None:
            return parts
        y = zeroed(torch.cat([part.flatten(2) for part in parts], -1), context.mask)
        y = along(self.filter, y, context, None if context.cache is None else self.recall(context, "past"))
        q, k, v = y.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def rows(self, first: int, number: int, like: Tensor) -> Tensor:
        """W r of `number` falling offsets: [heads, number, d]."""
        dim = self.relative.in_features
        waves = waves_of(first, number, dim, like)
        return self.relative(waves).unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def bias(self, query: Tensor, rows: Tensor, keys: int) -> Tensor:
        """The part of the scores that depends on offsets: query [B, N, H, d] and the rows [heads, N + keys - 1, d] from
        the offset of the last query to the first key -> [B, H, N, keys]."""
        turned = ((query + self.offset) * query.shape[-1] ** -0.5).transpose(1, 2)
        return shifted(turned @ rows.transpose(1, 2), keys)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        if self.window and (compiling() or key.shape[1] > self.window):
            return self.near(query, key, value, context)
        key, value, real = self.stored(key, value, context)
        (batch, number, heads), keys = query.shape[:3], key.shape[1]
        offsets = self.rows(keys - 1, number + keys - 1, query)

        def some(rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
            """Queries, which keys they see, and the bias of their scores."""
            mask = visible_keys(real, number, keys, key.device, context, rows)
            if rows == ALL:
                part, near = query, offsets
            else:
                part, near = query[:, rows], offsets[:, number - rows.stop : number - rows.start + keys - 1]
            return part + self.content, mask, self.bias(part, near, keys)

        if context.notes is not None:
            part, mask, bias = some(ALL)
            note_weights(self, context, part, key, mask, bias)
        parts = []
        for chunk in chunks_of(number, batch * heads * keys, query.device):
            part, mask, bias = some(chunk)
            parts.append(attend(part, key, value, mask, bias))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def near(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """`mix` within the window."""
        window, keys, mask = self.window, key.shape[1], context.mask
        if context.notes is not None:
            bias = self.bias(query, self.rows(keys - 1, 2 * keys - 1, query), keys)
            note_weights(self, context, query + self.content, key, within(window, key, mask), bias)
        offsets = self.rows(2 * window - 1, 4 * window - 1, query)

        def bias_of(part: Tensor) -> Tensor:
            """`bias` of blocks, which all have the same offsets."""
            part = part - self.content
            if not exporting():
                return self.bias(part, offsets, 3 * window)
            # One product for each head: with one for each block and head the number of blocks would be fixed.
            turned = ((part + self.offset) * part.shape[-1] ** -0.5).permute(2, 1, 0, 3).flatten(1, 2)
            scores = (turned @ offsets.transpose(1, 2)).unflatten(1, (window, -1))
            return shifted(scores.permute(2, 0, 1, 3), 3 * window)

        return banded(query + self.content, key, value, mask, window, bias=bias_of)


class Grouped(Relative):
    """Relative attention between groups of `size` neighbouring frames, whose channels are concatenated, so there are
    `size` times fewer queries and keys, each `size` times as wide (Efficient Conformer, Burchi and Vielzeuf 2021,
    arXiv:2109.01163)."""

    reads = Relative.reads - {"visible"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, size: int = 3, bias: bool = True) -> None:
        super().__init__(dim, heads, bias=bias)
        self.size = size
        self.content = nn.Parameter(torch.zeros(heads, size * self.head_dim))
        self.offset = nn.Parameter(torch.zeros(heads, size * self.head_dim))

    def rows(self, first: int, number: int, like: Tensor) -> Tensor:
        dim, size = self.relative.in_features, self.size
        waves = waves_of(first * size, number * size, dim, like)
        return self.relative(waves).view(number, self.heads, -1).transpose(0, 1)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        number = query.shape[1]
        after = shortfall(number, self.size)

        def folded(x: Tensor) -> Tensor:
            x = F.pad(zeroed(x, context.mask), (0, 0, 0, 0, 0, after)).flatten(2)
            return x.unflatten(1, (-1, self.size)).flatten(2).unflatten(-1, (self.heads, -1))

        real = None if context.mask is None else context.mask[:, :: self.size]
        y = super().mix(folded(query), folded(key), folded(value), context._replace(mask=real))
        y = y.flatten(2).unflatten(-1, (self.size, -1)).flatten(1, 2)[:, :number]
        return y.unflatten(-1, (self.heads, -1))


class Local(Attention):
    """Softmax attention to at most `window` tokens on either side, and to the first `tokens` of the sequence, which
    attend to all tokens and are seen by all, like prefix tokens (Longformer, Beltagy et al. 2020, arXiv:2004.05150;
    Fast Conformer, Rekesh et al. 2023, arXiv:2305.05084). Time and memory grow linearly with the length. An exported
    program for any length needs more than `tokens` + 1 tokens."""

    dimensions = (1,)
    reads = (Attention.reads | {"rotary"}) - {"visible", "order"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, window: int = 128, tokens: int = 0) -> None:
        super().__init__(dim, heads)
        self.window, self.tokens = window, tokens

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        shared = min(context.prefix + self.tokens, key.shape[1])
        if context.notes is not None:
            note_weights(self, context, query, key, within(self.window, key, context.mask, shared))
        return banded(query, key, value, context.mask, self.window, shared)
