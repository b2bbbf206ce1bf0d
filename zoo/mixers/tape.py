"""Softmax attention whose positions change from block to block."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Place
from zoo.mixers.scored import Scored
from zoo.tensors import linear


class Tape(Scored):
    """softmax(sum_p q_ip^T e_ip e_jp^T k_jp / sqrt(d)) v, p a pair of channels, with 2 x 2 states e of positions that
    each block changes for the next one (TAPE, Zhu et al. 2025, arXiv:2501.00712).

    The first block starts with the rotations of rotary positions, or identities without them, so a new model is
    softmax attention with those positions. A block leaves e_i + W2 (g_i * W1 sum_j w_ij e_j): W1 and W2 mix heads,
    pairs and the rows of states, with `rank` hidden units, and g_i = W z_i + b depends on what the token has collected.
    Columns are not mixed, so an orthogonal matrix that turns all states changes no score. W2 starts at zero. The last
    block with this mixer changes nothing. A stream is refused.
    """

    reads = Scored.reads - {"visible"}

    @classmethod
    def head_width_of(cls, dim: int, heads: int, **options: Any) -> int:
        width = super().head_width_of(dim, heads, **options)
        if width % 2:
            raise ValueError(f"the width of a head, dim {dim} / heads {heads}, must be even, got {width}")
        return width

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, rank: int = 16) -> None:
        super().__init__(dim, heads)
        self.first = place.order == 0
        self.down = self.up = self.gate = None
        if not place.last:
            self.down, self.up = linear(dim, rank, bias=False), linear(rank, dim, bias=False)
            self.gate = linear(dim, rank)
            nn.init.zeros_(self.up.weight)

    def start(self, query: Tensor, context: Context) -> Tensor:
        """The states [1 or B, N, 1, d / 2, 2, 2] of the first block."""
        if context.rotary is None:
            kind = torch.promote_types(query.dtype, torch.float32)
            return torch.eye(2, dtype=kind, device=query.device).expand(1, query.shape[1], 1, self.head_dim // 2, 2, 2)
        cosine, sine = context.rotary[..., None, :]
        rows = torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)
        states = torch.stack(rows, -2)
        return states if states.ndim == 6 else states[None]

    def states(self, query: Tensor, context: Context) -> Tensor:
        """The states [B, N, H, d / 2, 2, 2] that the block before left, or those of the first block."""
        if self.first:
            return self.start(query, context).expand(len(query), -1, self.heads, -1, -1, -1)
        if context.carry is None or (found := context.carry.values.get("tape")) is None:
            raise ValueError("tape: no positions to read; run the blocks before this one first, by Model.run")
        return found

    @staticmethod
    def turned_by(states: Tensor, x: Tensor) -> Tensor:
        """e^T x for the pairs (first half, second half) of x [B, N, H, d]."""
        first, second = (half[..., None] for half in x.chunk(2, -1))
        return (states[..., 0, :] * first + states[..., 1, :] * second).transpose(-1, -2).flatten(-2).to(x.dtype)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        states = self.states(query, context)
        query, key = self.turned_by(states, query), self.turned_by(states, key)
        context = context._replace(rotary=None)
        if self.down is None or self.up is None or self.gate is None:
            return super().mix(query, key, value, context)
        value = torch.cat([value, states.flatten(3).to(value.dtype)], -1)
        y, gathered = super().mix(query, key, value, context).split((self.value_dim, 2 * self.head_dim), -1)
        gathered = gathered.unflatten(-1, (-1, 2, 2)).movedim(-1, 2).flatten(3)  # [B, N, column, H * d]
        change = self.up(self.gate(y.flatten(2))[:, :, None] * self.down(gathered))
        change = change.unflatten(-1, (self.heads, -1, 2)).movedim(2, -1)
        if context.carry is not None:
            context.carry.left["tape"] = states + change
        return y
