"""Diffusion transformers: noise and images to a prediction of either (DiT, Peebles and Xie 2023, arXiv:2212.09748; SiT,
Ma et al. 2024, arXiv:2401.08740; JiT, Li and He 2025, arXiv:2511.13720)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.config import Choice, FlatConfig
from zoo.layer import Context
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.models.diffusion import Conditioned, DiffusionConfig, joined, last_modulation, start
from zoo.norms import NORMS, Norm
from zoo.spec import make
from zoo.stems.images import Patches
from zoo.tensors import to_map


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiffusionConfig, FlatConfig):
    """A diffusion transformer.

    Args:
        bottleneck: width between the two linears of the patch embedding; 0 for one linear.
        class_block: the first block that sees the class tokens.
    """

    bottleneck: int = 0
    class_block: int = 0
    ffn: Choice = "mlp(activation='gelu_tanh')"
    position: str = "sincos(order='xy')"

    def check_sizes(self) -> None:
        if self.bottleneck < 0:
            raise ValueError(f"bottleneck must be >= 0, got {self.bottleneck}")
        if not 0 <= self.class_block <= max(0, self.depth - 1) or self.class_block and not self.class_tokens:
            raise ValueError(f"class_block must be a block that sees class_tokens, got {self.class_block}")
        super().check_sizes()

    @property
    def prefix(self) -> int:
        return self.class_tokens

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


class DiT(Conditioned, Model[DiTConfig]):
    """model(x [B, channels, H, W], time [B], labels [B]) -> the prediction [B, outputs, H, W].

    Without labels all are of no class. H and W are free; a mask [B, H, W] of real pixels lets several sizes share a
    batch. `until` [B], of models made for it, is the time at which the step ends, by default the time itself.
    """

    replaceable = ("label_table",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        first = config.block()
        if config.bottleneck:
            self.stem = TwoLinears(config.channels, config.bottleneck, config.dim, config.patch)
        else:
            self.stem = Patches(config.channels, config.dim, config.patch)
        self.position = make_position(config)
        self.add_embeddings(config, config.dim)
        self.tokens = None
        if config.class_tokens:
            self.tokens = nn.Parameter(0.02 * torch.randn(1, config.class_tokens, config.dim))
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(make_block(config, 0, index, rate) for index, rate in enumerate(rates))
        self.norm: Norm = make(NORMS, first.norm, config.dim, first.place, field="norm")
        self.modulation = last_modulation(config, first.modulation, config.dim, first.place)
        self.out = nn.Linear(config.dim, config.patch**2 * config.outputs)
        linears = [layer for layer in self.blocks.modules() if isinstance(layer, nn.Linear)]
        start(linears, self.stem.children(), self.out)

    @property
    def strides(self) -> list[int]:
        return [self.config.patch] * self.config.depth

    @property
    def channels(self) -> list[int]:
        return [self.config.dim] * self.config.depth

    def embed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Context]:
        """Tokens [B, N, dim] with positions, and the Context of the first block, without the condition."""
        tokens, grid, mask = self.stem(x, mask)
        context = self.position.place(Context(grid=grid, mask=mask))
        return self.position(tokens, context), context

    def join(self, tokens: Tensor, context: Context, vectors: Tensor | None) -> tuple[Tensor, Context]:
        """The class tokens before the others, and the Context of the blocks that see them."""
        if self.tokens is None or vectors is None:
            return tokens, context
        own = self.tokens + vectors[:, None]
        mask = context.mask
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], own.shape[1]), mask], 1)
        joined = self.position.place(Context(grid=context.grid, prefix=own.shape[1], mask=mask, cond=context.cond))
        return torch.cat([own.to(tokens.dtype), tokens], 1), joined

    def tokens_after(
        self, x: Tensor, time: Tensor, labels: Tensor | None, until: Tensor | None, mask: Tensor | None, block: int
    ) -> Iterator[tuple[Tensor, Context]]:
        """The grid's tokens after each block up to `block`, and their Context."""
        tokens, context = self.embed(x, mask)
        cond, vectors = self.conditions(time, labels, until)
        context = context._replace(cond=cond)
        for index in range(block + 1):
            if index == self.config.class_block:
                tokens, context = self.join(tokens, context, vectors)
            tokens = self.run((self.blocks[index],), tokens, context)
            yield tokens[:, context.prefix :], context

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
        *_, (tokens, context) = self.tokens_after(x, time, labels, until, mask, self.config.depth - 1)
        grid = Context(grid=context.grid, mask=context.grid_mask, cond=context.cond)
        tokens, _ = self.modulation(self.norm(tokens, grid), grid)
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
    ) -> list[Tensor]:
        """The grid's tokens after the given blocks (all if None; -1 is the last) as maps [B, dim, H', W']; time None is
        0, images without noise."""
        wanted = chosen_layers(layers, self.config.depth, "block")
        time = x.new_zeros(x.shape[0]) if time is None else time
        found = [
            to_map(tokens, context.grid)
            for tokens, context in self.tokens_after(x, time, labels, None, mask, max(wanted, default=-1))
        ]
        return [found[layer] for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in ("tokens", "position.table")}
