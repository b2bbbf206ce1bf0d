"""What all families of diffusion models share: their config's fields and checks, the condition of their blocks, and
patches as maps."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.layer import Context, Place
from zoo.modulations import MODULATIONS, Modulation
from zoo.schedules import SCHEDULES
from zoo.spec import Choice, check, names_of, parse
from zoo.stems.conditions import TIMES, LabelEmbedding, TimeEmbedding
from zoo.tensors import compiling
from zoo.text import unknown

PREDICTIONS = ("velocity", "noise", "data")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ModelConfig):
    """The config of a family of diffusion models. Time 0 is data, time 1 is noise.

    Args:
        image: side of the images, or of their latents, for weights that depend on it; any other size works too.
        channels: channels of the images or latents.
        classes: number of classes; 0 for a model without labels. A further row of the table stands for no class.
        patch: side of a patch.
        class_tokens: tokens of the class that stand before the grid.
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
    shown = (*ModelConfig.shown, "modulation", "image", "patch", "classes", "schedule", "prediction")

    image: int = 32
    channels: int = 4
    classes: int = 1000
    patch: int = 2
    class_tokens: int = 0
    time: str = "sincos"
    until: bool = False
    schedule: str = "linear"
    prediction: str = "velocity"
    variance: bool = False
    norm: Choice = "layernorm(affine=False)"
    modulation: Choice = "adaln"

    def check_sizes(self) -> None:
        if min(self.image, self.channels, self.patch) < 1 or min(self.classes, self.class_tokens) < 0:
            raise ValueError("image, channels and patch must be >= 1, classes and class_tokens >= 0")
        if self.image < self.patch:
            raise ValueError(f"image must be at least a patch of {self.patch}, got {self.image}")
        for name, table in (("schedule", SCHEDULES), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name}: {unknown('name', getattr(self, name), table)}")
        if self.prediction == "velocity" and not SCHEDULES[self.schedule].moves:
            raise ValueError(
                f"prediction 'velocity' needs schedule 'linear', got '{self.schedule}'; predict noise or data"
            )
        if self.prediction == "noise" and self.schedule == "linear":
            raise ValueError(
                "prediction 'noise' needs schedule 'ddpm': at time 1 of 'linear' it does not tell the data; predict "
                "velocity or data"
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
            if row is not None and row.remembered and "cross" not in self.words:
                raise ValueError(f"modulation '{self.modulation}' needs cross in the layout, as in mixer, cross, ffn")
            return
        if row is MODULATIONS["none"]:
            raise ValueError("modulation 'none' does not see the time; choose another (adaln, adaln_single, tdn)")
        if self.classes and not self.class_tokens:
            raise ValueError(f"modulation '{self.modulation}' does not see the class; set class_tokens, or classes=0")
        if self.until:
            raise ValueError(f"until needs a modulation that sees it (adaln, adaln_single), got '{self.modulation}'")

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
    def scales(self) -> tuple[int, ...]:
        """Of a model with `predictions` for training before its own: the pixels of a side of which each of them
        predicts one value, coarse ones first."""
        return ()

    @property
    def pipeline_tag(self) -> str:
        return "unconditional-image-generation"

    def call(self, prepared: str) -> str:
        labels = "torch.tensor([0, 1])" if self.classes else "None"
        lines = ["import torch", "from zoo.outputs.samplers import sample", ""]
        steps = 1 if self.until else 20
        drawn = f"drawn = sample(model, {labels}, range(2), ({self.image}, {self.image}), steps={steps}).x"
        return "\n".join([*lines, drawn])

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = {
            "x": torch.randn(1, self.channels, self.image, self.image, generator=generator, device="cpu"),
            "time": torch.full((1,), 0.3),
        }
        return inputs | ({"labels": torch.zeros(1, dtype=torch.int64)} if self.classes else {})


class Conditions(NamedTuple):
    """The condition of the blocks, None if the memory holds it, and the vectors [B, dim] of times and labels."""

    cond: Tensor | None
    times: Tensor | None
    labels: Tensor | None


class Conditioned(nn.Module):
    """A module that embeds the time and the label of its blocks' condition."""

    time: TimeEmbedding | None
    until: TimeEmbedding | None
    label_table: LabelEmbedding | None

    def add_embeddings(self, config: DiffusionConfig, dim: int) -> None:
        """Gives the module the embeddings that the config asks for, for blocks of this width."""
        row = MODULATIONS[parse(names_of(config.modulation)[0])[0]]
        self.schedule = SCHEDULES[config.schedule]
        self.time = TimeEmbedding(dim, config.time) if row.embedded else None
        self.until = TimeEmbedding(dim, config.time) if config.until else None
        self.label_table = LabelEmbedding(config.classes, dim) if config.classes else None
        self.condition, self.remembered = row.condition(dim, len(config.layout)), row.remembered

    def conditions(self, time: Tensor, labels: Tensor | None, until: Tensor | None) -> Conditions:
        """The condition of the blocks, and of what it is made."""
        check_conditions(time, labels, until)
        if until is not None and self.until is None:
            raise ValueError("this model takes no `until`; its config has until=False")
        vectors = None
        if self.label_table is not None:
            if labels is None:
                labels = torch.full(time.shape, self.label_table.num_embeddings - 1, device=time.device)
            vectors = self.label_table(labels)
        elif labels is not None:
            raise ValueError("this model takes no labels; its config has classes=0")
        if self.time is None:
            return Conditions(self.schedule.log_ratio(time)[:, None, None], None, vectors)
        times = self.time(time)
        if self.until is not None:
            times = times + self.until(torch.zeros_like(time) if until is None else time - until)
        if self.remembered:
            return Conditions(None, times, vectors)
        embedding = times if vectors is None else times + vectors
        return Conditions(self.condition(embedding[:, None]), times, vectors)


class Embeddings(Conditioned):
    """The embeddings of time and label for the stages of one width."""

    def __init__(self, config: DiffusionConfig, dim: int) -> None:
        super().__init__()
        self.add_embeddings(config, dim)

    def forward(self, time: Tensor, labels: Tensor | None, until: Tensor | None) -> Conditions:
        return self.conditions(time, labels, until)


def last_modulation(config: DiffusionConfig, spec: str, dim: int, place: Place) -> Modulation:
    """The modulation behind the last block, which has no gate."""
    row, options = MODULATIONS[parse(spec)[0]], check(MODULATIONS, spec)
    if "gate" in options:
        options["gate"] = False
    last = replace(place, branch=len(config.layout), branches=len(config.layout))
    return row(dim, last, **options)  # pyright: ignore[reportCallIssue]


def preceded(tokens: Tensor, own: Tensor, context: Context) -> tuple[Tensor, Context]:
    """The class tokens `own` [B, n, dim] before the others, and the Context of both, without a position."""
    mask = context.mask
    if mask is not None:
        mask = torch.cat([mask.new_ones(mask.shape[0], own.shape[1]), mask], 1)
    together = context.moved(context.grid, own.shape[1], mask)
    return torch.cat([own.to(tokens.dtype), tokens], 1), together


def joined(patches: Tensor, height: int, width: int) -> Tensor:
    """Patches [B, H', W', p, p, C] as maps [B, C, height, width], without what they have beyond."""
    patch = patches.shape[3]
    if compiling():  # a slice would tie a traced program to sides that the patch divides
        rows, columns = (torch.arange(size, device=patches.device) for size in (height, width))
        rows = rows[:, None]
        return patches[:, rows // patch, columns // patch, rows % patch, columns % patch].permute(0, 3, 1, 2)
    maps = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return maps[:, :, :height, :width]


def check_conditions(time: Tensor, labels: Tensor | None, until: Tensor | None) -> None:
    """ValueError for times that are not [B], floating point and from 0 to 1, or labels that are not integers [B]; the
    values are checked on the CPU alone."""
    for name, each in {"time": time, "until": until}.items():
        if each is None:
            continue
        if each.ndim != 1 or not each.is_floating_point():
            raise ValueError(f"{name} must be floating point [B], got {each.dtype} {list(each.shape)}")
        if not compiling() and each.device.type == "cpu" and not bool(((each >= 0) & (each <= 1)).all()):
            raise ValueError(f"{name} must be from 0, data, to 1, noise, got {each.tolist()}")
    if labels is not None and (labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"labels must be integers [B], got {labels.dtype} {list(labels.shape)}")
    if not compiling():
        for name, each in {"labels": labels, "until": until}.items():
            if each is not None and len(each) != len(time):
                raise ValueError(f"{name} must be [B] as the {len(time)} times, got {list(each.shape)}")


def check_number(x: Tensor, time: Tensor) -> None:
    """ValueError if there is not a time for each image."""
    if not compiling() and len(time) != len(x):
        raise ValueError(f"time must be [B], one for each of the {len(x)} images, got {list(time.shape)}")


@torch.no_grad()
def start(layers: Iterable[nn.Module], patches: Iterable[nn.Module], out: nn.Linear | nn.Conv2d) -> None:
    """Weights as DiT publishes them: Xavier's for these linears and convolutions, `patches` as linears of all that they
    see; those that are zero, where a block is to start as the identity, stay so, and `out` becomes zero."""
    if out.weight.is_meta:
        return
    for layer, flat in (*((each, False) for each in layers), *((each, True) for each in patches)):
        if isinstance(layer, nn.Linear | nn.Conv2d) and bool(layer.weight.any()):
            nn.init.xavier_uniform_(layer.weight.flatten(1) if flat else layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.zeros_(out.weight)
    if out.bias is not None:
        nn.init.zeros_(out.bias)
