"""Diffusion transformers: noise and images to a prediction of either (DiT, Peebles and Xie 2023, arXiv:2212.09748; SiT,
Ma et al. 2024, arXiv:2401.08740; JiT, Li and He 2025, arXiv:2511.13720)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zoo.config import Choice, FlatConfig, names_of
from zoo.layer import Context
from zoo.models.base import Model, chosen_layers, drop_rates, make_block, make_position
from zoo.modulations import MODULATIONS, Modulation
from zoo.norms import NORMS, Norm
from zoo.schedules import SCHEDULES
from zoo.spec import check, make, parse
from zoo.stems.conditions import TIMES, LabelEmbedding, TimeEmbedding
from zoo.stems.images import Patches
from zoo.tensors import compiling, to_map
from zoo.text import unknown

PREDICTIONS = ("velocity", "noise", "data")


@dataclass(frozen=True, kw_only=True)
class DiTConfig(FlatConfig):
    """A diffusion transformer. Time 0 is data, time 1 is noise.

    Args:
        image: side of the images, or of their latents, for weights that depend on it; any other size works too.
        channels: channels of the images or latents.
        classes: number of classes; 0 for a model without labels. A further row of the table stands for no class.
        patch: side of a patch.
        bottleneck: width between the two linears of the patch embedding; 0 for one linear.
        class_tokens: tokens of the class that stand before the grid from block `class_block` on.
        class_block: the first block that sees them.
        time: embedding of the time.
        until: whether the model also takes the time at which a step ends, for MeanFlow (Geng et al. 2025,
            arXiv:2505.13447).
        schedule: how data and noise are mixed: `linear`, (1 - t) data + t noise, or `ddpm` with DDPM's 1000 steps.
        prediction: what the output is: velocity, noise or data.
        variance: whether a second half of the output channels is the variance of a step (Nichol and Dhariwal 2021,
            arXiv:2102.09672).
    """

    task = "generate"
    input = "image"
    argument = "x"
    labels = "classes"
    provides = frozenset({"cond"})
    shown = (*FlatConfig.shown, "modulation", "image", "patch", "classes", "schedule", "prediction")

    image: int = 32
    channels: int = 4
    classes: int = 1000
    patch: int = 2
    bottleneck: int = 0
    class_tokens: int = 0
    class_block: int = 0
    time: str = "sincos"
    until: bool = False
    schedule: str = "linear"
    prediction: str = "velocity"
    variance: bool = False
    norm: Choice = "layernorm(affine=False)"
    ffn: Choice = "mlp(activation='gelu_tanh')"
    position: str = "sincos(order='xy')"
    modulation: Choice = "adaln"

    def check_sizes(self) -> None:
        if min(self.image, self.channels, self.patch) < 1 or min(self.classes, self.bottleneck, self.class_tokens) < 0:
            raise ValueError("image, channels and patch must be >= 1, classes, bottleneck and class_tokens >= 0")
        if not 0 <= self.class_block <= max(0, self.depth - 1) or self.class_block and not self.class_tokens:
            raise ValueError(f"class_block must be a block that sees class_tokens, got {self.class_block}")
        for name, table in (("schedule", SCHEDULES), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name}: {unknown('name', getattr(self, name), table)}")
        if self.prediction == "velocity" and not SCHEDULES[self.schedule].moves:
            raise ValueError(
                f"prediction 'velocity' needs schedule 'linear', got '{self.schedule}'; predict noise or data"
            )
        if self.variance and (self.schedule, self.prediction) != ("ddpm", "noise"):
            raise ValueError("variance needs schedule 'ddpm' and prediction 'noise'")
        if self.class_tokens and not self.classes:
            raise ValueError("class_tokens needs classes")
        try:
            check(TIMES, self.time)
        except ValueError as error:
            raise ValueError(f"time: {error}") from None
        rows = {parse(spec)[0] for spec in names_of(self.modulation)}
        if len(rows) > 1:
            raise ValueError(f"modulation must be the same in all blocks, got {', '.join(sorted(rows))}")
        row = MODULATIONS.get(rows.pop())
        if row is None or row.embedded:
            return
        if row is MODULATIONS["none"]:
            raise ValueError("modulation 'none' does not see the time; choose another (adaln, adaln_single, tdn)")
        if self.classes and not self.class_tokens:
            raise ValueError(f"modulation '{self.modulation}' does not see the class; set class_tokens, or classes=0")
        if self.until:
            raise ValueError(f"until needs a modulation that sees it (adaln, adaln_single), got '{self.modulation}'")

    @property
    def prefix(self) -> int:
        return self.class_tokens

    @property
    def labelled(self) -> int:
        return self.classes

    @property
    def headed(self) -> bool:
        return True

    @property
    def answers(self) -> bool:
        return False

    @property
    def outputs(self) -> int:
        """Channels of the model's output."""
        return self.channels * (1 + self.variance)

    @property
    def pipeline_tag(self) -> str:
        return "unconditional-image-generation"

    def grid(self, stage: int) -> tuple[int, int]:
        side = -(-self.image // self.patch)
        return side, side

    def call(self, prepared: str) -> str:
        labels = "torch.tensor([0, 1])" if self.classes else "None"
        lines = ["import torch", "from zoo.outputs.samplers import sample", ""]
        return "\n".join([*lines, f"drawn = sample(model, {labels}, range(2), ({self.image}, {self.image}), steps=20)"])

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = {
            "x": torch.randn(1, self.channels, self.image, self.image, generator=generator, device="cpu"),
            "time": torch.full((1,), 0.3),
        }
        return inputs | ({"labels": torch.zeros(1, dtype=torch.int64)} if self.classes else {})

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


class DiT(Model[DiTConfig]):
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
        row, options = MODULATIONS[parse(first.modulation)[0]], check(MODULATIONS, first.modulation)
        self.time = TimeEmbedding(config.dim, config.time) if row.embedded else None
        self.until = TimeEmbedding(config.dim, config.time) if config.until else None
        self.label_table = LabelEmbedding(config.classes, config.dim) if config.classes else None
        self.tokens = None
        if config.class_tokens:
            self.tokens = nn.Parameter(0.02 * torch.randn(1, config.class_tokens, config.dim))
        self.condition = row.condition(config.dim, len(config.layout))
        rates = drop_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(make_block(config, 0, index, rate) for index, rate in enumerate(rates))
        self.norm: Norm = make(NORMS, first.norm, config.dim, first.place, field="norm")
        last = replace(first.place, branch=len(config.layout), branches=len(config.layout))
        if "gate" in options:
            options["gate"] = False
        self.modulation: Modulation = row(config.dim, last, **options)  # pyright: ignore[reportCallIssue]
        self.out = nn.Linear(config.dim, config.patch**2 * config.outputs)
        start(self)

    @property
    def strides(self) -> list[int]:
        return [self.config.patch] * self.config.depth

    @property
    def channels(self) -> list[int]:
        return [self.config.dim] * self.config.depth

    def conditions(self, time: Tensor, labels: Tensor | None, until: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The condition of the blocks, and the labels' vectors [B, dim]."""
        check_times(time, "time")
        if until is not None and self.until is None:
            raise ValueError("this model takes no `until`; its config has until=False")
        vectors = None
        if self.label_table is not None:
            if labels is None:
                labels = torch.full(time.shape, self.config.classes, device=time.device)
            vectors = self.label_table(labels)
        elif labels is not None:
            raise ValueError("this model takes no labels; its config has classes=0")
        if self.time is None:
            ratio = SCHEDULES[self.config.schedule].log_ratio(time).to(self.out.weight.dtype)
            return ratio[:, None, None], vectors
        embedding = self.time(time)
        if self.until is not None:
            embedding = embedding + self.until(torch.zeros_like(time) if until is None else time - until)
        if vectors is not None:
            embedding = embedding + vectors
        return self.condition(embedding[:, None]), vectors

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


def joined(patches: Tensor, height: int, width: int) -> Tensor:
    """Patches [B, H', W', p, p, C] as maps [B, C, height, width], without what they have beyond."""
    patch = patches.shape[3]
    if compiling():  # a slice would tie a traced program to sides that the patch divides
        rows, columns = (torch.arange(size, device=patches.device) for size in (height, width))
        rows = rows[:, None]
        return patches[:, rows // patch, columns // patch, rows % patch, columns % patch].permute(0, 3, 1, 2)
    maps = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return maps[:, :, :height, :width]


def check_times(time: Tensor, name: str) -> None:
    """ValueError for times that are not [B], floating point and from 0 to 1; values on the CPU alone."""
    if time.ndim != 1 or not time.is_floating_point():
        raise ValueError(f"{name} must be floating point [B], got {time.dtype} {list(time.shape)}")
    if not compiling() and time.device.type == "cpu" and not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"{name} must be from 0, data, to 1, noise, got {time.tolist()}")


@torch.no_grad()
def start(model: DiT) -> None:
    """Weights as published: Xavier's for the linears, patches as one of them; zero where a block is to start as the
    identity, and behind the last block."""
    if model.out.weight.is_meta:
        return
    linears = [layer for block in model.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    for layer in (*linears, *model.stem.children()):
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if bool(layer.weight.any()):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.out.bias)
