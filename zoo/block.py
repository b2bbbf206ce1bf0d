"""One Block for every family: a layout spelt out as residual branches, norms put where the placement says."""

import functools
import types
import typing
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.channels import CHANNELS
from zoo.ffns import FFNS
from zoo.fusion import fold_in, fold_out, keep, not_affine
from zoo.layer import Context, Fold, Layer, check, compiling, make, parse
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.norms import NORMS, Affine, HeadScale, Norm, recomputing
from zoo.positions import POSITIONS

# What fills which site, for branches that mix tokens and for feed-forward. `before` precedes the branch, `after`
# follows it, `total` follows the sum, `stream` lets the sum start from what `before` gave; others are the branch's own.
_PRE, _POST = {"before": "norm"}, {"total": "norm"}
PLACEMENTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "pre": (_PRE, _PRE),
    "post": (_POST, _POST),
    "peri": (_PRE | {"after": "norm"}, _PRE | {"after": "norm"}),
    "sub": (_PRE | {"inner": "norm"}, _PRE | {"inner": "norm"}),
    "hybrid": ({"query": "norm", "key": "norm", "value": "norm"}, _PRE | {"stream": "before"}),
    "normformer": (_PRE | {"after": "norm", "inner": "heads"}, _PRE | {"inner": "norm"}),
    "scaled": ({"before": "affine"} | _POST, {"before": "affine"} | _POST),
}
OUTER = ("before", "after", "total", "stream")
FEED_FORWARD = ("ffn", "half")
WORDS = ("mixer", "cross", "conv", *FEED_FORWARD, "norm")
TABLES = {"mixer": MIXERS, "cross": CROSSES, "conv": CONVS, "conv_norm": NORMS, "ffn": FFNS, "norm": NORMS}
TABLES |= {"channel": CHANNELS, "position": POSITIONS, "placement": PLACEMENTS}


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(each, typing.get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The choices that every family shares. A family adds its own fields; what a model is stands here, whole.

    Wrong names, wrong options and pairs of choices that would ignore each other are ValueErrors at once.
    """

    axes: ClassVar[int] = 2  # 2: tokens lie on H x W; 1: along time

    dim: int
    depth: int
    heads: int
    layout: tuple[str, ...] = ("mixer", "ffn")
    mixer: str = "softmax"
    cross: str = "softmax"
    conv: str = "glu"
    conv_norm: str = "batchnorm"
    ffn: str = "mlp"
    norm: str = "layernorm"
    placement: str = "pre"
    channel: str = "none"
    position: str = "sincos"
    modulate: bool = False
    drop_path: float = 0.0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            kind = _kinds(type(self))[field.name]
            if not _fits(value, kind):
                raise ValueError(f"{field.name} takes {getattr(kind, '__name__', kind)}, not {value!r}")
        if min(self.dim, self.depth, self.heads) < 1:
            raise ValueError(f"dim, depth and heads are at least 1, not {self.dim}, {self.depth} and {self.heads}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path lies in 0..1, not {self.drop_path}")
        for field, table in TABLES.items():
            try:
                if field == "placement":
                    if self.placement not in table:
                        raise ValueError(f"there is no '{self.placement}'; choose from: {', '.join(sorted(table))}")
                else:
                    check(table, getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        if not self.layout:
            raise ValueError("layout is empty; the usual one is mixer, ffn")
        for word in self.words:
            if word not in WORDS:
                raise ValueError(f"layout: there is no '{word}'; choose from: {', '.join(WORDS)}, or join two with +")
        for entry in self.layout:
            if "+" in entry and not {"half", "norm"}.isdisjoint(entry.split("+")):
                raise ValueError(f"layout: half and norm stand alone, not as in '{entry}'")
        self._check_pairs()

    @property
    def words(self) -> list[str]:
        """The layout's words, one by one."""
        return [word for entry in self.layout for word in entry.split("+")]

    @property
    def writes(self) -> frozenset[str]:
        """The fields of the Context that this model sets, the mask among them; a family adds its own."""
        written = POSITIONS[parse(self.position)[0]].writes | {"mask"}
        return written | ({"cond"} if self.modulate else set()) | ({"memory"} if "cross" in self.words else set())

    @property
    def head_dim(self) -> int:
        """The width of one head of the mixer, which rotary positions turn."""
        return check(MIXERS, self.mixer).get("head_dim") or self.dim // self.heads

    def build(self) -> nn.Module:
        """The model that this config describes."""
        raise TypeError(f"{type(self).__name__} describes blocks, not a model")

    def _check_pairs(self) -> None:
        for field in fields(self):
            words = {"ffn": FEED_FORWARD, "conv_norm": ("conv",)}.get(field.name, (field.name,))
            if field.name not in ("mixer", "cross", "conv", "conv_norm", "ffn") or not {*words}.isdisjoint(self.words):
                continue
            if (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"{field.name} '{value}' would be ignored: the layout has no {' or '.join(words)}")
        if "mixer" not in self.words and self.writes & {"rotary", "bias"}:
            raise ValueError(f"position '{self.position}' would be ignored: the layout has no mixer")
        tokens = self.writes & {"prefix", "mask"}
        needs = {"mixer": self.writes - {"cond", "memory"}, "conv": tokens, "cross": tokens | self.writes & {"code"}}
        needs |= {"channel": tokens, "position": tokens}
        for field, needed in needs.items():
            if field not in ("channel", "position") and field not in self.words:
                continue
            name = parse(getattr(self, field))[0]
            row = TABLES[field][name]
            if name == "none" or not row.mixes or not (unread := sorted(needed - row.reads)):
                continue
            if self.writes & {"rotary", "bias"} & set(unread):
                source = f"position '{self.position}'"
            else:
                source = "this model" + (", which has prefix tokens," if "prefix" in unread else "")
            able = [other for other, each in TABLES[field].items() if needed <= each.reads or other == "none"]
            raise ValueError(
                f"{field} '{name}' does not read {' and '.join(unread)}, which {source} sets; "
                f"choose another {field} ({', '.join(able)}) or drop what sets it"
            )


class Parallel(Layer):
    """Branches that read the same tokens, summed (ViT-22B, Dehghani et al. 2023, arXiv:2302.05442)."""

    def __init__(self, branches: list[Layer]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.branches[0](x, context)
        for branch in self.branches[1:]:
            y = y + branch(x, context)
        return y

    def inputs(self) -> list[nn.Linear] | str:
        return _joined([branch.inputs() for branch in self.branches])  # pyright: ignore[reportCallIssue]

    def outputs(self) -> list[nn.Linear] | str:
        return _joined([branch.outputs() for branch in self.branches])  # pyright: ignore[reportCallIssue]


def _joined(parts: list[list[nn.Linear] | str]) -> list[nn.Linear] | str:
    layers: list[nn.Linear] = []
    for part in parts:
        if isinstance(part, str):
            return part
        layers += part
    return layers


class Residual(Layer):
    """x + drop_path(gate * factor * layer_scale * channel(after(branch(modulate(before(x)))))), then `total`.

    Modulation is adaLN-Zero: shift, scale and gate are read off silu(cond) by a linear that starts at zero (Peebles and
    Xie 2023, arXiv:2212.09748).
    """

    def __init__(self, config: BlockConfig, entry: str, drop: float) -> None:
        super().__init__()
        words = entry.split("+")
        leaves = [self.build(config, word) for word in words]
        self.branch = leaves[0] if len(words) == 1 else Parallel(leaves)
        self.before: Layer | None = None
        self.after: Layer | None = None
        self.total: Layer | None = None
        self.stream = False
        rows = [PLACEMENTS[config.placement][word in FEED_FORWARD] for word in words]
        outer = [{site: what for site, what in row.items() if site in OUTER} for row in rows]
        if any(each != outer[0] for each in outer):
            raise ValueError(
                f"placement '{config.placement}' treats the branches of '{entry}' differently; they share one norm"
            )
        for site, what in outer[0].items():
            setattr(self, site, True if site == "stream" else self.filling(config, what, config.dim, 0))
        for word, leaf, row in zip(words, leaves, rows, strict=True):
            for site, what in row.items():
                if site in OUTER:
                    continue
                name = f"{word} '{getattr(config, 'ffn' if word == 'half' else word)}'"
                if site not in leaf.sites:
                    has = ", ".join(leaf.sites) or "none"
                    raise ValueError(f"placement '{config.placement}' needs the site '{site}'; {name} has: {has}")
                if what == "heads" and leaf.heads == 0:
                    raise ValueError(f"placement '{config.placement}' scales heads, and {name} has none")
                leaf.fill(site, self.filling(config, what, leaf.sites[site], leaf.heads))
        self.channel = (
            None if parse(config.channel)[0] == "none" else make(CHANNELS, config.channel, config.dim, config.axes)
        )
        self.layer_scale = None
        if config.layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.modulation = None
        if config.modulate:
            self.modulation = nn.Linear(config.dim, 3 * config.dim)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        self.factor = 0.5 if "half" in words else 1.0
        self.drop = drop
        self.adds_code = "code" in config.writes

    @staticmethod
    def build(config: BlockConfig, word: str) -> Layer:
        if word == "mixer":
            return make(MIXERS, config.mixer, config.dim, config.heads, config.axes)
        if word == "cross":
            return make(CROSSES, config.cross, config.dim, config.heads)
        if word == "conv":
            return make(CONVS, config.conv, config.dim, config.axes, config.conv_norm)
        return make(FFNS, config.ffn, config.dim)

    @staticmethod
    def filling(config: BlockConfig, what: str, width: int, heads: int) -> Layer:
        if what == "norm":
            return make(NORMS, config.norm, width)
        return Affine(width) if what == "affine" else HeadScale(width, heads)

    @property
    def leaves(self) -> list[Layer]:
        """The branch, or the parallel branches that it sums."""
        return list(self.branch.branches) if isinstance(self.branch, Parallel) else [self.branch]  # pyright: ignore

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = x if self.before is None else self.before(x, context)
        if self.stream:
            x = y
        gate = None
        if self.modulation is not None:
            if context.cond is None:
                raise ValueError("a modulated block needs cond in the Context")
            shift, scale, gate = self.modulation(F.silu(context.cond)).chunk(3, -1)
            y = y * (1 + scale) + shift
        y = self.branch(y, context)
        if self.after is not None:
            y = self.after(y, context)
        if self.channel is not None:
            y = self.channel(y, context)
        if self.layer_scale is not None:
            y = y * self.layer_scale
        if self.factor != 1.0:
            y = y * self.factor
        if gate is not None:
            y = y * gate
        x = x + self.drop_path(y)
        return x if self.total is None else self.total(x, context)

    def drop_path(self, y: Tensor) -> Tensor:
        """Drops the branch for some samples and scales the others up (Huang et al. 2016, arXiv:1603.09382)."""
        if not self.training or self.drop == 0.0:
            return y
        keep = 1.0 - self.drop
        return y * (y.new_empty(len(y), *[1] * (y.ndim - 1)).bernoulli_(keep) / keep)

    def fold(self) -> list[Fold]:
        done = [fold for leaf in self.leaves for fold in self.fold_inner(leaf)]
        if isinstance(self.before, Norm):
            done.append(self.fold_before(self.before))
        if isinstance(self.after, Norm):
            done.append(self.fold_behind("after", self.after.affine()))
        if self.layer_scale is not None:
            if self.channel is not None:
                done.append(Fold("layer_scale", None, "channel attention stands between it and the branch"))
            elif self.after is not None:
                done.append(Fold("layer_scale", None, "a norm stands between it and the branch"))
            else:
                scale = self.layer_scale.detach()
                done.append(self.fold_behind("layer_scale", (scale, torch.zeros_like(scale))))
        if isinstance(self.total, Norm):
            done.append(keep(self, "total", "the stream reads it"))
        return done

    def fold_inner(self, leaf: Layer) -> list[Fold]:
        norm, outputs = getattr(leaf, "inner", None), leaf.outputs()
        if not isinstance(norm, Norm) or isinstance(outputs, str):
            return []
        name = "branch.inner" if leaf is self.branch else f"branch.branches.{self.leaves.index(leaf)}.inner"
        if (affine := norm.affine()) is None:
            return [Fold(name, None, not_affine(norm))]
        fold_in(outputs[0], *affine)
        setattr(leaf, "inner", None)  # noqa: B010
        return [Fold(name, "the output linear")]

    def fold_before(self, norm: Norm) -> Fold:
        inputs = self.branch.inputs()
        if (affine := norm.affine()) is None:
            return Fold("before", None, not_affine(norm))
        if self.stream:
            return keep(self, "before", "the stream reads it")
        if self.modulation is not None:
            return keep(self, "before", "the modulation reads it")
        if self.adds_code and any("code" in leaf.reads for leaf in self.leaves):
            return keep(self, "before", "the branch adds code before its linear")
        if isinstance(inputs, str):
            return keep(self, "before", inputs)
        for layer in inputs:
            fold_in(layer, *affine)
        self.before = None
        return Fold("before", "the branch's input linears")

    def fold_behind(self, site: str, affine: tuple[Tensor, Tensor] | None) -> Fold:
        outputs = self.branch.outputs()
        norm = getattr(self, site)
        if affine is None:
            return Fold(site, None, not_affine(norm))
        if isinstance(outputs, str):
            return keep(self, site, outputs) if isinstance(norm, Norm) else Fold(site, None, outputs)
        scale, shift = affine
        for number, layer in enumerate(outputs):
            fold_out(layer, scale, shift if number == 0 else torch.zeros_like(shift))
        setattr(self, site, None)
        return Fold(site, "the branch's output linears")


class Block(Layer):
    """The layout of the config, residual by residual; the word `norm` is a norm of the stream itself.

    The rate of stochastic depth grows linearly with the block's index, from 0 to `config.drop_path`.
    """

    def __init__(self, config: BlockConfig, index: int = 0) -> None:
        super().__init__()
        drop = config.drop_path * index / max(1, config.depth - 1)
        self.steps = nn.ModuleList(
            make(NORMS, config.norm, config.dim) if entry == "norm" else Residual(config, entry, drop)
            for entry in config.layout
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for step in self.steps:
            x = step(x, context)
        return x

    def fold(self) -> list[Fold]:
        return [
            keep(self.steps, str(index), "the stream reads it")._replace(layer=f"steps.{index}")
            for index, step in enumerate(self.steps)
            if isinstance(step, Norm)
        ]


def _first_and_second_run() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), recomputing()


def run(blocks: nn.ModuleList, x: Tensor, context: Context, checkpointing: bool = False) -> Tensor:
    """The blocks one after the other; with checkpointing, activations are computed again in the backward pass, and
    running statistics move once."""
    # The compiler traces a block once, so its statistics move once by themselves.
    watch = {} if compiling() else {"context_fn": _first_and_second_run}
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, context, use_reentrant=False, **watch)  # pyright: ignore
        else:
            x = block(x, context)
    return x
