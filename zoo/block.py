"""One Block for every family: a layout spelt out as residual branches, norms put where the placement says."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.channels import CHANNELS
from zoo.config import FEED_FORWARD, OUTER, PLACEMENTS, BlockConfig
from zoo.ffns import FFNS
from zoo.fusion import fold_in, fold_out, keep, not_affine
from zoo.layer import Context, Fold, Layer, compiling, make, parse
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.norms import NORMS, Affine, HeadScale, Norm, recomputing


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

    A bare branch stands without all that: x + branch(x). Modulation is adaLN-Zero: shift, scale and gate are read off
    silu(cond) by a linear that starts at zero (Peebles and Xie 2023, arXiv:2212.09748).
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
        self.shortcut: nn.Parameter | None = None
        bare = any(leaf.bare for leaf in leaves)
        rows = [
            {} if leaf.bare else PLACEMENTS[config.placement][word in FEED_FORWARD]
            for word, leaf in zip(words, leaves, strict=True)
        ]
        outer = [{site: what for site, what in row.items() if site in OUTER} for row in rows]
        if any(each != outer[0] for each in outer):
            raise ValueError(
                f"placement '{config.placement}' treats the branches of '{entry}' differently; they share one norm"
            )
        for site, what in outer[0].items():
            if site == "stream":
                self.stream = what == "before"
                self.shortcut = nn.Parameter(torch.ones(config.dim)) if what == "scale" else None
            else:
                setattr(self, site, self.filling(config, what, config.dim, 0))
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
        self.channel = None
        if parse(config.channel)[0] != "none" and not bare:
            self.channel = make(CHANNELS, config.channel, config.dim, config.axes)
        self.layer_scale = None
        if config.layer_scale is not None and not bare:
            self.layer_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.modulation = None
        if config.modulate and not bare:
            self.modulation = nn.Linear(config.dim, 3 * config.dim)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        self.factor = 0.5 if "half" in words else 1.0
        self.drop = 0.0 if bare else drop
        self.dropout = 0.0 if bare else config.dropout
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
        elif self.shortcut is not None:
            x = x * self.shortcut
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
        """Drops single values of the branch, and the branch for some samples (Huang et al. 2016, arXiv:1603.09382), and
        scales the others up."""
        y = F.dropout(y, self.dropout, self.training)
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

    drop is the rate of stochastic depth.
    """

    def __init__(self, config: BlockConfig, drop: float = 0.0) -> None:
        super().__init__()
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


def drop_rates(last: float, depth: int) -> list[float]:
    """The rates of stochastic depth of a model's blocks: they grow linearly from 0 to that of the last one."""
    return [last * index / max(1, depth - 1) for index in range(depth)]


def _first_and_second_run() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), recomputing()


def run(blocks: Iterable[nn.Module], x: Tensor, context: Context, checkpointing: bool = False) -> Tensor:
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
