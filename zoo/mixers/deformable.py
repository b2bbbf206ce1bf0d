"""Mixers that sample a grid at learned offsets: DCNv4 on its own tokens, and a decoder's cross-attention on memory."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.kernels import deformable, multiscale
from zoo.layer import ANYWHERE, Context, Layer, Place, Site
from zoo.mixers.local import depthwise
from zoo.tensors import filtered, linear, zeroed
from zoo.text import unknown

WEIGHTS = ("raw", "sigmoid", "softmax")


def weigh(scores: Tensor, how: str) -> Tensor:
    """The aggregation weights from scores [..., K]: unchanged, each in 0..1, or with sum 1."""
    if how == "raw":
        return scores
    return scores.sigmoid() if how == "sigmoid" else scores.softmax(-1)


def _check_weights(name: str, weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"{name}: {unknown('weights', weights, WEIGHTS)}")


class DCNv4(Layer):
    """Deformable convolution: each token predicts sampling offsets and weights by one linear that is zero at the start
    (Xiong et al. 2024, arXiv:2401.06197). It has one axis or two; groups=0 means one group per head.

    weights: `raw`, unbounded; `sigmoid`; `softmax` over the taps as in DCNv3 (Wang et al. 2023, arXiv:2211.05778).
    local > 0 is the kernel of a depthwise convolution before that linear. centre=True blends in the token's own
    value, at a share that each group predicts. scale multiplies the positions of taps and the offsets.
    """

    reads = frozenset({"mask"})
    mixes = True

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        kernel: int = 3,
        groups: int = 0,
        scale: float = 1.0,
        weights: str = "raw",
        local: int = 0,
        centre: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_weights("dcnv4", weights)
        self.axes, self.kernel, self.scale, self.weights = place.axes, kernel, scale, weights
        self.heads = groups or heads
        if dim % self.heads:
            raise ValueError(f"groups must divide dim {dim}, got {self.heads}")
        self.taps = kernel**place.axes
        self.value, self.out = linear(dim, dim), linear(dim, dim, bias)
        self.local = depthwise(dim, local, place.axes, bias=True) if local else None
        self.sample = nn.Linear(dim, self.heads * self.taps * (place.axes + 1))
        nn.init.zeros_(self.sample.weight)
        nn.init.zeros_(self.sample.bias)
        if weights == "sigmoid":  # starts, as softmax does, as the mean
            with torch.no_grad():
                self.sample.bias.view(self.heads, -1)[:, -self.taps :] = -math.log(max(self.taps - 1, 1e-3))
        self.centre = linear(dim, self.heads) if centre else None
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, groups: int = 0, **options: Any) -> dict[str, Site]:
        return {"inner": Site(dim, groups or heads)}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        grid = context.grid
        value = zeroed(self.value(x), context.mask)
        if self.local is not None:
            near = self.local.weight, self.local.bias, int(self.local.padding[0])
            x = filtered(zeroed(x, context.mask), grid, *near)
        # Group by group: the offsets of all taps, then the weights of all taps.
        sample = self.sample(x).unflatten(1, grid).unflatten(-1, (self.heads, -1))
        offsets, scores = sample.split([self.taps * self.axes, self.taps], -1)
        offsets, weights = offsets.unflatten(-1, (self.taps, self.axes)), weigh(scores, self.weights)
        y = deformable(value.unflatten(1, grid), offsets, weights, kernel=self.kernel, scale=self.scale).flatten(1, -2)
        if self.centre is not None:
            share = self.centre(y).sigmoid()[..., None]
            y = torch.lerp(y.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1)), share).flatten(2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.value, self.sample] if self.local is None else "a depthwise convolution reads it"

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class DeformableCross(Layer):
    """Each head samples `points` points around the query's reference on each grid of the memory (Deformable DETR, Zhu
    et al. 2021, arXiv:2010.04159).

    The reference is a point (x, y) or a box (x, y, w, h) in 0..1 of the sample's extent: offsets are pixels of their
    grid around a point, and half boxes, divided by `points`, around a box's centre. weights: `softmax` over all
    samples; `sigmoid`; `raw`, used as given. All three start as the mean of all samples.
    """

    reads = frozenset({"prefix", "mask", "code", "memory"})
    mixes = True

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        points: int = 4,
        weights: str = "softmax",
    ) -> None:
        super().__init__()
        _check_weights("deformable", weights)
        if dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.heads, self.levels, self.points, self.weights = heads, place.levels, points, weights
        levels = place.levels
        samples = levels * points
        self.values, self.out = linear(dim, dim), linear(dim, dim)
        self.offsets, self.scores = nn.Linear(dim, heads * samples * 2), nn.Linear(dim, heads * samples)
        for layer in (self.offsets, self.scores):
            nn.init.zeros_(layer.weight)
        # The heads look in as many directions, each point one pixel farther.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        ways = torch.stack([angles.cos(), angles.sin()], -1)
        ways = (ways / ways.abs().amax(-1, keepdim=True))[:, None, None]
        steps = torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_((ways * steps).expand(-1, levels, -1, -1).flatten())
        start = {"softmax": 0.0, "raw": 1 / samples, "sigmoid": -math.log(max(samples - 1, 1e-3))}
        nn.init.constant_(self.scores.bias, start[weights])
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        return {"inner": Site(dim, heads)}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory
        if memory is None or memory.reference is None or len(memory.grids) != self.levels:
            raise ValueError(f"deformable cross-attention needs a memory of {self.levels} grids, and references")
        query = x if context.code is None else x + context.code
        shape = (self.heads, self.levels, self.points)
        offsets = self.offsets(query).unflatten(-1, (*shape, 2))  # (x, y)
        weights = weigh(self.scores(query).unflatten(-1, (self.heads, -1)), self.weights).unflatten(-1, shape[1:])
        reference = memory.reference[:, :, None, None, None].to(torch.promote_types(offsets.dtype, torch.float32))
        share = 1.0 if memory.extent is None else memory.extent[:, None, None, :, None]  # of the padded maps
        if reference.shape[-1] == 2:
            sizes = offsets.new_tensor([(columns, rows) for rows, columns in memory.grids], dtype=reference.dtype)
            places = reference * share + offsets / sizes[:, None]
        else:
            places = (reference[..., :2] + offsets * reference[..., 2:] * (0.5 / self.points)) * share
        value = zeroed(self.values(memory.tokens), memory.mask)
        grids = [(rows, columns) for rows, columns in memory.grids]
        y = multiscale(value, grids, places.flip(-1), weights)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.offsets, self.scores]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]
