"""The C++ form of deformable aggregation, `deformable_cpu.cpp`, for tensors on the CPU."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels.native import library

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_POINTER = ctypes.c_void_p


def available() -> bool:
    """Whether the C++ code is available; compiles it if necessary."""
    return library("deformable_cpu") is not None


def forward(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    """The result of zoo.kernels.deformable.aggregate, in the dtype of value."""
    given = _read(value, offsets, weights, base, taps)
    out = torch.empty(*offsets.shape[:2], value.shape[-1], dtype=given.value.dtype)
    _call("forward", given, [*given], scale, [out])
    return out.to(value.dtype)


def backward(
    gradient: Tensor, value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, offsets and weights."""
    given = _read(value, offsets, weights, base, taps)
    gradient = gradient.to(given.value.dtype).contiguous()
    by_value = torch.zeros(value.shape, dtype=given.base.dtype)  # sums of many terms, in at least fp32
    by_offsets = torch.empty(offsets.shape, dtype=given.offsets.dtype)
    by_weights = torch.empty(weights.shape, dtype=given.weights.dtype)
    _call("backward", given, [gradient, *given], scale, [by_value, by_offsets, by_weights])
    return by_value.to(value.dtype), by_offsets.to(offsets.dtype), by_weights.to(weights.dtype)


class _Given(NamedTuple):
    value: Tensor
    offsets: Tensor
    weights: Tensor
    base: Tensor
    taps: Tensor


def _read(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor) -> _Given:
    """The tensors as the C++ code reads them: one dtype that it knows, places in fp32 or fp64."""
    kind = value.dtype
    if kind not in _NAMES or not kind == offsets.dtype == weights.dtype:
        kind = torch.promote_types(torch.promote_types(offsets.dtype, weights.dtype), kind)
        kind = torch.promote_types(kind, torch.float32)
    # Often offsets and weights are parts of one linear's output; they are read in place.
    offsets, weights = offsets.to(kind), weights.to(kind)
    if offsets.stride()[-2:] != (offsets.shape[-1], 1):
        offsets = offsets.contiguous()
    if weights.stride(-1) != 1:
        weights = weights.contiguous()
    wide = torch.promote_types(kind, torch.float32)
    return _Given(value.to(kind).contiguous(), offsets, weights, base.to(wide).contiguous(), taps.to(wide).contiguous())


def _call(name: str, given: _Given, tensors: list[Tensor], scale: float, results: list[Tensor]) -> None:
    batch, *grid, channels = given.value.shape
    rows, columns = (1, *grid) if len(grid) == 1 else grid
    strides = (*given.offsets.stride()[:3], *given.weights.stride()[:3])
    sizes = (batch, rows, columns, channels, *given.offsets.shape[1:4], *strides)
    function = getattr(library("deformable_cpu"), f"zoo_deformable_{name}_{_NAMES[given.value.dtype]}")
    function.restype = None
    inputs, outputs = [_POINTER] * len(tensors), [_POINTER] * len(results)
    # Set at once: the function is shared between threads.
    function.argtypes = [_POINTER, ctypes.c_int, *inputs, ctypes.c_double, ctypes.c_int, *outputs]
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    pointers = [each.data_ptr() for each in tensors]
    threads = torch.get_num_threads()
    function(numbers, len(grid), *pointers, scale, threads, *[each.data_ptr() for each in results])
