import math
import time

import pytest
import torch
from torchaudio.functional import resample as reference
from torchaudio.transforms import Resample

from zoo.inputs.audio import Resampler, resample

RATE = 16000


@pytest.mark.parametrize("rate", [8000, 16000, 11025, 44100, 48000, 96000])
def test_pieces_make_the_whole(rate: int):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 100, 5000, 20_000):
        wave = torch.randn(size, generator=generator)
        made = Resampler(rate, RATE)
        parts = [made.push(piece) for piece in wave.split(max(1, size // 7 - 3))] + [made.finish()]
        wanted = Resample(rate, RATE)(wave)
        assert torch.cat(parts).shape == wanted.shape
        assert torch.allclose(torch.cat(parts), wanted, atol=1e-5)
        assert torch.allclose(resample(wave, rate, RATE), reference(wave, rate, RATE), atol=1e-3)


@pytest.mark.parametrize("rate", [1000, 1009, 11127, 15994, 22051, 44101, 192001, 767999])
def test_odd_rates_keep_pitch_and_length_and_cost_little(rate: int):
    wave = torch.sin(2 * math.pi * 110 * torch.arange(2 * rate) / rate)
    start = time.process_time()
    found = resample(wave, rate, RATE)
    assert time.process_time() - start < 3
    assert abs(len(found) / RATE - 2) < 1e-3
    peak = torch.fft.rfft(found * torch.hann_window(len(found)), n=16 * RATE).abs().argmax()
    assert abs(int(peak) / 16 - 110) < 0.3
    assert (found[2000:-2000].abs().max() - 1).abs() < 0.01
    assert Resampler(rate, RATE).resample.kernel.numel() < 3e6


@pytest.mark.parametrize("rates", [(999, 16000), (16000, 0), (768_001, 16000), (16000, -1)])
def test_rates_that_are_none_of_sound(rates: tuple[int, int]):
    with pytest.raises(ValueError, match="sample rate must be 1000 to 768000 Hz, got"):
        resample(torch.zeros(10), *rates)
