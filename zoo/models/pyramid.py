"""Hierarchical models: stages of Blocks on ever coarser grids, for classifying and for detectors that read features
(MetaFormer, Yu et al. 2022, arXiv:2111.11418 and arXiv:2210.13452; DaViT, Ding et al. 2022, arXiv:2204.03645;
FlashInternImage, Xiong et al. 2024, arXiv:2401.06197; PVT, Wang et al. 2021, arXiv:2102.12122)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from zoo.block import Block, drop_rates, run
from zoo.config import BlockConfig, Config
from zoo.heads import HEADS
from zoo.layer import Context, check, make, to_map
from zoo.norms import NORMS
from zoo.positions import POSITIONS
from zoo.stems import REDUCTIONS, STEMS

# One choice for all blocks, or one a stage; in place of a stage's choice several, which its blocks take in turns.
Choice = str | tuple[str | tuple[str, ...], ...]
CHOICES = ("mixer", "conv", "conv_norm", "ffn", "norm", "placement", "channel", "position")


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(Config):
    """A pyramid. dim, depth and heads have a number for each stage; the choices of CHOICES are a name for all blocks,
    or a name for each stage, or in place of one such name a tuple of names that the stage's blocks take in turns.

    stem and reduction name what leads to the first stage and from a stage to the next, head what comes after the last
    one. The stem and a reduction take the norm of the first block that they lead to; the head takes final_norm, which
    "" makes that of the last stage's first block. position is that of a stage's tokens, one for all its blocks; image
    is the side for which learned positions have their rows. classes = 0 leaves the head's last linear away.
    """

    dim: tuple[int, ...]
    depth: tuple[int, ...]
    heads: tuple[int, ...]
    layout: tuple[str, ...] = ("mixer", "ffn")
    mixer: Choice = "softmax"
    conv: Choice = "glu"
    conv_norm: Choice = "batchnorm"
    ffn: Choice = "mlp"
    norm: Choice = "layernorm"
    placement: Choice = "pre"
    channel: Choice = "none"
    position: Choice = "none"
    stem: str = "conv"
    reduction: str = "conv"
    head: str = "linear"
    final_norm: str = ""
    drop_path: float = 0.0
    layer_scale: float | None = None
    image: int = 224
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.dim) == len(self.depth) == len(self.heads) > 0:
            raise ValueError(f"dim, depth and heads have a number a stage, not {self.dim}, {self.depth}, {self.heads}")
        if min(*self.dim, *self.depth, *self.heads, self.image, self.channels) < 1 or self.classes < 0:
            raise ValueError("dim, depth, heads, image and channels are at least 1, classes at least 0")
        if "cross" in {word for entry in self.layout for word in entry.split("+")}:
            raise ValueError("layout: a pyramid has no memory for 'cross' to read")
        for field, table in (("stem", STEMS), ("reduction", REDUCTIONS), ("head", HEADS), ("final_norm", NORMS)):
            try:
                check(table, getattr(self, field) or self.last_norm)
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        if self.final_norm and check(HEADS, self.head).get("norm_first") is False:
            raise ValueError(f"final_norm '{self.final_norm}' would be ignored: head '{self.head}' has no such norm")
        for field in CHOICES:
            if isinstance(choice := getattr(self, field), str):
                continue
            if len(choice) != len(self.dim):
                raise ValueError(f"{field} has {len(choice)} choices for {len(self.dim)} stages: {choice!r}")
            for names, most in zip(choice, self.depth, strict=True):
                most = 1 if field == "position" else most
                if isinstance(names, tuple) and not 0 < len(names) <= most:
                    raise ValueError(f"{field} takes 1 to {most} names in turns in that stage, not {names!r}")
        for stage, depth in enumerate(self.depth):
            try:
                blocks = [self.block(stage, index) for index in range(depth)]
            except ValueError as error:
                raise ValueError(f"stage {stage + 1}: {error}") from None
            widths = {block.head_dim for block in blocks}
            if "rotary" in blocks[0].writes and len(widths) > 1:
                raise ValueError(
                    f"stage {stage + 1}: position '{blocks[0].position}' turns heads of one width, not {sorted(widths)}"
                )

    def choice(self, field: str, stage: int, index: int) -> str:
        """The name that a block of a stage has for one of CHOICES."""
        choice: Choice = getattr(self, field)
        names = choice if isinstance(choice, str) else choice[stage]
        return names if isinstance(names, str) else names[index % len(names)]

    def block(self, stage: int, index: int) -> BlockConfig:
        """The config of one block."""
        return _block(
            dim=self.dim[stage],
            depth=self.depth[stage],
            heads=self.heads[stage],
            layout=self.layout,
            drop_path=self.drop_path,
            layer_scale=self.layer_scale,
            **{field: self.choice(field, stage, index) for field in CHOICES},
        )

    @property
    def last_norm(self) -> str:
        """The norm of the last stage's first block."""
        return self.choice("norm", len(self.dim) - 1, 0)

    def build(self) -> "Pyramid":
        return Pyramid(self)


@functools.lru_cache(maxsize=1024)
def _block(**choices: object) -> BlockConfig:
    return BlockConfig(**choices)  # pyright: ignore[reportArgumentType]


class Stage(nn.Module):
    """A reduction, where there is one, a position, and Blocks."""

    def __init__(self, config: PyramidConfig, stage: int, grid: tuple[int, int], rates: Sequence[float]) -> None:
        super().__init__()
        first = config.block(stage, 0)
        self.reduction = None
        if stage > 0:
            self.reduction = make(REDUCTIONS, config.reduction, config.dim[stage - 1], first.dim, first.norm)
        self.position = make(POSITIONS, first.position, first.dim, first.head_dim, grid, 0)
        self.blocks = nn.ModuleList(Block(config.block(stage, index), rate) for index, rate in enumerate(rates))

    def forward(self, x: Tensor, context: Context, checkpointing: bool = False) -> tuple[Tensor, Context]:
        if self.reduction is not None:
            x, context = self.reduction(x, context)
        context = self.position.place(context)
        return run(self.blocks, self.position(x, context), context, checkpointing), context


class Pyramid(nn.Module):
    """model(images [B, channels, H, W]) -> logits [B, classes], or pooled features [B, D] where classes = 0.

    H and W are free. A mask [B, H, W] of real pixels lets pictures of several sizes share a batch.
    """

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = make(STEMS, config.stem, config.channels, config.dim[0], config.block(0, 0).norm)
        rates = drop_rates(config.drop_path, sum(config.depth))
        stages = []
        for stage, depth in enumerate(config.depth):
            side = -(-config.image // self.strides[stage])
            start = sum(config.depth[:stage])
            stages.append(Stage(config, stage, (side, side), rates[start : start + depth]))
        self.stages = nn.ModuleList(stages)
        self.head = make(HEADS, config.head, config.dim[-1], config.classes, config.final_norm or config.last_norm)
        self.checkpointing = False

    @property
    def strides(self) -> list[int]:
        """How many pixels of a side become one token in each stage."""
        return [self.stem.stride * 2**stage for stage in range(len(self.config.dim))]

    def run(self, images: Tensor, mask: Tensor | None, stages: int) -> list[tuple[Tensor, Context]]:
        """The tokens after each of the first stages, and where they lie."""
        x, context = self.stem(images, mask)
        outputs = []
        for stage in self.stages[:stages]:
            x, context = stage(x, context, self.checkpointing and self.training)
            outputs.append((x, context))
        return outputs

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(*self.run(images, mask, len(self.stages))[-1])

    def features(self, images: Tensor, layers: Sequence[int] | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The tokens after the given stages (all where None; -1 is the last), not normalized, as maps [B, C, H', W'] at
        `strides`: sides are divided by the stride and rounded up."""
        number = len(self.stages)
        wanted = range(number) if layers is None else layers
        if bad := [layer for layer in wanted if not -number <= layer < number]:
            raise ValueError(f"layers: there is no stage {bad[0]}; the model has {number} stages, from 0")
        wanted = [layer % number for layer in wanted]
        outputs = self.run(images, mask, 1 + max(wanted, default=0))
        return [to_map(outputs[layer][0], outputs[layer][1].grid) for layer in wanted]

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension that weight decay leaves alone."""
        return {name for name, _ in self.named_parameters() if name.endswith("position.table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """How deep each parameter lies, in the form that timm's layer-wise decay reads."""
        early = (r"^stages\.(\d+)\.(?:reduction|position)", (0,))
        return {"stem": r"^stem", "blocks": [early, (r"^stages\.(\d+)\.blocks\.(\d+)", None)]}


_METAFORMER = PyramidConfig(
    dim=(64, 128, 320, 512),
    depth=(3, 3, 9, 3),
    heads=(2, 4, 10, 16),
    mixer="sepconv",
    ffn="mlp(activation='star_relu', bias=False)",
    norm="layernorm(bias=False)",
    placement=("pre", "pre", "res_scale", "res_scale"),
    stem="conv(kernel=7, padding=2)",
    reduction="conv(kernel=3, padding=1)",
    head="mlp",
    final_norm="layernorm",
)
_ATTENTION = "softmax(bias=False)"
_POOLFORMER = PyramidConfig(
    dim=(64, 128, 320, 512),
    depth=(2, 2, 6, 2),
    heads=(1, 2, 5, 8),
    mixer="pool",
    norm="groupnorm",
    layer_scale=1e-5,
    stem="conv(kernel=7, padding=2, after=False)",
    reduction="conv(kernel=3, padding=1, before=False)",
    head="linear(mean_first=True)",
    final_norm="layernorm",
)
_DAVIT = ("window(size=7)", "channel")
_INTERNIMAGE = PyramidConfig(
    dim=(64, 128, 256, 512),
    depth=(4, 4, 18, 4),
    heads=(4, 8, 16, 32),
    mixer="dcnv4(bias=False)",
    ffn="mlp(out_bias=False)",
    stem="double",
    reduction="conv(kernel=3, padding=1, after=True, bias=False)",
    head="conv",
)

PRESETS: dict[str, PyramidConfig] = {
    "poolformer_s12": _POOLFORMER,
    "poolformer_s24": replace(_POOLFORMER, depth=(4, 4, 12, 4)),
    "convformer_s18": _METAFORMER,
    "caformer_s18": replace(_METAFORMER, mixer=("sepconv", "sepconv", _ATTENTION, _ATTENTION)),
    "davit_tiny": PyramidConfig(
        dim=(96, 192, 384, 768),
        depth=(2, 2, 6, 2),
        heads=(3, 6, 12, 24),
        layout=("conv", "mixer", "conv", "ffn"),
        conv="depthwise",
        mixer=(_DAVIT,) * 4,
        norm="layernorm(eps=1e-05)",
        stem="conv(kernel=7, padding=3)",
        head="linear(mean_first=True)",
    ),
    "flash_internimage_t": _INTERNIMAGE,
    "flash_internimage_s": replace(
        _INTERNIMAGE,
        dim=(80, 160, 320, 640),
        depth=(4, 4, 21, 4),
        heads=(5, 10, 20, 40),
        mixer="dcnv4(local=3, bias=False)",
        placement="res_post",
        layer_scale=1e-5,
        reduction="conv(kernel=3, padding=1, before=False, after=True, bias=False)",
        head="conv(norm_first=False)",
    ),
    "pvt_sla_tiny": PyramidConfig(
        dim=(64, 128, 320, 512),
        depth=(2, 2, 2, 2),
        heads=(1, 2, 5, 8),
        mixer="sla",
        ffn=("mlp(ratio=8.0)", "mlp(ratio=8.0)", "mlp", "mlp"),
        norm="prepbn",
        reduction="conv(before=False, after=True)",
    ),
}
