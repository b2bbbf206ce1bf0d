"""Deformable aggregation: every output point sums samples of the input at learned offsets, with weights used as given
(DCNv4, Xiong et al. 2024, arXiv:2401.06197).

    out[p, g] = sum_k weights[p, g, k] * sample(value[..., g], base[p] + scale * (taps[k] + offsets[p, g, k]))

`sample` is linear along each axis and zero outside the grid. The forms: `gathered` takes the corners of each sample one
by one, exact in fp64, which the tests compare with; `reference` runs everywhere and is used for export; C++ on the
CPU and Triton on CUDA are behind one operator, which the compiler calls too: measured, that is twice as fast as
compiled gathers tap by tap, and compiles in one sixtieth of the time.
"""

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.cache import table
from zoo.kernels import deformable_cpu


def reference(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum in plain PyTorch: value [B, *grid, C], places [B, P, G, K, axes], weights [B, P, G, K] -> [B, P, C].

    Maps go through grid_sample, in one call for all groups. Lines do not: its coordinates in -1..1 lose a thousandth of
    a pixel if a line is 15,000 long.
    """
    places = places.nan_to_num(-2.0, -2.0, -2.0)  # NaN and infinite places are outside
    if value.ndim == 3:
        return gathered(value.to(places.dtype), places, weights).to(value.dtype)
    batch, groups = value.shape[0], places.shape[2]
    size = torch.tensor(value.shape[1:-1], dtype=places.dtype, device=value.device)
    where = ((2 * places + 1) / size - 1).flip(-1).transpose(1, 2).flatten(0, 1)  # [B * G, P, K, (x, y)] in -1..1
    maps = value.to(where.dtype).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = F.grid_sample(maps, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    summed = torch.einsum("bcpk,bpk->bpc", samples, weights.transpose(1, 2).flatten(0, 1).to(samples.dtype))
    return summed.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2).to(value.dtype)


def gathered(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The same by gathering each corner of each sample; on maps slower than grid_sample."""
    grid = value.shape[1:-1]
    batch, points, groups, taps = weights.shape
    channels = value.shape[-1] // groups
    flat = value.flatten(1, -2).unflatten(-1, (groups, channels)).transpose(1, 2)  # [B, G, N, C / G]
    places, weights = places.transpose(1, 2), weights.transpose(1, 2)  # [B, G, P, K, ...]
    low = places.detach().floor()
    total = torch.zeros(batch, groups, points, channels, dtype=value.dtype, device=value.device)
    for corner in itertools.product((0, 1), repeat=len(grid)):
        index = torch.zeros_like(low[..., 0], dtype=torch.long)
        share = torch.ones_like(places[..., 0])
        for axis, (side, size) in enumerate(zip(corner, grid, strict=True)):
            at = low[..., axis] + side
            part = places[..., axis] - low[..., axis]
            share = share * (part if side else 1 - part) * ((at >= 0) & (at < size))
            index = index * size + at.clamp(0, size - 1).long()
        picked = flat.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, channels))
        total = total + (picked.unflatten(2, (points, taps)) * (share * weights)[..., None]).sum(3)
    return total.transpose(1, 2).flatten(2)


def positions(offsets: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    """The place of each tap in pixels, in at least fp32: half precision would blur places. [B, P, G, K, axes]."""
    return base[:, None, None] + scale * (taps + offsets)


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator zoo::NAME, as torch.library.custom_op does, whose first call imports PyTorch's
    compiler, too, and takes half as long as importing PyTorch."""

    def make(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"zoo::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"zoo::{name}", "default", function)
        return getattr(torch.ops.zoo, name).default

    return make


@_operator("deformable")
def forward(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    """`aggregate` by the fast form of the device."""
    return _fast(value.device.type).forward(value, offsets, weights, base, taps, scale)


@_operator("deformable_backward")
def backward(
    gradient: Tensor, value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, offsets and weights."""
    return _fast(value.device.type).backward(gradient, value, offsets, weights, base, taps, scale)


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fast(device: str) -> Any:
    """The module with the fast form for the device, or None."""
    if device == "cpu":
        return deformable_cpu if deformable_cpu.available() else None
    if device == "cuda" and _triton_is_there():
        from zoo.kernels import deformable_triton

        return deformable_triton
    return None


def _has_fast(device: str) -> bool:
    """Whether an exporter is tracing, which does not know the operator; the compiler would assume so."""
    return not torch.compiler.is_exporting() and _fast(device) is not None


# torch.compiler.assume_constant_result, without the second that it takes to import the compiler.
_has_fast._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@torch.library.register_fake("zoo::deformable")
def _(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    return value.new_empty(offsets.shape[0], offsets.shape[1], value.shape[-1])


@torch.library.register_fake("zoo::deformable_backward")
def _(
    gradient: Tensor, value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None)


torch.library.register_autograd("zoo::deformable", _differentiate, setup_context=_remember)


def aggregate(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    """value [B, *grid, C], offsets [B, P, G, K, axes], weights [B, P, G, K], base [P, axes], taps [K, axes] ->
    [B, P, C]. Base and taps are constants; gradients go to the others."""
    if not offsets.shape[2] or value.shape[-1] % offsets.shape[2]:
        raise ValueError(f"groups must divide {value.shape[-1]} channels, got {offsets.shape[2]}")
    if not value.device == offsets.device == weights.device:
        raise ValueError(
            f"all tensors must be on one device, got {value.device}, {offsets.device} and {weights.device}"
        )
    if not _has_fast(value.device.type):
        return reference(value, positions(offsets, base, taps, scale), weights)
    return forward(value, offsets, weights, base, taps, scale)


def deformable(
    value: Tensor,
    offsets: Tensor,
    weights: Tensor,
    *,
    kernel: int | tuple[int, ...],
    stride: int = 1,
    dilation: int = 1,
    padding: int | str = "same",
    scale: float = 1.0,
) -> Tensor:
    """value [B, *grid, C], offsets [B, *out, G, K, axes], weights [B, *out, G, K] -> [B, *out, C].

    The grid has one axis or two. K counts the kernel's taps in row-major order; offsets are in pixels and in the order
    of the grid (y, x). A tap is read at p * stride + scale * (tap + offset), taps being counted from the middle of the
    kernel's span, dilation * (taps - 1) // 2 pixels after its first one.
    Padding "same" keeps the size, divided by the stride and rounded up; a number p puts the first point where a
    convolution padded by p has its first kernel's centre. ValueError if shapes do not fit each other.
    """
    grid, axes = tuple(value.shape[1:-1]), value.ndim - 2
    kernel = (kernel,) * axes if isinstance(kernel, int) else tuple(kernel)
    if axes not in (1, 2) or len(kernel) != axes:
        raise ValueError(f"deformable needs a grid of 1 or 2 axes and a kernel of as many, got {grid} and {kernel}")
    if not all(isinstance(number, int) and number > 0 for number in (*kernel, stride, dilation)):
        raise ValueError(f"kernel, stride and dilation must be integers >= 1, got {kernel}, {stride} and {dilation}")
    reach = [dilation * (taps - 1) for taps in kernel]
    middle = tuple(span // 2 for span in reach)
    if padding == "same":
        out = tuple(-(-size // stride) for size in grid)
        origin = (0,) * axes
    elif isinstance(padding, int) and not isinstance(padding, bool):
        out = tuple((size + 2 * padding - span - 1) // stride + 1 for size, span in zip(grid, reach, strict=True))
        origin = tuple(half - padding for half in middle)
    else:
        raise ValueError(f'padding must be an integer or "same", got {padding!r}')
    groups, points = offsets.shape[-3] if offsets.ndim == axes + 4 else 1, tuple(weights.shape[1 : axes + 1])
    wanted = (value.shape[0], *out, groups, math.prod(kernel), axes)
    if tuple(offsets.shape) != wanted or weights.shape != offsets.shape[:-1]:
        raise ValueError(
            f"deformable expects offsets {(value.shape[0], *out, 'groups', math.prod(kernel), axes)} and weights "
            f"without the last axis, got {tuple(offsets.shape)} and {tuple(weights.shape)}"
        )
    kind = torch.promote_types(torch.promote_types(value.dtype, offsets.dtype), torch.float32)
    base = table(lattice, out, (stride,) * axes, origin, kind, device=value.device)
    first = tuple(-half for half in middle)
    taps = table(lattice, kernel, (dilation,) * axes, first, kind, device=value.device)
    y = aggregate(value, offsets.flatten(1, axes), weights.flatten(1, axes), base, taps, scale)
    return y.unflatten(1, points)


def multiscale(
    value: Tensor, grids: Sequence[tuple[int, int]], places: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """Sums samples of several maps: value [B, M, C], the maps of `grids` one after the other; for each map, places
    [B, N, G, K, 2] in 0..1 of its height and width, (y, x), and weights [B, N, G, K], K being its own -> [B, N, C].

    The sampling of multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159); weights are used as given.
    """
    sizes = tuple(value.shape)
    if not len(grids) == len(places) == len(weights):
        raise ValueError(
            f"{len(places)} levels and {len(weights)} levels of weights do not fit the grids {tuple(grids)}"
        )
    for each, share in zip(places, weights, strict=True):
        if each.ndim != 5 or tuple(each.shape) != (*share.shape, 2):
            raise ValueError(
                f"multiscale expects a place (y, x) for each weight, got {tuple(each.shape)} and {tuple(share.shape)}"
            )
    if not grids or sum(rows * columns for rows, columns in grids) != sizes[1]:
        raise ValueError(f"{sizes[1]} tokens and {len(places)} levels do not fit the grids {tuple(grids)}")
    if len(sizes) != 3 or sizes[0] != places[0].shape[0]:
        raise ValueError(f"multiscale expects a value ({places[0].shape[0]}, tokens, channels), got {sizes}")
    kind = torch.promote_types(torch.promote_types(value.dtype, places[0].dtype), torch.float32)
    nowhere = torch.zeros(places[0].shape[1], 2, dtype=kind, device=value.device)
    maps = value.split([rows * columns for rows, columns in grids], 1)
    total = None
    for each, grid, where, share in zip(maps, grids, places, weights, strict=True):
        centre = torch.zeros(where.shape[3], 2, dtype=kind, device=value.device)
        pixels = where.to(kind) * torch.tensor(grid, dtype=kind, device=value.device) - 0.5
        one = aggregate(each.unflatten(1, grid), pixels, share, nowhere, centre, 1.0)
        total = one if total is None else total + one
    assert total is not None
    return total


def lattice(
    sizes: tuple[int, ...], steps: tuple[int, ...], origin: tuple[int, ...], kind: torch.dtype, device: torch.device
) -> Tensor:
    """All points origin + steps * (0 .. sizes - 1) in row-major order: [product(sizes), axes]."""
    lines = [
        torch.arange(size, device=device, dtype=kind) * step + start
        for size, step, start in zip(sizes, steps, origin, strict=True)
    ]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)
