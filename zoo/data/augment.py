"""Augmentation of waveforms and features: speed, noise, vocal tract length, filters and masked bands."""

import math
from typing import Any

import torch
from torch import Tensor

from zoo.tensors import mask_of

KNOTS = 5  # gains that `filter_bands` draws for each utterance


def spec_augment(
    features: Tensor,
    lengths: Tensor,
    frequency_masks: int,
    frequency_width: int,
    time_masks: int,
    time_share: float,
) -> Tensor:
    """Sets random bands of mel bins and of frames to 0, different for each sample.

    SpecAugment (Park et al. 2019, arXiv:1904.08779) without its time warping. Widths and places are uniform.

    Args:
        features: [B, T, mels].
        lengths: [B], valid frames of each sample; later frames are unchanged.
        frequency_masks: bands of mel bins per sample.
        frequency_width: most mel bins in a band.
        time_masks: bands of frames per sample.
        time_share: most frames in a band, as a share of the sample's length.

    Returns:
        A new tensor [B, T, mels].

    Raises:
        ValueError: a number is below 0, or `time_share` above 1.
    """
    if min(frequency_masks, frequency_width, time_masks) < 0 or not 0 <= time_share <= 1:
        found = f"{frequency_masks}, {frequency_width}, {time_masks} and {time_share}"
        raise ValueError(f"masks and widths must be >= 0 and time_share from 0 to 1, got {found}")
    batch, time, mels = features.shape
    bins = torch.full_like(lengths, mels)
    width = bins.clamp(max=frequency_width)
    low = _bands(bins, width, frequency_masks, mels)
    short = _bands(lengths, (lengths * time_share).long(), time_masks, time)
    real = mask_of(lengths, time)
    return features.masked_fill((low[:, None, :] | short[:, :, None]) & real[..., None], 0)


def _bands(extent: Tensor, widest: Tensor, number: int, size: int) -> Tensor:
    """[B, size], True in `number` random bands of 0..widest places, each inside the first `extent` of its row."""
    draws = torch.rand(2, len(extent), number, 1, device=extent.device)
    width = (draws[0] * (widest[:, None, None] + 1)).long()
    start = (draws[1] * (extent[:, None, None] - width + 1)).long()
    place = torch.arange(size, device=extent.device)
    return ((place >= start) & (place < start + width)).any(1)


def warp_frequencies(features: Tensor, centres: Tensor, most: float, bend: float = 4800.0) -> Tensor:
    """Stretches each utterance's frequencies, as if the speaker's vocal tract were of another length.

    Vocal tract length perturbation (Jaitly and Hinton 2013): frequency f takes what was at a * f, with a uniform in
    1 - most..1 + most, up to `bend`; above, a line leads to the last band, which stays. Between bands it is linear.

    Args:
        features: [B, T, mels], zero beyond each length.
        centres: [mels], increasing: the centre of each band in Hz.
        most: largest change, from 0 to below 1.
        bend: where the line begins, in Hz.

    Returns:
        A new tensor [B, T, mels].

    Raises:
        ValueError: `most` is out of range.
    """
    if not 0 <= most < 1:
        raise ValueError(f"the warp of frequencies must be >= 0 and < 1, got {most!r}")
    centres = centres.to(features.device, torch.float32)
    factor = 1 + most * (2 * torch.rand(len(features), 1, device=features.device) - 1)
    top = centres[-1]
    high = factor.clamp(max=1) * min(bend, float(top))
    beyond = top - (top - high) * (top - centres) / (top - high / factor).clamp(min=1e-6)
    source = torch.where(centres <= high / factor, factor * centres, beyond).clamp(centres[0], top)
    left = (torch.searchsorted(centres, source, right=True) - 1).clamp(0, len(centres) - 2)
    share = ((source - centres[left]) / (centres[left + 1] - centres[left])).to(features.dtype)
    below, above = (features.gather(2, index[:, None].expand_as(features)) for index in (left, left + 1))
    return torch.lerp(below, above, share[:, None])


def filter_bands(features: Tensor, lengths: Tensor, most: float) -> Tensor:
    """Adds a random curve over the bands to each utterance, as if it had been recorded by another microphone.

    FilterAugment (Nam et al. 2022, arXiv:2110.03282) in its linear form: a gain uniform in -most..most at the lowest
    band, the highest and between them at random places, and straight lines from each to the next.

    Args:
        features: [B, T, mels], on a logarithmic scale; normalisation of each band would have removed such a curve.
        lengths: [B], valid frames of each sample; later frames are unchanged.
        most: largest gain, in units of the features.

    Returns:
        A new tensor [B, T, mels].

    Raises:
        ValueError: `most` is below 0 or infinite.
    """
    if not 0 <= most < math.inf:
        raise ValueError(f"the gain of a band must be a number >= 0, got {most!r}")
    batch, time, mels = features.shape
    inner = 1 + (mels - 3) * torch.rand(batch, KNOTS - 2, device=features.device).sort(1).values
    ends = inner.new_tensor([0.0, mels - 1.0]).expand(batch, 2)
    places = torch.cat([ends[:, :1], inner, ends[:, 1:]], 1)
    gains = most * (2 * torch.rand(batch, KNOTS, device=features.device) - 1)
    bands = torch.arange(mels, device=features.device, dtype=places.dtype).expand(batch, mels).contiguous()
    right = torch.searchsorted(places.contiguous(), bands, right=True).clamp(1, KNOTS - 1)
    (below, above), (low, high) = ((each.gather(1, right - 1), each.gather(1, right)) for each in (places, gains))
    curve = torch.lerp(low, high, (bands - below) / (above - below).clamp(min=1e-6))
    return features + (curve[:, None] * mask_of(lengths, time)[..., None]).to(features.dtype)


def add_noise(waveform: Tensor, ratio: float, rate: int, lowest: float = 60.0) -> Tensor:
    """Adds noise with a spectrum between white and brown, at random.

    Args:
        waveform: [S]; where it is silent, it stays so.
        ratio: power of the waveform over that of the noise, in dB.
        rate: samples per second.
        lowest: in Hz; below it the noise is white, so that its power is in the audible range.

    Returns:
        A new tensor [S].
    """
    from scipy.fft import next_fast_len
    from torchaudio.functional import add_noise as mix

    length: Any = next_fast_len(len(waveform), real=True)
    spectrum = torch.fft.rfft(torch.randn(length))
    hertz = torch.arange(float(len(spectrum))) * rate / length
    noise = torch.fft.irfft(spectrum * hertz.clamp(min=lowest).pow(-float(torch.rand(()))), length)[: len(waveform)]
    return mix(waveform, noise, torch.tensor(ratio)) if waveform.any() else waveform


def change_speed(waveform: Tensor, factor: float) -> Tensor:
    """The waveform [S] played `factor` times as fast, pitch and all: [about S / factor] (Ko et al. 2015).

    Raises:
        ValueError: the factor is not between 0.5 and 2, in steps of 0.01.
    """
    from torchaudio.functional import resample

    check_speed(factor)
    return resample(waveform, round(100 * factor), 100)


def check_speed(factor: float) -> None:
    """Raises ValueError if `change_speed` does not accept the factor."""
    # Resampling by a fraction of two large numbers would need a kernel for each phase.
    if not 0.5 <= factor <= 2 or abs(100 * factor - round(100 * factor)) > 1e-6:
        raise ValueError(f"a speed must be from 0.5 to 2 in steps of 0.01, got {factor!r}")
