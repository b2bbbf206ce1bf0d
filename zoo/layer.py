"""The contract of a model's parts: a Layer maps tokens to tokens under a Context."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


_recomputing = False


@contextmanager
def second_run() -> Iterator[None]:
    """While a checkpointed block runs again in the backward pass: running statistics do not change, and layers report
    nothing."""
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


def recomputing() -> bool:
    """Whether a checkpointed block runs again."""
    return _recomputing


class Memory(NamedTuple):
    """The memory of a decoder: the tokens of an encoder and their positions."""

    tokens: Tensor  # [B, M, D]
    mask: Tensor | None = None  # [B, M], True on real tokens
    code: Tensor | None = None  # [1 or B, M, D], added to keys and not to values
    grids: tuple[tuple[int, ...], ...] = ()  # one per level; their products sum to M
    reference: Tensor | None = None  # [B, N, 2 or 4], where each query looks, in 0..1 of its sample's extent
    extent: Tensor | None = None  # [B, levels, 2], the share (x, y) of each map that is real; None for all of it


class Chunks(NamedTuple):
    """Which tokens see which, along time: each sees its whole chunk, and `left` tokens before that chunk."""

    chunk: int
    left: int  # a multiple of chunk

    def allow(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the queries [N] see the keys [M], both given by their places: [N, M]."""
        behind = (queries // self.chunk)[:, None] - keys // self.chunk
        return (behind >= 0) & (behind <= self.left // self.chunk)


class Groups(NamedTuple):
    """Which queries see which in a detector: those of `number` groups of `size` come first, then all others. A query
    of a group sees its group and the others, which see themselves alone (DN-DETR, Li et al. 2022, arXiv:2203.01305)."""

    number: int
    size: int

    def allow(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the queries [N] see the keys [M], both given by their places: [N, M]."""
        own, seen = ((places // self.size).clamp(max=self.number) for places in (queries, keys))
        return (seen == self.number) | (own[:, None] == seen)


class Order(NamedTuple):
    """Each token sees itself and those before it, line by line on an image. Prefix tokens see all tokens, and no other
    token sees them, as if they came last."""

    prefix: int = 0

    def allow(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the queries [N] see the keys [M], both given by their places: [N, M]."""
        last = torch.iinfo(keys.dtype).max
        queries, keys = (places.masked_fill(places < self.prefix, last) for places in (queries, keys))
        return queries[:, None] >= keys


class Bias(Protocol):
    """What a position adds to attention scores: a rule, as those above are, so that no N x N tensor is needed."""

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[1 or B, heads, ..., q, k] for the queries [..., q] and the keys [..., k], given by their places among all
        keys. Any axes in between are windows."""
        ...


# What layers write into is an object each time: FSDP2 copies the lists and dicts that a block is given.


class Losses:
    """What layers add to the loss of a training step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []


class Notes:
    """What layers report, by `<module path>.<name>`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}


class Carry:
    """What blocks leave for later ones on the same tokens, by name.

    A block finds `values` and writes into `left`, which `Model.run` gives to the next one. `values` do not change, so
    that a checkpointed block finds the same when it runs again.
    """

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values: dict[str, Tensor] = {} if values is None else values
        self.left: dict[str, Tensor] = {}


class Context(NamedTuple):
    """The context of tokens [B, N, D]. N = prefix + product(grid); masks are True on real tokens.

    Real tokens form a top-left rectangle of the grid (left-aligned in time), so a layer may use each sample's extent.
    With a cache, the tokens are one chunk of a stream: the keys are those in the cache, then the new ones;
    rotary is for all of them, and the queries are the last N.
    """

    grid: tuple[int, ...]  # (H, W) or (T,)
    prefix: int = 0  # class token and registers, before the grid
    mask: Tensor | None = None  # [B, N]
    rotary: Tensor | None = None  # [2, keys, d / 2] or [2, B, keys, d / 2] fp32: cosine and sine of queries and keys
    bias: Bias | None = None  # added to attention scores
    cond: Tensor | None = None  # the condition that modulates the blocks, in the shape that the modulation states
    code: Tensor | None = None  # [1 or B, N, D], added to queries and keys and not to values
    memory: Memory | None = None
    visible: Chunks | Groups | None = None
    order: Order | None = None  # in a causal model
    cache: dict[str, Tensor] | None = None  # the memory of a stream, by `<module path>.<slot>`; layers write into it
    notes: Notes | None = None  # what layers report; None if nobody asks
    losses: Losses | None = None  # what layers add to the loss; None if nobody asks
    carry: Carry | None = None  # what blocks leave for later ones

    def moved(self, grid: tuple[int, ...], prefix: int = 0, mask: Tensor | None = None) -> "Context":
        """The Context of other tokens of the same samples, with the condition and the memory of this one; blocks have
        left nothing in it. ValueError for a condition of single tokens on another number of them."""
        if self.cond is not None and self.cond.shape[1] != 1 and self.cond.shape[1] != prefix + math.prod(grid):
            raise ValueError(f"a condition of {self.cond.shape[1]} tokens does not fit the grid {grid}")
        return Context(
            grid,
            prefix,
            mask,
            cond=self.cond,
            memory=self.memory,
            notes=self.notes,
            losses=self.losses,
            carry=None if self.carry is None else Carry(),
        )

    @property
    def grid_mask(self) -> Tensor | None:
        """The mask without the prefix, [B, product(grid)]."""
        return None if self.mask is None else self.mask[:, self.prefix :]


@dataclass(frozen=True)
class Place:
    """The position of a row of a table in its model; every row's constructor receives one."""

    axes: int = 2  # 2: tokens form H x W; 1: along time
    grid: tuple[int, ...] = ()  # at the config's own size; weights that depend on the number of tokens start from it
    prefix: int = 0
    index: int = 0  # of the block, from 0, among the `depth` blocks of the model
    depth: int = 1
    order: int = 0  # of the block, from 0, among those that have its mixer and see the same tokens
    last: bool = True  # whether it is the last of those
    levels: int = 1  # grids of the memory that cross-attention reads
    branch: int = 0  # of the layout's `branches`; a modulation behind the last block has branch = branches
    branches: int = 1


ANYWHERE = Place()


class Site(NamedTuple):
    """A place inside a layer that a Block may fill with a norm of this width, split into heads if it has some."""

    width: int
    heads: int = 0


class Fold(NamedTuple):
    """One line of `model.fusion`: a layer, where it went, or why it stayed."""

    layer: str
    into: str | None
    reason: str = ""


class Layer(nn.Module):
    """Maps tokens x [B, N, D] to [B, N, D] under a Context.

    A row of a table declares what a config needs to know before anything is built. Class attributes hold for every
    option:

    - `reads`: the fields of the Context that the layer honours,
    - `mixes`: whether one token's output depends on other tokens,
    - `dimensions`: the numbers of axes that its grid may have,
    - `bare`: whether a Block puts nothing around it,
    - `causal`: whether only causal models may use it,
    - `undecayed`: the parameters of more than one dimension that weight decay would pull from where they start, such as
      an identity, towards zero.

    Two more a layer may set by its options: `quadratic` says whether its memory in inference grows with the square of
    the number of tokens, `reports_loss` whether it adds to the loss in training.

    The class methods `reads_of`, `causal_of`, `dimensions_of`, `sites_of` and `head_width_of` take the options, for
    rows where they matter.

    `address` is the layer's path in its model, by which it finds its memory of a stream. A layer that changes over
    training has a method `advance(progress)` and a property `finished`, true once it has reached its final form.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    dimensions: ClassVar[tuple[int, ...]] = (1, 2)
    mixes: ClassVar[bool] = False
    bare: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    undecayed: ClassVar[tuple[str, ...]] = ()
    quadratic: bool = False
    reports_loss: bool = False
    address: str = ""

    @classmethod
    def reads_of(cls, **options: Any) -> frozenset[str]:
        """The fields of the Context that the layer honours with these options."""
        return cls.reads

    @classmethod
    def causal_of(cls, **options: Any) -> bool:
        """Whether only causal models may use it with these options."""
        return cls.causal

    @classmethod
    def dimensions_of(cls, **options: Any) -> tuple[int, ...]:
        """The numbers of axes that its grid may have with these options."""
        return cls.dimensions

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        """The sites that a Block may fill: `inner` is before the output linear; `query`, `key` and `value`
        after the projections; `norm` after a convolution. Each is an attribute, None until it is filled."""
        return {}

    @classmethod
    def head_width_of(cls, dim: int, heads: int, **options: Any) -> int:
        """The width of a head, which rotary angles turn."""
        return dim // heads

    def forward(self, x: Tensor, context: Context) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward")

    @property
    def finished(self) -> bool:
        """Whether training has nothing left to change but weights, so that the layer may be folded."""
        return True

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        """The memory of a stream for this layer, by slot, before the first chunk: in the dtype and on the
        device of `like`."""
        return {}

    def recall(self, context: Context, slot: str) -> Tensor:
        """The memory of the stream in a slot of this layer; it is changed in place."""
        assert context.cache is not None
        return context.cache[f"{self.address}.{slot}"]

    def note(self, context: Context, name: str, value: Tensor) -> None:
        """Reports a value under `<address>.<name>`, if somebody asks."""
        if context.notes is not None and not _recomputing:
            context.notes.values[f"{self.address}.{name}"] = value

    def wants_loss(self, context: Context) -> bool:
        """Whether this forward is to `add_loss`: a training step that collects losses."""
        return self.reports_loss and self.training and context.losses is not None and torch.is_grad_enabled()

    def add_loss(self, context: Context, loss: Tensor) -> None:
        """Adds a loss, which the task weighs by its `balance`. A checkpointed block adds it again when it runs again,
        since both runs have to save the same tensors; nobody reads it then."""
        if context.losses is not None:
            context.losses.values.append(loss)

    def inputs(self) -> "list[nn.Linear] | str":
        """All the linears that read x, if nothing else does; or why an affine map cannot be folded into them."""
        return f"{type(self).__name__} has no linear that alone reads its input"

    def outputs(self) -> "list[nn.Linear] | str":
        """The linears whose sum is the result; or why an affine map cannot be folded into them."""
        return f"{type(self).__name__} has no output linear"


def joined(parts: "Iterable[list[nn.Linear] | str]") -> "list[nn.Linear] | str":
    """All linears of the parts, or the first reason why a part has none."""
    layers: list[nn.Linear] = []
    for part in parts:
        if isinstance(part, str):
            return part
        layers += part
    return layers


def advance(model: nn.Module, progress: float) -> None:
    """Tells every part with a method `advance` the progress of training, 0..1."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be from 0 to 1, got {progress}")
    for module in model.modules():
        if callable(step := getattr(module, "advance", None)):
            step(progress)


def undecayed(model: nn.Module) -> set[str]:
    """The parameters of the layers that weight decay leaves alone by declaration."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, Layer))
    names = {f"{name}.{each}".lstrip(".") for name, layer in layers for each in layer.undecayed}
    return names & {name for name, _ in model.named_parameters()}


def unfinished(model: nn.Module) -> list[str]:
    """The paths of the layers that have not reached their final form."""
    return [name for name, module in model.named_modules() if isinstance(module, Layer) and not module.finished]


def copied(model: Module) -> Module:
    """A deep copy with the forward hooks of the model's own modules; others, such as those of a profiler, cannot be
    copied."""
    parts = list(model.modules())
    own = {id(part) for part in parts}
    tables = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks) if hooks]
    before = [dict(hooks) for hooks in tables]
    try:
        for hooks in tables:
            for key, hook in list(hooks.items()):
                if id(getattr(getattr(hook, "func", hook), "__self__", None)) not in own:
                    del hooks[key]
        return copy.deepcopy(model)
    finally:
        for hooks, kept in zip(tables, before, strict=True):
            hooks.clear()
            hooks.update(kept)


def halved(context: Context) -> Context:
    """The Context of every second token along time."""
    # Compiled blocks are compiled again for other strides.
    mask = None if context.mask is None else context.mask[:, ::2].contiguous()
    return context.moved(((context.grid[0] + 1) // 2,), mask=mask)


def extent(context: Context) -> list[Tensor]:
    """How far each sample's real tokens reach along each axis of the grid: one tensor [B] per axis."""
    mask = context.grid_mask
    assert mask is not None
    if len(context.grid) == 1:
        return [mask.sum(1)]
    rectangle = mask.unflatten(1, context.grid)
    return [rectangle.any(2).sum(1), rectangle.any(1).sum(1)]
