"""What mixers with queries, keys and values share: their projections, and what each token may see."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion import fold_site, keep
from zoo.layer import Chunks, Context, Fold, Layer, Site
from zoo.spec import options_of
from zoo.tensors import linear


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
    paired: ClassVar[bool] = False  # whether the channels of a head form pairs, so that its width must be even

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, head_dim: int = 0, **options: Any) -> int:
        if head_dim == 0 and dim % heads:
            other = ", or give head_dim" if "head_dim" in options_of(cls) else ""
            raise ValueError(f"heads must divide dim {dim}, got {heads}; choose heads that do{other}")
        width = head_dim or dim // heads
        if cls.paired and width % 2:
            raise ValueError(f"channels form pairs, so dim / heads must be even, got {width}")
        return width

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        width = cls.head_width_of(dim, heads, **options)
        return dict.fromkeys(("query", "key", "value"), Site(width)) | {"inner": Site(heads * width, heads)}


class Projected(Headed):
    """The base of every mixer with queries, keys and values: one projection to all of them, `mix`, one output linear.

    A subclass defines `mix`. `code` is added to the input of queries and keys, not of values.

    Args:
        head_dim: width of a head's queries and keys; 0 for dim / heads.
        kv_heads: heads of keys and values; 0 for `heads`.
        bias: whether the projections have biases.
        value_dim: width of a head's values; 0 for that of its keys.
        sources: three letters, which say where queries, keys and values are from: equal letters are one projection, and
            `x` is the tokens themselves.
    """

    reads = frozenset({"prefix", "mask", "code"})

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int = 0,
        kv_heads: int = 0,
        bias: bool = True,
        value_dim: int = 0,
        sources: str = "qkv",
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.sources = heads, kv_heads or heads, sources
        self.head_dim = self.head_width_of(dim, heads, head_dim=head_dim)
        self.value_dim = value_dim or self.head_dim
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
        self.qkv = linear(dim, sum(self.projections.values()), bias)
        self.out = linear(heads * self.value_dim, dim, bias)
        self.query: Layer | None = None
        self.key: Layer | None = None
        self.value: Layer | None = None
        self.inner: Layer | None = None

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """query [B, N, H, d], key [B, N, K, d] and value [B, N, K, e] -> [B, N, H, e]."""
        raise TypeError(f"{type(self).__name__} has no mix")

    @property
    def widths(self) -> list[int]:
        """The widths of queries, keys and values, all heads together."""
        return [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim]

    @property
    def projections(self) -> dict[str, int]:
        """The rows of `qkv` for each letter of `sources`, in their order."""
        return {letter: width for letter, width in zip(self.sources, self.widths, strict=True) if letter != "x"}

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        if context.code is None:
            q, k, v = self.parts(x)
        elif self.sources == "qkv":
            split = sum(self.widths[:2])
            weight, bias = self.qkv.weight, self.qkv.bias
            first, last = (None, None) if bias is None else (bias[:split], bias[split:])
            q, k = F.linear(x + context.code, weight[:split], first).split(self.widths[:2], -1)
            v = F.linear(x, weight[split:], last)
        else:
            (q, k, _), (_, _, v) = self.parts(x + context.code), self.parts(x)
        return self.split(q, k, v, context)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, width] of the same tokens."""
        rows = self.projections
        named = dict(zip(rows, self.qkv(x).split(list(rows.values()), -1), strict=True)) | {"x": x}
        q, k, v = (named[letter] for letter in self.sources)
        return q, k, v

    def split(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, width] by head, [B, N, H, d], as `at_sites` gives them."""
        q, k = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k))
        return self.at_sites(q, k, v.unflatten(-1, (-1, self.value_dim)), context)

    def at_sites(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, each normalized if its site is filled."""
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
        return "its values or keys are the tokens themselves" if "x" in self.sources else [self.qkv]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]

    def fold(self) -> list[Fold]:
        rows, done = self.projections, []
        for site, letter in zip(("query", "key", "value"), self.sources, strict=True):
            if self.sources.count(letter) == 1 and letter != "x":
                start = sum([*rows.values()][: [*rows].index(letter)])
                done += fold_site(self, site, self.qkv, slice(start, start + rows[letter]))
            elif getattr(self, site) is not None:
                done.append(keep(self, site, "the projection in front of it has other readers"))
        return done


def visible_keys(
    real: Tensor | None, number: int, keys: int, device: torch.device, context: Context, rows: slice = slice(None)
) -> Tensor | None:
    """Which of the real keys some rows of the last `number` tokens see: None for all, [B, M], or [1 or B, n, M]. Those
    that a stream has stored are all visible."""
    visible = context.visible if context.cache is None else None
    rules = [rule for rule in (visible, context.order) if rule is not None]
    if not rules:
        return real
    places, found = torch.arange(keys, device=device), None if real is None else real[:, None]
    for rule in rules:
        pairs = rule.allow(places[-number:][rows], places)[None]
        found = pairs if found is None else pairs & found
    return found


def bias_between(context: Context, number: int, keys: int, like: Tensor, rows: slice = slice(None)) -> Tensor | None:
    """The bias of the scores of some rows of the last `number` tokens, [1 or B, heads, n, M] in the dtype of `like`;
    None if there is none."""
    if context.bias is None:
        return None
    places = torch.arange(keys, device=like.device)
    return context.bias.between(places[keys - number :][rows], places).to(like.dtype)


class Attention(Projected):
    """The base of attention over all that a token may see: all tokens, or those that `visible` and `order` allow, or in
    a stream the stored keys and the new ones. A subclass defines `mix`."""

    reads = Projected.reads | {"visible", "order"}

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        key = like.new_zeros(batch, visible.left, self.kv_heads, self.head_dim)
        value = like.new_zeros(batch, visible.left, self.kv_heads, self.value_dim)
        real = torch.zeros(batch, visible.left, dtype=torch.bool, device=like.device)
        return {"key": key, "value": value, "real": real}

    def stored(self, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values after those stored in the stream, if there is one, and which are real: None for all, or
        [B, M]. New ones are stored."""
        mask = context.mask
        if context.cache is None or context.visible is None:
            return key, value, mask
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
