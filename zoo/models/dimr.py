"""Diffusion models with a branch for each resolution, from coarse to fine (DiMR, Liu et al. 2024, arXiv:2406.09416)."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import Size
from zoo.layer import Carry, Context
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.diffusion import DiffusionConfig, Embeddings, joined, last_modulation, preceded
from zoo.modulations import MODULATIONS, Modulation, TimeDependent
from zoo.norms import LayerNorm
from zoo.spec import Choice, names_of, parse
from zoo.stems.images import Patches
from zoo.tensors import linear, to_map, to_tokens, zeroed


@dataclass(frozen=True, kw_only=True)
class DiMRConfig(DiffusionConfig):
    """A diffusion model with branches from coarse to fine. A tuple of choices has an entry for each branch.

    The last branch has patches of `patch` pixels, each one before it of twice as many as the next. The class tokens
    stand before the grid of the first branch.

    Args:
        dim: channels of each branch.
        depth: number of blocks of each branch, odd: each block behind the middle one also sees a block before it.
        heads: attention heads of each branch.
        fine_layout: as layout, of all branches but the first.
    """

    dim: tuple[int, ...]
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    patch: int = 1
    class_tokens: int = 1
    fine_layout: tuple[str, ...] = ("conv", "ffn")
    conv: Choice = "depthwise(kernel=7)"
    ffn: Choice = "geglu(ratio=2.0)"
    norm: Choice = "rmsnorm(affine=False)"
    modulation: Choice = "tdn"
    position: Choice = "learned"

    def check_sizes(self) -> None:
        if not len(self.dim) == len(self.depth) == len(self.heads) or len(self.dim) < 2:
            raise ValueError(
                "dim, depth and heads must have one number for each of at least two branches, "
                f"got {self.dim}, {self.depth}, {self.heads}"
            )
        if bad := [number for number in self.depth if number < 1 or number % 2 == 0]:
            raise ValueError(f"depth must be odd in each branch, got {bad[0]}")
        super().check_sizes()
        if self.embedded and len(self.layout) != len(self.fine_layout):
            raise ValueError(
                f"modulation '{self.described('modulation')}' needs as many entries in fine_layout as in layout"
            )

    @property
    def embedded(self) -> bool:
        """Whether the blocks' condition is an embedding of time and label, of the width of their branch."""
        return MODULATIONS[parse(names_of(self.modulation)[0])[0]].embedded

    @property
    def stages(self) -> tuple[Size, ...]:
        return tuple(map(Size, self.dim, self.depth, self.heads))

    @property
    def staged(self) -> bool:
        return True

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        return self.layout, self.fine_layout

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(2**exponent for exponent in range(len(self.dim) - 1, 0, -1))

    def prefix_of(self, stage: int) -> int:
        return 0 if stage else self.class_tokens

    def path(self, stage: int, index: int) -> str:
        return f"branches.{stage}.blocks.{index}"

    def stride(self, stage: int) -> int:
        """Pixels of a side per token in a branch."""
        return self.patch * 2 ** (len(self.dim) - 1 - stage)

    def grid(self, stage: int) -> tuple[int, int]:
        side = -(-self.image // self.stride(stage))
        return side, side

    def build(self) -> "DiMR":
        return DiMR(self)


class Adjusted(nn.Module):
    """LayerNorm, then a modulation; a learned gain and shift if there is none."""

    def __init__(self, dim: int, modulation: Modulation | None) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, affine=modulation is None, eps=1e-5)
        self.modulation = modulation

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.norm(x, context)
        return y if self.modulation is None else self.modulation(y, context)[0]


class Up(nn.Module):
    """The tokens that a branch had before its blocks and behind each, side by side; each becomes 2 x 2 tokens of the
    next branch."""

    def __init__(self, inputs: int, dim: int, timed: bool) -> None:
        super().__init__()
        self.before = Adjusted(inputs, TimeDependent(inputs, shift=True) if timed else None)
        self.expand = linear(inputs, 4 * dim)
        self.after = Adjusted(dim, TimeDependent(dim, shift=True) if timed else None)

    def forward(self, seen: Sequence[Tensor], context: Context, finer: Context) -> Tensor:
        y = self.expand(self.before(torch.cat([*seen], -1), context))
        squares = y.unflatten(1, context.grid).unflatten(-1, (2, 2, -1))
        return self.after(to_tokens(joined(squares, finer.grid[0], finer.grid[1])), finer)


class Branch(nn.Module):
    """Patches, a position, what comes from the branch before, Blocks and a prediction.

    Each block behind the middle one has a linear before it, `skips`, of its input and the output of a block before the
    middle one, the last of these first (U-ViT, Bao et al. 2023, arXiv:2209.12152).
    """

    def __init__(self, config: DiMRConfig, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        dim, depth, timed = config.dim[stage], config.depth[stage], not config.embedded
        self.patch = config.patch
        self.outputs = config.outputs if stage == len(config.dim) - 1 else config.channels
        self.stem = Patches(config.channels, dim, config.stride(stage))
        self.position = make_position(config, stage, prefix=False)
        self.up = None
        if stage:
            self.up = Up(config.dim[stage - 1] * (config.depth[stage - 1] + 1), dim, timed)
        self.blocks = nn.ModuleList(make_block(config, stage, index, rate) for index, rate in enumerate(rates))
        self.skips = nn.ModuleList(linear(2 * dim, dim) for _ in range(depth // 2))
        first = config.block(stage)
        last = TimeDependent(dim, shift=True) if timed else last_modulation(config, first.modulation, dim, first.place)
        self.norm = Adjusted(dim, last)
        self.out = nn.Conv2d(dim, config.patch**2 * self.outputs, 3, padding=1)

    def enter(
        self, x: Tensor, mask: Tensor | None, cond: Tensor | None, before: tuple[list[Tensor], Context] | None
    ) -> tuple[Tensor, Context]:
        """The tokens before the first block and their Context, from the image and what the branch before saw."""
        tokens, grid, real = self.stem(x, mask)
        context = self.position.place(Context(grid=grid, mask=real, cond=cond, carry=Carry()))
        tokens = self.position(tokens, context)
        if self.up is not None:
            assert before is not None
            tokens = tokens + self.up(*before, context).to(tokens.dtype)
        return tokens, context

    def predict(self, tokens: Tensor, context: Context, height: int, width: int) -> Tensor:
        """The prediction of the grid's tokens: [B, outputs, height, width]."""
        maps = self.out(to_map(zeroed(self.norm(tokens, context), context.mask), context.grid))
        patches = maps.unflatten(1, (self.patch, self.patch, self.outputs)).permute(0, 4, 5, 1, 2, 3)
        return joined(patches, height, width)


class DiMR(Model[DiMRConfig]):
    """model(x [B, channels, H, W], time [B], labels [B]) -> the prediction [B, outputs, H, W] of the last branch.

    Without labels all are of no class. H and W are free; a mask [B, H, W] of real pixels lets several sizes share a
    batch. `until` [B], of models made for it, is the time at which the step ends, by default the time itself. Training
    also uses the other branches' `predictions`. Where the blocks have modulation `tdn`, the norms outside them have
    `tdn(shift=True)`.
    """

    def __init__(self, config: DiMRConfig) -> None:
        super().__init__(config)
        # The noise ratio is the same for all widths; the label then is in the class tokens alone.
        widths = config.dim if config.embedded else config.dim[:1]
        self.embeddings = nn.ModuleList(Embeddings(config, width) for width in widths)
        self.replaceable = tuple(f"embeddings.{index}.label_table" for index in range(len(widths)))
        self.tokens = None
        if config.class_tokens:
            self.tokens = nn.Parameter(nn.init.normal_(torch.empty(1, config.class_tokens, config.dim[0]), std=0.02))
        rates = drop_rates(config.drop_path, sum(config.depth))
        branches = []
        for stage, depth in enumerate(config.depth):
            before = sum(config.depth[:stage])
            branches.append(Branch(config, stage, rates[before : before + depth]))
        self.branches = nn.ModuleList(branches)

    @property
    def strides(self) -> list[int]:
        return [self.config.stride(stage) for stage in range(len(self.config.dim))]

    @property
    def channels(self) -> list[int]:
        return list(self.config.dim)

    def tokens_after(self, branch: Branch, x: Tensor, context: Context) -> Iterator[Tensor]:
        """The tokens behind each block of a branch."""
        middle, kept = len(branch.skips), []
        for index, block in enumerate(branch.blocks):
            if index > middle:
                x = branch.skips[index - middle - 1](torch.cat([x, kept.pop()], -1)).to(x.dtype)
            x = self.run((block,), x, context)
            if index < middle:
                kept.append(x)
            yield x

    def found(
        self, x: Tensor, time: Tensor, labels: Tensor | None, until: Tensor | None, mask: Tensor | None, branches: int
    ) -> Iterator[tuple[Tensor, Context]]:
        """The grid's tokens behind the last block of each of the first branches, and their Context."""
        conditions = [each(time, labels, until) for each in self.embeddings]
        before = None
        for index, branch in enumerate(self.branches[:branches]):
            assert isinstance(branch, Branch)
            cond, _, vectors = conditions[min(index, len(conditions) - 1)]
            tokens, context = branch.enter(x, mask, cond, before)
            whole, inner = tokens, context
            if index == 0 and self.tokens is not None and vectors is not None:
                whole, inner = preceded(tokens, self.tokens + vectors[:, None], context)
                inner = branch.position.place(inner)
            behind = self.tokens_after(branch, whole, inner)
            if index == len(self.branches) - 1:
                (last,) = deque(behind, maxlen=1)
            else:
                before = [tokens, *(each[:, inner.prefix :] for each in behind)], context
                last = before[0][-1]
            yield last, context

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor | None = None,
        *,
        until: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, channels, H, W], times [B] in 0..1 and labels [B] -> [B, outputs, H, W]; zeros where the mask [B, H, W]
        is False."""
        branch: Any = self.branches[-1]
        ((tokens, context),) = deque(self.found(x, time, labels, until, mask, len(self.branches)), maxlen=1)
        y = branch.predict(tokens, context, x.shape[2], x.shape[3])
        return y if mask is None else y.masked_fill(~mask[:, None], 0.0)

    def predictions(
        self, x: Tensor, time: Tensor, labels: Tensor | None = None, *, until: Tensor | None = None
    ) -> list[Tensor]:
        """The prediction of each branch for its training. That of the last is `forward`'s; those of the others are
        [B, channels, H', W'] for sides divided by the config's `scales` and rounded up."""
        sides = [(-(-x.shape[2] // scale), -(-x.shape[3] // scale)) for scale in (*self.config.scales, 1)]
        found = self.found(x, time, labels, until, None, len(self.branches))
        branches: Any = self.branches
        return [
            branch.predict(tokens, context, *side)
            for branch, (tokens, context), side in zip(branches, found, sides, strict=True)
        ]

    def features(
        self,
        x: Tensor,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
        time: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """The tokens behind the given branches (all if None; -1 is the last) as maps [B, C, H', W'] at `strides`; time
        None is 0, images without noise."""
        wanted = chosen_layers(layers, len(self.branches), "branch")
        time = x.new_zeros(x.shape[0]) if time is None else time
        found = [*self.found(x, time, labels, None, mask, 1 + max(wanted, default=-1))]
        return [to_map(found[layer][0], found[layer][1].grid) for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name == "tokens" or name.endswith("position.table")}
