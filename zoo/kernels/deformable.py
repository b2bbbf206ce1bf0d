"""Deformable aggregation: every output point sums samples of the input at learned offsets, with weights used as given
(DCNv4, Xiong et al. 2024, arXiv:2401.06197).

    out[p, g] = sum_k weights[p, g, k] * sample(value[..., g], p * stride + origin + scale * (tap_k + offsets[p, g, k]))

`sample` is linear along each axis and zero outside the grid. `reference` uses grid_sample; `oracle` gathers the corners
one by one and serves the tests in fp64.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


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
    of the grid (y, x). Padding "same" centres the kernel on its output point; a number p starts it p pixels outside the
    grid as a convolution does. ValueError where shapes do not fit each other.
    """
    places = sampling(value, offsets, weights, kernel, stride, dilation, padding, scale)
    return reference(value, places, weights)


def sampling(
    value: Tensor,
    offsets: Tensor,
    weights: Tensor,
    kernel: int | tuple[int, ...],
    stride: int,
    dilation: int,
    padding: int | str,
    scale: float,
) -> Tensor:
    """Where each tap is read, in pixels: [B, *out, G, K, axes]. Checks all shapes."""
    grid = tuple(value.shape[1:-1])
    axes = len(grid)
    kernel = (kernel,) * axes if isinstance(kernel, int) else kernel
    if axes not in (1, 2) or len(kernel) != axes:
        raise ValueError(f"deformable takes grids of 1 or 2 axes and a kernel of as many, not {grid} and {kernel}")
    if padding == "same":
        out = tuple(-(-size // stride) for size in grid)
        starts = [-dilation * ((taps - 1) // 2) for taps in kernel]
        origin = [0.0] * axes
    elif isinstance(padding, int):
        out = tuple(
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps in zip(grid, kernel, strict=True)
        )
        starts = [-dilation * ((taps - 1) // 2) for taps in kernel]
        origin = [float(-padding - start) for start in starts]
    else:
        raise ValueError(f'padding is a number or "same", not {padding!r}')
    taps = torch.tensor(
        list(
            itertools.product(
                *[[start + dilation * i for i in range(n)] for start, n in zip(starts, kernel, strict=True)]
            )
        ),
        dtype=torch.promote_types(offsets.dtype, torch.float32),
        device=value.device,
    )
    groups = offsets.shape[-3]
    if offsets.shape != (value.shape[0], *out, groups, len(taps), axes) or weights.shape != offsets.shape[:-1]:
        raise ValueError(
            f"deformable expects offsets {(value.shape[0], *out, 'groups', len(taps), axes)} and weights without the "
            f"last axis, not {tuple(offsets.shape)} and {tuple(weights.shape)}"
        )
    if value.shape[-1] % groups:
        raise ValueError(f"{groups} groups do not divide {value.shape[-1]} channels")
    lines = [
        torch.arange(size, device=value.device, dtype=taps.dtype) * stride + start
        for size, start in zip(out, origin, strict=True)
    ]
    base = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    return base[..., None, None, :] + scale * (taps + offsets)


def reference(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum by grid_sample, one call for all groups; a line of tokens is a map of height 1."""
    grid, out = value.shape[1:-1], places.shape[1:-3]
    batch, groups = value.shape[0], places.shape[-3]
    if len(grid) == 1:
        value = value[:, None]
        places = torch.cat([torch.zeros_like(places), places], -1)
    size = torch.tensor(value.shape[1:-1], dtype=places.dtype, device=value.device)
    where = ((2 * places + 1) / size - 1).flip(-1)  # -1..1, x first
    where = where.flatten(1, -4).movedim(2, 1).flatten(0, 1)  # [B * G, points, K, 2]; half precision would blur places
    maps = value.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # [B * G, C / G, H, W]
    wide = maps.to(where.dtype)
    samples = F.grid_sample(wide, where, mode="bilinear", padding_mode="zeros", align_corners=False).to(maps.dtype)
    by_group = weights.flatten(1, -3).movedim(2, 1).flatten(0, 1)  # [B * G, points, K]
    summed = torch.einsum("bcpk,bpk->bpc", samples, by_group)
    return summed.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2).unflatten(1, out)


def oracle(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The same by gathering each corner of each sample: slow, exact in fp64, for the tests."""
    grid, out = value.shape[1:-1], places.shape[1:-3]
    batch, groups, taps = len(value), places.shape[-3], places.shape[-2]
    channels = value.shape[-1] // groups
    flat = value.flatten(1, -2).unflatten(-1, (groups, channels)).transpose(1, 2)  # [B, G, N, C / G]
    places = places.flatten(1, -4).movedim(2, 1)  # [B, G, points, K, axes]
    weights = weights.flatten(1, -3).movedim(2, 1)
    low = places.detach().floor()
    total = torch.zeros(batch, groups, places.shape[2], channels, dtype=value.dtype, device=value.device)
    for corner in itertools.product((0, 1), repeat=len(grid)):
        index = torch.zeros_like(low[..., 0], dtype=torch.long)
        share = torch.ones_like(places[..., 0])
        for axis, (side, size) in enumerate(zip(corner, grid, strict=True)):
            at = low[..., axis] + side
            share = share * (1 - (places[..., axis] - at).abs()) * ((at >= 0) & (at < size))
            index = index * size + at.clamp(0, size - 1).long()
        picked = flat.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, channels))
        total = total + (picked.unflatten(2, (-1, taps)) * (share * weights)[..., None]).sum(3)
    return total.transpose(1, 2).reshape(batch, *out, -1)
