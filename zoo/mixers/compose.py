"""Mixers of mixers: several side by side on the same tokens, and attention weights that blocks share."""

from typing import Any

import torch
from torch import Tensor, nn

import zoo.mixers
from zoo.channels import grid_mean
from zoo.layer import ANYWHERE, Chunks, Context, Layer, Place, Site, joined
from zoo.mixers.scored import Pairs, Scored
from zoo.spec import check, make, parse
from zoo.tensors import linear
from zoo.text import unknown

WEIGHTS = ("sum", "learned", "input")
OF = ("softmax", "sepconv")


def parts_of(of: str | tuple[str, ...]) -> list[tuple[type[Layer], dict[str, Any]]]:
    """The row and the options of each mixer of a blend; ValueError if there are none to blend, or one is invalid."""
    if isinstance(of, str) or len(of) < 2:
        raise ValueError(f"blend: of must be a tuple of two mixers or more, got {of!r}")
    parts = []
    for spec in of:
        try:
            options = check(zoo.mixers.MIXERS, spec)
        except ValueError as error:
            raise ValueError(f"blend: of '{spec}': {error}") from None
        row = zoo.mixers.MIXERS[parse(spec)[0]]
        if issubclass(row, Blend | SharedScores):
            raise ValueError(f"blend: of '{spec}': it cannot be part of a blend; choose another mixer")
        parts.append((row, options))
    return parts


class Blend(Layer):
    """Several mixers side by side on the same tokens, their results summed (Multi-Encoder, Hu et al. 2023,
    arXiv:2312.15872).

    of: the mixers, names with their options. weights: `sum` adds the results as they are; `learned` takes the mean that
    a softmax over learned numbers weights, equal at the start (for two, the gate of TPTT, Furfaro 2025,
    arXiv:2506.17671); `input` weights them by softmax(W2 relu(W1 m)), where m is the mean of a sample's tokens on the
    grid (A2N, Chen et al. 2021, arXiv:2104.09497). A blend reads what all its mixers read, and placements put no norms
    inside them.
    """

    reads = frozenset({"mask"})
    mixes = True

    @classmethod
    def reads_of(cls, *, of: str | tuple[str, ...] = OF, weights: str = "sum", **options: Any) -> frozenset[str]:
        found = [row.reads_of(**given) for row, given in parts_of(of) if row.mixes]
        whole = {"visible", "order"} if weights == "input" else set()  # the mean sees all tokens
        return frozenset.intersection(*found) - whole

    @classmethod
    def causal_of(cls, *, of: str | tuple[str, ...] = OF, **options: Any) -> bool:
        return any(row.causal_of(**given) for row, given in parts_of(of))

    @classmethod
    def dimensions_of(cls, *, of: str | tuple[str, ...] = OF, **options: Any) -> tuple[int, ...]:
        kinds = [set(row.dimensions_of(**given)) for row, given in parts_of(of)]
        if not (able := set.intersection(*kinds)):
            raise ValueError("blend: some of its mixers work along time only, others on images only")
        return tuple(sorted(able))

    @classmethod
    def head_width_of(cls, dim: int, heads: int, *, of: str | tuple[str, ...] = OF, **options: Any) -> int:
        if "rotary" not in cls.reads_of(of=of, **options):
            return super().head_width_of(dim, heads)
        widths = {row.head_width_of(dim, heads, **given) for row, given in parts_of(of)}
        if len(widths) > 1:
            found = ", ".join(str(width) for width in sorted(widths))
            raise ValueError(f"blend: rotary positions need heads of one width, its mixers have {found}")
        return widths.pop()

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        of: str | tuple[str, ...] = OF,
        weights: str = "sum",
    ) -> None:
        super().__init__()
        if weights not in WEIGHTS:
            raise ValueError(unknown("weights", weights, WEIGHTS))
        if place.axes not in self.dimensions_of(of=of):
            raise ValueError(f"blend: its mixers do not all work {'along time' if place.axes == 1 else 'on images'}")
        self.reads = self.reads_of(of=of, weights=weights)  # pyright: ignore[reportAttributeAccessIssue]
        self.head_dim = self.head_width_of(dim, heads, of=of)
        self.mixers = nn.ModuleList(make(zoo.mixers.MIXERS, spec, dim, heads, place, field="of") for spec in of)
        self.quadratic = any(mixer.quadratic for mixer in self.mixers)
        self.weights = weights
        self.shares = nn.Parameter(torch.zeros(len(of))) if weights == "learned" else None
        self.squeeze = self.gate = None
        if weights == "input":
            self.squeeze, self.gate = linear(dim, max(1, dim // 4)), linear(max(1, dim // 4), len(of))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        unread = dict.fromkeys({"rotary", "bias", "code"} - self.reads)
        parts = [mixer(x, context._replace(**unread)) for mixer in self.mixers]
        if self.shares is not None:
            shares = self.shares.softmax(0)
        elif self.squeeze is not None and self.gate is not None:
            shares = self.gate(self.squeeze(grid_mean(x, context)).relu()).softmax(-1).T[..., None, None]
        else:
            shares = None
        if shares is not None:
            parts = [share * part for share, part in zip(shares, parts, strict=True)]
        y = parts[0]
        for part in parts[1:]:
            y = y + part
        return y

    def inputs(self) -> list[nn.Linear] | str:
        own = [] if self.squeeze is None else [self.squeeze]  # the mean of an affine map is the map of the mean
        return joined([own, *(mixer.inputs() for mixer in self.mixers)])  # pyright: ignore[reportCallIssue]

    def outputs(self) -> list[nn.Linear] | str:
        if self.weights != "sum":
            return "the results of its mixers are weighted"
        return joined(mixer.outputs() for mixer in self.mixers)  # pyright: ignore[reportCallIssue]


class SharedScores(Scored):
    """Softmax attention in every `every`-th block; the others have values alone and reuse its weights (ARMHuBERT, Jang
    et al. 2023, arXiv:2305.11685; EchoAtt, Rajabzadeh et al. 2024, arXiv:2409.14595).

    Blocks are counted from 0 among those that have this mixer and see the same tokens: from 0 again where a model
    changes its tokens, as where the frame rate is halved. The blocks up to `first` compute their own weights; blocks
    `first` + `every` and so on do, too. Others use those of the last block that did. residual=True adds, before the
    softmax, the scores of the last block that computed some (EfficientASR, Wang et al. 2024, arXiv:2404.19214, without
    its diagonal attention). The weights have to be kept for later blocks, so memory is quadratic in the number of
    tokens.
    """

    quadratic = True

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        sites = super().sites_of(dim, heads, **options)
        return {site: sites[site] for site in ("value", "inner")}  # most blocks have no queries and keys

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        every: int = 2,
        first: int = 0,
        residual: bool = False,
    ) -> None:
        self.computes = place.order <= first or (place.order - first) % every == 0
        super().__init__(dim, heads, sources="qkv" if self.computes else "xxv")
        self.residual = residual

    @staticmethod
    def last(what: str, context: Context) -> Tensor | None:
        """What the last block before this one that computed weights left."""
        return None if context.carry is None else context.carry.values.get(what)

    @staticmethod
    def leave(what: str, value: Tensor, context: Context) -> None:
        """Keeps a value for later blocks."""
        if context.carry is not None:
            context.carry.left[what] = value

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if self.residual:
            if (before := self.last("scores", pairs.context)) is not None:
                scores = scores + before
            self.leave("scores", scores, pairs.context)
        return self.biased(scores, pairs)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        weights = pairs.masked(scores).softmax(-1)
        self.leave("weights", weights, pairs.context)
        return weights

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        if self.computes:
            return super().mix(query, key, value, context)
        if (weights := self.last("weights", context)) is None:
            raise ValueError(
                "shared_scores: no attention weights to reuse; run the blocks before this one first, by Model.run"
            )
        if context.cache is not None:
            value = self.extended(self.recall(context, "value"), value)
        if context.notes is not None:
            self.note(context, "weights", weights.detach())
        return (weights @ value.transpose(1, 2)).transpose(1, 2)

    def inputs(self) -> list[nn.Linear]:
        return [self.qkv]

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        state = super().state(batch, visible, like)
        return state if self.computes else {"value": state["value"]}
