"""From log-mel features to tokens at a lower frame rate: strided convolutions over time and frequency, a linear."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import CHANNELS
from zoo.fusion import fold_site
from zoo.layer import Context, Fold, Place
from zoo.norms import NORMS, Norm
from zoo.spec import check, make, parse
from zoo.tensors import compiling, linear, mask_of, relu, silu
from zoo.text import unknown

SLICES = {"cpu": 512}  # frames of inference at once, to fit the processor's caches
SLICE = 8192  # elsewhere
# Zeros before and after time and frequency, for a kernel of 3 and a stride of 2.
PADDINGS = {"symmetric": (1, 1), "right": (0, 1), "causal": (2, 1)}


def shortened(lengths: Any, padding: str) -> Any:
    """Frames after one strided convolution, of a number or a tensor of them; 0 stays 0."""
    after = (lengths + sum(PADDINGS[padding]) - 3) // 2 + 1
    return torch.where(lengths > 0, after, 0) if isinstance(lengths, Tensor) else after * (lengths > 0)


class Stage(nn.Module):
    """A 3 x 3 convolution of stride 2 over maps [B, C, T, F], or a depthwise one and a pointwise linear."""

    def __init__(self, inputs: int, channels: int, depthwise: bool, norm: str) -> None:
        super().__init__()
        self.normed = norm != ""
        self.norm: Norm | None = make(NORMS, norm, channels, Place(axes=1)) if norm else None
        self.conv = nn.Conv2d(inputs, channels, 3, stride=2, groups=channels if depthwise else 1)
        self.point = nn.Linear(channels, channels) if depthwise else None

    def forward(self, maps: Tensor, padding: int = 0) -> Tensor:
        # Channels last in memory, two to three times as fast on the CPU.
        weight = self.conv.weight.contiguous(memory_format=torch.channels_last)
        maps = F.conv2d(maps, weight, self.conv.bias, 2, padding, groups=self.conv.groups)
        if self.point is not None:
            maps = self.point(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return maps

    def activated(self, maps: Tensor, real: Tensor | None) -> Tensor:
        """ReLU of the maps, or the norm over their real frames and swish."""
        if not self.normed:
            return relu(maps)
        frames = maps.permute(0, 2, 3, 1)
        if self.norm is not None:  # else it is folded
            frames = self.norm(frames, Context(grid=(maps.shape[2],), mask=real))
        return silu(frames).permute(0, 3, 1, 2)

    def fold(self) -> list[Fold]:
        return fold_site(self, "norm", self.conv)


class Subsampling(nn.Module):
    """Features [B, T, mels] to tokens [B, T', dim], T' about T / stride: `stages` strided convolutions and a linear.

    The first convolution is full, the others are depthwise with a pointwise linear, or full too. Frames that the mask
    [B, T] marks as padding are set to zero before every convolution, so they change nothing. padding is `symmetric` (1
    zero on either side), `right` (1 after) or `causal` (2 before and 1 after, so no frame reads a later one). channels
    is the number of channels of the convolutions; 0 takes that of the paper. channel is channel attention by name, on
    the output of the last convolution, whose grid is time x frequency.
    """

    depthwise = True
    stages = 2
    usual = 0  # width of the maps; 0 for dim
    norm = ""  # after each convolution

    def __init__(
        self, mels: int, dim: int, *, channels: int = 0, padding: str = "symmetric", channel: str = "none"
    ) -> None:
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"subsampling: {unknown('padding', padding, PADDINGS)}")
        self.mels, self.padding = mels, padding
        self.width = width = channels or self.usual or dim
        self.convs = nn.ModuleList(
            Stage(width if stage else 1, width, self.depthwise and stage > 0, self.norm) for stage in range(self.stages)
        )
        try:
            check(CHANNELS, channel)
        except ValueError as error:
            raise ValueError(f"channel of the subsampling: {error}") from None
        self.channel = None if parse(channel)[0] == "none" else make(CHANNELS, channel, width, Place(axes=2))
        rows = [mels]
        for _ in range(self.stages):
            rows.append(shortened(rows[-1], padding))
        self.rows = rows  # of frequency, before each convolution and after the last
        if min(rows) < 1:
            raise ValueError(f"mels: {mels} bands are too few to halve {self.stages} times")
        self.out = linear(width * rows[-1], dim)

    def state(self, batch: int, like: Tensor) -> dict[str, Tensor]:
        """The last frame before each convolution, before the first chunk of a stream."""
        widths = [1] + [self.width] * (self.stages - 1)
        return {
            f"stem.{number}": like.new_zeros(batch, width, 1, rows)
            for number, (width, rows) in enumerate(zip(widths, self.rows[:-1], strict=True))
        }

    @property
    def stride(self) -> int:
        """Frames of the features per token."""
        return 2**self.stages

    def tokens(self, lengths: Any) -> Any:
        """The number of tokens of this many frames."""
        for _ in range(self.stages):
            lengths = shortened(lengths, self.padding)
        return lengths

    def forward(
        self, features: Tensor, mask: Tensor | None = None, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T', dim] and their mask [B, T'] or None; with a cache, those of the next chunk of a stream.

        In a stream the mask may begin with padding, the time before the first frame.
        """
        whole = cache is not None or torch.is_grad_enabled() or compiling()
        whole = whole or self.channel is not None or self.norm != ""  # which look at all frames
        size = SLICES.get(features.device.type, SLICE)
        if whole or features.shape[1] <= size:
            maps, real = self.convolved(features, mask, cache)
            return self.out(maps), real
        return self.sliced(features, mask, size)

    def sliced(self, features: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
        """The same slice by slice, for inference: the maps, many times the size of the features, stay small. Tokens
        beside a cut, which lack frames, are dropped; two on either side are enough for every padding."""
        number, stride = int(self.tokens(features.shape[1])), self.stride
        step, made, reals = size // stride, [], []
        for start in range(0, number, step):
            first, end = max(0, start - 2), min(number, start + step)
            frames = slice(first * stride, (end + 2) * stride)
            tokens, real = self.convolved(features[:, frames], None if mask is None else mask[:, frames])
            made.append(self.out(tokens[:, start - first : end - first]))
            reals.append(None if real is None else real[:, start - first : end - first])
        return torch.cat(made, 1), None if mask is None else torch.cat(reals, 1)

    def convolved(
        self, features: Tensor, mask: Tensor | None, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the linear reads [B, T', channels x frequency], and its mask."""
        before, behind = PADDINGS[self.padding]
        maps, real = features[:, None], mask
        for number, stage in enumerate(self.convs):
            assert isinstance(stage, Stage)
            if real is not None:
                maps = maps.masked_fill(~real[:, None, :, None], 0.0)
            if cache is None:
                short = 0 if compiling() else max(0, 3 - before - behind - maps.shape[2])
                if before == behind and not short:
                    maps = stage(maps, before)
                else:
                    maps = stage(F.pad(maps, (before, behind, before, behind + short)))
                if real is not None:
                    lengths = shortened(real.sum(1), self.padding)
                    real = mask_of(lengths, maps.shape[2])
            else:
                past, last = cache[f"stem.{number}"], maps[:, :, -1:]
                maps = F.pad(torch.cat([past, maps], 2), (before, behind))
                past.copy_(last)
                maps = stage(maps)
                # A window is (past, odd, even); its token exists if odd or even does.
                real = None if real is None else real.unflatten(1, (-1, 2)).any(2)
            maps = stage.activated(maps, real)
        if self.channel is not None:
            tokens = maps.permute(0, 2, 3, 1)
            grid = (tokens.shape[1], tokens.shape[2])
            flat = None if real is None else real[:, :, None].expand(-1, -1, grid[1]).flatten(1)
            gated = self.channel(tokens.flatten(1, 2), Context(grid=grid, mask=flat))
            maps = gated.unflatten(1, grid).permute(0, 3, 1, 2)
        return maps.transpose(1, 2).flatten(2), real


class FullSubsampling(Subsampling):
    """Two full convolutions of stride 2, as in Conformer; 4 frames become a token (Gulati et al. 2020,
    arXiv:2005.08100)."""

    depthwise = False


class DepthwiseSubsampling(Subsampling):
    """A full and a depthwise convolution of stride 2, as in Squeezeformer; 4 frames become a token (Kim et al. 2022,
    arXiv:2206.00888)."""


class DeepSubsampling(Subsampling):
    """A full and two depthwise convolutions of stride 2 with 256 channels, as in Fast Conformer; 8 frames become a
    token (Rekesh et al. 2023, arXiv:2305.05084)."""

    stages = 3
    usual = 256


class NormedSubsampling(Subsampling):
    """A convolution of stride 2, batch normalization and swish, as in Efficient Conformer; 2 frames become a token
    (Burchi and Vielzeuf 2021, arXiv:2109.01163)."""

    stages = 1
    norm = "batchnorm"
