"""Normalizations over channels-last tokens: what each computes, and the affine map that it becomes at inference."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Layer, Place, recomputing
from zoo.tensors import zeroed


class Norm(Layer):
    """A normalization of x [B, N, ..., D] over its last dimension.

    `batch_statistics`: whether training normalizes by statistics of the batch, which samples share.
    """

    batch_statistics: ClassVar[bool] = False

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """(a, b) [D] if inference computes a * x + b, else None."""
        return None


class Affine(Norm):
    """weight * x + bias per channel: Squeezeformer's learned scale, and the rest of a folded norm that cannot be folded
    further (Kim et al. 2022, arXiv:2206.00888)."""

    def __init__(self, dim: int, place: Place = ANYWHERE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight).to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.weight.detach(), self.bias.detach()


class HeadScale(Norm):
    """One learned factor per head, before the output linear (NormFormer, Shleifer et al. 2021, arXiv:2110.09456)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))
        self.width = dim // heads

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x * self.weight.repeat_interleave(self.width).to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        scale = self.weight.detach().repeat_interleave(self.width)
        return scale, torch.zeros_like(scale)


class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) over each token's channels, then weight and bias per channel (Ba et al. 2016,
    arXiv:1607.06450). affine=False omits both, bias=False omits the bias."""

    def __init__(
        self, dim: int, place: Place = ANYWHERE, *, affine: bool = True, bias: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.shape, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and bias else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(Norm):
    """weight * x / sqrt(mean(x^2) + eps) over each token's channels (Zhang and Sennrich 2019, arXiv:1910.07467).
    affine=False omits the weight, bias=True adds a bias."""

    def __init__(
        self, dim: int, place: Place = ANYWHERE, *, affine: bool = True, bias: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if bias and not affine:
            raise ValueError("rmsnorm: bias=True needs affine=True")
        self.shape, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        same = x if self.weight is None else x.to(torch.promote_types(x.dtype, self.weight.dtype))  # else PyTorch warns
        y = F.rms_norm(same, self.shape, self.weight, self.eps)
        return y if self.bias is None else (y + self.bias).to(y.dtype)


class CRMSNorm(Norm):
    """weight * x / sqrt((sum(x^2) + sum(x)^2) / (D + 1) + eps) over the D channels of each token: the RMS norm of
    D + 1 channels with zero mean, the last of which is not stored (Jiang et al. 2023, arXiv:2305.14858). affine=False
    omits the weight."""

    def __init__(self, dim: int, place: Place = ANYWHERE, *, affine: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = values.square().sum(-1, keepdim=True) + values.sum(-1, keepdim=True).square()
        y = values * torch.rsqrt(squares / (x.shape[-1] + 1) + self.eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)


class GroupNorm(Norm):
    """(x - mean) / sqrt(variance + eps) over all real tokens of a sample and the channels of a group, then weight and
    bias per channel (Wu and He 2018, arXiv:1803.08494). The channels form `groups` groups."""

    reads = frozenset({"prefix", "mask"})
    mixes = True

    def __init__(self, dim: int, place: Place = ANYWHERE, *, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"groupnorm: groups must divide {dim} channels, got {groups}")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.groups == 1 and context.mask is None:
            y = F.layer_norm(x, x.shape[1:], None, None, self.eps)
            return torch.addcmul(self.bias, y, self.weight).to(x.dtype)
        values = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        across = (*range(1, values.ndim - 2), values.ndim - 1)
        number = math.prod([values.shape[axis] for axis in across[1:]])
        if context.mask is None:
            count = values.shape[1] * number
        else:
            count = (context.mask.sum(1).clamp(min=1) * number).view(-1, *[1] * (values.ndim - 1))
        centred = values - zeroed(values, context.mask).sum(across, keepdim=True) / count
        variance = zeroed(centred.square(), context.mask).sum(across, keepdim=True) / count
        y = (centred * torch.rsqrt(variance + self.eps)).flatten(-2)
        return torch.addcmul(self.bias, y, self.weight).to(x.dtype)


class DyT(Norm):
    """weight * tanh(alpha * x) + bias with one scalar alpha, without any statistics (Zhu et al. 2025,
    arXiv:2503.10622)."""

    def __init__(self, dim: int, place: Place = ANYWHERE, *, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return torch.addcmul(self.bias, torch.tanh(self.alpha * x), self.weight).to(x.dtype)


class _GatherSum(torch.autograd.Function):
    """The sum over all ranks; each rank's loss then sends its gradient to every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduce(gradient)


def world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _all_reduce(x: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    world = torch.distributed.group.WORLD
    assert world is not None
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", world))


def statistics(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], biased variance [D] and count [] of the real tokens of x [B, N, ..., D], over all ranks.

    The squares are taken of centred values. No real token at all gives a mean of 0 and a variance of 1.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    across = tuple(range(x.ndim - 1))
    if mask is None:
        number = torch.full((), math.prod(x.shape[:-1]), device=x.device, dtype=values.dtype)
    else:
        number = mask.sum(dtype=values.dtype) * math.prod(x.shape[2:-1])
    mean = zeroed(values, mask).sum(across) / number.clamp(min=1)
    squares = zeroed((values - mean).square(), mask).sum(across)
    if (ranks := world_size()) > 1:
        own = torch.cat([mean, squares, number[None]])
        slots = [torch.zeros_like(own)] * ranks
        slots[torch.distributed.get_rank()] = own
        means, spreads, numbers = _GatherSum.apply(torch.stack(slots)).split([len(mean), len(mean), 1], 1)
        number = numbers.sum()
        mean = (means * numbers).sum(0) / number.clamp(min=1)
        squares = (spreads + numbers * (means - mean).square()).sum(0)
    return mean, torch.where(number > 0, squares / number.clamp(min=1), 1.0), number


class BatchNorm(Norm):
    """(x - mean) / sqrt(variance + eps) per channel over all real tokens of the batch and of all ranks; running
    statistics at inference (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

    reads = frozenset({"mask"})
    batch_statistics = True
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, place: Place = ANYWHERE, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def scale_shift(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - scale * mean

    def whole(self, x: Tensor) -> Tensor:
        """The training result for several tokens that are all real and on this rank, by torch's own kernel, which is
        three to five times as fast on the CPU."""
        kept = self.running_mean, self.running_var
        if recomputing():
            kept = kept[0].clone(), kept[1].clone()
        y = F.batch_norm(x.flatten(0, -2), *kept, self.weight, self.bias, True, self.momentum, self.eps)
        return y.view(x.shape)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.training:
            scale, shift = self.scale_shift(self.running_mean, self.running_var)
            return torch.addcmul(shift, x, scale).to(x.dtype)
        if context.mask is None and x.numel() > x.shape[-1] and world_size() == 1:
            return self.whole(x)
        mean, variance, number = statistics(x, context.mask)
        if not recomputing():
            with torch.no_grad():
                rate = self.momentum * (number > 0).to(mean.dtype)
                unbiased = variance * (number / (number - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate.to(self.running_mean.dtype))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate.to(self.running_var.dtype))
        scale, shift = self.scale_shift(mean, variance)
        return torch.addcmul(shift, x, scale).to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor] | None:
        with torch.no_grad():
            return self.scale_shift(self.running_mean, self.running_var)


class RepBN(BatchNorm):
    """BatchNorm(x) + alpha * x with one scalar alpha, a single affine map at inference (SLAB, Guo et al. 2024,
    arXiv:2405.11582)."""

    def __init__(
        self, dim: int, place: Place = ANYWHERE, *, alpha: float = 1.0, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(dim, place, eps=eps, momentum=momentum)
        self.alpha = nn.Parameter(torch.tensor([alpha]))

    def whole(self, x: Tensor) -> Tensor:
        return torch.addcmul(super().whole(x), x, self.alpha.to(x.dtype))

    def scale_shift(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = super().scale_shift(mean, variance)
        return scale + self.alpha, shift


class PRepBN(RepBN):
    """blend * LayerNorm(x) + (1 - blend) * RepBN(x); training moves the blend from 1 to 0 (SLAB, arXiv:2405.11582).

    The blend is 1 during the first `warmup` of training, then falls linearly and is 0 from `until` on; both are shares
    of the training, and `zoo.advance` sets the blend. It never rises again, so a finished model stays finished in
    further training. Inference computes the same blend. Batch statistics are tracked from the first step.
    """

    blend: Tensor

    def __init__(
        self,
        dim: int,
        place: Place = ANYWHERE,
        *,
        alpha: float = 1.0,
        until: float = 0.8,
        warmup: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(dim, place, alpha=alpha, eps=eps, momentum=momentum)
        if not 0.0 <= warmup < until <= 1.0:
            raise ValueError(f"prepbn needs 0 <= warmup < until <= 1, got warmup={warmup}, until={until}")
        self.until, self.warmup = until, warmup
        self.layernorm = LayerNorm(dim, place)
        self.register_buffer("blend", torch.ones(()))
        self.share = 1.0  # the blend, known without asking the device
        self.register_load_state_dict_post_hook(PRepBN.note_share)

    def note_share(self, incompatible_keys: Any) -> None:
        self.share = 1.0 if self.blend.is_meta else self.blend.item()

    @property
    def finished(self) -> bool:
        """Whether the blend is 0; LayerNorm is then skipped, and no value changes."""
        return self.share == 0.0

    def advance(self, progress: float) -> None:
        self.share = min(self.share, max(0.0, (self.until - progress) / (self.until - self.warmup)))
        self.blend.fill_(self.share)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = super().forward(x, context)
        if self.finished:
            if not self.training:
                return y
            # The unused parameters stay in the graph, so that no rank waits for their gradients.
            weight, bias = self.layernorm.weight, self.layernorm.bias
            assert weight is not None and bias is not None
            return y + (0.0 * (weight.sum() + bias.sum())).to(y.dtype)
        return torch.lerp(y, self.layernorm(x, context).to(y.dtype), self.blend.to(y.dtype))

    def affine(self) -> tuple[Tensor, Tensor] | None:
        blend = self.share if self.blend.is_meta else self.blend.item()
        if blend > 0:
            share = f"{blend:.3g}"
            raise ValueError(
                f"prepbn still blends LayerNorm in at {share}; finish training, or drop it with zoo.advance(model, 1.0)"
            )
        return super().affine()


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether any norm of the model normalizes by statistics of the batch."""
    return any(isinstance(module, Norm) and module.batch_statistics for module in model.modules())


def refresh_statistics(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replaces running statistics by the plain average over batches; weights do not change, and dropout is off.

    Stochastic depth shifts the variances that training records; SLAB ends with such a pass. Returns the number of
    batches. Each batch is the argument of model(batch), or a tuple of its arguments.
    """
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    number = 0
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches, start=1):
                for layer in layers:
                    layer.training, layer.momentum = True, 1.0 / number
                model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return number


NORMS: dict[str, type[Norm]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "crmsnorm": CRMSNorm,
    "groupnorm": GroupNorm,
    "batchnorm": BatchNorm,
    "repbn": RepBN,
    "prepbn": PRepBN,
    "dyt": DyT,
}
"""Each row is constructed as row(dim, place, *, options)."""
