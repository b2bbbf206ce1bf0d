"""A head of blocks of its own, whose condition is the tokens of the blocks before it (DDT, Wang et al. 2025,
arXiv:2504.05741; DiT-DH, Zheng et al. 2025, arXiv:2510.11690)."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import Context
from zoo.models.base import make_block, make_position
from zoo.models.diffusion import last_modulation
from zoo.modulations import MODULATIONS
from zoo.norms import NORMS, Norm
from zoo.spec import make, parse


class DecoupledHead(nn.Module):
    """Sees the noisy image again, in patches of its own. Each token of its blocks is modulated by the encoder's token
    at the same place, plus the time.

    Args:
        config: a DiTConfig with `head_depth`.
        stem: makes the patch embedding for a width.
        rates: of stochastic depth, one for each block.
    """

    def __init__(self, config: Any, stem: Callable[[int], nn.Module], rates: list[float]) -> None:
        super().__init__()
        first = config.block(1)
        dim = first.dim
        self.stem = stem(dim)
        self.position = make_position(config, 1)
        self.project = nn.Linear(config.dim, dim) if dim != config.dim else None
        self.condition = MODULATIONS[parse(first.modulation)[0]].condition(dim, len(config.layout))
        self.blocks = nn.ModuleList(make_block(config, 1, index, rate) for index, rate in enumerate(rates))
        self.norm: Norm = make(NORMS, first.norm, dim, first.place, field="norm")
        self.modulation = last_modulation(config, first.modulation, dim, first.place)

    def placed(
        self, x: Tensor, mask: Tensor | None, tokens: Tensor, time: Tensor, context: Context
    ) -> tuple[Tensor, Context]:
        """The head's tokens before its first block, and their Context, from the image, the encoder's tokens [B, N, dim]
        with theirs, and the vectors of the time [B, 1, dim]."""
        own, _, _ = self.stem(x, mask)
        cond = tokens + time
        if self.project is not None:
            cond = self.project(F.silu(cond))
        context = self.position.place(context._replace(cond=self.condition(cond)))
        return self.position(own, context), context
