"""Sounds to make features of."""

import math

import torch
from torch import Tensor


def tone(seconds: float, pitch: float = 440.0, rate: int = 16000) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * pitch * torch.arange(round(seconds * rate)) / rate)


def speechlike(samples: int, seed: int = 0) -> Tensor:
    """Tones that come and go over noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 16000
    waves = [
        torch.sin(2 * math.pi * (200 + 700 * k) * time) * torch.sin(2 * math.pi * (1 + k) * time) for k in range(5)
    ]
    return 0.1 * torch.stack(waves).sum(0) + 0.01 * torch.randn(samples, generator=generator)
