"""One Block for every family: a layout spelled out as residual branches, norms put where the placement says.

One residual; parts in [brackets] exist if the config has them:

        x
        +-------------------+
        |                [before]        a norm
        |                [modulation]    shift and scale, computed from a condition; none around cross-attention
        |                 branch         mixer, cross-attention, convolution or feed-forward layer, or several, summed
     [stream]            [after]         a norm
        |                [channel]       channel attention
        |                [layer_scale]   a learned scale for each channel
        |                [1/2]           for `half` in the layout
        |                [gate]          of the modulation
        |                 drop           dropout and stochastic depth
        +------- + ---------+
                 |
              [total]                    a norm

`stream` is x itself, the result of `before`, or x times a learned scale. A branch may have sites of its own: `query`,
`key` and `value` after the projections, `inner` before the output linear. The placements fill these sites:

    placement    mixers, convolutions                feed-forward
    pre          before                              before
    post         total                               total
    res_post     after                               after
    res_scale    before; stream = scale              before; stream = scale
    peri         before, after                       before, after
    sub          before, inner                       before, inner
    sub_ffn      before                              before, inner
    hybrid       query, key, value                   before; stream = before
    crate        before                              before; stream = before
    normformer   before, after; inner = heads        before, inner
    scaled       before = affine; total              before = affine; total

A site holds the norm that the config names, or as stated: `affine`, a learned scale and shift, or `heads`, a learned
scale for each head.
"""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import CHANNELS
from zoo.choices import FEED_FORWARD, BlockConfig, Filling
from zoo.ffns import FFNS
from zoo.fusion import fold_last, fold_residual, keep
from zoo.layer import Context, Fold, Layer, Site, joined
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.modulations import MODULATIONS
from zoo.norms import NORMS, Affine, HeadScale, Norm
from zoo.spec import make, parse


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
        return joined(branch.inputs() for branch in self.branches)  # pyright: ignore[reportCallIssue]

    def outputs(self) -> list[nn.Linear] | str:
        return joined(branch.outputs() for branch in self.branches)  # pyright: ignore[reportCallIssue]


class Residual(Layer):
    """One entry of the layout as drawn above. A bare branch has none of these parts: x + branch(x)."""

    def __init__(self, config: BlockConfig, index: int, drop: float) -> None:
        super().__init__()
        entry = config.layout[index]
        words, plan = entry.split("+"), config.plan(entry)
        leaves = [branch(config, word) for word in words]
        for leaf, fillings in zip(leaves, plan.inner, strict=True):
            for each in fillings:
                setattr(leaf, each.site, filling(config, each))
        self.branch = leaves[0] if len(words) == 1 else Parallel(leaves)
        self.before: Layer | None = None
        self.after: Layer | None = None
        self.total: Layer | None = None
        self.stream = plan.stream == "before"
        self.shortcut = nn.Parameter(torch.ones(config.dim)) if plan.stream == "scale" else None
        for each in plan.outer:
            setattr(self, each.site, filling(config, each))
        self.channel: Layer | None = None
        self.layer_scale: nn.Parameter | None = None
        self.modulation: Layer | None = None
        self.factor = 0.5 if "half" in words else 1.0
        self.drop = self.dropout = 0.0
        self.adds_code = "code" in config.writes
        if any(leaf.bare for leaf in leaves):
            return
        self.drop, self.dropout = drop, config.dropout
        if parse(config.channel)[0] != "none":
            self.channel = make(CHANNELS, config.channel, config.dim, config.place, field="channel")
        if config.layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        if "cond" in config.writes and words != ["cross"]:
            place = replace(config.place, branch=index, branches=len(config.layout))
            self.modulation = make(MODULATIONS, config.modulation, config.dim, place, field="modulation")

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
            y, gate = self.modulation(y, context)
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
        kept = 1.0 - self.drop
        return y * (y.new_empty(len(y), *[1] * (y.ndim - 1)).bernoulli_(kept) / kept)

    def fold(self) -> list[Fold]:
        return fold_residual(self)


def branch(config: BlockConfig, word: str) -> Layer:
    """The layer of a word of the layout."""
    if word in FEED_FORWARD:
        return make(FFNS, config.ffn, config.dim, config.place, field="ffn")
    if word == "conv":
        return make(CONVS, config.conv, config.dim, config.place, field="conv")
    table, spec = (MIXERS, config.mixer) if word == "mixer" else (CROSSES, config.cross)
    return make(table, spec, config.dim, config.heads, config.place, field=word)


def filling(config: BlockConfig, given: Filling) -> Layer:
    """The layer that fills a site."""
    width, heads = given.size
    if given.what == "affine":
        return Affine(width, config.place)
    if given.what == "heads":
        return HeadScale(width, heads)
    spec = config.conv_norm if given.what == "conv_norm" else config.norm
    return make(NORMS, spec, width, config.place, field=given.what)


class Block(Layer):
    """The layout of the config, residual by residual; the word `norm` is a norm of the stream itself.

    drop is the rate of stochastic depth. `stride` is the number of tokens along time that become one.
    """

    stride: ClassVar[int] = 1

    def __init__(self, config: BlockConfig, drop: float = 0.0) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            filling(config, Filling("", "norm", Site(config.dim))) if entry == "norm" else Residual(config, index, drop)
            for index, entry in enumerate(config.layout)
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

    def fold_last(self, reader: nn.Linear, into: str) -> list[Fold]:
        """Folds the norm at the end of the block, if any, into a linear that is the only reader of the block."""
        return fold_last(self.steps, reader, into)
