"""Attention with other scores of a query and a key than their scaled product."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Chunks, Context, Place, Site
from zoo.mixers.attention import Cross
from zoo.mixers.projected import rotate
from zoo.mixers.scored import Pairs, Scored
from zoo.tensors import relu
from zoo.text import unknown


class Tempered(Scored):
    """softmax(t_i q_i . k_j / sqrt(d)) g_j v_j: each query sets how sharply it attends, each value how much it gives
    (Selective Self-Attention, Zhang et al. 2024, arXiv:2411.12892).

    t_i = 1 + tanh(w . gelu(q_i)) + sigmoid(a) log n, where the query sees n tokens, and g_j = 1 + tanh(u . gelu(v_j)).
    w, u and a are learned per head; w and u start at zero and sigmoid(a) at 0.02. values=False omits g.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, values: bool = True) -> None:
        super().__init__(dim, heads)
        self.of_query = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.of_length = nn.Parameter(torch.full((heads,), -4.0))
        self.of_value = nn.Parameter(torch.zeros(heads, self.head_dim)) if values else None

    @staticmethod
    def factor(x: Tensor, vector: Tensor) -> Tensor:
        """1 + tanh(vector . gelu(x)) of x [B, N, H, d]: [B, N, H, 1]."""
        return 1 + torch.tanh((F.gelu(x) * vector).sum(-1, keepdim=True))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        if self.of_value is not None:
            value = value * self.factor(value, self.of_value)
        query = torch.cat([query, self.factor(query, self.of_query)], -1)
        return super().mix(query, key, value, context)

    def turned(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        width = self.head_dim
        return torch.cat([rotate(x[..., :width], rotary), x[..., width:]], -1)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        query, factor = query.split((self.head_dim, 1), -1)
        lengths = pairs.seen(key.transpose(-1, -2)).log()
        factor = factor + self.of_length.sigmoid()[:, None, None] * lengths
        return super().scores(query * factor, key, pairs)


class GaussianKeys(Scored):
    """Weights proportional to sum_m exp(p_m - |q_i - k_jm|^2 / (2 sqrt(d))) with several keys per token, a mixture of
    Gaussians (Transformer-MGK, Nguyen et al. 2021, arXiv:2110.08678).

    keys is the number of keys of a token in each head, and p, the logarithms of their shares, is learned per head.
    shifted=True adds a learned vector to one projected key for each of them; otherwise each has a projection. hard=True
    takes the nearest key alone, so there is no p. The paper's linear form is left out.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        keys: int = 2,
        shifted: bool = False,
        hard: bool = False,
    ) -> None:
        self.keys, self.projected = keys, 1 if shifted else keys
        super().__init__(dim, heads)
        self.shift = nn.Parameter(torch.zeros(heads, keys, self.head_dim)) if shifted else None
        if self.shift is not None:
            nn.init.normal_(self.shift, std=0.5)
        self.shares = None if hard or keys == 1 else nn.Parameter(torch.zeros(heads, keys))

    @property
    def widths(self) -> list[int]:
        width = self.heads * self.head_dim
        return [width, self.projected * width, width]

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        slots = super().state(batch, visible, like)
        return slots | {"key": slots["key"].repeat(1, 1, self.keys, 1)}

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        if self.shift is not None:
            key = (key[:, :, :, None] + self.shift).flatten(2, 3)
        return super().mix(query, key, value, context)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        """|q|^2 is left out: it is the same for all keys of a query."""
        kind = torch.promote_types(query.dtype, torch.float32)
        keys = key.unflatten(1, (-1, self.keys))
        near = query[:, :, None] @ keys.transpose(-1, -2) - keys.to(kind).square().sum(-1)[..., None, :] / 2
        near = near * self.head_dim**-0.5  # [B, H, keys, n, M]
        scores = near.amax(2) if self.shares is None else (near + self.shares[..., None, None]).logsumexp(2)
        return self.biased(scores.to(query.dtype), pairs)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"mlp": relu, "concat": torch.tanh}
SCORES = (*ACTIVATIONS, "general")


class Additive(Scored):
    """softmax of s(q_i, k_j), where s is a small network of both or a bilinear form (Neural Attention, DiGiugno and
    Mahmood 2025, arXiv:2502.17206; Luong et al. 2015, arXiv:1508.04025).

    score is `mlp`: w . relu(W_q x_i + W_k x_j + b) with `width` hidden units in each head; `concat`: the same with
    tanh; or `general`: x_i^T W x_j / sqrt(d) with the d channels of a head, which takes no width. Values have the
    channels of a head. Rotary positions are refused, for these scores would not depend on differences of positions
    alone. Luong's local windows are left out.
    """

    reads = Scored.reads - {"rotary"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, score: str = "mlp", width: int = 16) -> None:
        if score not in SCORES:
            raise ValueError(unknown("score", score, SCORES))
        if score == "general" and width != 16:
            raise ValueError(f"score='general' has no hidden units and takes no width, got width={width}")
        own, values = self.head_width_of(dim, heads, score=score, width=width), super().head_width_of(dim, heads)
        super().__init__(dim, heads, head_dim=own, value_dim=values, sources="xkv" if score == "general" else "qkv")
        self.activation = ACTIVATIONS.get(score)
        if self.activation is not None:
            self.units = nn.Parameter(torch.zeros(heads, width))
            nn.init.normal_(self.units, std=width**-0.5)

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, score: str = "mlp", width: int = 16, **options: Any) -> int:
        own = super().head_width_of(dim, heads, **options)
        return own if score == "general" or options.get("head_dim") else width

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        values = super().head_width_of(dim, heads)
        return super().sites_of(dim, heads, **options) | {"value": Site(values), "inner": Site(dim, heads)}

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        if self.activation is None:
            return super().scores(query, key, pairs)
        return self.biased(networked(query, key, self.units, self.activation), pairs)


class AdditiveCross(Cross):
    """softmax of w . act(W_q x_i + W_k m_j + b) over the tokens m_j of a decoder's memory (Luong et al. 2015,
    arXiv:1508.04025), with `width` hidden units in each head: act is tanh for score='concat', relu for score='mlp'.
    Memory grows with queries times tokens of the memory, in training times `width`."""

    def __init__(
        self, dim: int, heads: int, place: Place = ANYWHERE, *, score: str = "concat", width: int = 16
    ) -> None:
        if score not in ACTIVATIONS:
            raise ValueError(unknown("score", score, ACTIVATIONS))
        super().__init__(dim, heads, place, width)
        self.activation = ACTIVATIONS[score]
        self.units = nn.Parameter(torch.zeros(heads, width))
        nn.init.normal_(self.units, std=width**-0.5)

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, width: int = 16, **options: Any) -> dict[str, Site]:
        return super().sites_of(dim, heads) | dict.fromkeys(("query", "key"), Site(width))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, context: Context) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        scores = networked(query, key, self.units, self.activation)
        if mask is not None:
            allowed = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
            scores = scores.masked_fill(~allowed, -torch.inf)
        weights = scores.softmax(-1)
        self.note(context, "weights", weights.detach())
        return (weights @ value).transpose(1, 2)


def networked(query: Tensor, key: Tensor, units: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """sum_u w_u act(q_iu + k_ju) of query [B, H, n, U], key [B, H, M, U] and units w [H, U]: [B, H, n, M]."""
    scores = 0.0
    for unit, weight in enumerate(units[..., None, None].unbind(1)):
        scores = scores + weight * activation(query[..., unit, None] + key[..., None, :, unit])
    assert isinstance(scores, Tensor)
    return scores


class Signed(Scored):
    """Weights 2 tanh(q k^T / sqrt(d)) sigmoid(-|q - k|_1 / sqrt(d)), not normalized: a similar token is added, an
    opposite one subtracted, and a distant one dropped (CoDA, Tay et al. 2019, NeurIPS; Comateformer, Li et al. 2024,
    arXiv:2412.07220). Rotary positions are refused, for the distance would not depend on differences of positions
    alone."""

    reads = Scored.reads - {"rotary"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        kind = torch.promote_types(query.dtype, torch.float32)
        distance = torch.cdist(query.to(kind), key.to(kind), p=1.0) * query.shape[-1] ** -0.5
        return 2 * super().scores(query, key, pairs).tanh() * torch.sigmoid(-distance).to(query.dtype)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        return pairs.masked(scores, 0.0)


class Polar(Scored):
    """Scores sum_p |q_p| |k_p| cos(a_p (angle q_p - angle k_p) + b_p) / sqrt(d), where pairs of channels are complex
    numbers (ComplexFormer, Shao et al. 2025, arXiv:2505.10222, withdrawn by its authors).

    Angles are from -pi to pi. a and b are learned per head and pair and start at 1 and 0, which is softmax attention.
    Rotary positions add the phase of the difference of positions, which the paper learns per head.
    """

    undecayed = ("slope",)
    paired = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)
        self.slope = nn.Parameter(torch.ones(heads, self.head_dim // 2))
        self.phase = nn.Parameter(torch.zeros(heads, self.head_dim // 2))

    def adapted(self, x: Tensor, phase: Tensor | float = 0.0) -> Tensor:
        """x [B, N, H, d] with the angles a * angle + phase."""
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
        squares = first.square() + second.square()
        zero = squares == 0  # where the root has no gradient
        size = squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
        angle = self.slope * torch.atan2(second, first) + phase
        return torch.cat([size * angle.cos(), size * angle.sin()], -1).to(x.dtype)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return super().mix(self.adapted(query, self.phase), self.adapted(key), value, context)
