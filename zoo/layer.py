"""What a part of a model is: a Layer maps tokens to tokens under a Context; `make` builds one from its name."""

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode


def mask_of(lengths: Tensor, size: int) -> Tensor:
    """[B, size], True on the first of lengths [B]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Memory(NamedTuple):
    """What a decoder reads: the tokens of an encoder and where they lie."""

    tokens: Tensor  # [B, M, D]
    mask: Tensor | None = None  # [B, M], True on real tokens
    code: Tensor | None = None  # [1 or B, M, D], added to keys and not to values
    grids: tuple[tuple[int, ...], ...] = ()  # one per level; their products sum to M
    reference: Tensor | None = None  # [B, N, 2 or 4], where each query looks, in 0..1


class Chunks(NamedTuple):
    """Which tokens see which, along time: each sees its own chunk whole, and `left` tokens in front of that chunk."""

    chunk: int
    left: int  # a multiple of chunk

    def allow(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the queries [N] see the keys [M], both given by their places: [N, M]."""
        behind = (queries // self.chunk)[:, None] - keys // self.chunk
        return (behind >= 0) & (behind <= self.left // self.chunk)


class Context(NamedTuple):
    """What tokens [B, N, D] know besides their values. N = prefix + product(grid); masks are True on what is real.

    Real tokens form a top-left rectangle of the grid (left-aligned in time), so a layer may use each sample's extent.
    With a cache, the tokens are one chunk of a stream: the keys are those that the cache holds and then the new ones,
    and rotary and bias speak of all of them, the queries being the last N.
    """

    grid: tuple[int, ...]  # (H, W) or (T,)
    prefix: int = 0  # class token and registers, in front of the grid
    mask: Tensor | None = None  # [B, N]
    rotary: Tensor | None = None  # [2, keys, d / 2] fp32: cosine and sine that turn queries and keys
    bias: Tensor | None = None  # [heads, N, keys], added to attention scores
    cond: Tensor | None = None  # [B, 1 or N, D], what modulates the blocks
    code: Tensor | None = None  # [1 or B, N, D], added to queries and keys and not to values
    memory: Memory | None = None
    visible: Chunks | None = None
    cache: dict[str, Tensor] | None = None  # what a stream remembers, by `<module path>.<slot>`; layers write into it

    @property
    def grid_mask(self) -> Tensor | None:
        """The mask without the prefix, [B, product(grid)]."""
        return None if self.mask is None else self.mask[:, self.prefix :]


class Fold(NamedTuple):
    """One line of `model.fusion`: a layer, where it went, and why where it stayed."""

    layer: str
    into: str | None
    reason: str = ""


class Layer(nn.Module):
    """Maps tokens x [B, N, D] to [B, N, D] under a Context.

    `reads` names the fields of the Context that the layer honours; `mixes` says whether one token's output depends on
    other tokens; `bare`, that a Block puts nothing around it. `sites` maps the names of the places that a Block may
    fill with a norm to their widths: `inner` stands in front of the output linear, `query`, `key` and `value` behind
    the projections. `heads`, where above 0, splits the `inner` site into heads. `dimensions` are the numbers of axes
    that its grid may have. `address` is the layer's path in its model, by which it finds what a stream remembers.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    dimensions: ClassVar[tuple[int, ...]] = (1, 2)
    mixes: ClassVar[bool] = False
    bare: ClassVar[bool] = False
    sites: dict[str, int] = {}
    heads: int = 0
    address: str = ""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward")

    def state(self, batch: int, visible: Chunks) -> dict[str, Tensor]:
        """What a stream has to remember for this layer, by slot, as it is before the first chunk."""
        return {}

    def recall(self, context: Context, slot: str) -> Tensor:
        """What the stream remembers in a slot of this layer; it is changed in place."""
        assert context.cache is not None
        return context.cache[f"{self.address}.{slot}"]

    def fill(self, site: str, layer: "Layer") -> None:
        """Puts a layer into a site; ValueError where there is no such site or it is taken."""
        name = type(self).__name__
        if site not in self.sites:
            raise ValueError(
                f"{name} has no site '{site}' for this placement; it has: {', '.join(self.sites) or 'none'}"
            )
        if getattr(self, site) is not None:
            raise ValueError(f"the site '{site}' of {name} is already filled; drop the option that fills it")
        setattr(self, site, layer)

    def inputs(self) -> "list[nn.Linear] | str":
        """All the linears that alone read x, or the reason why an affine map cannot be folded into them."""
        return f"{type(self).__name__} has no linear that alone reads its input"

    def outputs(self) -> "list[nn.Linear] | str":
        """The linears whose sum alone is the result, or the reason why an affine map cannot be folded into them."""
        return f"{type(self).__name__} has no output linear"


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear map with truncated-normal weights (standard deviation 0.02) and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, N, ...] with zeros where the mask [B, N] is False."""
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - 2)), 0.0)


def to_map(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens [B, product(grid), C] as a map [B, C, *grid], channels last in memory."""
    # In this order a batch of one, too, has the strides by which convolutions recognise channels last.
    return x.unflatten(1, grid).movedim(-1, 1)


def to_tokens(x: Tensor) -> Tensor:
    """A map [B, C, *grid] as tokens [B, product(grid), C]."""
    return x.flatten(2).transpose(1, 2)


def filtered(
    tokens: Tensor, grid: tuple[int, ...], weight: Tensor, bias: Tensor | None, padding: int, stride: int = 1
) -> Tensor:
    """A depthwise convolution along the grid of tokens [B, product(grid), C], zeros outside: [B, N', C]. weight is that
    of a Conv1d or a Conv2d."""
    if len(grid) == 2:
        return to_tokens(F.conv2d(to_map(tokens, grid), weight, bias, stride, padding, groups=len(weight)))
    if len(weight) <= 16:  # in bf16 oneDNN never ends the other way with so few channels (torch 2.11)
        return to_tokens(F.conv1d(tokens.transpose(1, 2), weight, bias, stride, padding, groups=len(weight)))
    # On a map of one row the channels may lie last in memory, which is many times as fast on the CPU.
    maps, kernel = tokens.transpose(1, 2)[:, :, None], weight[:, :, None]
    return to_tokens(F.conv2d(maps, kernel, bias, (1, stride), (0, padding), groups=len(weight)))


def halved(context: Context) -> Context:
    """The Context of every second token along time."""
    mask = None if context.mask is None else context.mask[:, ::2]
    return Context(grid=((context.grid[0] + 1) // 2,), mask=mask)


def extent(context: Context) -> list[Tensor]:
    """How far each sample's real tokens reach along each axis of the grid: one tensor [B] per axis."""
    mask = context.grid_mask
    assert mask is not None
    if len(context.grid) == 1:
        return [mask.sum(1)]
    rectangle = mask.unflatten(1, context.grid)
    return [rectangle.any(2).sum(1), rectangle.any(1).sum(1)]


@lru_cache(maxsize=4096)
def parse(spec: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Splits "pool(size=5)" into ("pool", (("size", 5),)). Options are literals; nothing is ever evaluated."""
    hint = "write a name, or a name with options as in 'pool(size=5)'"
    if len(spec) > 500:
        raise ValueError(f"cannot read {spec[:40]!r}..., which has {len(spec)} characters; {hint}")
    try:
        node = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"cannot read {spec!r}; {hint}") from None
    if isinstance(node, ast.Name):
        return node.id, ()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(f"cannot read {spec!r}; {hint}")
    options = []
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in dict(options):
            raise ValueError(f"cannot read {spec!r}; each option is written once, by its name")
        try:
            options.append((keyword.arg, ast.literal_eval(keyword.value)))
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"cannot read {spec!r}; {hint}; a word is written in quotes") from None
    return node.func.id, tuple(options)


@lru_cache(maxsize=1024)
def options_of(row: type) -> dict[str, Any]:
    """The options of a row and their defaults: its constructor's keyword-only parameters."""
    parameters = inspect.signature(row).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check(table: Mapping[str, type], spec: str) -> dict[str, Any]:
    """All options of the row that spec names, given ones over defaults; ValueError where a name or option is wrong."""
    name, given = parse(spec)
    if name not in table:
        raise ValueError(f"there is no '{name}'; choose from: {', '.join(sorted(table))}")
    allowed = options_of(table[name])
    for option, value in given:
        if option not in allowed:
            raise ValueError(f"'{name}' has no option '{option}'; it has: {', '.join(allowed) or 'none'}")
        default = allowed[option]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if default is not None and (
            not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ValueError(f"option {option} of '{name}' takes a value like {default!r}, not {value!r}")
        if isinstance(default, int | float) and not isinstance(default, bool):
            least = 1 if isinstance(default, int) and default > 0 else 0
            if not least <= value < math.inf:
                raise ValueError(f"option {option} of '{name}' is at least {least} and finite, not {value!r}")
    return allowed | dict(given)


def make(table: Mapping[str, type], spec: str, *arguments: Any) -> Any:
    """Builds the row that spec names: make(MIXERS, "pool(size=5)", dim, heads, axes)."""
    options = check(table, spec)
    return table[parse(spec)[0]](*arguments, **options)


def advance(model: nn.Module, progress: float) -> None:
    """Tells every layer that changes over training how much of it is over, progress in 0..1."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress lies in 0..1, not {progress}")
    for module in model.modules():
        if isinstance(module, Layer) and callable(step := getattr(module, "advance", None)):
            step(progress)


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=256)
def _cached(make: Callable[..., Tensor], device: torch.device, *shape: Any) -> Tensor:
    return make(*shape, torch.device("cpu")).to(device)  # made on the CPU, for not every device has fp64


def table(make: Callable[..., Tensor], *shape: Any, device: torch.device) -> Tensor:
    """What make(*shape, device) gives, a fixed table, computed once for each shape; the compiler traces it anew."""
    if compiling():
        return make(*shape, device)
    if _get_current_dispatch_mode() is not None:  # what a mode makes of tensors must not outlive it
        return make(*shape, torch.device("cpu")).to(device)
    with torch.inference_mode(False), torch.no_grad():
        return _cached(make, device, *shape)


def exporting() -> bool:
    """Whether the call is being traced by the exporter, whose program takes other sizes than it saw."""
    return torch.compiler.is_exporting()


def compiling() -> bool:
    """Whether the call is being traced by the compiler or the exporter."""
    return torch.compiler.is_compiling()
