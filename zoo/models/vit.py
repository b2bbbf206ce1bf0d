"""Vision transformers: one resolution, any mixer (Dosovitskiy et al. 2021, arXiv:2010.11929; DeiT, Touvron et al. 2021,
arXiv:2012.12877)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.channels import grid_mean
from zoo.config import FlatConfig
from zoo.fusion import fold_in, keep, not_affine
from zoo.heads.images import AttentionPool
from zoo.layer import Carry, Context, Fold, Order
from zoo.models.base import ClassifierConfig, Model, chosen_layers, drop_rates, make_block, make_position
from zoo.norms import NORMS, Norm
from zoo.spec import make
from zoo.stems.images import Patches
from zoo.tensors import linear, to_map
from zoo.text import unknown

POOLS = ("mean", "token", "norm_after_mean", "distilled", "token_and_mean", "attention")
OF_TOKENS = ("token", "distilled", "token_and_mean")  # pools that read a class token


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ClassifierConfig, FlatConfig):
    """A vision transformer.

    Args:
        patch: side of a patch in pixels.
        pool: the input of the head: `mean` of the normalized grid tokens; `token`, the normalized class token;
            `norm_after_mean`, the mean, then normalized; `distilled`, the mean of the logits of a class and a
            distillation token, each with its own head; `token_and_mean`, the first two joined, 2 dim wide (DINOv2,
            Oquab et al. 2023, arXiv:2304.07193); `attention`, what a learned query gives that attends to the
            normalized grid tokens, then a feed-forward layer (SigLIP, Zhai et al. 2023, arXiv:2303.15343).
        class_token: whether a class token comes before the grid; pools of a token need it.
        causal: whether each token sees only itself and the patches before it, line by line. Prefix tokens see all
            tokens, and no patch sees them. The mixer `causal` reaches this in the course of training.
        first_norm: whether the tokens are normalized before the first block, and patches have no bias (CLIP, Radford et
            al. 2021, arXiv:2103.00020).
        registers: further learned tokens before the grid (Darcet et al. 2024, arXiv:2309.16588).
    """

    shown = (*FlatConfig.shown, "classes")

    patch: int = 16
    pool: str = "mean"
    class_token: bool = False
    first_norm: bool = False
    registers: int = 0
    causal: bool = False

    def check_sizes(self) -> None:
        if min(self.image, self.patch, self.channels) < 1 or min(self.classes, self.registers) < 0:
            raise ValueError("image, patch and channels must be >= 1, classes and registers >= 0")
        if self.pool not in POOLS:
            raise ValueError(f"pool: {unknown('name', self.pool, POOLS)}")
        if self.pool in OF_TOKENS and not self.class_token:
            raise ValueError(f"pool '{self.pool}' needs a class token; add class_token=True or choose pool 'mean'")
        if self.pool == "attention" and self.dim % max(1, self.heads):
            raise ValueError(f"pool 'attention' needs heads that divide dim {self.dim}, got {self.heads}")

    @property
    def prefix(self) -> int:
        """The number of tokens before the grid."""
        return self.class_token + (self.pool == "distilled") + self.registers

    @property
    def writes(self) -> frozenset[str]:
        return super().writes | ({"order"} if self.causal else set())

    @property
    def tokens_read(self) -> int:
        return (self.pool in OF_TOKENS) + (self.pool == "distilled")

    def grid(self, stage: int) -> tuple[int, int]:
        side = -(-self.image // self.patch)
        return side, side

    def build(self) -> "ViT":
        return ViT(self)


class ViT(Model[ViTConfig]):
    """model(images [B, channels, H, W]) -> logits [B, classes], or pooled tokens [B, num_features] if classes = 0.

    H and W are free. A mask [B, H, W] of real pixels lets images of several sizes share a batch.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        first = config.block()
        self.stem = Patches(config.channels, config.dim, config.patch, bias=not config.first_norm)
        self.tokens = None
        if config.prefix:
            self.tokens = nn.Parameter(torch.zeros(1, config.prefix, config.dim))
            nn.init.trunc_normal_(self.tokens, std=0.02)
        self.position = make_position(config)
        self.first_norm: Norm | None = None
        if config.first_norm:
            self.first_norm = make(NORMS, first.norm, config.dim, first.place, field="norm")
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(make_block(config, 0, index, rate) for index, rate in enumerate(rates))
        self.norm: Norm | None = make(NORMS, first.norm, config.dim, first.place, field="norm")
        self.pooler = None
        if config.pool == "attention":
            self.pooler = AttentionPool(config.dim, config.heads, first.norm, first.ffn, first.place)
        self.head = linear(self.num_features, config.classes) if config.classes else None
        self.head_distilled = None
        if config.pool == "distilled" and config.classes:
            self.head_distilled = linear(config.dim, config.classes)

    @property
    def strides(self) -> list[int]:
        return [self.config.patch] * self.config.depth

    @property
    def channels(self) -> list[int]:
        return [self.config.dim] * self.config.depth

    @property
    def num_features(self) -> int:
        return self.config.dim * (2 if self.config.pool == "token_and_mean" else 1)

    def embed(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Context]:
        """Tokens [B, N, dim] with positions, and the Context of all blocks."""
        x, grid, mask = self.stem(images, mask)
        prefix = self.config.prefix
        if self.tokens is not None:
            x = torch.cat([self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(x.shape[0], prefix), mask], 1)
        order = Order(prefix) if self.config.causal else None
        context = Context(grid=grid, prefix=prefix, mask=mask, order=order, carry=Carry())
        context = self.position.place(context)
        x = self.position(x, context)
        return x if self.first_norm is None else self.first_norm(x, context), context

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images [B, channels, H, W] and a mask [B, H, W] of real pixels -> [B, classes], or [B, num_features]."""
        x, context = self.embed(images, mask)
        x = self.run(self.blocks, x, context)
        pooled = self.pool(x, context)
        if self.head is None:
            return pooled.mean(1)
        if self.head_distilled is None:
            return self.head(pooled[:, 0])
        return (self.head(pooled[:, 0]) + self.head_distilled(pooled[:, 1])) / 2

    def pool(self, x: Tensor, context: Context) -> Tensor:
        """The input of the head: [B, 1, num_features], or [B, 2, dim] for a distilled model."""
        if self.config.pool == "norm_after_mean":
            pooled = grid_mean(x, context)[:, None]
            return pooled if self.norm is None else self.norm(pooled, Context(grid=(1,)))
        x = x if self.norm is None else self.norm(x, context)
        if self.pooler is not None:
            return self.pooler(x, context)
        if self.config.pool == "mean":
            return grid_mean(x, context)[:, None]
        if self.config.pool == "token_and_mean":
            return torch.cat([x[:, 0], grid_mean(x, context)], -1)[:, None]
        return x[:, : self.config.tokens_read]

    def features(self, images: Tensor, layers: Sequence[int] | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The grid's tokens after the given blocks (all if None; -1 is the last), not normalized, as maps
        [B, dim, H', W']."""
        wanted = chosen_layers(layers, self.config.depth, "block")
        x, context = self.embed(images, mask)
        maps = []
        for block in self.blocks[: 1 + max(wanted, default=-1)]:
            x = self.run((block,), x, context)
            maps.append(x)
        return [to_map(maps[layer][:, context.prefix :], context.grid) for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in ("tokens", "position.table", "pooler.query")}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        after = (r"^(?:norm|pooler)", (99999,))
        return {"stem": r"^(?:stem|tokens|position|first_norm)", "blocks": [(r"^blocks\.(\d+)", None), after]}

    def fold(self) -> list[Fold]:
        """Folds the final norm into the heads, through the mean."""
        kept = [] if self.first_norm is None else [keep(self, "first_norm", "the stream reads it")]
        if self.norm is None:
            return kept
        affine = self.norm.affine()
        if affine is None:
            return [*kept, Fold("norm", None, not_affine(self.norm))]
        if self.pooler is not None:
            self.pooler.fold_in(*affine)
        elif self.head is None:
            return [*kept, keep(self, "norm", "the model has no head")]
        else:
            for head in (self.head, self.head_distilled):
                if head is not None:
                    fold_in(head, *(each.repeat(self.num_features // len(each)) for each in affine))
        self.norm = None
        return [*kept, Fold("norm", "the head" if self.pooler is None else "the pooler")]
