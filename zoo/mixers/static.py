"""Attention with learned matrices between tokens, which start from the grid of their place."""

import math

import torch
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Place
from zoo.mixers.attention import DotProduct
from zoo.positions import lengths
from zoo.tensors import zeroed


class Super(DotProduct):
    """softmax(q x^T / sqrt(d) + bias) A x: a learned matrix A between tokens makes the values, and keys are the tokens
    themselves (Super Attention, Hosseini and Hosseini 2024, arXiv:2403.01643).

    A has a row and a column for each token of the grid at the config's own size, and starts as the identity. The values
    of another grid, and with a mask those of each sample's extent, are resized to that one and back, linearly along
    each axis. Prefix tokens keep their values. A is a weight: a config of 3,136 tokens has 37 MiB of it in a block.
    Attention maps are those of the softmax.
    """

    undecayed = ("between",)

    reads = DotProduct.reads - {"visible", "order"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads, sources="qxx")
        self.grid = place.grid or (16,) * place.axes
        self.between = nn.Parameter(torch.eye(math.prod(self.grid)))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        grid, own = context.grid, self.grid
        tokens = zeroed(value, context.mask)[:, context.prefix :].flatten(2)
        if context.mask is None and all(isinstance(size, int) for size in grid) and grid == own:
            tokens = self.between @ tokens
        else:
            real = lengths(context, value.device)
            full = [torch.full_like(length, size) for length, size in zip(real, own, strict=True)]
            tokens = resized(tokens, grid, real, own, full)
            tokens = resized(self.between @ tokens, own, full, grid, real)
        value = torch.cat([value[:, : context.prefix], tokens.unflatten(-1, value.shape[2:])], 1)
        return super().mix(query, key, value, context)


def resized(
    tokens: Tensor, grid: tuple[int, ...], real: list[Tensor], onto: tuple[int, ...], wanted: list[Tensor]
) -> Tensor:
    """Tokens [B, product(grid), C] resized linearly to another grid, [B, product(onto), C]: along each axis the first
    `real` [1 or B] tokens to the first `wanted` [1 or B]."""
    x, wide = tokens.unflatten(1, grid), torch.promote_types(tokens.dtype, torch.float32)
    for axis, (size, number) in enumerate(zip(grid, onto, strict=True), start=1):
        length, count = (sizes[axis - 1].clamp(min=1)[:, None].to(wide) for sizes in (real, wanted))
        places = (torch.arange(number, device=x.device) + 0.5) * length / count - 0.5
        places = places.clamp(min=0).minimum(length - 1)
        weights = 1 - (places[..., None] - torch.arange(size, device=x.device)).abs()  # [1 or B, number, size]
        moved = x.movedim(axis, 1)
        x = (weights.clamp(min=0).to(x.dtype) @ moved.flatten(2)).unflatten(2, moved.shape[2:]).movedim(1, axis)
    return x.flatten(1, -2)
