"""Stems of conditions: a time from 0 to 1, and a class, as vectors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.spec import make
from zoo.tensors import compiling, like


class Waves(nn.Module):
    """Cosines, then sines of place / period^(k / (width / 2 - shift)) for k = 0 .. width / 2 - 1 (DiT, Peebles and Xie
    2023, arXiv:2212.09748).

    The place is scale * time: DiT counts 0 to 999, which is count=True, one less, with times k / 1000; SiT and JiT take
    the time itself, scale=1. reverse=True replaces the time by 1 - time, for models whose time ends with the data.
    shift=1 is that of diffusers; width is the number of cosines and sines.
    """

    def __init__(
        self,
        *,
        scale: float = 1000.0,
        count: bool = False,
        period: float = 10000.0,
        shift: float = 0.0,
        width: int = 256,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        if width % 2 or shift >= width / 2 or period <= 0:
            raise ValueError(f"width must be even, shift < width / 2 and period > 0, got {width}, {shift} and {period}")
        self.scale, self.first, self.period = scale, -1.0 if count else 0.0, period
        self.shift, self.width, self.reverse = shift, width, reverse

    def forward(self, time: Tensor) -> Tensor:
        """[B] -> fp32 [B, width]."""
        time = time.float()
        half = self.width // 2
        rates = torch.arange(half, device=time.device, dtype=torch.float32) / (half - self.shift)
        places = self.scale * (1 - time if self.reverse else time) + self.first
        angles = places[:, None] * (-math.log(self.period) * rates).exp()
        return torch.cat([angles.cos(), angles.sin()], -1)


TIMES: dict[str, type[nn.Module]] = {"sincos": Waves}
"""Each row is constructed as row(*, options) and has a `width`."""


class TimeEmbedding(nn.Module):
    """W2 silu(W1 waves(time)) for times [B]: [B, dim]."""

    def __init__(self, dim: int, time: str) -> None:
        super().__init__()
        self.waves = make(TIMES, time, field="time")
        self.expand, self.out = nn.Linear(self.waves.width, dim), nn.Linear(dim, dim)
        for layer in (self.expand, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, time: Tensor) -> Tensor:
        return self.out(F.silu(self.expand(self.waves(time).to(like(self.expand).dtype))))


class LabelEmbedding(nn.Embedding):
    """A vector for each class and, last, one for no class: labels [B] -> [B, dim]; ValueError for other labels."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__(classes + 1, dim)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        null = self.num_embeddings - 1
        if not compiling() and labels.device.type == "cpu" and bool(((labels < 0) | (labels > null)).any()):
            raise ValueError(f"labels must be from 0 to {null}, where {null} is no class, got {labels.tolist()}")
        return super().forward(labels)
