"""Stems: raw input to tokens, with the grid and the mask that follow; and reductions from one grid to a coarser one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion import fold_site, keep
from zoo.layer import ANYWHERE, Context, Fold, Place
from zoo.norms import NORMS, Norm
from zoo.spec import make
from zoo.tensors import check_floats, compiling, gelu, shortfall, to_map, to_tokens, zeroed


def checked(images: Tensor, mask: Tensor | None, channels: int) -> Tensor:
    """The images [B, channels, H, W] with zeros where the mask [B, H, W] is False; ValueError on other shapes and on
    integers."""
    check_floats(images, "images")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be [B, {channels}, H, W], got {list(images.shape)}")
    if mask is None:
        return images
    if mask.shape != images[:, 0].shape or mask.dtype != torch.bool:
        raise ValueError(f"the mask must be boolean [B, H, W] like the images, got {mask.dtype} {list(mask.shape)}")
    return images.masked_fill(~mask[:, None], 0.0)


def padding_of(sizes: Sequence[int], stride: int) -> list[int]:
    """F.pad's padding at the right and bottom of maps with these sides [H, W], so that the stride divides them."""
    return [0, shortfall(sizes[1], stride), 0, shortfall(sizes[0], stride)]


def coarsened(mask: Tensor | None, stride: int) -> Tensor | None:
    """The mask [B, H, W] after a stride: a token is real if any of its stride x stride places is. [B, N]."""
    if mask is None:
        return None
    real = F.max_pool2d(F.pad(mask[:, None].float(), padding_of(mask.shape[1:], stride)), stride)
    return real.flatten(1) > 0


def convolve(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """The convolution of maps [B, C, H, W], padded with zeros at the right and the bottom until the stride divides."""
    padding = padding_of(maps.shape[2:], conv.stride[0])
    if compiling() or any(padding):  # a traced program takes any size
        maps = F.pad(maps, padding)
    return conv(maps)


def stream(maps: Tensor, conv: nn.Module) -> Tensor:
    """The tokens of a convolution's result, which the residual branches are added to: in the precision of its weights
    (where they are not quantized) under autocast, too, and with the channels last in memory, or every layer would copy
    them."""
    tokens, weight = to_tokens(maps), conv.weight
    if isinstance(weight, Tensor) and weight.is_floating_point():
        tokens = tokens.to(weight.dtype)
    return tokens.contiguous()


class Patches(nn.Module):
    """Cuts images [B, channels, H, W] into patches and maps each to a token (Dosovitskiy et al. 2021,
    arXiv:2010.11929).

    Sides that the patch does not divide are padded with zeros at the right and the bottom. A mask [B, H, W] marks real
    pixels: others are zeroed, and a patch is real if any of its pixels is.
    """

    def __init__(self, channels: int, dim: int, patch: int, bias: bool = True) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.conv = nn.Conv2d(channels, dim, patch, stride=patch, bias=bias)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Tokens [B, N, dim], the grid (H', W') and the mask of the tokens [B, N] or None."""
        maps = convolve(self.conv, checked(images, mask, self.channels))
        tokens = stream(maps, self.conv)
        return tokens, (maps.shape[2], maps.shape[3]), coarsened(mask, self.patch)


class Reduction(nn.Module):
    """Norm, strided convolution, norm, from the tokens of a grid to a grid whose sides are divided by `stride` and
    rounded up. before and after say which of the two norms exist, bias whether the convolution has a bias.
    kernel, padding and groups are those of the convolution."""

    def __init__(
        self,
        inputs: int,
        dim: int,
        norm: str,
        place: Place = ANYWHERE,
        stride: int = 2,
        *,
        kernel: int = 2,
        padding: int = 0,
        groups: int = 1,
        before: bool = True,
        after: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not kernel - stride <= 2 * padding < kernel:
            raise ValueError(
                f"kernel {kernel} and padding {padding} do not reduce sides by exactly the stride {stride}"
            )
        self.stride = stride
        self.before: Norm | None = make(NORMS, norm, inputs, place) if before else None
        self.conv = nn.Conv2d(inputs, dim, kernel, stride, padding, groups=groups, bias=bias)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.after: Norm | None = make(NORMS, norm, dim, place) if after else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        x = x if self.before is None else self.before(x, context)
        maps = convolve(self.conv, to_map(zeroed(x, context.mask), context.grid))
        mask = None if context.mask is None else coarsened(context.mask.unflatten(1, context.grid), self.stride)
        context = Context(grid=(maps.shape[2], maps.shape[3]), mask=mask)
        x = stream(maps, self.conv)
        return x if self.after is None else self.after(x, context), context

    def fold(self) -> list[Fold]:
        front = (
            []
            if self.before is None
            else [keep(self, "before", "a convolution that pads with zeros, if only odd sides, reads it")]
        )
        return front + fold_site(self, "after", self.conv)


class ConvStem(nn.Module):
    """A convolution of stride 4 and a norm, which after=False omits; from images to tokens and their Context.

    A mask [B, H, W] marks real pixels: others are zeroed, and a token is real where any of its pixels is. kernel and
    padding are those of the convolution.
    """

    stride = 4

    def __init__(
        self,
        channels: int,
        dim: int,
        norm: str,
        place: Place = ANYWHERE,
        *,
        kernel: int = 4,
        padding: int = 0,
        after: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.reduction = Reduction(
            channels, dim, norm, place, self.stride, kernel=kernel, padding=padding, before=False, after=after
        )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Context]:
        return self.reduction(*_pixels(images, mask, self.channels))


class DoubleStem(nn.Module):
    """Convolution of stride 2, norm, GELU, convolution of stride 2, norm (InternImage, Wang et al. 2023,
    arXiv:2211.05778). Images become tokens and their Context; masks are as in ConvStem."""

    stride = 4

    def __init__(self, channels: int, dim: int, norm: str, place: Place = ANYWHERE) -> None:
        super().__init__()
        self.channels = channels
        self.first = Reduction(channels, dim // 2, norm, place, kernel=3, padding=1, before=False, after=True)
        self.second = Reduction(dim // 2, dim, norm, place, kernel=3, padding=1, before=False, after=True)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Context]:
        x, context = self.first(*_pixels(images, mask, self.channels))
        return self.second(gelu(x), context)


def _pixels(images: Tensor, mask: Tensor | None, channels: int) -> tuple[Tensor, Context]:
    images = checked(images, mask, channels)
    grid = (images.shape[2], images.shape[3])
    return to_tokens(images), Context(grid=grid, mask=None if mask is None else mask.flatten(1))
