"""Position encodings. `forward` adds to the tokens once; `place` writes into the Context."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import rows, table
from zoo.layer import Context, Layer, Place, extent
from zoo.tensors import filtered, single, zeroed
from zoo.text import unknown


class Position(Layer):
    """The constructor takes the width of the tokens, the heads of the mixers, the width of a head, and the Place.

    `writes` names the fields of the Context that `place` sets; a mixer has to read them. `streams`: whether only
    distances matter, so that it serves any chunk of a stream; `sized`, whether its weights depend on the grid of its
    Place."""

    writes: ClassVar[frozenset[str]] = frozenset()
    streams: ClassVar[bool] = False
    sized: ClassVar[bool] = False

    @classmethod
    def streams_of(cls, **options: Any) -> bool:
        """`streams` with these options."""
        return cls.streams

    def __init__(self, dim: int, heads: int, head_dim: int, place: Place) -> None:
        super().__init__()
        self.dim, self.head_dim, self.grid, self.prefix = dim, head_dim, place.grid, place.prefix

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x

    def place(self, context: Context) -> Context:
        return context


def _waves(start: int, stop: int, width: int, base: float, device: torch.device) -> Tensor:
    """Angles place / base^(k / width) for k = 0 .. width - 1, in fp64: [stop - start, width]."""
    rates = base ** (-torch.arange(width, device=device, dtype=torch.float64) / width)
    return torch.arange(start, stop, device=device, dtype=torch.float64)[:, None] * rates


def _sincos(start: int, stop: int, dim: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of the places on one axis: [stop - start, dim]."""
    waves = _waves(start, stop, dim // 2, 10000.0, device)
    return torch.cat([waves.sin(), waves.cos()], 1).float()


def _turns(start: int, stop: int, width: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of the angles of the places on one axis: [stop - start, 2, width]."""
    angles = _waves(start, stop, width, base, device)
    return torch.stack([angles.cos(), angles.sin()], 1).float()


def _on_grid(
    make: Callable[..., Tensor], grid: tuple[int, ...], *shape: Any, device: torch.device, last_first: bool = False
) -> Tensor:
    """The rows of each axis for every position of the grid, one axis after the other: [N, ..., sum of the widths];
    from the last axis to the first with `last_first`."""
    if len(grid) == 1:
        return rows(make, 0, grid[0], *shape, device=device)
    return table(_product, make, last_first, grid, *shape, device=device)


def _product(make: Callable[..., Tensor], last_first: bool, grid: tuple[int, ...], *rest: Any) -> Tensor:
    parts = []
    for axis, size in enumerate(grid):
        row = make(0, size, *rest)
        shape = [1] * len(grid) + list(row.shape[1:])
        shape[axis] = size
        parts.append(row.view(shape).expand(*grid, *row.shape[1:]))
    return torch.cat(parts[::-1] if last_first else parts, -1).flatten(0, len(grid) - 1)


class NoPosition(Position):
    """No position encoding."""

    streams = True


def _check_axes(name: str, dim: int, place: Place) -> None:
    if dim % (2 * place.axes):
        raise ValueError(f"{name} on {place.axes} axes needs a dim that is a multiple of {2 * place.axes}, got {dim}")


def _added(x: Tensor, context: Context, last_first: bool, centred: str = "none") -> Tensor:
    """x [B, N, D] + sines and cosines of each axis; the last axis has the first channels if `last_first`."""
    width = (x.shape[-1] + int(centred == "compressed")) // len(context.grid)
    waves = _on_grid(_sincos, context.grid, width, device=x.device, last_first=last_first)
    if centred != "none":
        waves = (waves.double() - waves.double().mean(-1, keepdim=True))[:, : x.shape[-1]]
    waves = waves.to(x.dtype)
    return x + (F.pad(waves, (0, 0, context.prefix, 0)) if context.prefix else waves)


class SinCos(Position):
    """Adds fixed sines and cosines of each axis (Vaswani et al. 2017; in two dimensions as MoCo v3 and MAE do). On
    images, order says which axis has the first half of the channels: `yx` or `xy`.

    centred serves the norms that do not subtract the mean of the channels: `full` subtracts it here, for rmsnorm;
    `compressed` also omits the last of dim + 1 channels, for crmsnorm; `none` does neither (Jiang et al. 2023,
    arXiv:2305.14858).
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, place: Place, *, order: str = "yx", centred: str = "none"
    ) -> None:
        super().__init__(dim, heads, head_dim, place)
        if centred not in ("none", "full", "compressed"):
            raise ValueError(f"sincos: {unknown('centred', centred, ('none', 'full', 'compressed'))}")
        _check_axes("sincos", dim + (centred == "compressed"), place)
        if order not in ("yx", "xy"):
            raise ValueError(f"sincos: {unknown('order', order, ('yx', 'xy'))}")
        self.last_first, self.centred = order == "xy", centred

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return _added(x, context, self.last_first, self.centred)


def lengths(context: Context, device: torch.device) -> list[Tensor]:
    """How many tokens each sample has along each axis: one tensor [1 or B] per axis."""
    if context.mask is not None:
        return extent(context)
    return [torch.full((1,), size, device=device) for size in context.grid]


def _linear(distance: Tensor) -> Tensor:
    """The weights of linear interpolation at a distance >= 0 in samples."""
    return (1 - distance).clamp(min=0)


def _cubic(distance: Tensor, sharpness: float = 0.75) -> Tensor:
    """The weights of bicubic interpolation on one axis at a distance >= 0 in samples (Keys 1981, with the parameter
    -sharpness)."""
    near = 1 - distance.square() * (3 - sharpness - (2 - sharpness) * distance)
    return torch.where(distance < 1, near, sharpness * (1 - distance) * (2 - distance).clamp(min=0).square())


class Learned(Position):
    """Adds a learned table with a row for each token, prefix included; for another grid the table is resized, on images
    bicubically (Dosovitskiy et al. 2021, arXiv:2010.11929).

    antialias=True resizes it as timm does, and transformers for DINOv2 with registers; the default is what transformers
    does for ViT, DeiT and DINOv2.

    With a mask the table is resized to the size of each sample, so padding changes nothing.
    """

    reads = frozenset({"prefix", "mask"})
    sized = True

    def __init__(self, dim: int, heads: int, head_dim: int, place: Place, *, antialias: bool = False) -> None:
        super().__init__(dim, heads, head_dim, place)
        self.antialias = antialias
        self.table = nn.Parameter(torch.zeros(1, place.prefix + math.prod(place.grid), dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        free = not all(isinstance(size, int) for size in context.grid)  # of the exporter, for which no size is fixed
        if context.mask is None and not free and context.grid == self.grid:
            return x + self.table
        resized = self.resize(context, x.device)
        head = self.table[:, : self.prefix].expand(resized.shape[0], -1, -1)
        return x + torch.cat([head, resized], 1).to(x.dtype)

    def resize(self, context: Context, device: torch.device) -> Tensor:
        """The grid's part of the table at the extents of the context: [1 or B, N, D]."""
        x = self.table[:, self.prefix :].unflatten(1, self.grid)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sizes = zip(context.grid, lengths(context, device), strict=True)
        with torch.autocast(device.type, enabled=False):
            for axis, (size, length) in enumerate(sizes, start=1):
                number = self.grid[axis - 1]
                centres = torch.arange(size, device=device, dtype=x.dtype) + 0.5
                places = centres * number / length.clamp(min=1)[:, None] - 0.5  # [1 or B, size], in rows of the table
                weights, taps = self.weigh(places, number, number / length.clamp(min=1).to(x.dtype))
                x = x.index_select(axis, taps).movedim(axis, -2)  # [1 or B, tokens of the other axis, taps, D]
                if x.ndim == 3:
                    x = weights @ x
                elif context.mask is None:  # matmul would reshape the other axis, which an export cannot leave free
                    x = torch.bmm(weights.expand(x.shape[1], -1, -1), x[0])[None]
                else:
                    x = weights[:, None] @ x
                x = x.movedim(-2, axis)
        return x.flatten(1, -2)

    def weigh(self, places: Tensor, number: int, step: Tensor) -> tuple[Tensor, Tensor]:
        """How the `number` rows of the table on one axis make those at places [1 or B, size] between them, `step`
        [1 or B] apart: weights [1 or B, size, taps], and the rows that they are for [taps]."""
        plain = len(self.grid) == 1
        if self.antialias:
            taps = torch.arange(number, device=places.device)
            distance = (places[..., None] - taps).abs() / step.clamp(min=1)[:, None, None]
            weights = _linear(distance) if plain else _cubic(distance, 0.5)
            total = weights.sum(-1, keepdim=True)
            return weights / total.masked_fill(total == 0, 1), taps  # nothing is near the places of padding
        taps = torch.arange(-2, number + 2, device=places.device)
        distance = (places[..., None] - taps).abs()
        return _linear(distance) if plain else _cubic(distance), taps.clamp(0, number - 1)


class Rotary(Position):
    """Rotates queries and keys by angles that grow with the position (RoPE, Su et al. 2021, arXiv:2104.09864); on
    images each axis has half of the channels. Prefix tokens are not rotated. Of n pairs, pair k is rotated by
    position / base^(k / n). absolute=True also adds `sincos(order='xy')` to the tokens (LightningDiT, Yao et al. 2025,
    arXiv:2501.01423).

    The position is that on the grid, from 0. With `reference` the n tokens along a side, of each sample's extent, have
    the positions of that many ones: token i has i * reference / n (EVA-02, Fang et al. 2023, arXiv:2303.11331). With
    centred=True it has 2 pi times its centre on -1..1 (DINOv3, Simeoni et al. 2025, arXiv:2508.10104).
    """

    writes = frozenset({"rotary"})
    streams = True
    anchor: Tensor

    @classmethod
    def streams_of(cls, *, absolute: bool = False, reference: int = 0, centred: bool = False, **options: Any) -> bool:
        return not (absolute or reference or centred)

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        place: Place,
        *,
        base: float = 10000.0,
        absolute: bool = False,
        reference: int = 0,
        centred: bool = False,
    ) -> None:
        super().__init__(dim, heads, head_dim, place)
        if head_dim % (2 * place.axes):
            raise ValueError(
                f"rope on {place.axes} axes needs a head width that is a multiple of {2 * place.axes}, got {head_dim}"
            )
        if base <= 0:
            raise ValueError(f"rope: base must be > 0, got {base}")
        if absolute:
            _check_axes("rope(absolute=True)", dim, place)
        if reference and centred:
            raise ValueError("rope: give either reference or centred")
        self.base, self.absolute, self.reference, self.centred = base, absolute, reference, centred
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # knows the device

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return _added(x, context, True) if self.absolute else x

    def place(self, context: Context) -> Context:
        width = self.head_dim // (2 * len(context.grid))
        if self.reference or self.centred:
            angles = self.angles(context, width)
            cosine, sine = angles.cos().float(), angles.sin().float()
        else:
            turns = _on_grid(_turns, context.grid, width, self.base, device=self.anchor.device)
            cosine, sine = turns.unbind(1)
        if context.prefix:
            cosine, sine = F.pad(cosine, (0, 0, context.prefix, 0), value=1.0), F.pad(sine, (0, 0, context.prefix, 0))
        return context._replace(rotary=torch.stack([cosine, sine]))

    def angles(self, context: Context, width: int) -> Tensor:
        """Angles in fp64 where positions depend on the size of the grid: [N, axes * width], or [B, N, axes * width]."""
        device, grid, parts = self.anchor.device, context.grid, []
        for axis, (size, length) in enumerate(zip(grid, lengths(context, device), strict=True)):
            place = torch.arange(size, device=device, dtype=torch.float64) / length.clamp(min=1)[:, None]
            if self.centred:
                place = 2 * math.pi * (2 * place + 1 / length.clamp(min=1)[:, None] - 1)
            else:
                place = place * self.reference
            rates = self.base ** (-torch.arange(width, device=device, dtype=torch.float64) / width)
            row = place[..., None] * rates
            shape = [row.shape[0], *[1] * len(grid), width]
            shape[1 + axis] = size
            parts.append(row.view(shape).expand(-1, *grid, -1))
        angles = torch.cat(parts, -1).flatten(1, -2)
        return angles if context.mask is not None else angles[0]


class LearnedRotary(Learned):
    """`learned` and `rope` together (EVA-02, Fang et al. 2023, arXiv:2303.11331). antialias is an option of the first,
    base and reference are those of the second."""

    writes = frozenset({"rotary"})

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        place: Place,
        *,
        antialias: bool = False,
        base: float = 10000.0,
        reference: int = 0,
    ) -> None:
        super().__init__(dim, heads, head_dim, place, antialias=antialias)
        self.rope = Rotary(dim, heads, head_dim, place, base=base, reference=reference)

    def place(self, context: Context) -> Context:
        return self.rope.place(context)


class Conditional(Position):
    """x + a depthwise convolution of x on the grid, with zero padding (CPE, Chu et al. 2021, arXiv:2102.10882).
    The convolution is `kernel` tokens wide."""

    reads = frozenset({"prefix", "mask"})
    mixes = True

    def __init__(self, dim: int, heads: int, head_dim: int, place: Place, *, kernel: int = 3) -> None:
        super().__init__(dim, heads, head_dim, place)
        if kernel % 2 == 0:
            raise ValueError(f"cpe: kernel must be odd, got {kernel}")
        conv = nn.Conv1d if place.axes == 1 else nn.Conv2d
        self.conv = conv(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = zeroed(x[:, context.prefix :], context.grid_mask)
        added = filtered(tokens, context.grid, self.conv.weight, self.conv.bias, int(self.conv.padding[0]))
        return x + F.pad(added, (0, 0, context.prefix, 0))


class Sine(Position):
    """Sines and cosines of each axis, added to queries and keys and not to values (DETR, Carion et al. 2020,
    arXiv:2005.12872).

    Positions run from 1 / n to 1 of the n tokens of each sample's extent, times 2 pi, sines and cosines alternating.
    With extent=False they count tokens from 0 as in `sincos` (RT-DETR, Zhao et al. 2024, arXiv:2304.08069).
    """

    writes = frozenset({"code"})
    reads = frozenset({"prefix", "mask"})
    anchor: Tensor

    def __init__(self, dim: int, heads: int, head_dim: int, place: Place, *, extent: bool = True) -> None:
        super().__init__(dim, heads, head_dim, place)
        _check_axes("sine", dim, place)
        self.extent = extent
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # knows the device and the dtype

    def place(self, context: Context) -> Context:
        grid, width = context.grid, self.dim // len(context.grid)
        if self.extent:
            code = self.normalized(context, width)
        else:
            code = _on_grid(_sincos, grid, width, device=self.anchor.device)[None]
        code = F.pad(code, (0, 0, context.prefix, 0)) if context.prefix else code
        return context._replace(code=code.to(self.anchor.dtype))

    def normalized(self, context: Context, width: int) -> Tensor:
        """[1 or B, N, dim], the first axis in the first channels."""
        device, parts = self.anchor.device, []
        rates = 10000.0 ** (-torch.arange(width // 2, device=device) / (width // 2))
        for axis, (size, length) in enumerate(zip(context.grid, lengths(context, device), strict=True)):
            place = torch.arange(1, size + 1, device=device) / (length[:, None] + 1e-6) * (2 * math.pi)
            waves = place[..., None] * rates
            row = torch.stack([waves.sin(), waves.cos()], -1).flatten(-2)  # [1 or B, size, width]
            shape = [row.shape[0], *[1] * len(context.grid), width]
            shape[1 + axis] = size
            parts.append(row.view(shape).expand(-1, *context.grid, -1))
        return torch.cat(parts, -1).flatten(1, -2)


class Distances(NamedTuple):
    """Scores fall with the distance of a key from its query: -slope * distance, by the places on the grid in tokens.
    Prefix tokens have no distance."""

    slopes: Tensor  # [heads]
    grid: tuple[int, ...]
    prefix: int
    power: float  # 2: Euclidean distance; 1: sum over the axes

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[1, heads, ..., q, k] in at least single precision, for the places of queries [..., q] and keys [..., k]."""
        slopes, pairs = single(self.slopes), zip(self.axes(queries), self.axes(keys), strict=True)
        gaps = [(one[..., None] - other[..., None, :]).abs().to(slopes.dtype) for one, other in pairs]
        distance = gaps[0] if len(gaps) == 1 else sum(gap**self.power for gap in gaps) ** (1 / self.power)
        if self.prefix:
            on_grid = (queries >= self.prefix)[..., None] & (keys >= self.prefix)[..., None, :]
            distance = distance.masked_fill(~on_grid, 0.0)
        return -slopes.view(-1, *[1] * distance.ndim) * distance[None, None]

    def axes(self, places: Tensor) -> list[Tensor]:
        """The coordinates of each place, by axis."""
        places = places - self.prefix
        return [places] if len(self.grid) == 1 else [places // self.grid[1], places % self.grid[1]]


class Alibi(Position):
    """Adds -m_h * distance to the scores of head h, with m_h = 2^(-8 h / heads) for h = 1 .. heads (ALiBi, Press et al.
    2022, arXiv:2108.12409).

    The distance is that of the tokens along time, before and after a query alike; on images it is Euclidean, or with
    distance='manhattan' the sum over both axes. Prefix tokens have none. In the paper it extrapolates to longer
    inputs than those of training. For a number of heads that is no power of two the paper takes other slopes.
    """

    writes = frozenset({"bias"})
    streams = True
    slopes: Tensor

    def __init__(self, dim: int, heads: int, head_dim: int, place: Place, *, distance: str = "euclidean") -> None:
        super().__init__(dim, heads, head_dim, place)
        if distance not in (known := ("euclidean", "manhattan")):
            raise ValueError(f"alibi: {unknown('distance', distance, known)}")
        self.power = 2.0 if distance == "euclidean" else 1.0
        self.register_buffer("slopes", self.of(heads), persistent=False)

    @staticmethod
    def of(heads: int, device: torch.device | str | None = None) -> Tensor:
        return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device, dtype=torch.float32))

    def place(self, context: Context) -> Context:
        return context._replace(bias=Distances(self.slopes, context.grid, context.prefix, self.power))


def make_anchors(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Gives the positions of a model that was made on the meta device the buffer by which they know their device."""
    for part in model.modules():
        if isinstance(part, Rotary | Sine):
            part.anchor = torch.zeros((), device=device)
        elif isinstance(part, Alibi):
            part.slopes = part.of(len(part.slopes), device)


POSITIONS: dict[str, type[Position]] = {
    "none": NoPosition,
    "learned": Learned,
    "sincos": SinCos,
    "sine": Sine,
    "rope": Rotary,
    "learned_rope": LearnedRotary,
    "alibi": Alibi,
    "cpe": Conditional,
}
"""Each row is constructed as row(dim, heads, width of a head, place, *, options)."""
