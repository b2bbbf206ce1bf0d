"""Hierarchical models: stages of Blocks on ever coarser grids, for classification and for detectors that use features
(MetaFormer, Yu et al. 2022, arXiv:2111.11418 and arXiv:2210.13452; DaViT, Ding et al. 2022, arXiv:2204.03645;
FlashInternImage, Xiong et al. 2024, arXiv:2401.06197; PVT, Wang et al. 2021, arXiv:2102.12122)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zoo.config import ModelConfig, Size
from zoo.heads import HEADS
from zoo.layer import Context
from zoo.models.base import ClassifierConfig, Model, chosen_layers, drop_rates, make_block, make_position, run
from zoo.norms import NORMS
from zoo.spec import Choice, check, make, parse
from zoo.stems import REDUCTIONS, STEMS
from zoo.tensors import to_map


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(ClassifierConfig, ModelConfig):
    """A hierarchical model. A tuple of choices has an entry for each stage.

    The stem and a reduction take the norm of the first block that they lead to.

    Args:
        dim: channels of each stage.
        depth: number of blocks of each stage.
        heads: attention heads of each stage.
        stem: from the image to the tokens of the first stage.
        reduction: from a stage to the next.
        head: from the tokens of the last stage to logits.
        final_norm: norm of the head; empty for that of the last stage's first block.
    """

    shown = (*ModelConfig.shown, "classes")

    dim: tuple[int, ...]
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    position: Choice = "none"
    stem: str = "conv"
    reduction: str = "conv"
    head: str = "linear"
    final_norm: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.image, self.channels) < 1 or self.classes < 0:
            raise ValueError("image and channels must be >= 1, classes >= 0")
        for field, table in (("reduction", REDUCTIONS), ("head", HEADS), ("final_norm", NORMS)):
            try:
                check(table, getattr(self, field) or self.last_norm)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        if len(self.dim) == 1 and self.reduction != "conv":
            raise ValueError(f"reduction '{self.reduction}' would be ignored: the model has one stage; omit it")
        if self.final_norm and check(HEADS, self.head).get("norm_first") is False:
            raise ValueError(f"final_norm '{self.final_norm}' would be ignored: head '{self.head}' has no norm")

    def path(self, stage: int, index: int) -> str:
        return f"stages.{stage}.blocks.{index}"

    def check_sizes(self) -> None:
        try:
            check(STEMS, self.stem)
        except ValueError as error:
            raise ValueError(f"stem: {error}") from None
        if not len(self.dim) == len(self.depth) == len(self.heads) > 0:
            raise ValueError(
                f"dim, depth and heads must have one number per stage, got {self.dim}, {self.depth}, {self.heads}"
            )
        if min(self.depth) < 1:
            raise ValueError(f"depth must be >= 1 in each stage, got {self.depth}")

    @property
    def stages(self) -> tuple[Size, ...]:
        return tuple(map(Size, self.dim, self.depth, self.heads))

    @property
    def staged(self) -> bool:
        return True

    def stride(self, stage: int) -> int:
        """Pixels of a side per token in a stage."""
        return STEMS[parse(self.stem)[0]].stride * 2**stage  # pyright: ignore[reportAttributeAccessIssue]

    def grid(self, stage: int) -> tuple[int, int]:
        side = -(-self.image // self.stride(stage))
        return side, side

    @property
    def last_norm(self) -> str:
        """The norm of the last stage's first block."""
        return self.chosen("norm", len(self.dim) - 1, 0)

    def build(self) -> "Pyramid":
        return Pyramid(self)


class Stage(nn.Module):
    """A reduction, if any, a position, and Blocks."""

    def __init__(self, config: PyramidConfig, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        first = config.block(stage)
        self.reduction = None
        if stage > 0:
            given = (config.dim[stage - 1], first.dim, first.norm, first.place)
            self.reduction = make(REDUCTIONS, config.reduction, *given, field="reduction")
        self.position = make_position(config, stage)
        self.blocks = nn.ModuleList(make_block(config, stage, index, rate) for index, rate in enumerate(rates))

    def forward(self, x: Tensor, context: Context, runner: Callable[..., Tensor] = run) -> tuple[Tensor, Context]:
        """Tokens [B, N, D] of the stage before, or of the stem -> tokens of this stage, and their Context. `runner`
        runs the blocks."""
        if self.reduction is not None:
            x, context = self.reduction(x, context)
        context = self.position.place(context)
        return runner(self.blocks, self.position(x, context), context), context


class Pyramid(Model[PyramidConfig]):
    """model(images [B, channels, H, W]) -> logits [B, classes], or if classes = 0 the pooled features
    [B, num_features] of the last map.

    H and W are free. A mask [B, H, W] of real pixels lets images of several sizes share a batch.
    """

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        first, last = config.block(), config.block(len(config.dim) - 1)
        self.stem = make(STEMS, config.stem, config.channels, first.dim, first.norm, first.place, field="stem")
        rates = drop_rates(config.drop_path, sum(config.depth))
        stages = []
        for stage, depth in enumerate(config.depth):
            start = sum(config.depth[:stage])
            stages.append(Stage(config, stage, rates[start : start + depth]))
        self.stages = nn.ModuleList(stages)
        norm = config.final_norm or config.last_norm
        self.head = make(HEADS, config.head, last.dim, config.classes, norm, last.place, field="head")

    @property
    def strides(self) -> list[int]:
        return [self.config.stride(stage) for stage in range(len(self.config.dim))]

    @property
    def channels(self) -> list[int]:
        return list(self.config.dim)

    def staged(self, images: Tensor, mask: Tensor | None, stages: int) -> list[tuple[Tensor, Context]]:
        """The tokens [B, N, D] after each of the first stages, and their Context."""
        x, context = self.stem(images, mask)
        outputs = []
        for stage in self.stages[:stages]:
            x, context = stage(x, context, self.run)
            outputs.append((x, context))
        return outputs

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images [B, channels, H, W] and a mask [B, H, W] of real pixels -> [B, classes], or [B, D]."""
        return self.head(*self.staged(images, mask, len(self.stages))[-1])

    def features(self, images: Tensor, layers: Sequence[int] | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The tokens after the given stages (all if None; -1 is the last), not normalized, as maps [B, C, H', W'] at
        `strides`: sides are divided by the stride and rounded up."""
        wanted = chosen_layers(layers, len(self.stages), "stage")
        outputs = self.staged(images, mask, 1 + max(wanted, default=0))
        return [to_map(outputs[layer][0], outputs[layer][1].grid) for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("position.table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        early = (r"^stages\.(\d+)\.(?:reduction|position)", (0,))
        return {"stem": r"^stem", "blocks": [early, (r"^stages\.(\d+)\.blocks\.(\d+)", None)]}
