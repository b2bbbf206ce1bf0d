"""Configs of models, as frozen dataclasses: the description of a family, and the choices that all families share."""

import functools
import itertools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.choices import USES, WORDS, BlockConfig, words_of
from zoo.layer import Place
from zoo.modulations import MODULATIONS
from zoo.positions import POSITIONS
from zoo.spec import Choice, names_of, parse
from zoo.text import readable, unknown

CHOICES = ("mixer", "cross", "conv", "conv_norm", "ffn", "norm", "placement", "channel", "modulation")


# The largest value of an integer field; 1,000,000 for others. A config from elsewhere cannot request more before it is
# compared with its weights.
LARGEST = {"depth": 1_000, "dim": 65_536, "widths": 65_536, "heads": 4_096, "patch": 4_096, "image": 65_536}


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(each, typing.get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _renamed(choice: Any) -> Any:
    """A choice of mixers with qk_norm spelled as a name, which was true or false in earlier versions."""
    if isinstance(choice, list | tuple):
        return tuple(_renamed(each) for each in choice)
    if not isinstance(choice, str):
        return choice
    return choice.replace("qk_norm=True", "qk_norm='layernorm'").replace("qk_norm=False", "qk_norm='none'")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete description of a model in flat fields; ValueError if a field has a wrong type. Lists become tuples.

    A family describes itself here; weights, cards, tasks, scripts and the command use nothing else.
    """

    task: ClassVar[str | None] = None  # the command that trains, evaluates and uses it, as in `zoo classify`
    input: ClassVar[str | None] = None  # kind of input, a row of zoo.inputs.INPUTS
    argument: ClassVar[str] = "x"  # the name of the model's first argument, a batch of prepared inputs
    labels: ClassVar[str | None] = None  # kind of labels, a row of zoo.outputs.LABELS
    counted: ClassVar[str] = "classes"  # the field with the number of outputs
    shown: ClassVar[tuple[str, ...]] = ()  # the fields that a card lists; () for all

    def __post_init__(self) -> None:
        for each in fields(self):
            kind = _kinds(type(self))[each.name]
            try:
                value = _frozen(getattr(self, each.name))
            except RecursionError:
                raise ValueError(f"{each.name} must be {_said(kind)}, got lists nested too deeply") from None
            if kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            object.__setattr__(self, each.name, value)
            if not _fits(value, kind):
                raise ValueError(f"{each.name} must be {_said(kind)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{each.name} must be finite, got {value!r}")
            most = LARGEST.get(each.name, 1_000_000)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and number > most:
                    raise ValueError(f"{each.name} must be <= {most:,}, got {str(number)[:40]}")

    @classmethod
    def migrated(cls, values: Mapping[str, Any], base: "Config | None" = None) -> dict[str, Any]:
        """Renames the fields of earlier versions to the current names; they change `base`, if given."""
        return dict(values)

    def build(self) -> nn.Module:
        """The model that this config describes."""
        raise TypeError(f"{type(self).__name__} describes no model")

    def missing(self, names: Iterable[str]) -> str | None:
        """The path of a block that is missing among these tensor names, if known without building the model."""
        return None

    @property
    def labelled(self) -> int:
        """How many outputs have a label; 0 for a model without a head."""
        return 0

    @property
    def headed(self) -> bool:
        """Whether the model gives answers as it is; a backbone without a head does not."""
        return self.labelled > 0

    @property
    def answers(self) -> bool:
        """Whether the model has an answer, with labels, for one raw input."""
        return self.labels is not None and self.labelled > 0

    @property
    def pipeline_tag(self) -> str:
        """The Hub's pipeline tag of the model."""
        return "feature-extraction"

    @property
    def tags(self) -> list[str]:
        """The Hub's tags of the model."""
        return []

    def described(self, name: str) -> str:
        """A field's value in readable form."""
        return readable(getattr(self, name))

    def call(self, prepared: str) -> str:
        """The line of Python, for a card, that uses the model on `prepared`, an expression of its input."""
        return f"output = model({prepared})"

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Arguments of the model by name, for its probe: random, small, the same for the same config."""
        raise TypeError(f"{type(self).__name__} has no probe_inputs")

    def probe_outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name that a probe stores for these inputs; each is compared relative to its largest
        value.

        A family whose output depends on a ranking (the best of many queries) gives the values before it instead, so
        that near ties cannot change the result.
        """
        output = model(**inputs)
        if isinstance(output, Tensor):
            return {"output": output}
        pairs = output.items() if isinstance(output, Mapping) else enumerate(output)
        return {str(name): each for name, each in pairs if isinstance(each, Tensor) and each.is_floating_point()}


def _said(kind: Any) -> str:
    """A field's type as an error names it."""
    names = {Choice: "a name or a tuple of names", str: "a name", str | None: "a name or null", float: "a number"}
    names |= {float | None: "a number or null", int: "an int", int | None: "an int or null", bool: "true or false"}
    names |= {tuple[int, ...]: "a tuple of ints", tuple[str, ...]: "a tuple of names"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))


def field_names(config: Config | type[Config]) -> list[str]:
    """The names of a config's fields, its sizes first."""
    return sorted((each.name for each in fields(config)), key=lambda name: name not in ("dim", "depth", "heads"))


class Size(NamedTuple):
    """How large a stage is; a family without stages has one."""

    dim: int
    depth: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The choices that every family shares; a family adds its own fields and its stages.

    The choices of CHOICES are one name for all blocks, or several in turn (see Choice); position is that of a stage's
    tokens, one for all its blocks. Norms outside the blocks are those of the first block of their stage.

    Args:
        layout: branches of a block, in order: mixer, cross, conv, ffn, half (an ffn that counts half), norm.
        mixer: token mixer.
        cross: how a decoder attends to its memory.
        conv: convolution branch of a layout with `conv`.
        conv_norm: norm inside the convolution branch.
        ffn: feed-forward layer.
        norm: normalization of the blocks.
        placement: where the norms of a block are.
        channel: channel attention at the end of each branch.
        modulation: how a condition changes a block.
        position: position encoding.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0.
        dropout: dropout rate of the branches.
        layer_scale: initial value of the learned scale of each branch; None for no such scale.
    """

    axes: ClassVar[int] = 2  # 2: tokens form H x W; 1: along time
    provides: ClassVar[frozenset[str]] = frozenset()  # which of `cond` and `memory` the model puts into the Context
    shown = ("mixer", "norm", "placement", "channel", "position", "ffn", "dim", "depth", "heads")

    layout: tuple[str, ...] = ("mixer", "ffn")
    mixer: Choice = "softmax"
    cross: Choice = "softmax"
    conv: Choice = "glu"
    conv_norm: Choice = "batchnorm"
    ffn: Choice = "mlp"
    norm: Choice = "layernorm"
    placement: Choice = "pre"
    channel: Choice = "none"
    modulation: Choice = "none"
    position: Choice = "sincos"
    drop_path: float = 0.0
    dropout: float = 0.0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*CHOICES, "position"):
            for spec in names_of(getattr(self, name)):
                try:
                    parse(spec)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        self.check_sizes()
        dims, depths, heads = zip(*self.stages, strict=True)
        if min(*dims, *heads, sum(depths)) < 1:
            sizes = f"dim {readable(dims)}, depth {readable(depths)}, heads {readable(heads)}"
            raise ValueError(f"dim, depth and heads must be >= 1, got {sizes}")
        for name in ("drop_path", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be >= 0 and < 1, got {getattr(self, name)}")
        self._check_layout()
        self._check_turns()
        for stage, size in enumerate(self.stages):
            self._check_stage(stage, size)

    @classmethod
    def migrated(cls, values: Mapping[str, Any], base: "Config | None" = None) -> dict[str, Any]:
        given = dict(values)
        modulated = isinstance(given.get("modulate"), bool) and given.pop("modulate")
        if modulated and given.setdefault("modulation", "adaln") != "adaln":
            raise ValueError(f"modulate=True and modulation '{given['modulation']}' contradict each other")
        if "mixer" in given:
            given["mixer"] = _renamed(given["mixer"])
        return given

    # The description of a family

    def check_sizes(self) -> None:
        """ValueError if the stages are unknown."""

    @property
    def stages(self) -> tuple[Size, ...]:
        """The sizes of the stages."""
        raise TypeError(f"{type(self).__name__} has no stages")

    @property
    def tags(self) -> list[str]:
        fields = ("mixer", "norm", "placement", "channel", "position", "ffn")
        names = [parse(spec)[0] for name in fields for spec in names_of(getattr(self, name))]
        return [name for name in names if name != "none"]

    @property
    def staged(self) -> bool:
        """Whether a tuple of choices has an entry for each stage."""
        return False

    @property
    def prefix(self) -> int:
        """The number of tokens before the grid."""
        return 0

    @property
    def writes(self) -> frozenset[str]:
        """The fields of the Context that this model sets in every stage, whatever its position, the mask among them."""
        return frozenset({"mask"})

    def prefix_of(self, stage: int) -> int:
        """The number of tokens before the grid of a stage."""
        return self.prefix

    def part(self, stage: int, index: int) -> int:
        """The part of a stage that a block is in: the blocks of a part see the same tokens."""
        return 0

    def path(self, stage: int, index: int) -> str:
        """Where a block is in the model, as its weights are named."""
        return f"blocks.{self.place(stage, index).index}"

    def missing(self, names: Iterable[str]) -> str | None:
        """The path of a block that the config has and the tensor names do not, or None. Only gaps are found: blocks
        without any tensor have no names."""
        length = 1 + self.path(0, 0).count(".")
        paths = {".".join(name.split(".")[:length]) for name in names}
        for stage, size in enumerate(self.stages):
            turns = self.turns(stage)
            for index in range(size.depth - turns):
                if self.path(stage, index) in paths and (path := self.path(stage, index + turns)) not in paths:
                    return path
        return None

    def grid(self, stage: int) -> tuple[int, ...]:
        """The grid of a stage at the config's own size."""
        raise TypeError(f"{type(self).__name__} has no grid")

    # What follows from it

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """The layouts of the blocks of each stage; the last is that of all further stages, too."""
        return (self.layout,)

    @property
    def words(self) -> list[str]:
        """The words of all layouts, one by one."""
        return [word for layout in self.layouts for word in words_of(layout)]

    def described(self, name: str) -> str:
        return readable(getattr(self, name), " / " if name in CHOICES and not self.staged else ", ")

    def chosen(self, name: str, stage: int, index: int) -> str:
        """The name that a block of a stage has for one of CHOICES, or for `position`."""
        choice: Choice = getattr(self, name)
        if self.staged and not isinstance(choice, str):
            choice = choice[stage]
        each = choice if isinstance(choice, str) else choice[index % len(choice)]
        assert isinstance(each, str)
        return each

    def place(self, stage: int = 0, index: int = 0) -> Place:
        """The Place of a block, given by its index in its stage."""
        before, depth = (sum(size.depth for size in part) for part in (self.stages[:stage], self.stages))
        return Place(self.axes, self.grid(stage), self.prefix_of(stage), min(before + index, depth - 1), depth)

    def block(self, stage: int = 0, index: int = 0) -> BlockConfig:
        """One block, given by its index in its stage."""
        position = self.chosen("position", stage, index)
        chosen = {name: self.chosen(name, stage, index) for name in CHOICES}
        writes = self.writes | ({"memory"} if "cross" in self.words else set())
        writes |= {"prefix"} if self.prefix_of(stage) else set()
        modulation = MODULATIONS.get(parse(chosen["modulation"])[0])
        writes |= set() if modulation is None else modulation.reads
        writes |= POSITIONS[parse(position)[0]].writes if parse(position)[0] in POSITIONS else set()
        number = max(self.stages[stage].depth, index + 1)
        alike = [(self.part(stage, each), parse(self.chosen("mixer", stage, each))[0]) for each in range(number)]
        order, last = alike[:index].count(alike[index]), alike[index] not in alike[index + 1 :]
        return BlockConfig(
            dim=self.stages[stage].dim,
            heads=self.stages[stage].heads,
            place=replace(self.place(stage, index), order=order, last=last),
            layout=self.layouts[min(stage, len(self.layouts) - 1)],
            position=position,
            dropout=self.dropout,
            layer_scale=self.layer_scale,
            writes=writes,
            **chosen,
        )

    def _check_layout(self) -> None:
        for layout in self.layouts:
            if {*layout} <= {"norm"}:
                raise ValueError(f"layout {'has no branch' if layout else 'is empty'}; the usual one is mixer, ffn")
        for word in self.words:
            if word not in WORDS:
                raise ValueError(f"layout: {unknown('branch', word, WORDS)}; + joins two, as in mixer+ffn")
        if "cross" in self.words and "memory" not in self.provides:
            raise ValueError("layout: this model has no memory for 'cross' to read")
        if {*names_of(self.modulation)} - {"none"} and "cond" not in self.provides:
            raise ValueError(f"modulation '{self.described('modulation')}': this model has no condition to read")
        for entry in itertools.chain(*self.layouts):
            if "+" in entry and not {"half", "norm"}.isdisjoint(entry.split("+")):
                raise ValueError(f"layout: half and norm cannot be joined to other words, as in '{entry}'")
        usual = {each.name: each.default for each in fields(self)}
        for name, words in USES.items():
            value = getattr(self, name)
            if {*words}.isdisjoint(self.words) and value != usual[name]:
                missing = " or ".join(words)
                raise ValueError(f"{name} '{self.described(name)}' would be ignored: the layout has no {missing}")

    def _check_turns(self) -> None:
        for name in (*CHOICES, "position"):
            choice: Choice = getattr(self, name)
            if isinstance(choice, str):
                continue
            if self.staged and len(choice) != len(self.stages):
                raise ValueError(f"{name} has {len(choice)} choices for {len(self.stages)} stages: {choice!r}")
            for stage, turns in enumerate(choice if self.staged else (choice,)):
                where = f" in stage {stage}" if self.staged else ""
                if isinstance(turns, str):
                    continue
                if not all(isinstance(each, str) for each in turns):
                    raise ValueError(
                        f"{name} must be a name, or a tuple of names that the blocks take in turn, got {turns!r}"
                    )
                depth = max(1, self.stages[stage].depth)
                if name == "position" and len(turns) != 1:
                    raise ValueError(f"position must be one name for all blocks{where}, got {turns!r}")
                if not 0 < len(turns) <= depth:
                    most = f"1 to {depth} names" if depth > 1 else "one name"
                    raise ValueError(f"{name} must be {most} for the {depth} blocks{where}, got {turns!r}")

    def located(self, stage: int, index: int) -> str:
        """The start of an error of a block: its path if blocks differ."""
        turned = any(len(self._turns(name, stage)) > 1 for name in CHOICES)
        return f"{self.path(stage, index)}: " if turned or self.staged else ""

    def _check_stage(self, stage: int, size: Size) -> None:
        """ValueError if a block is invalid; it names the block if blocks differ."""
        blocks = []
        for index in range(min(self.turns(stage), max(1, size.depth))):
            try:
                blocks.append(self.block(stage, index))
            except ValueError as error:
                raise ValueError(f"{self.located(stage, index)}{error}") from None
        widths = sorted({block.head_width for block in blocks})
        if "rotary" in blocks[0].writes and len(widths) > 1:
            where = f"{self.path(stage, 0)}: " if self.staged else ""
            raise ValueError(f"{where}position '{blocks[0].position}' needs heads of one width, got {widths}")

    def turns(self, stage: int) -> int:
        """After how many blocks of a stage the same block comes again."""
        return math.lcm(*(len(self._turns(name, stage)) for name in CHOICES))

    def _turns(self, name: str, stage: int) -> tuple[str, ...]:
        choice = getattr(self, name)
        if self.staged and not isinstance(choice, str):
            choice = choice[stage]
        return (choice,) if isinstance(choice, str) else choice


@dataclass(frozen=True, kw_only=True)
class FlatConfig(ModelConfig):
    """A family whose blocks all have one width.

    Args:
        dim: channels of each token.
        depth: number of blocks.
        heads: attention heads of a block.
    """

    dim: int
    depth: int
    heads: int

    @property
    def stages(self) -> tuple[Size, ...]:
        return (Size(self.dim, self.depth, self.heads),)
