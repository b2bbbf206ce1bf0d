"""Mixers that sample a grid at learned offsets: DCNv4 on its own tokens, and a decoder's cross-attention on memory."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cache import table
from zoo.kernels import deformable, multiscale
from zoo.kernels.deformable import lattice
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
    value, at a share that each group predicts. scale multiplies the positions of taps and the offsets; with scales > 0
    so does a learned factor of each group, between 0 and `scales` and at the start spread evenly there (FlowDCN, Wang
    et al. 2024, arXiv:2410.22655, takes 6).
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
        scales: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_weights("dcnv4", weights)
        if not 0.0 <= scales < math.inf:
            raise ValueError(f"dcnv4: scales must be finite and >= 0, got {scales}")
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
        self.largest = scales
        self.scales = None
        if scales:
            start = torch.logit((torch.arange(self.heads, device="cpu") + 0.5) / self.heads)
            self.scales = nn.Parameter(start.to(self.sample.weight.device))
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
        if self.scales is not None:
            offsets = self.scaled(offsets, self.scales)
        y = deformable(value.unflatten(1, grid), offsets, weights, kernel=self.kernel, scale=self.scale).flatten(1, -2)
        if self.centre is not None:
            share = self.centre(y).sigmoid()[..., None]
            y = torch.lerp(y.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1)), share).flatten(2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def scaled(self, offsets: Tensor, scales: Tensor) -> Tensor:
        """Offsets [B, *grid, heads, taps, axes] that, with the positions of the taps, are a factor of each group times
        the given ones."""
        factor = (self.largest * scales.sigmoid()).to(offsets.dtype)[:, None, None]
        sizes, ones, first = ((each,) * self.axes for each in (self.kernel, 1, -((self.kernel - 1) // 2)))
        taps = table(lattice, sizes, ones, first, offsets.dtype, device=offsets.device)
        return factor * (offsets + taps) - taps

    def inputs(self) -> list[nn.Linear] | str:
        return [self.value, self.sample] if self.local is None else "a depthwise convolution reads it"

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]


class DeformableCross(Layer):
    """Each head samples `points` points around the query's reference on each grid of the memory (Deformable DETR, Zhu
    et al. 2021, arXiv:2010.04159).

    The reference is a point (x, y) or a box (x, y, w, h) in 0..1 of the sample's extent: offsets are pixels of their
    grid around a point, and half boxes, divided by `points`, around a box's centre.

    points: one number, or one for each grid. weights: `softmax` over all samples; `sigmoid`; `raw`, used as given. All
    three start as the mean of all samples. project: whether the values and the result go through a linear each.
    gated: whether tokens and result are each scaled by a gate that reads both, starting at 1/2, before they are added
    (D-FINE, Peng et al. 2024, arXiv:2410.13842).
    """

    reads = frozenset({"prefix", "mask", "code", "memory"})
    mixes = True

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        points: int | tuple[int, ...] = 4,
        weights: str = "softmax",
        project: bool = True,
        gated: bool = False,
    ) -> None:
        super().__init__()
        _check_weights("deformable", weights)
        if dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.heads, self.weights = heads, weights
        self.points = (points,) * place.levels if isinstance(points, int) else points
        if len(self.points) != place.levels:
            raise ValueError(f"points must be one number, or one for each of {place.levels} levels, got {points}")
        samples = sum(self.points)
        self.values = linear(dim, dim) if project else None
        self.out = linear(dim, dim) if project else None
        self.offsets, self.scores = nn.Linear(dim, heads * samples * 2), nn.Linear(dim, heads * samples)
        for layer in (self.offsets, self.scores):
            nn.init.zeros_(layer.weight)
        # The heads look in as many directions, each point one pixel farther.
        angles = torch.arange(heads, device="cpu") * (2 * math.pi / heads)
        ways = torch.stack([angles.cos(), angles.sin()], -1)
        ways = (ways / ways.abs().amax(-1, keepdim=True))[:, None]
        steps = torch.cat([torch.arange(1, number + 1, device="cpu") for number in self.points])[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_((ways * steps).flatten())
        start = {"softmax": 0.0, "raw": 1 / samples, "sigmoid": -math.log(max(samples - 1, 1e-3))}
        nn.init.constant_(self.scores.bias, start[weights])
        self.gate = nn.Linear(2 * dim, 2 * dim) if gated else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.inner: Layer | None = None

    @classmethod
    def sites_of(cls, dim: int, heads: int, *, project: bool = True, **options: Any) -> dict[str, Site]:
        return {"inner": Site(dim, heads)} if project else {}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = context.memory
        if memory is None or memory.reference is None or len(memory.grids) != len(self.points):
            raise ValueError(f"deformable cross-attention needs a memory of {len(self.points)} grids, and references")
        query = x if context.code is None else x + context.code
        offsets = self.offsets(query).unflatten(-1, (self.heads, -1, 2))  # (x, y)
        weights = weigh(self.scores(query).unflatten(-1, (self.heads, -1)), self.weights)
        reference = memory.reference[:, :, None, None].to(torch.promote_types(offsets.dtype, torch.float32))
        grids = [(rows, columns) for rows, columns in memory.grids]
        places = []
        for level, each in enumerate(offsets.split(self.points, -2)):
            share = 1.0 if memory.extent is None else memory.extent[:, level, None, None, None]  # of the padded map
            if reference.shape[-1] == 2:
                place = reference * share + each / each.new_tensor(grids[level][::-1], dtype=reference.dtype)
            else:
                place = (reference[..., :2] + each * reference[..., 2:] * (0.5 / self.points[level])) * share
            places.append(place.flip(-1))
        value = zeroed(memory.tokens if self.values is None else self.values(memory.tokens), memory.mask)
        y = multiscale(value, grids, places, weights.split(self.points, -1))
        y = y if self.inner is None else self.inner(y, context)
        y = y if self.out is None else self.out(y)
        if self.gate is None:
            return y
        own, given = self.gate(torch.cat([x, y], -1)).sigmoid().chunk(2, -1)
        return (own - 1) * x + given * y  # the residual adds x

    def inputs(self) -> list[nn.Linear] | str:
        return [self.offsets, self.scores] if self.gate is None else "its gate reads it"

    def outputs(self) -> list[nn.Linear] | str:
        if self.out is None or self.gate is not None:
            return "a gate is behind it" if self.gate is not None else "it has no output linear"
        return [self.out]
