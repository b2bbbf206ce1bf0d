"""Diffusion transformers: noise and images to a prediction of either (DiT, Peebles and Xie 2023, arXiv:2212.09748; SiT,
Ma et al. 2024, arXiv:2401.08740; JiT, Li and He 2025, arXiv:2511.13720)."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import FlatConfig, Size
from zoo.layer import Carry, Context, Memory
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.decoupled import DecoupledHead
from zoo.models.diffusion import (
    Conditioned,
    Conditions,
    DiffusionConfig,
    check_number,
    joined,
    last_modulation,
    preceded,
    start,
)
from zoo.modulations import MODULATIONS
from zoo.norms import NORMS, Norm
from zoo.spec import Choice, make, names_of, parse
from zoo.stems.images import Patches
from zoo.tensors import to_map


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiffusionConfig, FlatConfig):
    """A diffusion transformer.

    Args:
        bottleneck: width between the two linears of the patch embedding; 0 for one linear.
        class_block: the first block that sees the class tokens.
        memory_dim: channels of the tokens, such as those of a text, that the layout's `cross` reads; 0 for none.
        head_depth: blocks of a decoupled head, which the tokens of the blocks before it modulate (DDT, Wang et al.
            2025, arXiv:2504.05741); 0 for none.
        head_dim: its channels; 0 for `dim`.
        head_heads: its attention heads; 0 for `heads`.
    """

    provides = frozenset({"cond", "memory"})

    bottleneck: int = 0
    class_block: int = 0
    memory_dim: int = 0
    head_dim: int = 0
    head_depth: int = 0
    head_heads: int = 0
    ffn: Choice = "mlp(activation='gelu_tanh')"
    position: str = "sincos(order='xy')"

    def check_sizes(self) -> None:
        for name in ("bottleneck", "memory_dim", "head_depth", "head_dim", "head_heads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if (self.head_dim or self.head_heads) and not self.head_depth:
            raise ValueError("head_dim and head_heads would be ignored; set head_depth")
        if self.memory_dim and "cross" not in self.words:
            raise ValueError("memory_dim would be ignored: the layout has no cross")
        if "cross" in self.words and not self.memory_dim and self.modulation != "cross":
            raise ValueError("layout: nothing for 'cross' to read; set memory_dim, or modulation='cross'")
        if "cross" in self.words and (bad := {*names_of(self.cross)} - {"softmax"}):
            raise ValueError(f"cross '{min(bad)}' needs the maps of a detector; choose softmax")
        if not 0 <= self.class_block <= max(0, self.depth - 1) or self.class_block and not self.class_tokens:
            raise ValueError(f"class_block must be a block that sees class_tokens, got {self.class_block}")
        super().check_sizes()
        row = MODULATIONS.get(parse(names_of(self.modulation)[0])[0])
        if self.head_depth and row is not None and (row.remembered or not row.embedded):
            raise ValueError(f"head_depth needs modulation adaln or adaln_single, got '{self.modulation}'")

    @property
    def stages(self) -> tuple[Size, ...]:
        whole = Size(self.dim, self.depth, self.heads)
        head = Size(self.head_dim or self.dim, self.head_depth, self.head_heads or self.heads)
        return (whole, head) if self.head_depth else (whole,)

    @property
    def prefix(self) -> int:
        return self.class_tokens

    def prefix_of(self, stage: int) -> int:
        return 0 if stage else self.prefix

    def part(self, stage: int, index: int) -> int:
        return int(not stage and index >= self.class_block)

    def path(self, stage: int, index: int) -> str:
        return f"head.blocks.{index}" if stage else f"blocks.{index}"

    def located(self, stage: int, index: int) -> str:
        return f"{self.path(stage, index)}: " if stage else super().located(stage, index)

    def grid(self, stage: int) -> tuple[int, int]:
        side = -(-self.image // self.patch)
        return side, side

    def build(self) -> "DiT":
        return DiT(self)


class TwoLinears(Patches):
    """As `Patches`, in two linears with `width` channels between them (JiT, Li and He 2025, arXiv:2511.13720)."""

    def __init__(self, channels: int, width: int, dim: int, patch: int) -> None:
        super().__init__(channels, width, patch, bias=False)
        self.out = nn.Linear(width, dim)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        tokens, grid, mask = super().forward(images, mask)
        return self.out(tokens), grid, mask


def stem(config: DiTConfig, dim: int) -> Patches:
    """The patch embedding, for tokens of this width."""
    if config.bottleneck:
        return TwoLinears(config.channels, config.bottleneck, dim, config.patch)
    return Patches(config.channels, dim, config.patch)


class DiT(Conditioned, Model[DiTConfig]):
    """model(x [B, channels, H, W], time [B], labels [B]) -> the prediction [B, outputs, H, W].

    Without labels all are of no class. H and W are free; a mask [B, H, W] of real pixels lets several sizes share a
    batch. `until` [B], of models made for it, is the time at which the step ends, by default the time itself. `memory`,
    of models with memory_dim, holds the tokens that `cross` reads; without it a learned token stands for them.
    """

    replaceable = ("label_table",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        first = config.block()
        self.stem = stem(config, config.dim)
        self.position = make_position(config, prefix=False)
        self.add_embeddings(config, config.dim)
        self.tokens = None
        if config.class_tokens:
            self.tokens = nn.Parameter(nn.init.normal_(torch.empty(1, config.class_tokens, config.dim), std=0.02))
        self.remember = self.nothing = None
        if config.memory_dim:
            self.remember = nn.Linear(config.memory_dim, config.dim)
            self.nothing = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.memory_dim), std=0.02))
        rates = drop_rates(config.drop_path, config.depth + config.head_depth)
        before, behind = rates[: config.depth], rates[config.depth :]
        self.blocks = nn.ModuleList(make_block(config, 0, index, rate) for index, rate in enumerate(before))
        self.head = DecoupledHead(config, partial(stem, config), behind) if behind else None
        if self.head is None:
            self.norm: Norm = make(NORMS, first.norm, config.dim, first.place, field="norm")
            self.modulation = last_modulation(config, first.modulation, config.dim, first.place)
        self.out = nn.Linear(config.stages[-1].dim, config.patch**2 * config.outputs)
        blocks, patches = [*self.blocks.modules()], [*self.stem.children()]
        if self.head is not None:
            blocks, patches = [*blocks, *self.head.blocks.modules()], [*patches, *self.head.stem.children()]
        start([layer for layer in blocks if isinstance(layer, nn.Linear)], patches, self.out)

    @property
    def strides(self) -> list[int]:
        return [self.config.patch] * self.config.depth

    @property
    def channels(self) -> list[int]:
        return [self.config.dim] * self.config.depth

    def embed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Context]:
        """Tokens [B, N, dim] with positions, and the Context of the first block, without the condition."""
        tokens, grid, mask = self.stem(x, mask)
        context = self.position.place(Context(grid=grid, mask=mask, carry=Carry()))
        return self.position(tokens, context), context

    def join(self, tokens: Tensor, context: Context, vectors: Tensor | None) -> tuple[Tensor, Context]:
        """The class tokens before the others, and the Context of the blocks that see them."""
        if self.tokens is None or vectors is None:
            return tokens, context
        together, context = preceded(tokens, self.tokens + vectors[:, None], context)
        return together, self.position.place(context)

    def memory(self, given: Memory | None, found: Conditions, batch: int) -> Memory | None:
        """What the layout's `cross` reads: the given tokens, and those of time and label if they are not modulated."""
        if given is not None and self.remember is None:
            raise ValueError("this model takes no memory; its config has memory_dim=0")
        parts, masks = [], []
        if self.remembered:
            own = [each for each in (found.times, found.labels) if each is not None]
            parts.append(torch.stack(own, 1))
        if self.remember is not None:
            assert self.nothing is not None
            tokens = self.nothing.expand(batch, -1, -1) if given is None else given.tokens
            parts.append(self.remember(tokens))
            if given is not None and given.mask is not None:
                masks = [given.mask.new_ones(batch, each.shape[1]) for each in parts[:-1]] + [given.mask]
        if not parts:
            return None
        return Memory(torch.cat(parts, 1), torch.cat(masks, 1) if masks else None)

    def tokens_after(
        self, x: Tensor, found: Conditions, memory: Memory | None, mask: Tensor | None, block: int
    ) -> Iterator[tuple[Tensor, Context]]:
        """The grid's tokens after each block up to `block`, and their Context."""
        tokens, context = self.embed(x, mask)
        context = context._replace(cond=found.cond, memory=self.memory(memory, found, x.shape[0]))
        for index in range(block + 1):
            if index == self.config.class_block:
                tokens, context = self.join(tokens, context, found.labels)
            tokens = self.run((self.blocks[index],), tokens, context)
            yield tokens[:, context.prefix :], context

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor | None = None,
        *,
        until: Tensor | None = None,
        memory: Memory | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, channels, H, W], times [B] in 0..1 and labels [B] -> [B, outputs, H, W]; zeros where the mask [B, H, W]
        is False."""
        found = self.conditions(time, labels, until)
        check_number(x, time)
        ((tokens, context),) = deque(self.tokens_after(x, found, memory, mask, self.config.depth - 1), maxlen=1)
        last: Any = self
        context = context.moved(context.grid, mask=context.grid_mask)
        if self.head is not None:
            assert found.times is not None
            last = self.head
            tokens, context = self.head.placed(x, mask, tokens, found.times[:, None], context)
            tokens = self.run(self.head.blocks, tokens, context)
        tokens, _ = last.modulation(last.norm(tokens, context), context)
        patch, grid = self.config.patch, (context.grid[0], context.grid[1])
        y = joined(self.out(tokens).view(-1, *grid, patch, patch, self.config.outputs), x.shape[2], x.shape[3])
        return y if mask is None else y.masked_fill(~mask[:, None], 0.0)

    def features(
        self,
        x: Tensor,
        layers: Sequence[int] | None = None,
        mask: Tensor | None = None,
        time: Tensor | None = None,
        labels: Tensor | None = None,
        memory: Memory | None = None,
    ) -> list[Tensor]:
        """The grid's tokens after the given blocks (all if None; -1 is the last) as maps [B, dim, H', W']; time None is
        0, images without noise."""
        wanted = chosen_layers(layers, self.config.depth, "block")
        time = x.new_zeros(x.shape[0]) if time is None else time
        found = self.conditions(time, labels, None)
        check_number(x, time)
        maps = [
            to_map(tokens, context.grid)
            for tokens, context in self.tokens_after(x, found, memory, mask, max(wanted, default=-1))
        ]
        return [maps[layer] for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        own = ("tokens", "nothing", "position.table", "head.position.table")
        return {name for name, _ in self.named_parameters() if name in own}
