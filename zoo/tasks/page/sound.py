"""Log-mel features as part of a graph: from samples to a model's input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.inputs.audio.features import AudioPreprocess, hann_window, mel_filters


class Sound(nn.Module):
    """What an `AudioPreprocess` computes, on a clip of at least two hops, in operations that ONNX has.

    The Fourier transform of the windowed frames is a convolution whose kernels are cosines and sines.
    """

    kernels: Tensor
    filters: Tensor

    def __init__(self, preprocess: AudioPreprocess):
        super().__init__()
        self.preprocess, cpu = preprocess, torch.device("cpu")
        bins, points = (torch.arange(each, dtype=torch.float64) for each in (preprocess.fft // 2 + 1, preprocess.fft))
        turns = bins[:, None] * points % preprocess.fft * (2 * math.pi / preprocess.fft)
        before = (preprocess.fft - preprocess.window) // 2
        after = preprocess.fft - preprocess.window - before
        window = F.pad(hann_window(preprocess, cpu).double(), (before, after))
        self.register_buffer("kernels", (torch.cat([turns.cos(), turns.sin()]) * window).float()[:, None])
        self.register_buffer("filters", mel_filters(preprocess, cpu))

    def forward(self, samples: Tensor) -> Tensor:
        """float32 [S] at the rate of the preprocess to float32 [1, T, mels]."""
        made = self.preprocess
        if made.peak:
            samples = samples / (samples.abs().max() + 1e-9)
        samples = torch.cat([samples[:1], samples[1:] - made.preemphasis * samples[:-1]])
        parts = F.conv1d(samples[None, None], self.kernels, stride=made.hop, padding=made.fft // 2)
        real, imaginary = parts[:, :, : samples.shape[0] // made.hop].square().chunk(2, 1)
        mels = (real + imaginary).transpose(1, 2) @ self.filters
        natural = made.log == "ln"
        features = (mels + made.floor).log() if natural else 10 * mels.clamp(min=made.floor).log10()
        if made.top_db is not None:
            features = features.maximum(features.amax((1, 2), keepdim=True) - made.top_db)
        padding = torch.zeros_like(features[..., :1], dtype=torch.bool)
        return made.normalized(features, length_of(features), padding)


def length_of(features: Tensor) -> Tensor:
    """The number of frames of [1, T, mels] as int64 [1], computed in the graph so that clips of any length work."""
    return torch.ones_like(features[..., 0], dtype=torch.int64).sum(1)
