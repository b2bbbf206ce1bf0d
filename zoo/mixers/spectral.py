"""Mixers by Fourier transforms of the tokens."""

import math

import torch
from torch import Tensor

from zoo.layer import ANYWHERE, Context, Layer, Place
from zoo.positions import lengths
from zoo.tensors import compiling, single, unmixed, zeroed


class FourierTransform(Layer):
    """The real part of a discrete Fourier transform along channels and tokens, on images along both axes; it has no
    parameters (FNet, Lee-Thorp et al. 2021, arXiv:2105.03824).

    It is a fast transform of N log N operations. With a mask each sample is transformed at its own size, by matrices of
    size x size along each axis; along time memory is then quadratic in the length. A compiled or exported program uses
    these matrices without a mask, too. scale=True divides by sqrt(N D), for N tokens of D channels, so that the size of
    the result does not depend on them, as a residual branch needs; scale=False does not, as published. Prefix tokens
    are refused, for they have no place on the grid.
    """

    reads = frozenset({"mask"})
    mixes = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, scale: bool = True) -> None:
        super().__init__()
        self.scale = scale
        self.quadratic = place.axes == 1

    def forward(self, x: Tensor, context: Context) -> Tensor:
        grid, axes = context.grid, range(1, 1 + len(context.grid))
        y = single(zeroed(x, context.mask)).unflatten(1, grid)
        with unmixed(x):
            if context.mask is None and not compiling() and len(x):  # MKL refuses an empty batch
                y = torch.fft.fftn(y, dim=(*axes, -1), norm="ortho" if self.scale else "backward").real
            else:
                y = self.by_matrices(y, lengths(context, x.device))
        return y.flatten(1, -2).to(x.dtype)

    def by_matrices(self, x: Tensor, real: list[Tensor]) -> Tensor:
        """The real part of the transform of the first `real` [1 or B] tokens of x [B, *grid, C] along each axis; 0
        beyond them."""
        cosine, sine = waves(torch.full((1,), x.shape[-1], device=x.device), x.shape[-1], x, self.scale)
        x, imaginary = x @ cosine[0], -(x @ sine[0])
        for axis, length in enumerate(real, start=1):
            cosine, sine = waves(length, x.shape[axis], x, self.scale)
            rest = x.movedim(axis, 1).shape[2:]
            parts = [part.movedim(axis, 1).flatten(2) for part in (x, imaginary)]
            x = (cosine @ parts[0] + sine @ parts[1]).unflatten(2, rest).movedim(1, axis)
            if axis < len(real):  # nothing reads the imaginary part of the last
                imaginary = (cosine @ parts[1] - sine @ parts[0]).unflatten(2, rest).movedim(1, axis)
        return x


def waves(length: Tensor, size: int, like: Tensor, scale: bool) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / n for i and j below n, for each n of `length` [B], and 0 elsewhere: [B, size, size];
    with `scale` they are divided by sqrt(n)."""
    places = torch.arange(size, device=like.device)
    length = length.clamp(min=1)[:, None, None]
    angle = (places[:, None] * places % length).to(like.dtype) * (2 * math.pi) / length.to(like.dtype)
    inside = ((places[:, None] < length) & (places < length)).to(like.dtype)
    inside = inside * length.to(like.dtype).rsqrt() if scale else inside
    return angle.cos() * inside, angle.sin() * inside
