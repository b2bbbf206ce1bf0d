"""Attention whose scores become weights by another way than softmax."""

from torch import Tensor

from zoo.layer import ANYWHERE, Place
from zoo.mixers.scored import Pairs, Scored


class Power(Scored):
    """s^power / sum_j s_j^power in place of softmax, s = q k^T / sqrt(d), for an even power (Power-Softmax, Zimerman et
    al. 2024, arXiv:2410.09457). It has no exponential, so that an encrypted model can compute it."""

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, power: int = 2) -> None:
        super().__init__(dim, heads)
        if power % 2:
            raise ValueError(f"power must be even, got {power}")
        self.power = power

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        scores = pairs.masked(scores, 0.0)
        largest = scores.detach().abs().amax(-1, keepdim=True).clamp(min=1e-6)
        powers = (scores / largest) ** self.power
        return powers / powers.sum(-1, keepdim=True).clamp(min=1e-6)
