"""Positions: what tells tokens where they are. `forward` adds to the tokens once; `place` writes into the Context."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import Context, Layer, extent, filtered, table, to_map, to_tokens, zeroed


class Position(Layer):
    """`writes` names the fields of the Context that `place` sets; a mixer has to read them."""

    writes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, dim: int, head_dim: int, grid: tuple[int, ...], prefix: int) -> None:
        super().__init__()
        self.dim, self.head_dim, self.grid, self.prefix = dim, head_dim, grid, prefix

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x

    def place(self, context: Context) -> Context:
        return context


def _waves(size: int, width: int, base: float, device: torch.device) -> Tensor:
    """Angles place / base^(k / width) for k = 0 .. width - 1, in fp64: [size, width]."""
    rates = base ** (-torch.arange(width, device=device, dtype=torch.float64) / width)
    return torch.arange(size, device=device, dtype=torch.float64)[:, None] * rates


def _sincos(grid: tuple[int, ...], dim: int, prefix: int, device: torch.device) -> Tensor:
    """[prefix + N, dim]: sines and cosines of each axis, one after the other; zeros for the prefix."""
    parts = []
    for axis, size in enumerate(grid):
        waves = _waves(size, dim // (2 * len(grid)), 10000.0, device)
        shape = [1] * len(grid) + [-1]
        shape[axis] = size
        wave = torch.cat([waves.sin(), waves.cos()], 1)
        parts.append(wave.view(shape).expand(*grid, -1))
    table = torch.cat(parts, -1).reshape(-1, dim).float()
    return F.pad(table, (0, 0, prefix, 0))


def _rotary(grid: tuple[int, ...], head_dim: int, prefix: int, base: float, device: torch.device) -> Tensor:
    """[2, prefix + N, head_dim / 2]: cosine and sine; each axis turns its share of the pairs, the prefix none."""
    parts = []
    for axis, size in enumerate(grid):
        waves = _waves(size, head_dim // (2 * len(grid)), base, device)
        shape = [1] * len(grid) + [-1]
        shape[axis] = size
        parts.append(waves.view(shape).expand(*grid, -1))
    angles = F.pad(torch.cat(parts, -1).reshape(-1, head_dim // 2), (0, 0, prefix, 0))
    return torch.stack([angles.cos(), angles.sin()]).float()


class NoPosition(Position):
    """Tokens are a set."""


class SinCos(Position):
    """Fixed sines and cosines of each axis are added (Vaswani et al. 2017; in two dimensions as MoCo v3 and MAE do)."""

    def __init__(self, dim: int, head_dim: int, grid: tuple[int, ...], prefix: int) -> None:
        super().__init__(dim, head_dim, grid, prefix)
        if dim % (2 * len(grid)):
            raise ValueError(f"sincos on {len(grid)} axes needs a dim that {2 * len(grid)} divides, not {dim}")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x + table(_sincos, context.grid, self.dim, context.prefix, device=x.device).to(x.dtype)


class Learned(Position):
    """A learned table, one row a token, prefix included; on another grid it is resized, in two dimensions bicubically
    (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Under a mask the table is resized to each sample's own extent, so padding changes nothing.
    """

    reads = frozenset({"prefix", "mask"})

    def __init__(self, dim: int, head_dim: int, grid: tuple[int, ...], prefix: int) -> None:
        super().__init__(dim, head_dim, grid, prefix)
        self.table = nn.Parameter(torch.zeros(1, prefix + math.prod(grid), dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.grid == self.grid and context.mask is None:
            return x + self.table
        resized = self.resize(context, x.device)
        head = self.table[:, : self.prefix].expand(len(resized), -1, -1)
        return x + torch.cat([head, resized], 1).to(x.dtype)

    def resize(self, context: Context, device: torch.device) -> Tensor:
        """The grid's part of the table at the extents of the context: [1 or B, N, D]."""
        source = to_map(self.table[:, self.prefix :], self.grid).float()
        if context.mask is None:
            lengths = [torch.full((1,), size, device=device) for size in context.grid]
        else:
            lengths = extent(context)
        places = []
        for size, length in zip(context.grid, lengths, strict=True):
            place = torch.arange(size, device=device, dtype=torch.float32)
            places.append((2 * place + 1) / length.clamp(min=1)[:, None] - 1)  # [B, size], -1..1 over the extent
        batch = len(places[0])
        if len(places) == 1:
            source = source[:, :, None]
            where = torch.stack([places[0], torch.zeros_like(places[0])], -1)[:, None]
        else:
            down, along = places[0][:, :, None], places[1][:, None, :]
            where = torch.stack(torch.broadcast_tensors(along, down), -1)
        mode = "bilinear" if len(places) == 1 else "bicubic"
        source = source.expand(batch, -1, -1, -1)
        resized = F.grid_sample(source, where, mode=mode, padding_mode="border", align_corners=False)
        return to_tokens(resized)


class Rotary(Position):
    """Queries and keys are turned by angles that grow with their place (RoPE, Su et al. 2021, arXiv:2104.09864); on two
    axes each axis turns half of the pairs. Prefix tokens are not turned."""

    writes = frozenset({"rotary"})
    anchor: Tensor

    def __init__(self, dim: int, head_dim: int, grid: tuple[int, ...], prefix: int, *, base: float = 10000.0) -> None:
        super().__init__(dim, head_dim, grid, prefix)
        if head_dim % (2 * len(grid)):
            raise ValueError(
                f"rope on {len(grid)} axes needs a head of a width that {2 * len(grid)} divides, not {head_dim}"
            )
        self.base = base
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # knows the device

    def place(self, context: Context) -> Context:
        key = (context.grid, self.head_dim, context.prefix, self.base)
        return context._replace(rotary=table(_rotary, *key, device=self.anchor.device))


class Conditional(Position):
    """x + depthwise convolution of x on the grid, zero outside it (CPE, Chu et al. 2021, arXiv:2102.10882)."""

    reads = frozenset({"prefix", "mask"})
    mixes = True

    def __init__(self, dim: int, head_dim: int, grid: tuple[int, ...], prefix: int, *, kernel: int = 3) -> None:
        super().__init__(dim, head_dim, grid, prefix)
        if kernel % 2 == 0:
            raise ValueError(f"cpe takes an odd kernel, not {kernel}")
        conv = nn.Conv1d if len(grid) == 1 else nn.Conv2d
        self.conv = conv(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = zeroed(x[:, context.prefix :], context.grid_mask)
        added = filtered(tokens, context.grid, self.conv.weight, self.conv.bias, int(self.conv.padding[0]))
        return x + F.pad(added, (0, 0, context.prefix, 0))


POSITIONS: dict[str, type[Position]] = {
    "none": NoPosition,
    "learned": Learned,
    "sincos": SinCos,
    "rope": Rotary,
    "cpe": Conditional,
}
