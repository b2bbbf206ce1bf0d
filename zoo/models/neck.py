"""The neck of RT-DETR: maps of several strides exchange information from coarse to fine and back (CCFM, Zhao et al.
2024, arXiv:2304.08069), and that of D-FINE (Peng et al. 2024, arXiv:2410.13842)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.channels import CHANNELS
from zoo.ffns import activation_of
from zoo.fusion import ensure_bias, fold_site
from zoo.layer import ANYWHERE, Context, Fold, Layer, Place
from zoo.norms import NORMS
from zoo.spec import make, parse
from zoo.stems.images import Reduction
from zoo.tensors import to_map, to_tokens, zeroed

Level = tuple[Tensor, Context]
"""The tokens [B, N, D] of one stride, and their Context."""


class ConvNorm(Layer):
    """A convolution of `kernel` tokens without bias, a norm and an activation; `inputs` channels become `dim`."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(
        self, inputs: int, dim: int, norm: str, kernel: int = 1, activation: str = "", place: Place = ANYWHERE
    ) -> None:
        super().__init__()
        self.conv: nn.Linear | nn.Conv2d = nn.Linear(inputs, dim, bias=False)
        if kernel > 1:
            self.conv = nn.Conv2d(inputs, dim, kernel, padding=kernel // 2, bias=False)
        self.norm: Layer | None = make(NORMS, norm, dim, place)
        self.activation = activation_of(activation) if activation else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if isinstance(self.conv, nn.Conv2d):
            x = to_tokens(self.conv(to_map(zeroed(x, context.mask), context.grid)))
        else:
            x = self.conv(x)
        x = x if self.norm is None else self.norm(x, context)
        return x if self.activation is None else self.activation(x)

    def fold(self) -> list[Fold]:
        return fold_site(self, "norm", self.conv)


class RepBlock(Layer):
    """activation(conv 3 x 3 + conv 1 x 1), each with a norm; one convolution once it is folded (RepVGG, Ding et al.
    2021, arXiv:2101.03697)."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(self, dim: int, norm: str, activation: str) -> None:
        super().__init__()
        self.wide, self.narrow = ConvNorm(dim, dim, norm, 3), ConvNorm(dim, dim, norm)
        self.activation = activation_of(activation)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.wide(x, context)
        return self.activation(y if self.narrow is None else y + self.narrow(x, context))

    def fold(self) -> list[Fold]:
        report = [each._replace(layer=f"wide.{each.layer}") for each in self.wide.fold()]
        if self.narrow is None:
            return report
        report += [each._replace(layer=f"narrow.{each.layer}") for each in self.narrow.fold()]
        if self.wide.norm is not None or self.narrow.norm is not None:
            return report
        wide, narrow = self.wide.conv, self.narrow.conv
        with torch.no_grad():
            wide.weight[:, :, 1, 1] += narrow.weight
            ensure_bias(wide).add_(ensure_bias(narrow))
        self.narrow = None
        return [*report, Fold("narrow", "the centre of the convolution beside it")]


class CSP(Layer):
    """RepBlocks on one projection of x, added to another projection of it (cross-stage partial, Wang et al. 2020,
    arXiv:1911.11929); `inputs` channels become `dim`, and the blocks have `hidden`."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(
        self, inputs: int, dim: int, hidden: int, depth: int, norm: str, activation: str, channel: str, place: Place
    ) -> None:
        super().__init__()
        self.first, self.second = (ConvNorm(inputs, hidden, norm, 1, activation) for _ in range(2))
        self.blocks = nn.ModuleList(RepBlock(hidden, norm, activation) for _ in range(depth))
        self.out = ConvNorm(hidden, dim, norm, 1, activation) if hidden != dim else None
        self.channel = channel_of(channel, dim, place)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.first(x, context)
        for block in self.blocks:
            y = block(y, context)
        y = y + self.second(x, context)
        y = y if self.out is None else self.out(y, context)
        return y if self.channel is None else self.channel(y, context)


class ELAN(Layer):
    """Two CSP layers in a row, each with a convolution behind it; the halves of a projection of x and both results
    together become `dim` channels (D-FINE, Peng et al. 2024, arXiv:2410.13842; YOLOv9, Wang et al. 2024,
    arXiv:2402.13616). The layers have half of `hidden` channels."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(
        self, inputs: int, dim: int, hidden: int, depth: int, norm: str, activation: str, channel: str, place: Place
    ) -> None:
        super().__init__()
        half = max(1, hidden // 2)
        rest = (half, half, depth, norm, activation, "none", place)
        self.first = ConvNorm(inputs, 2 * dim, norm, 1, activation)
        self.parts = nn.ModuleList([CSP(dim, *rest), CSP(half, *rest)])
        self.convs = nn.ModuleList(ConvNorm(half, half, norm, 3, activation) for _ in range(2))
        self.out = ConvNorm(2 * dim + 2 * half, dim, norm, 1, activation)
        self.channel = channel_of(channel, dim, place)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        parts = [*self.first(x, context).chunk(2, -1)]
        for part, conv in zip(self.parts, self.convs, strict=True):
            parts.append(conv(part(parts[-1], context), context))
        y = self.out(torch.cat(parts, -1), context)
        return y if self.channel is None else self.channel(y, context)


NECKS: dict[str, type[CSP | ELAN]] = {"csp": CSP, "elan": ELAN}


class Neck(nn.Module):
    """Levels from fine to coarse, each side half of the one before -> the same levels, each having seen the others.

    Args:
        dim: channels of every level.
        levels: number of levels.
        kind: a row of NECKS; with `elan`, levels become coarser by a linear and a depthwise convolution.
        hidden: channels inside a layer.
        depth: RepBlocks in a CSP layer.
        norm: norm behind every convolution.
        activation: activation behind every norm, but with `elan` none where levels become coarser or go to finer ones.
        channel: channel attention behind every layer.
    """

    def __init__(
        self,
        dim: int,
        levels: int,
        kind: str,
        hidden: int,
        depth: int,
        norm: str,
        activation: str,
        channel: str,
        place: Place,
    ) -> None:
        super().__init__()
        row, light = NECKS[kind], kind == "elan"
        given = (2 * dim, dim, hidden, depth, norm, activation, channel, place)
        between = "" if light else activation
        self.laterals = nn.ModuleList(ConvNorm(dim, dim, norm, 1, between) for _ in range(levels - 1))
        self.down = nn.ModuleList(row(*given) for _ in range(levels - 1))
        self.points = nn.ModuleList(ConvNorm(dim, dim, norm) for _ in range(levels - 1)) if light else None
        shape = {"kernel": 3, "padding": 1, "before": False, "after": True, "bias": False}
        shape |= {"groups": dim if light else 1}
        self.reductions = nn.ModuleList(Reduction(dim, dim, norm, place, **shape) for _ in range(levels - 1))
        self.activation = activation_of(between) if between else None
        self.up = nn.ModuleList(row(*given) for _ in range(levels - 1))

    def forward(self, levels: Sequence[Level]) -> list[Level]:
        x, context = levels[-1]
        coarse: list[Level] = []
        for (fine, place), lateral, mix in zip(reversed(levels[:-1]), self.laterals, self.down, strict=True):
            x = lateral(x, context)
            coarse.insert(0, (x, context))
            x = mix(torch.cat([doubled(x, context.grid), fine], -1), place)
            context = place
        found = [(x, context)]
        for number, ((other, place), reduce, mix) in enumerate(zip(coarse, self.reductions, self.up, strict=True)):
            x = x if self.points is None else self.points[number](x, context)
            x = reduce(x, context)[0]
            x = x if self.activation is None else self.activation(x)
            x = mix(torch.cat([x, other], -1), place)
            context = place
            found.append((x, context))
        return found


def channel_of(spec: str, dim: int, place: Place) -> Layer | None:
    """The channel attention of this name, or None for `none`."""
    return None if parse(spec)[0] == "none" else make(CHANNELS, spec, dim, place, field="neck_channel")


def doubled(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, D] of a grid, repeated along both axes: [B, 4 N, D]."""
    return x.unflatten(1, grid)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(1, 4)
