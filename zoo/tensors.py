"""Functions of tensors that every part uses: masks, tokens and maps, filters along the grid."""

import itertools
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def mask_of(lengths: Tensor, size: int) -> Tensor:
    """[B, size], True on the first of lengths [B]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of the tensors, by its name, that has a NaN or an infinity; None if there is none."""
    for name, tensor in tensors.items():
        # The sum is fast, and may overflow.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            return name
    return None


def check_floats(inputs: Tensor, name: str) -> None:
    """ValueError if a model's input, such as an image that was just read, is not floating point."""
    if not inputs.is_floating_point():
        kind = str(inputs.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be floating point, got {kind}; use the checkpoint's preprocess")


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear map with truncated-normal weights (standard deviation 0.02) and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Unfilled(TorchFunctionMode):
    """Modules made in it have zeros, or on the meta device nothing, instead of random values: for weights that are
    about to be read. PyTorch imports its compiler for those on the meta device, which takes half as long as PyTorch.
    """

    RANDOM = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_)
    REST = (Tensor.erfinv_, Tensor.clamp_)  # what nn.init.trunc_normal_ does next; zeros stay zeros

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.RANDOM + self.REST:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        if tensor.is_meta or func is Tensor.erfinv_:
            return tensor
        with torch.no_grad():
            return tensor.zero_() if func in self.RANDOM else func(*args, **kwargs)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules made in it are on the meta device: they have shapes and dtypes, and cost neither memory nor time."""
    with torch.device("meta"), Unfilled():
        yield


def like(module: nn.Module) -> Tensor:
    """The first floating-point tensor of a module, for its dtype and device.

    Quantization replaces the weights of linears, so no single layer's weight tells.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((each for each in tensors if each.is_floating_point()), torch.zeros(()))


def fingerprint(module: nn.Module) -> dict[str, int]:
    """The CRC-32 of each tensor of a module's state, by name; that of its float32 values for any dtype of floating
    point, so that a dtype that holds the same values gives the same."""

    def checksum(x: Tensor) -> int:
        plain = x.detach().cpu().reshape(-1)
        return zlib.crc32((plain.float() if x.is_floating_point() else plain).numpy().data)

    return {name: checksum(each) for name, each in module.state_dict().items()}


def single(x: Tensor) -> Tensor:
    """x in at least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mixing_precision(x: Tensor) -> bool:
    """Whether mixed precision chooses the dtypes of products on the device of x."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def unmixed(x: Tensor) -> AbstractContextManager[Any]:
    """A context without mixed precision on the device of x: what is computed in it has the dtypes of its inputs."""
    return torch.autocast(x.device.type, enabled=False) if mixing_precision(x) else nullcontext()


def zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, N, ...] with zeros where the mask [B, N] is False."""
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - 2)), 0.0)


def real_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of x [B, N, ...] over the real tokens, in at least single precision: [B, 1, ...]; 0 if none is real."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, keepdim=True, dtype=wide)
    number = mask.sum(1).clamp(min=1).to(wide).view(-1, *[1] * (x.ndim - 1))
    return zeroed(x, mask).sum(1, keepdim=True, dtype=wide) / number


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, which is positive."""
    return F.relu(x) + x.clamp(max=0).exp()


def shortfall(size: int, divisor: int) -> int:
    """The padding from a size to the next multiple of divisor, -size % divisor.

    torch.compile reduces this form of it to one division, (size - 1) // product, however many are nested; nested
    remainders took more than 20 minutes.
    """
    return ((size - 1) // divisor + 1) * divisor - size


def overwritable() -> bool:
    """Whether a layer may write over tensors that it has made itself, since no gradient needs them."""
    return not torch.is_grad_enabled() and not compiling()


# Activations of a tensor that the caller no longer needs. In place they save fresh memory of the size of a hidden
# layer, which on the CPU may cost more than the activation itself.


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu, in place where `overwritable`."""
    return torch.ops.aten.gelu_(x, approximate=approximate) if overwritable() else F.gelu(x, approximate=approximate)


def relu(x: Tensor) -> Tensor:
    """F.relu, in place where `overwritable`."""
    return F.relu(x, inplace=overwritable())


def silu(x: Tensor) -> Tensor:
    """F.silu, in place where `overwritable`."""
    return F.silu(x, inplace=overwritable())


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
        maps = to_map(tokens.contiguous(), grid)  # on the CPU, part of wider tokens takes twice as long
        return to_tokens(F.conv2d(maps, weight, bias, stride, padding, groups=len(weight)))
    if len(weight) <= 16:  # in bf16 oneDNN never ends the other way with so few channels (torch 2.11)
        return to_tokens(F.conv1d(tokens.transpose(1, 2), weight, bias, stride, padding, groups=len(weight)))
    # On a map of one row the channels may be last in memory, which is many times as fast on the CPU.
    maps, kernel = tokens.transpose(1, 2)[:, :, None], weight[:, :, None]
    return to_tokens(F.conv2d(maps, kernel, bias, (1, stride), (0, padding), groups=len(weight)))


def exporting() -> bool:
    """Whether the call is being traced by the exporter, whose program takes other sizes than it saw."""
    return torch.compiler.is_exporting()


def compiling() -> bool:
    """Whether the call is being traced, by the compiler, the exporter or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
