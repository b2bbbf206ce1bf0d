"""Augmentation of speech and of its features, and cutting it at silence."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sounds import speechlike, tone
from zoo.data.augment import add_noise, change_speed, filter_bands, spec_augment, warp_frequencies
from zoo.inputs.audio import (
    RECIPES,
    UnreadableAudio,
    split_at_silence,
)
from zoo.tensors import mask_of


def test_warped_frequencies():
    centres = RECIPES["squeezeformer"].centres
    features = centres.float().expand(400, 3, 80)  # each band holds its own frequency
    assert torch.equal(warp_frequencies(features, centres, 0.0), features)
    warped = warp_frequencies(features, centres, 0.2)
    assert (warped.diff(dim=-1) > 0).all() and torch.equal(warped[:, 0], warped[:, 2])
    torch.testing.assert_close(warped[..., -1], features[..., -1])  # the last band stays
    low = (centres > 200) & (centres < 4800 / 1.2)
    ratios = (warped / features)[:, 0, low]
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), atol=1e-4, rtol=0)  # one factor per utterance
    assert 0.8 <= ratios.min() < 0.82 and 1.18 < ratios.max() <= 1.2001

    # A tone that is warped is another tone.
    plain = RECIPES["streaming"]
    torch.manual_seed(3)
    moved = warp_frequencies(plain(tone(0.5, 1000.0))[None], plain.centres, 0.2)[0, 10:40].mean(0)
    torch.manual_seed(3)
    factor = float(warp_frequencies(features[:1], centres, 0.2)[0, 0, 20] / features[0, 0, 20])
    assert abs(float(plain.centres[moved.argmax()]) * factor / 1000 - 1) < 0.03 < abs(factor - 1)

    padded = features.clone()
    padded[1, 2:] = 0
    assert (warp_frequencies(padded, centres, 0.2)[1, 2:] == 0).all()
    assert warp_frequencies(features[:0], centres, 0.2).shape == (0, 3, 80)
    for most in (-0.1, 1.0):
        with pytest.raises(ValueError, match="must be >= 0 and < 1"):
            warp_frequencies(features, centres, most)


def test_filtered_bands():
    lengths = torch.tensor([5, 3, 0]).repeat(100)
    features = torch.randn(300, 5, 64)
    curves = filter_bands(features, lengths, 0.5) - features
    real = mask_of(lengths, 5)
    assert (curves[~real] == 0).all()
    torch.testing.assert_close(curves[::3], curves[::3, :1].expand(-1, 5, -1), atol=1e-6, rtol=0)  # the same in time
    found = curves[::3, 0]
    assert 0.45 < found.abs().max() <= 0.5 + 1e-6 and found.mean().abs() < 0.05
    assert found.std(0).min() > 0.15 and torch.corrcoef(found.T)[0, -1].abs() < 0.4  # the two ends know not each other
    bends = (found.diff(n=2, dim=1).abs() > 1e-4).sum(1)  # each of 3 inner knots bends the line at up to 2 bands
    assert bends.max() == 6 and bends.min() >= 2
    torch.testing.assert_close(filter_bands(features, lengths, 0.0), features)
    assert filter_bands(features[:0], lengths[:0], 0.5).shape == (0, 5, 64)
    for most in (-0.1, math.inf):
        with pytest.raises(ValueError, match=f"a number >= 0, got {most}"):
            filter_bands(features, lengths, most)


@pytest.mark.parametrize("seconds", [1.0, 10.0])
def test_noise(seconds: float):
    wave = tone(seconds, 440.0)
    hertz = torch.fft.rfftfreq(len(wave), 1 / 16000)
    shares = []
    for ratio in (40.0, 10.0, 0.0):
        for _ in range(20):
            noise = add_noise(wave, ratio, 16000) - wave
            assert abs(10 * float(torch.log10(wave.square().mean() / noise.square().mean())) - ratio) < 0.01
            power = torch.fft.rfft(noise).abs().square()
            assert power[hertz >= 60].sum() > 0.4 * power.sum()  # brown noise has half of it there
            shares.append(float(power[hertz < 1000].sum() / power.sum()))
    assert 0.1 < min(shares) < 0.2 and max(shares) > 0.9  # from white, which has 1/8 there, to brown
    assert not add_noise(torch.zeros(100), 10.0, 16000).any() and len(add_noise(wave[:1], 10.0, 16000)) == 1


def test_spec_augment_bounds():
    lengths = torch.tensor([100, 40, 7, 0, 1])
    features = torch.ones(5, 100, 80)
    seen_time, seen_bins = set(), set()
    for _ in range(200):
        time_only = spec_augment(features, lengths, 0, 0, 1, 0.25)
        for row, length in enumerate(lengths.tolist()):
            gone = (time_only[row] == 0).all(1).nonzero().flatten()
            assert ((time_only[row] == 0).any(1) == (time_only[row] == 0).all(1)).all()
            assert len(gone) <= int(0.25 * length) and (gone < length).all()
            assert len(gone) < 2 or gone[-1] - gone[0] == len(gone) - 1
            seen_time |= {len(gone)} if row == 0 else set()
        bins_only = spec_augment(features, lengths, 1, 10, 0, 0.0)
        assert (bins_only[3] == 1).all() and (bins_only[1, 40:] == 1).all()
        gone = (bins_only[0] == 0).all(0).nonzero().flatten()
        assert len(gone) <= 10 and (len(gone) < 2 or gone[-1] - gone[0] == len(gone) - 1)
        seen_bins.add(len(gone))
    assert seen_bins == set(range(11)) and {0, 25} <= seen_time and len(seen_time) > 20
    assert (features == 1).all()


def test_spec_augment_is_per_sample_and_seeded():
    lengths = torch.full((32,), 50)
    features = torch.ones(32, 50, 80)
    torch.manual_seed(1)
    first = spec_augment(features, lengths, 2, 27, 2, 0.1)
    torch.manual_seed(1)
    assert torch.equal(first, spec_augment(features, lengths, 2, 27, 2, 0.1))
    assert not torch.equal(first, spec_augment(features, lengths, 2, 27, 2, 0.1))
    assert len({row.numpy().tobytes() for row in first}) > 30
    starts = spec_augment(torch.ones(2000, 50, 80), torch.full((2000,), 50), 0, 0, 1, 0.1)
    share = (starts == 0).float().mean((0, 2))
    assert share[5:45].min() > 0.7 * share[5:45].max()  # everywhere alike but at the edges
    assert torch.equal(spec_augment(features, lengths, 0, 27, 0, 0.1), features)
    assert spec_augment(features[:0], lengths[:0], 2, 27, 2, 0.1).shape == (0, 50, 80)
    with pytest.raises(ValueError, match="time_share from 0 to 1"):
        spec_augment(features, lengths, 2, 27, 2, 1.5)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1, 1.15, 0.57])
def test_change_speed(factor: float):
    waveform = change_speed(tone(1.0, 1000), factor)
    assert len(waveform) == math.ceil(16000 * 100 / round(100 * factor))
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    assert abs(int(spectrum.argmax()) * 16000 / len(waveform) - 1000 * factor) < 2
    assert factor != 1 or torch.equal(waveform, tone(1.0, 1000))


@pytest.mark.parametrize("factor", [0.4, 2.1, 0.955, math.nan])
def test_wrong_speed(factor: float):
    with pytest.raises(ValueError, match="a speed must be from 0.5 to 2 in steps of 0.01"):
        change_speed(tone(0.1), factor)


def test_split_at_silence_finds_pauses():
    speech = [speechlike(count, seed) for seed, count in enumerate((40000, 30000, 40000))]
    pause = torch.zeros(3200)
    waveform = torch.cat([speech[0], pause, speech[1], pause, speech[2]])
    parts = spans(waveform, 2.9)
    assert len(parts) == 3
    assert 40000 < parts[0][1] < 43200 and 73200 < parts[1][1] < 76400


def spans(waveform: Tensor, longest: float, piece: int = 10**9) -> list[tuple[int, int]]:
    parts = list(split_at_silence(waveform.split(piece), 16000, longest))
    assert torch.equal(torch.cat([torch.zeros(0), *(part for _, part in parts)]), waveform)
    return [(start, start + len(part)) for start, part in parts]


@pytest.mark.parametrize("samples", [0, 1, 15999, 16000, 16001, 100000])
@pytest.mark.parametrize("longest", [0.1, 1.0, 2.5])
def test_split_covers_exactly(samples: int, longest: float):
    parts = spans(speechlike(samples), longest)
    assert samples == 0 or (parts[0][0] == 0 and parts[-1][1] == samples)
    assert all(end == start for (_, end), (start, _) in zip(parts, parts[1:], strict=False))
    assert all(0 < end - start <= longest * 16000 for start, end in parts)
    assert len(parts) <= 1 + 1.5 * samples / (longest * 16000) + 1
    assert samples > longest * 16000 or parts == [(0, samples)] * bool(samples)
    assert spans(speechlike(samples), longest, piece=7001) == parts


def test_split_gives_what_came_before_a_fault():
    def broken() -> Iterator[Tensor]:
        yield tone(0.5)
        raise UnreadableAudio("a.wav: it is truncated")

    found = []
    with pytest.raises(UnreadableAudio):
        found += split_at_silence(broken(), 16000, 1.0)
    parts = split_at_silence(broken(), 16000, 1.0)
    assert torch.equal(next(parts)[1], tone(0.5))


def test_split_refuses_tiny_parts():
    with pytest.raises(ValueError, match="longest must be >= 0.1 seconds, got 0.01"):
        list(split_at_silence([tone(1.0)], 16000, 0.01))
