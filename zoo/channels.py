"""Channel attention: gates x * gate(x), the gate computed from all real tokens of the grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Layer, Place, extent
from zoo.tensors import linear, zeroed


class Channel(Layer):
    """Gates the channels of tokens x [B, N, D]. Prefix tokens are gated too and do not enter the statistics."""

    reads = frozenset({"prefix", "mask"})
    mixes = True


def grid_mean(x: Tensor, context: Context) -> Tensor:
    """The mean over the real tokens of the grid, [B, D]; zeros if a sample has none."""
    tokens, mask = x[:, context.prefix :], context.grid_mask
    if mask is None:
        return tokens.mean(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (zeroed(tokens, mask).sum(1, dtype=wide) / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


class SqueezeExcite(Channel):
    """x * sigmoid(W2 relu(W1 mean(x))), where the hidden width is a multiple of 8 (Hu et al. 2018,
    arXiv:1709.01507). That width is about dim / reduction."""

    def __init__(self, dim: int, place: Place = ANYWHERE, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(8, int(dim / reduction + 4) // 8 * 8)
        self.squeeze, self.excite = linear(dim, hidden), linear(hidden, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(grid_mean(x, context))))
        return x * torch.sigmoid(gate)[:, None]


class EfficientChannel(Channel):
    """x * sigmoid(conv(mean(x))) with one filter along the channels (ECA-Net, Wang et al. 2020, arXiv:1910.03151).

    kernel=0 takes the paper's rule: |log2(dim) + 1| / 2, rounded up to odd and at least 3.
    """

    def __init__(self, dim: int, place: Place = ANYWHERE, *, kernel: int = 0) -> None:
        super().__init__()
        if kernel == 0:
            rule = int(abs(math.log2(dim) + 1) / 2)
            kernel = max(3, rule if rule % 2 else rule + 1)
        if kernel % 2 == 0:
            raise ValueError(f"eca: kernel must be odd, got {kernel}")
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate = self.conv(grid_mean(x, context)[:, None]).transpose(1, 2)  # [B, D, 1]
        return x * torch.sigmoid(gate).transpose(1, 2)


# The sixteen most useful (vertical, horizontal) frequencies on a 7 x 7 map, as found by Qin et al. 2021.
FREQUENCIES = ((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0), (5, 0), (1, 6), (3, 0), (0, 4), (0, 6))
FREQUENCIES += ((0, 3), (3, 5), (2, 2))


class FrequencyChannel(Channel):
    """SE that squeezes by a cosine transform in place of the mean; each sixteenth of the channels has one
    two-dimensional frequency (FcaNet, Qin et al. 2021, arXiv:2012.11879). The hidden width is dim / reduction.

    The basis follows the size of each sample, so padding changes nothing. Frequencies are scaled by size // 7, as
    the paper does for larger maps, up to the highest that a size has. In one dimension the sixteen lowest are
    used.
    """

    def __init__(self, dim: int, place: Place = ANYWHERE, *, reduction: int = 16) -> None:
        super().__init__()
        if dim % 16:
            raise ValueError(f"fca: dim must be a multiple of 16, got {dim}")
        self.frequencies = FREQUENCIES if place.axes == 2 else tuple((u,) for u in range(16))
        hidden = max(1, dim // reduction)
        self.squeeze, self.excite = linear(dim, hidden, bias=False), linear(hidden, dim, bias=False)

    def basis(self, size: int, lengths: Tensor, frequency: Tensor) -> Tensor:
        """cos(pi u (i + 1/2) / length), orthonormal, zero beyond each sample's length: [B, 16, size]."""
        kind = frequency.dtype
        place = torch.arange(size, device=lengths.device)
        length = lengths.clamp(min=1).to(kind)[:, None, None]
        scaled = frequency[None, :, None]
        if len(self.frequencies[0]) == 2:
            scaled = scaled * (lengths // 7).clamp(min=1).to(kind)[:, None, None]
        scaled = torch.minimum(scaled, length - 1)  # the highest one on so few places
        wave = torch.cos(math.pi * scaled * (place.to(kind) + 0.5) / length)
        norm = torch.where(scaled == 0, 1.0, 2.0).to(kind).sqrt() / length.sqrt()
        return wave * norm * (place < lengths[:, None])[:, None]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tokens = x[:, context.prefix :]
        kind = torch.promote_types(x.dtype, torch.float32)
        frequencies = torch.tensor(self.frequencies, dtype=kind, device=x.device).T  # [axes, 16]
        if context.mask is None:
            lengths = [torch.full((1,), size, device=x.device) for size in context.grid]
        else:
            lengths = extent(context)
        waves = [self.basis(*each) for each in zip(context.grid, lengths, frequencies, strict=True)]
        basis = waves[0] if len(waves) == 1 else (waves[0][:, :, :, None] * waves[1][:, :, None, :]).flatten(2)
        parts = zeroed(tokens, context.grid_mask).to(kind).unflatten(2, (16, -1))  # [B, N, 16, D / 16]
        pooled = torch.einsum("bnkc,bkn->bkc", parts, basis.expand(x.shape[0], -1, -1)).flatten(1).to(x.dtype)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))[:, None]


class LocalChannel(Channel):
    """x * a_h * a_w, where each is a mean over rows or columns, a convolution along it, GroupNorm and a sigmoid, with
    the same weights for both axes (ELA, Xu and Wan 2024, arXiv:2403.01123). On sequences there is one such factor.

    The convolution is `kernel` tokens wide and reads `span` channels per group, 1 (depthwise) or 8 in the paper;
    `groups` is that of GroupNorm.
    """

    reads = frozenset({"mask"})

    def __init__(self, dim: int, place: Place = ANYWHERE, *, kernel: int = 7, span: int = 1, groups: int = 16) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"ela: kernel must be odd, got {kernel}")
        if dim % span or dim % groups:
            raise ValueError(f"ela: span and groups must divide dim {dim}, got {span} and {groups}")
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim // span, bias=False)
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def gate(self, strip: Tensor, real: Tensor | None) -> Tensor:
        """strip [B, D, L] -> gate [B, D, L]; real [B, L] marks the places that exist."""
        if real is None:
            y = torch.group_norm(self.conv(strip), self.groups, self.weight, self.bias)
            return torch.sigmoid(y)
        real = real[:, None]
        y = self.conv(strip * real).unflatten(1, (self.groups, -1))
        weights = real[:, None].to(y.dtype)
        number = weights.sum((2, 3), keepdim=True).clamp(min=1) * y.shape[2]
        mean = (y * weights).sum((2, 3), keepdim=True) / number
        variance = ((y - mean).square() * weights).sum((2, 3), keepdim=True) / number
        y = ((y - mean) * torch.rsqrt(variance + 1e-5)).flatten(1, 2)
        return torch.sigmoid(y * self.weight[:, None] + self.bias[:, None])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        grid = context.grid
        if context.mask is None:
            real: list[Tensor | None] = [None] * len(grid)
        else:
            places = [torch.arange(size, device=x.device) for size in grid]
            real = [place < length[:, None] for place, length in zip(places, extent(context), strict=True)]
        y = zeroed(x, context.mask)
        if len(grid) == 1:
            return x * self.gate(y.transpose(1, 2), real[0]).transpose(1, 2)
        maps = y.transpose(1, 2).unflatten(2, grid)  # [B, D, H, W]
        gates = []
        for axis, other in ((2, 3), (3, 2)):
            across = real[other - 2]
            count = grid[other - 2] if across is None else across.sum(1).clamp(min=1)[:, None, None].to(x.dtype)
            gates.append(self.gate(maps.sum(other) / count, real[axis - 2]))
        return x * (gates[0][:, :, :, None] * gates[1][:, :, None, :]).flatten(2).transpose(1, 2)


class NoChannel(Channel):
    """No channel attention."""

    def __init__(self, dim: int, place: Place = ANYWHERE) -> None:
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x


CHANNELS: dict[str, type[Channel]] = {
    "none": NoChannel,
    "se": SqueezeExcite,
    "eca": EfficientChannel,
    "fca": FrequencyChannel,
    "ela": LocalChannel,
}
"""Each row is constructed as row(dim, place, *, options)."""
