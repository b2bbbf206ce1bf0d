"""Mixers and branches that look at neighbours on the grid: pooling, separable convolution, speech convolution, none."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import grid_mean
from zoo.ffns import StarReLU, hidden_width
from zoo.fusion import fold_site
from zoo.layer import ANYWHERE, Chunks, Context, Fold, Layer, Place, Site, halved
from zoo.tensors import filtered, gelu, linear, silu, to_map, to_tokens, zeroed


class Identity(Layer):
    """Returns its input, so the branch adds the normalized x (IdentityFormer, Yu et al. 2022,
    arXiv:2210.13452)."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x


class Pool(Layer):
    """The mean of the neighbouring tokens minus the token itself (PoolFormer, Yu et al. 2022, arXiv:2111.11418).
    The neighbourhood is `size` tokens wide."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, size: int = 3) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"pool: size must be odd, got {size}")
        self.size = size

    def pool(self, maps: Tensor, counted: bool) -> Tensor:
        pool = F.avg_pool1d if maps.ndim == 3 else F.avg_pool2d
        return pool(maps, self.size, stride=1, padding=self.size // 2, count_include_pad=counted)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        maps = to_map(zeroed(x, context.mask), context.grid)
        if context.mask is None:
            return to_tokens(self.pool(maps, counted=False)) - x
        real = to_map(context.mask[..., None].to(x.dtype), context.grid)
        share = self.pool(real, counted=True).clamp(min=1e-4)
        return to_tokens(self.pool(maps, counted=True) / share) - x


def depthwise(width: int, kernel: int, axes: int, bias: bool) -> nn.Conv1d | nn.Conv2d:
    """A convolution of each channel by itself that keeps the grid's size."""
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}")
    conv = nn.Conv1d if axes == 1 else nn.Conv2d
    return conv(width, width, kernel, padding=kernel // 2, groups=width, bias=bias)


def along(conv: nn.Conv1d | nn.Conv2d, y: Tensor, context: Context, past: Tensor | None = None) -> Tensor:
    """A depthwise convolution of tokens on the grid; under `visible` it reads no later token, only earlier ones:
    `past` [B, kernel - 1, C] of a stream, else zeros. New tokens are written into `past`."""
    if context.visible is None:
        return filtered(y, context.grid, conv.weight, conv.bias, int(conv.padding[0]))
    front = conv.kernel_size[0] - 1
    if past is None:
        y = F.pad(y, (0, 0, front, 0))
    else:
        y = torch.cat([past, y], 1)
        past.copy_(y[:, y.shape[1] - front :])
    return filtered(y, (y.shape[1],), conv.weight, conv.bias, 0)


class SeparableConv(Layer):
    """Linear, StarReLU, depthwise convolution and linear, without biases (ConvFormer, Yu et al. 2022,
    arXiv:2210.13452). The width between is ratio * dim; the convolution is `kernel` tokens wide."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, ratio: float = 2.0, kernel: int = 7) -> None:
        super().__init__()
        hidden = hidden_width(dim, ratio)
        self.expand, self.out = linear(dim, hidden, bias=False), linear(hidden, dim, bias=False)
        self.activation = StarReLU()
        self.conv = depthwise(hidden, kernel, place.axes, bias=False)
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, ratio: float = 2.0, **options: Any) -> dict[str, Site]:
        return {"inner": Site(hidden_width(dim, ratio))}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = zeroed(self.activation(self.expand(x)), context.mask)
        y = along(self.conv, y, context)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class GatedConv(Layer):
    """Linear, depthwise convolution, GELU, y * sigmoid(W mean(y)) and linear (DiCo, Ai et al. 2025, arXiv:2505.11196).
    The convolution is `kernel` tokens wide."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, kernel: int = 3) -> None:
        super().__init__()
        self.expand, self.gate, self.out = linear(dim, dim), linear(dim, dim), linear(dim, dim)
        self.conv = depthwise(dim, kernel, place.axes, bias=True)
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        return {"inner": Site(dim)}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = gelu(along(self.conv, zeroed(self.expand(x), context.mask), context))
        y = y * torch.sigmoid(self.gate(grid_mean(y, context)))[:, None]
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class Convolution(Layer):
    """The convolution branch of Conformer: linear, gated linear unit, depthwise convolution, norm, swish and linear
    (Gulati et al. 2020, arXiv:2005.08100). The depthwise convolution is `kernel` frames wide, and causal if
    the model works in chunks (`visible`). The Block fills `norm`."""

    reads = frozenset({"mask", "visible"})
    mixes = True
    gate = "glu"

    def __init__(self, dim: int, place: Place = ANYWHERE, *, kernel: int = 31) -> None:
        super().__init__()
        hidden = self.sites_of(dim, 1)["norm"].width
        self.expand, self.out = linear(dim, 2 * dim), linear(hidden, dim)
        self.conv = depthwise(hidden, kernel, place.axes, bias=True)
        self.norm: Layer | None = None
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        return dict.fromkeys(("norm", "inner"), Site(dim if cls.gate == "glu" else 2 * dim))

    def state(self, batch: int, visible: Chunks, like: Tensor) -> dict[str, Tensor]:
        width, front = self.conv.in_channels, self.conv.kernel_size[0] - 1
        return {"past": like.new_zeros(batch, front, width)}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.expand(x)
        y = zeroed(F.glu(y, -1) if self.gate == "glu" else silu(y), context.mask)
        y = along(self.conv, y, context, None if context.cache is None else self.recall(context, "past"))
        y = silu(y if self.norm is None else self.norm(y, context))
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.expand]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]

    def fold(self) -> list[Fold]:
        return fold_site(self, "norm", self.conv)


class StridedConvolution(Convolution):
    """Conformer's convolution with stride 2 along time, from `inputs` channels to dim: [B, N, inputs] to
    [B, (N + 1) // 2, dim] (Burchi and Vielzeuf 2021, arXiv:2109.01163)."""

    def __init__(self, inputs: int, dim: int, place: Place, *, kernel: int = 15) -> None:
        super().__init__(dim, place, kernel=kernel)
        self.expand = linear(inputs, 2 * dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = zeroed(F.glu(self.expand(x), -1), context.mask)
        y = filtered(y, context.grid, self.conv.weight, self.conv.bias, int(self.conv.padding[0]), 2)
        return self.out(silu(y if self.norm is None else self.norm(y, halved(context))))


class SwishConvolution(Convolution):
    """The convolution branch of Squeezeformer: that of Conformer with swish in place of the gated linear unit (Kim et
    al. 2022, arXiv:2206.00888). The depthwise convolution is `kernel` frames wide."""

    gate = "swish"


class Depthwise(Layer):
    """A depthwise convolution on the grid, the conditional position encoding before each branch of DaViT
    (Chu et al. 2021, arXiv:2102.10882; Ding et al. 2022, arXiv:2204.03645). It is `kernel` tokens wide."""

    reads = frozenset({"mask"})
    mixes = True
    bare = True

    def __init__(self, dim: int, place: Place = ANYWHERE, *, kernel: int = 3) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel, place.axes, bias=True)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return along(self.conv, zeroed(x, context.mask), context)
