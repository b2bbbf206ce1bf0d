"""Mixers that sample the grid at learned offsets."""

from torch import Tensor, nn

from zoo.kernels import deformable
from zoo.layer import Context, Layer, linear, zeroed


class DCNv4(Layer):
    """Deformable aggregation without softmax: offsets and weights are read off the token by one linear that starts at
    zero (Xiong et al. 2024, arXiv:2401.06197). Any kernel, one axis or two; `groups` 0 means one a head."""

    reads = frozenset({"mask"})
    mixes = True

    def __init__(
        self, dim: int, heads: int, axes: int = 2, *, kernel: int = 3, groups: int = 0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.axes, self.kernel, self.scale = axes, kernel, scale
        self.heads = groups or heads
        if dim % self.heads:
            raise ValueError(f"{self.heads} groups do not divide dim {dim}")
        self.taps = kernel**axes
        self.value, self.out = linear(dim, dim), linear(dim, dim)
        self.sample = nn.Linear(dim, self.heads * self.taps * (axes + 1))
        nn.init.zeros_(self.sample.weight)
        nn.init.zeros_(self.sample.bias)
        self.sites = {"inner": dim}
        self.inner: Layer | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        grid = context.grid
        value = zeroed(self.value(x), context.mask).unflatten(1, grid)
        # Group by group: the offsets of all taps, then the weights of all taps.
        sample = self.sample(x).unflatten(1, grid).unflatten(-1, (self.heads, -1))
        offsets, weights = sample.split([self.taps * self.axes, self.taps], -1)
        offsets = offsets.unflatten(-1, (self.taps, self.axes))
        y = deformable(value, offsets, weights, kernel=self.kernel, scale=self.scale)
        y = y.flatten(1, -2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def inputs(self) -> list[nn.Linear] | str:
        return [self.value, self.sample]

    def outputs(self) -> list[nn.Linear] | str:
        return [self.out]
