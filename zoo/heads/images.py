"""From the tokens of the last stage to logits; with classes = 0, to the pooled tokens [B, dim]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import grid_mean
from zoo.ffns import FFNS, hidden_width
from zoo.fusion import fold_in, fold_norm, fold_site
from zoo.layer import ANYWHERE, Context, Fold, Memory, Place
from zoo.mixers.attention import Cross
from zoo.norms import NORMS, BatchNorm, Norm
from zoo.spec import make
from zoo.tensors import gelu, linear

_ONE = Context(grid=(1,))


class AttentionPool(nn.Module):
    """A learned query that attends to the tokens x [B, N, dim] of the grid, without the prefix; then a feed-forward
    layer is added, with a norm before it (Zhai et al. 2022, arXiv:2106.04560). It gives [B, 1, dim]."""

    def __init__(self, dim: int, heads: int, norm: str, ffn: str, place: Place = ANYWHERE) -> None:
        super().__init__()
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=dim**-0.5))
        self.attention = Cross(dim, heads, place)
        self.norm: Norm | None = make(NORMS, norm, dim, place)
        self.ffn: Any = make(FFNS, ffn, dim, place)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        memory = Memory(x[:, context.prefix :], context.grid_mask)
        y = self.attention(self.query.to(x.dtype).expand(x.shape[0], -1, -1), _ONE._replace(memory=memory))
        return y + self.ffn(y if self.norm is None else self.norm(y, _ONE), _ONE)

    def fold_in(self, scale: Tensor, shift: Tensor) -> None:
        """Makes it of x what it was of scale * x + shift."""
        fold_in(self.attention.keys, scale, shift)
        fold_in(self.attention.values, scale, shift)

    def fold(self) -> list[Fold]:
        return fold_norm(self, "norm", self.ffn.expand, "linear behind it")


class LinearHead(nn.Module):
    """The mean of the normalized tokens, then a linear map; mean_first=True takes the mean before the norm."""

    def __init__(self, dim: int, classes: int, norm: str, place: Place = ANYWHERE, *, mean_first: bool = False) -> None:
        super().__init__()
        self.norm: Norm | None = make(NORMS, norm, dim, place)
        self.out = linear(dim, classes) if classes else None
        self.mean_first = mean_first

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.mean_first:
            x = grid_mean(x, context)[:, None]
            pooled = x[:, 0] if self.norm is None else self.norm(x, _ONE)[:, 0]
        else:
            pooled = grid_mean(x if self.norm is None else self.norm(x, context), context)
        return pooled if self.out is None else self.out(pooled)

    def fold(self) -> list[Fold]:
        return fold_norm(self, "norm", self.out, "linear behind it")


class MLPHead(nn.Module):
    """Mean, norm, linear, squared ReLU, norm and linear, with a hidden width of ratio * dim (MetaFormer baselines, Yu
    et al. 2022, arXiv:2210.13452). With classes = 0 only the mean and the norm."""

    def __init__(self, dim: int, classes: int, norm: str, place: Place = ANYWHERE, *, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = hidden_width(dim, ratio)
        self.norm: Norm | None = make(NORMS, norm, dim, place)
        self.expand = linear(dim, hidden) if classes else None
        self.inner: Norm | None = make(NORMS, norm, hidden, place) if classes else None
        self.out = linear(hidden, classes) if classes else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = grid_mean(x, context)[:, None]
        x = x if self.norm is None else self.norm(x, _ONE)
        if self.expand is None or self.out is None:
            return x[:, 0]
        x = F.relu(self.expand(x)).square()
        return self.out((x if self.inner is None else self.inner(x, _ONE))[:, 0])

    def fold(self) -> list[Fold]:
        front = fold_norm(self, "norm", self.expand, "linear behind it")
        return front + fold_norm(self, "inner", self.out, "linear behind it")


class ConvHead(nn.Module):
    """Norm, linear, batch normalization and GELU of each token, then the mean and a linear map; norm_first=False omits
    the first norm (InternImage, Wang et al. 2023, arXiv:2211.05778). The hidden width is ratio * dim. With classes = 0
    only the norm, if there is one, and the mean."""

    def __init__(
        self, dim: int, classes: int, norm: str, place: Place = ANYWHERE, *, ratio: float = 1.5, norm_first: bool = True
    ) -> None:
        super().__init__()
        hidden = hidden_width(dim, ratio)
        self.norm: Norm | None = make(NORMS, norm, dim, place) if norm_first else None
        self.expand = linear(dim, hidden, bias=False) if classes else None
        self.inner: Norm | None = BatchNorm(hidden, place) if classes else None
        self.out = linear(hidden, classes) if classes else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x if self.norm is None else self.norm(x, context)
        if self.expand is None or self.out is None:
            return grid_mean(x, context)
        x = self.expand(x)
        return self.out(grid_mean(gelu(x if self.inner is None else self.inner(x, context)), context))

    def fold(self) -> list[Fold]:
        # The norm after the linear comes first: the one before it then sees the new weights.
        behind = [] if self.expand is None else fold_site(self, "inner", self.expand)
        return behind + fold_norm(self, "norm", self.expand, "linear behind it")
