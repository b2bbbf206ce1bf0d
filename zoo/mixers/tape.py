"""Softmax attention whose positions change from block to block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Place
from zoo.mixers.scored import Scored
from zoo.tensors import linear


class Tape(Scored):
    """softmax(sum_p q_ip^T e_ip e_jp^T k_jp / sqrt(d)) v, p a pair of channels, with 2 x 2 states e of positions that
    each block changes for the next one (TAPE, Zhu et al. 2025, arXiv:2501.00712).

    The first block starts with the rotations of rotary positions, or identities without them, so a new model is
    softmax attention with those positions. A block changes states in two steps: e_i + s sum_j w_ij e_j with its weights
    w and a number s for each head, then e_i + W2 (silu(W z_i) * W1 e_i). W1 and W2 mix heads, with `rank` hidden units,
    and are the same for all pairs. s and W1 start at zero. The paper computes W z_i from the result of the feed-forward
    layer; here z_i is what the token has collected in all heads. An orthogonal matrix that turns all states from the
    right changes no score. The last block with this mixer changes nothing. Streaming is not supported.
    """

    reads = Scored.reads - {"visible"}
    paired = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, rank: int = 64) -> None:
        super().__init__(dim, heads)
        self.first = place.order == 0
        self.share = None
        if not place.last:
            self.share = nn.Parameter(torch.zeros(heads))
            self.gate = linear(dim, rank, bias=False)
            self.down, self.up = linear(heads, rank, bias=False), linear(rank, heads, bias=False)
            nn.init.zeros_(self.down.weight)

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
        """The states [B, N, H, d / 2, 2, 2] that the last layer of this kind left, or those of the first block."""
        carry = context.carry
        found = None if carry is None else carry.left.get("tape", carry.values.get("tape"))
        if found is not None:
            return found
        if not self.first:
            raise ValueError("tape: no positions to read; run the blocks before this one first, by Model.run")
        return self.start(query, context).expand(query.shape[0], -1, self.heads, -1, -1, -1)

    @staticmethod
    def turned_by(states: Tensor, x: Tensor) -> Tensor:
        """e^T x for the pairs (first half, second half) of x [B, N, H, d]."""
        first, second = (half[..., None] for half in x.chunk(2, -1))
        return (states[..., 0, :] * first + states[..., 1, :] * second).transpose(-1, -2).flatten(-2).to(x.dtype)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        states = self.states(query, context)
        query, key = self.turned_by(states, query), self.turned_by(states, key)
        context = context._replace(rotary=None)
        if self.share is None:
            return super().mix(query, key, value, context)
        value = torch.cat([value, states.flatten(3).to(value.dtype)], -1)
        y, gathered = super().mix(query, key, value, context).split((self.value_dim, 2 * self.head_dim), -1)
        if context.carry is not None:
            context.carry.left["tape"] = self.changed(states, gathered, y.flatten(2))
        return y

    def changed(self, states: Tensor, gathered: Tensor, collected: Tensor) -> Tensor:
        """The states for the next block, from sum_j w_ij e_j [B, N, H, 2 d] and what tokens collected [B, N, H d]."""
        assert self.share is not None
        states = states + (self.share[:, None] * gathered).unflatten(-1, states.shape[3:])
        gate = F.silu(self.gate(collected))[:, :, None]
        mixing = (gate * self.up.weight) @ self.down.weight  # of heads, for each token: [B, N, H, H]
        return states + (mixing @ states.flatten(3)).unflatten(-1, states.shape[3:])
