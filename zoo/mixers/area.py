"""Attention inside strips of the grid."""

import torch
from torch import Tensor

from zoo.layer import ANYWHERE, Context, Place, extent
from zoo.mixers.attention import attend, note_weights, together
from zoo.mixers.local import along, depthwise
from zoo.mixers.projected import Projected
from zoo.tensors import compiling, exporting, zeroed


class Area(Projected):
    """Softmax attention inside `areas` strips of whole rows, or of frames along time, plus a depthwise convolution of
    the values over the whole grid, `kernel` tokens wide (area attention of YOLOv12, Tian et al. 2025,
    arXiv:2502.12524).

    The strips divide the rows of each sample's own extent: row r of R is in strip floor(areas * r / R). Their heights
    differ by one row at most; with fewer rows than areas each row is a strip. The projections are linear, without the
    batch norms of the paper.
    """

    reads = Projected.reads - {"prefix"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, areas: int = 4, kernel: int = 7) -> None:
        super().__init__(dim, heads)
        if areas < 1:
            raise ValueError(f"area: areas must be >= 1, got {areas}")
        self.areas = areas
        self.conv = depthwise(heads * self.head_dim, kernel, place.axes, bias=True)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        near = along(self.conv, zeroed(value, context.mask).flatten(2), context).unflatten(2, value.shape[2:])
        if context.mask is None and context.notes is None and not compiling() and context.grid[0] % self.areas == 0:
            q, k, v = (x.unflatten(1, (self.areas, -1)).flatten(0, 1) for x in (query, key, value))
            return attend(q, k, v, None).unflatten(0, (-1, self.areas)).flatten(1, 2) + near
        to, back, inside = self.strips(context, query)
        if context.notes is not None:
            strip = back // (to.shape[1] // self.areas)
            note_weights(self, context, query, key, together(strip, context.mask))
        each = torch.arange(query.shape[0], device=query.device)[:, None]
        q, k, v = (x[each, to].unflatten(1, (self.areas, -1)).flatten(0, 1) for x in (query, key, value))
        allowed = inside if context.mask is None else inside & context.mask[each, to]
        y = attend(q, k, v, allowed.expand(query.shape[0], -1).unflatten(1, (self.areas, -1)).flatten(0, 1))
        return y.unflatten(0, (-1, self.areas)).flatten(1, 2)[each, back] + near

    def strips(self, context: Context, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of which token each place of a strip is [1 or B, areas * places], at which place each token is [1 or B, N],
        and which places belong to the strip; the others repeat a token. All strips have the places of the tallest."""
        rows, width = context.grid[0], 1 if len(context.grid) == 1 else context.grid[1]
        every, columns = torch.arange(rows, device=like.device), torch.arange(width, device=like.device)
        real = every.new_full((1,), rows) if context.mask is None else extent(context)[0].clamp(min=1)
        numbers = torch.arange(self.areas + 1, device=like.device)
        edges = (numbers * real[:, None] + self.areas - 1) // self.areas  # the first row of each strip
        tall = (rows - 1) // self.areas + (2 if exporting() else 1)  # a program for more than 1 would refuse 1
        row = edges[:, :-1, None] + torch.arange(tall, device=like.device)
        inside = row < edges[:, 1:, None]
        strip = (every * self.areas // real[:, None]).clamp(max=self.areas - 1)
        place = strip * tall + (every - edges.gather(1, strip)).clamp(max=tall - 1)
        to, back = (x[..., None] * width + columns for x in (row.clamp(max=rows - 1), place))
        return to.flatten(1), back.flatten(1), inside[..., None].expand(-1, -1, -1, width).flatten(1)
