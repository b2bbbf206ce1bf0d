"""Diffusion models with stages down and up, joined by skip connections (U-Net, Ronneberger et al. 2015,
arXiv:1505.04597; DiCo, Ai et al. 2025, arXiv:2505.11196)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import Size
from zoo.layer import Context
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.diffusion import DiffusionConfig, Embeddings, check_number, joined, last_modulation, preceded, start
from zoo.modulations import MODULATIONS
from zoo.norms import NORMS, Norm
from zoo.spec import Choice, make, names_of, parse
from zoo.stems.images import checked, coarsened, convolve, padding_of, stream
from zoo.tensors import compiling, to_map, to_tokens, zeroed


@dataclass(frozen=True, kw_only=True)
class UDiTConfig(DiffusionConfig):
    """A diffusion model with stages down and up. A tuple of choices has an entry for each stage.

    The number of stages is odd: each half of them before the middle one doubles the stride, each behind it halves it.
    The class tokens stand before the grid of the middle stage. Stages of one width share the embeddings of time and
    label.

    Args:
        dim: channels of each stage.
        depth: number of blocks of each stage.
        heads: attention heads of each stage.
    """

    dim: tuple[int, ...]
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    patch: int = 1
    mixer: Choice = "dico"
    ffn: Choice = "mlp(ratio=2.0)"
    position: Choice = "none"

    def check_sizes(self) -> None:
        if not len(self.dim) == len(self.depth) == len(self.heads) or len(self.dim) % 2 == 0:
            raise ValueError(
                "dim, depth and heads must have one number for each of an odd number of stages, "
                f"got {self.dim}, {self.depth}, {self.heads}"
            )
        if min(self.depth) < 1:
            raise ValueError(f"depth must be >= 1 in each stage, got {self.depth}")
        if bad := [width for width in self.dim[1 : self.middle + 1] if width % 4]:
            raise ValueError(f"dim must be a multiple of 4 in the stages down and in the middle, got {bad[0]}")
        super().check_sizes()

    @property
    def middle(self) -> int:
        """The stage with the largest stride."""
        return len(self.dim) // 2

    @property
    def stages(self) -> tuple[Size, ...]:
        return tuple(map(Size, self.dim, self.depth, self.heads))

    @property
    def staged(self) -> bool:
        return True

    def prefix_of(self, stage: int) -> int:
        return self.class_tokens if stage == self.middle else 0

    def path(self, stage: int, index: int) -> str:
        return f"stages.{stage}.blocks.{index}"

    def stride(self, stage: int) -> int:
        """Pixels of a side per token in a stage."""
        return self.patch * 2 ** min(stage, len(self.dim) - 1 - stage)

    def grid(self, stage: int) -> tuple[int, int]:
        side = -(-self.image // self.stride(stage))
        return side, side

    def build(self) -> "UDiT":
        return UDiT(self)


class OverlappingPatches(nn.Module):
    """As `Patches`, each of which sees the pixels around it, too: a convolution of stride `patch` that is patch + 2
    wide."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.conv = nn.Conv2d(channels, dim, patch + 2, patch, padding=1)

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Context]:
        maps = convolve(self.conv, checked(images, mask, self.channels))
        context = Context(grid=(maps.shape[2], maps.shape[3]), mask=coarsened(mask, self.patch))
        return stream(maps, self.conv), context


def squares_of(maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] in squares of 2 x 2, zeros beyond odd sides: [B, C, H', 2, W', 2]."""
    if compiling():  # splitting the sides would tie a traced program to even ones
        sides = (torch.arange((size - 1) // 2 + 1, device=maps.device) for size in maps.shape[2:])
        rows, columns = (2 * side[:, None] + torch.arange(2, device=maps.device) for side in sides)
        return F.pad(maps, (0, 1, 0, 1))[:, :, rows[:, :, None, None], columns]
    if any(padding := padding_of(maps.shape[2:], 2)):
        maps = F.pad(maps, padding)
    return maps.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))


class Down(nn.Module):
    """A convolution, then each 2 x 2 tokens become one; sides are halved and rounded up."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, dim // 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        maps, mask = self.conv(to_map(zeroed(x, context.mask), context.grid)), context.mask
        if mask is not None:
            real = mask.unflatten(1, context.grid)
            maps, mask = maps.masked_fill(~real[:, None], 0.0), coarsened(real, 2)
        squares = squares_of(maps).permute(0, 2, 4, 1, 3, 5)
        grid = (squares.shape[1], squares.shape[2])
        return squares.flatten(3).flatten(1, 2).to(x.dtype), context.moved(grid, mask=mask)


class Up(nn.Module):
    """A convolution, then each token becomes 2 x 2 of the width of those of the skip connection, which a linear joins
    them with."""

    def __init__(self, inputs: int, skip: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * skip, 3, padding=1, bias=False)
        self.out = nn.Linear(2 * skip, dim)

    def forward(self, x: Tensor, context: Context, skip: Tensor, finer: Context) -> Tensor:
        maps = self.conv(to_map(zeroed(x, context.mask), context.grid))
        squares = maps.unflatten(1, (-1, 2, 2)).permute(0, 4, 5, 2, 3, 1)
        tokens = to_tokens(joined(squares, finer.grid[0], finer.grid[1]))
        return self.out(torch.cat([tokens.to(skip.dtype), skip], -1)).to(skip.dtype)


class Stage(nn.Module):
    """What leads to the stage, `down` or `up`; a position; and Blocks."""

    def __init__(self, config: UDiTConfig, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        dim, before = config.dim, config.dim[stage - 1]
        self.down = Down(before, dim[stage]) if 0 < stage <= config.middle else None
        self.up = Up(before, dim[len(dim) - 1 - stage], dim[stage]) if stage > config.middle else None
        self.position = make_position(config, stage, prefix=False)
        self.blocks = nn.ModuleList(make_block(config, stage, index, rate) for index, rate in enumerate(rates))


class UDiT(Model[UDiTConfig]):
    """model(x [B, channels, H, W], time [B], labels [B]) -> the prediction [B, outputs, H, W].

    Without labels all are of no class. H and W are free; a mask [B, H, W] of real pixels lets several sizes share a
    batch. `until` [B], of models made for it, is the time at which the step ends, by default the time itself.
    """

    def __init__(self, config: UDiTConfig) -> None:
        super().__init__(config)
        last = config.block(len(config.dim) - 1)
        self.stem = OverlappingPatches(config.channels, config.dim[0], config.patch)
        # The noise ratio is the same for all widths; the label then is in the class tokens alone.
        embedded = MODULATIONS[parse(names_of(config.modulation)[0])[0]].embedded
        widths = list(dict.fromkeys(config.dim)) if embedded else [config.dim[config.middle]]
        self.embeddings = nn.ModuleList(Embeddings(config, width) for width in widths)
        self.embedding_of = [widths.index(width) if embedded else 0 for width in config.dim]
        self.replaceable = tuple(f"embeddings.{index}.label_table" for index in range(len(widths)))
        self.tokens = None
        if config.class_tokens:
            self.tokens = nn.Parameter(
                nn.init.normal_(torch.empty(1, config.class_tokens, config.dim[config.middle]), std=0.02)
            )
        rates = drop_rates(config.drop_path, sum(config.depth))
        stages = []
        for stage, depth in enumerate(config.depth):
            first = sum(config.depth[:stage])
            stages.append(Stage(config, stage, rates[first : first + depth]))
        self.stages = nn.ModuleList(stages)
        self.norm: Norm = make(NORMS, last.norm, last.dim, last.place, field="norm")
        self.modulation = last_modulation(config, last.modulation, last.dim, last.place)
        self.out = nn.Conv2d(last.dim, config.patch**2 * config.outputs, 3, padding=1)
        start(self.stages.modules(), self.stem.children(), self.out)

    @property
    def strides(self) -> list[int]:
        return [self.config.stride(stage) for stage in range(len(self.config.dim))]

    @property
    def channels(self) -> list[int]:
        return list(self.config.dim)

    def staged(
        self, x: Tensor, time: Tensor, labels: Tensor | None, until: Tensor | None, mask: Tensor | None, stages: int
    ) -> list[tuple[Tensor, Context]]:
        """The grid's tokens after each of the first stages, and their Context."""
        conditions = [each(time, labels, until) for each in self.embeddings]
        check_number(x, time)
        found: list[tuple[Tensor, Context]] = []
        for index, stage in enumerate(self.stages[:stages]):
            assert isinstance(stage, Stage)
            cond, _, vectors = conditions[self.embedding_of[index]]
            if stage.up is not None:
                skip, finer = found[len(self.stages) - 1 - index]
                tokens, context = stage.up(*found[-1], skip, finer), finer
            else:
                tokens, context = self.stem(x, mask) if stage.down is None else stage.down(*found[-1])
            context = stage.position.place(Context(grid=context.grid, mask=context.mask, cond=cond))
            tokens, inner = stage.position(tokens, context), context
            if index == self.config.middle and self.tokens is not None and vectors is not None:
                tokens, inner = preceded(tokens, self.tokens + vectors[:, None], context)
                inner = stage.position.place(inner)
            tokens = self.run(stage.blocks, tokens, inner)
            found.append((tokens[:, inner.prefix :], context))
        return found

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
        tokens, context = self.staged(x, time, labels, until, mask, len(self.stages))[-1]
        tokens, _ = self.modulation(self.norm(tokens, context), context)
        maps = self.out(to_map(zeroed(tokens, context.mask), context.grid))
        patch = self.config.patch
        patches = maps.unflatten(1, (patch, patch, self.config.outputs)).permute(0, 4, 5, 1, 2, 3)
        y = joined(patches, x.shape[2], x.shape[3])
        return y if mask is None else y.masked_fill(~mask[:, None], 0.0)

    def features(
        self,
        x: Tensor,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
        time: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """The tokens after the given stages (all if None; -1 is the last) as maps [B, C, H', W'] at `strides`; time
        None is 0, images without noise."""
        wanted = chosen_layers(layers, len(self.stages), "stage")
        time = x.new_zeros(x.shape[0]) if time is None else time
        found = self.staged(x, time, labels, None, mask, 1 + max(wanted, default=0))
        return [to_map(found[layer][0], found[layer][1].grid) for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name == "tokens" or name.endswith("position.table")}
