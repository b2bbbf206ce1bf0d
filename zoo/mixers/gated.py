"""Mixers that carry a state from token to token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import delta_attention
from zoo.layer import ANYWHERE, Context, Place
from zoo.mixers.projected import Projected
from zoo.tensors import linear, silu, single, zeroed


class DeltaNet(Projected):
    """A memory of keys and values that each token corrects, S = S + b_i k_i (v_i - k_i S), and reads by its query,
    q_i S (DeltaNet, Schlag et al. 2021, arXiv:2102.11174; in parallel by chunks, Yang et al. 2024, arXiv:2406.06484).

    Queries and keys are unit vectors of silu(W x), b_i = sigmoid(w . x_i) for each head. Tokens come line by line on an
    image, after the prefix tokens. directions=2 adds the result of a second memory, which reads the tokens from the
    last to the first; directions=1 has the first alone and needs a ViT with causal=True, where prefix tokens come last.
    An exported program takes the number of tokens that it was exported with, and a compiled model is compiled again for
    each number of chunks of 32 tokens. The paper's short convolutions and its norm of each head are left out;
    placements may put a norm there.

    On one CPU core it takes half as long as softmax attention for 3,136 tokens and twice as long for 784, as N / 32
    steps depend on each other.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, directions: int = 2) -> None:
        super().__init__(dim, heads)
        if directions not in (1, 2):
            raise ValueError(f"deltanet: directions must be 1 or 2, got {directions}")
        self.directions = directions
        self.rate = linear(dim, heads)

    @classmethod
    def reads_of(cls, *, directions: int = 2, **options: Any) -> frozenset[str]:
        return cls.reads | {"order"} if directions == 1 else cls.reads

    @classmethod
    def causal_of(cls, *, directions: int = 2, **options: Any) -> bool:
        return directions == 1

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x, context)
        rate = self.rate(x).sigmoid()[..., None]
        return query, key, torch.cat([value, rate], -1)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        value, rate = value.split((self.value_dim, 1), -1)
        query, key = (F.normalize(single(silu(part)), dim=-1) for part in (query, key))
        key, value, rate = (zeroed(part, context.mask) for part in (key, value, rate))
        parts = query, key, single(value), single(rate)
        if self.directions == 2:
            mixed, batch = delta_attention(*(torch.cat([part, part.flip(1)]) for part in parts)), value.shape[0]
            mixed = mixed[:batch] + mixed[batch:].flip(1)
        else:
            prefix = context.prefix
            mixed = delta_attention(*(part.roll(-prefix, 1) if prefix else part for part in parts))
            mixed = mixed.roll(prefix, 1) if prefix else mixed
        return mixed.to(value.dtype)

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv, self.rate]
