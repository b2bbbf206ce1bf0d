"""Deformable aggregation on CUDA, in Triton: the sum that `zoo.kernels.deformable` states, and its gradients.

    position = base[p] + scale * (taps[k] + offsets[b, p, g, k])
    out[b, p, g * D : (g + 1) * D] = sum_k weights[b, p, g, k] * sample(value[b, ..., g * D : (g + 1) * D], position)

One program owns a block of output points of one group of one image, as a tile [POINTS, CHUNKS, WIDTH] whose last two
axes are the group's channels; see `_tile`. Sums are in fp32 (fp64 where value is) and in an order that no other image
changes; only the atomic additions into the gradient of value come in any order. A position that is NaN or reaches no
pixel adds nothing and has zero gradient. Measurements and their limits: deformable_triton.md.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _neighbours(position, size):
    """The pixels below and above a position on one axis, moved into the grid; the upper one's share; which of the two
    lie in the grid; whether the position is near it. One that is not counts as -1: lower pixel outside, upper share 0.
    """
    near = (position >= -1) & (position < size)  # false for NaN; and huge positions do not fit an integer
    position = tl.where(near, position, -1.0)
    low = tl.floor(position).to(tl.int32)
    share = position - low.to(position.dtype)
    return tl.maximum(low, 0), tl.minimum(low + 1, size - 1), share, low >= 0, low + 1 < size, near


@triton.jit
def _program(total, groups, POINTS: tl.constexpr):
    """Which image, group and points this program owns, and which of the points exist (the others repeat the last).

    Groups run fastest: programs that start together read the same lines of offsets and neighbouring ones of value.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(total, POINTS)
    point = program // groups % blocks * POINTS + tl.arange(0, POINTS)
    image = (program // groups // blocks).to(tl.int64)
    return image, program % groups, tl.minimum(point, total - 1).to(tl.int64), point < total


@triton.jit
def _coordinate(offsets, taps, base, index, SCALE: tl.constexpr):
    """Where a tap is read, on one axis: [POINTS]."""
    return base + SCALE * (tl.load(taps + index).to(base.dtype) + tl.load(offsets + index).to(base.dtype))


@triton.jit
def _add(even, odd, start, pixel, share, inside, FULL: tl.constexpr, PAIRS: tl.constexpr):
    """Adds a share of one pixel's row per point to the sums.

    With PAIRS a row comes as words of two bf16, of which the second is an fp32 but for its lower bits, so that taking
    the word apart costs one instruction per channel; a plain conversion costs one and a half.
    """
    row = tl.load(start + pixel[:, None, None]) if FULL else tl.load(start + pixel[:, None, None], inside, 0)
    share = share[:, None, None]
    if PAIRS:
        even += (row << 16).to(tl.float32, bitcast=True) * share
        odd += (row & -65536).to(tl.float32, bitcast=True) * share
    else:
        even += row.to(even.dtype) * share
    return even, odd


@triton.jit
def _forward(
    value,
    offsets,
    weights,
    base,
    taps,
    out,
    total,
    height,
    width,
    groups,
    offsets_image,
    offsets_point,
    offsets_group,
    weights_image,
    weights_point,
    weights_group,
    D: tl.constexpr,
    K: tl.constexpr,
    AXES: tl.constexpr,
    POINTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    SCALE: tl.constexpr,
):
    """All of `out`. With PAIRS, value is read as words of two channels, and D and WIDTH count those."""
    FULL: tl.constexpr = CHUNKS * WIDTH == D
    image, group, point, live = _program(total, groups, POINTS)  # pyright: ignore[reportGeneralTypeIssues]
    offsets += image * offsets_image + group * offsets_group + point * offsets_point
    weights += image * weights_image + group * weights_group + point * weights_point
    stride = tl.cast(groups * D, INDEX)  # one group is a plain number to the compiler
    line = width * stride
    channel = (tl.arange(0, CHUNKS) * WIDTH)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
    inside = channel < D
    start = value + image * height * line + group * D + channel
    base_x = tl.load(base + point * AXES + AXES - 1).to(WIDE)
    base_y = tl.load(base + point * AXES).to(WIDE)
    even = tl.zeros([POINTS, CHUNKS, WIDTH], WIDE)
    odd = tl.zeros([POINTS, CHUNKS, WIDTH], WIDE)
    for first in tl.range(0, K, UNROLL):
        for step in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
            k = first + step
            weight = tl.load(weights + k).to(WIDE)
            x = _coordinate(offsets, taps, base_x, k * AXES + AXES - 1, SCALE)
            left, right, share, left_in, right_in, _ = _neighbours(x, width)
            left *= stride
            right *= stride
            left_share = tl.where(left_in, 1 - share, 0.0) * weight
            right_share = tl.where(right_in, share, 0.0) * weight
            if AXES == 2:
                y = _coordinate(offsets, taps, base_y, k * AXES, SCALE)
                top, bottom, share, top_in, bottom_in, _ = _neighbours(y, height)
                top *= line
                bottom *= line
                top_share = tl.where(top_in, 1 - share, 0.0)
                bottom_share = tl.where(bottom_in, share, 0.0)
                even, odd = _add(even, odd, start, top + left, top_share * left_share, inside, FULL, PAIRS)
                even, odd = _add(even, odd, start, top + right, top_share * right_share, inside, FULL, PAIRS)
                even, odd = _add(even, odd, start, bottom + left, bottom_share * left_share, inside, FULL, PAIRS)
                even, odd = _add(even, odd, start, bottom + right, bottom_share * right_share, inside, FULL, PAIRS)
            else:
                even, odd = _add(even, odd, start, left, left_share, inside, FULL, PAIRS)
                even, odd = _add(even, odd, start, right, right_share, inside, FULL, PAIRS)
    channels: tl.constexpr = 1 + PAIRS
    sums = tl.interleave(even, odd) if PAIRS else even
    channel = (tl.arange(0, CHUNKS) * channels * WIDTH)[None, :, None] + tl.arange(0, channels * WIDTH)[None, None, :]
    out += (image * total + point[:, None, None]) * (groups * D * channels) + group * D * channels + channel
    tl.store(out, sums.to(out.dtype.element_ty), live[:, None, None] & (channel < D * channels))


@triton.jit
def _scatter(start, grad_start, pixel, gradient, share, reached, inside, FULL: tl.constexpr):
    """One corner per point: adds its share of the gradient to its pixel; returns gradient . row, 0 where not reached.

    Shares that are exactly zero are not added: three corners of four for integer offsets.
    """
    row = tl.load(start + pixel[:, None, None]) if FULL else tl.load(start + pixel[:, None, None], inside, 0)
    added = (reached & (share != 0))[:, None, None] & inside
    tl.atomic_add(grad_start + pixel[:, None, None], gradient * share[:, None, None], mask=added, sem="relaxed")
    dot = tl.sum(tl.sum(gradient * row.to(gradient.dtype), 1), 1)
    return tl.where(reached, dot, 0.0)


@triton.jit
def _backward(
    value,
    offsets,
    weights,
    base,
    taps,
    gradient,
    grad_value,
    grad_offsets,
    grad_weights,
    total,
    height,
    width,
    groups,
    offsets_image,
    offsets_point,
    offsets_group,
    weights_image,
    weights_point,
    weights_group,
    D: tl.constexpr,
    K: tl.constexpr,
    AXES: tl.constexpr,
    POINTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    SCALE: tl.constexpr,
):
    """All three gradients; the one of value is added to `grad_value`, in WIDE."""
    FULL: tl.constexpr = CHUNKS * WIDTH == D
    image, group, point, live = _program(total, groups, POINTS)  # pyright: ignore[reportGeneralTypeIssues]
    offsets += image * offsets_image + group * offsets_group + point * offsets_point
    weights += image * weights_image + group * weights_group + point * weights_point
    grad_weights += ((image * total + point) * groups + group) * K
    grad_offsets += ((image * total + point) * groups + group) * K * AXES
    stride = tl.cast(groups * D, INDEX)  # one group is a plain number to the compiler
    line = width * stride
    channel = (tl.arange(0, CHUNKS) * WIDTH)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
    channel = tl.max_contiguous(
        channel, [1, 1, VECTOR]
    )  # or loads and atomic additions are distributed differently over threads
    inside = channel < D
    start = value + image * height * line + group * D + channel
    grad_start = grad_value + image * height * line + group * D + channel
    gradient += (image * total + point[:, None, None]) * stride + group * D + channel
    wanted = tl.load(gradient, inside, 0).to(WIDE)
    base_x = tl.load(base + point * AXES + AXES - 1).to(WIDE)
    base_y = tl.load(base + point * AXES).to(WIDE)
    for first in tl.range(0, K, UNROLL):
        for step in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
            k = first + step
            weight = tl.load(weights + k).to(WIDE)
            x = _coordinate(offsets, taps, base_x, k * AXES + AXES - 1, SCALE)
            left, right, x_share, left_in, right_in, near = _neighbours(x, width)
            left *= stride
            right *= stride
            left_in = left_in & live
            right_in = right_in & near & live
            x_rest = 1 - x_share
            if AXES == 2:
                y = _coordinate(offsets, taps, base_y, k * AXES, SCALE)
                top, bottom, y_share, top_in, bottom_in, near = _neighbours(y, height)
                top *= line
                bottom *= line
                bottom_in = bottom_in & near
                y_rest = 1 - y_share
                share = y_rest * x_rest * weight
                top_left = _scatter(start, grad_start, top + left, wanted, share, top_in & left_in, inside, FULL)
                share = y_rest * x_share * weight
                top_right = _scatter(start, grad_start, top + right, wanted, share, top_in & right_in, inside, FULL)
                share = y_share * x_rest * weight
                low_left = _scatter(start, grad_start, bottom + left, wanted, share, bottom_in & left_in, inside, FULL)
                share = y_share * x_share * weight
                low_right = _scatter(
                    start, grad_start, bottom + right, wanted, share, bottom_in & right_in, inside, FULL
                )
                along_y = x_rest * (low_left - top_left) + x_share * (low_right - top_right)
                grad_y = (SCALE * weight * along_y).to(grad_offsets.dtype.element_ty)
                tl.store(grad_offsets + k * AXES, grad_y, live)
                at_left = y_rest * top_left + y_share * low_left
                at_right = y_rest * top_right + y_share * low_right
            else:
                at_left = _scatter(start, grad_start, left, wanted, x_rest * weight, left_in, inside, FULL)
                at_right = _scatter(start, grad_start, right, wanted, x_share * weight, right_in, inside, FULL)
            grad_x = (SCALE * weight * (at_right - at_left)).to(grad_offsets.dtype.element_ty)
            tl.store(grad_offsets + (k * AXES + AXES - 1), grad_x, live)
            grad_weight = x_rest * at_left + x_share * at_right
            tl.store(grad_weights + k, grad_weight.to(grad_weights.dtype.element_ty), live)


def forward(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    """value [B, *grid, C], offsets [B, P, G, K, axes], weights [B, P, G, K], base [P, axes] and taps [K, axes] in fp32
    -> [B, P, C].

    The grid has one axis or two; offsets are in pixels and in its order. Offsets and weights may be views of one tensor
    in which a group's K * axes offsets, and its K weights, lie together; they are then read where they are.
    """
    value, offsets, weights = value.contiguous(), _packed(offsets, 2), _packed(weights, 1)
    out = value.new_empty(*weights.shape[:2], value.shape[-1])
    if not (out.numel() and value.numel() and weights.numel()):
        return out.zero_()
    wide, row = _wide(value, offsets, weights), value.shape[-1] // weights.shape[2]
    pairs = value.dtype == torch.bfloat16 and wide == torch.float32 and row % 2 == 0 and value.storage_offset() % 2 == 0
    words = value.view(torch.int32) if pairs else value
    row = row // 2 if pairs else row
    lanes, held, threads = (4, 8, 256) if pairs else (2, 16, 128)
    tile = _tile(row, 16 // words.element_size(), lanes, held, threads)
    _launch(_forward, (words, offsets, weights, base, taps, out), scale, wide, row, threads, PAIRS=pairs, **tile)
    return out


def backward(
    gradient: Tensor, value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, offsets and weights, contiguous and in their dtypes; gradient is [B, P, C]."""
    value, offsets, weights = value.contiguous(), _packed(offsets, 2), _packed(weights, 1)
    wide = _wide(value, offsets, weights)
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
    grad_offsets, grad_weights = offsets.new_zeros(offsets.shape), weights.new_zeros(weights.shape)
    if gradient.numel() and value.numel() and weights.numel():
        row, vector = value.shape[-1] // weights.shape[2], 16 // wide.itemsize
        tile = _tile(row, vector, lanes=8, held=2 * vector, threads=32)
        tensors = value, offsets, weights, base, taps, gradient.contiguous(), grad_value, grad_offsets, grad_weights
        _launch(_backward, tensors, scale, wide, row, 32, VECTOR=min(vector, tile["WIDTH"]), **tile)
    return grad_value.to(value.dtype), grad_offsets, grad_weights


def _packed(tensor: Tensor, axes: int) -> Tensor:
    """The tensor itself if its last axes are contiguous, else a contiguous copy."""
    step = 1
    for size, stride in zip(tensor.shape[: -axes - 1 : -1], tensor.stride()[: -axes - 1 : -1], strict=True):
        if size > 1 and stride != step:
            return tensor.contiguous()
        step *= size
    return tensor


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def _tile(row: int, vector: int, lanes: int, held: int, threads: int) -> dict[str, int]:
    """How a program's threads share points and channels, from the width of a group's row alone.

    A thread reads `vector` neighbours, 16 bytes, at once. `lanes` threads share a row: all of them repeat the
    arithmetic of its position, but then the row of a corner is one request. Each takes several vectors (CHUNKS) until
    it has the number of elements `held` that leaves registers for enough programs; longer rows get more threads.
    """
    row = 1 << (row - 1).bit_length()
    width = min(row, lanes * vector)
    chunks = min(row // width, max(held // vector, 1))
    width = row // chunks
    return {"POINTS": max(threads * vector // max(width, vector), 1), "CHUNKS": chunks, "WIDTH": width}


def _launch(
    kernel, tensors: tuple[Tensor, ...], scale: float, wide: torch.dtype, row: int, threads: int, **constants: int
) -> None:
    value, offsets, weights = tensors[:3]
    batch, total, groups, kernel_size = weights.shape
    height, width = (1, *value.shape[1:-1])[-2:]
    programs = triton.cdiv(total, constants["POINTS"]) * groups * batch
    with torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](
            *tensors,
            total,
            height,
            width,
            groups,
            *offsets.stride()[:3],
            *weights.stride()[:3],
            D=row,
            K=kernel_size,
            AXES=value.ndim - 2,
            UNROLL=max(step for step in range(1, 10) if kernel_size % step == 0),
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            INDEX=tl.int32 if value[0].numel() < 2**31 else tl.int64,
            SCALE=float(scale),
            num_warps=threads // 32,
            **constants,
        )
