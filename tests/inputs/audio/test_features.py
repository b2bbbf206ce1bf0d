"""Features of audio: those of other libraries and of their definitions, of batches, of streams, of files."""

import math
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from sounds import speechlike, tone
from zoo.inputs.audio import (
    RECIPES,
    AudioPreprocess,
    StreamingFeatures,
    UnreadableAudio,
    features,
    pad_features,
    resample,
    split_at_silence,
)

# Features


@pytest.mark.parametrize("samples", [[40000, 16000, 31999, 801], [16000]])
def test_nemo_recipe_equals_parakeet(samples: list[int]):
    transformers = pytest.importorskip("transformers")
    clips = [speechlike(count, seed) for seed, count in enumerate(samples)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract = transformers.ParakeetFeatureExtractor(feature_size=80)
        theirs = extract([clip.numpy() for clip in clips], sampling_rate=16000, return_tensors="pt")
    padded, lengths = pad_features(clips)
    ours, frames = RECIPES["nemo"](padded, lengths)
    assert frames.tolist() == theirs["attention_mask"].sum(1).tolist() == [count // 160 for count in samples]
    for row, length in enumerate(frames):
        expected, found = theirs["input_features"][row, :length], ours[row, :length]
        assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 8000.0), (500.0, 7000.0)])
def test_squeezeformer_recipe_equals_its_definition(lowest: float, highest: float):
    waveform = speechlike(8000).double().numpy()
    x = waveform / np.abs(waveform).max()
    x = np.concatenate([x[:1], x[1:] - 0.97 * x[:-1]])
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    x = np.pad(x, 256)
    power = [np.abs(np.fft.rfft(window * x[160 * t : 160 * t + 512])) ** 2 for t in range(50)]
    ends = 2595 * np.log10(1 + np.array([lowest, highest]) / 700)
    edges = 700 * (10 ** (np.linspace(*ends, 82) / 2595) - 1)
    hertz = np.arange(257) * 16000 / 512
    rise = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    decibels = 10 * np.log10(np.maximum(power @ np.maximum(0, np.minimum(rise, fall)), 1e-10))
    decibels = np.maximum(decibels, decibels.max() - 80)
    expected = (decibels - decibels.mean()) / decibels.std()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = replace(RECIPES["squeezeformer"], lowest=lowest, highest=highest)
        found = made(torch.from_numpy(waveform).float())
    assert found.shape == (50, 80)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_streaming_recipe_is_nemo_before_normalisation():
    waveform = speechlike(16000)
    plain = RECIPES["streaming"](waveform)
    expected = (plain - plain.mean(0)) / (plain.std(0) + 1e-5)
    torch.testing.assert_close(RECIPES["nemo"](waveform), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_changes_nothing(recipe: str):
    preprocess = RECIPES[recipe]
    clips = [speechlike(count, seed) for seed, count in enumerate((16000, 1, 100, 399, 160, 48001, 7777, 0))]
    clips += [torch.zeros(5000), tone(0.5), torch.ones(3000), 1e-6 * speechlike(4000)]
    padded, lengths = pad_features(clips)
    padded[torch.arange(padded.shape[1]) >= lengths[:, None]] = math.nan
    features, frames = preprocess(padded, lengths)
    assert features.shape == (len(clips), 48001 // 160, 80) and features.dtype == torch.float32
    assert features.isfinite().all()
    for row, clip in enumerate(clips):
        alone = preprocess(clip)
        assert len(alone) == frames[row] == preprocess.frames(len(clip))
        assert alone.shape[1] == 80 and not features[row, len(alone) :].any()
        assert len(alone) == 0 or (features[row, : len(alone)] - alone).abs().max() < 1e-5, row


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 1), (159, 1), (160, 1), (319, 1), (320, 2), (16000, 100)])
def test_number_of_frames(samples: int, frames: int):
    preprocess = AudioPreprocess()
    assert preprocess.frames(samples) == frames == len(preprocess(torch.ones(samples)))
    assert preprocess.seconds_per_frame == 0.01


def test_normalisation():
    features = RECIPES["nemo"](speechlike(16000))
    torch.testing.assert_close(features.mean(0), torch.zeros(80), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(80), atol=1e-3, rtol=0)
    features = RECIPES["squeezeformer"](speechlike(16000))
    assert abs(features.mean()) < 1e-5 and abs(features.std() - 1) < 1e-3
    for recipe in ("nemo", "squeezeformer"):
        assert RECIPES[recipe](torch.zeros(16000)).abs().max() == 0
    quiet, loud = RECIPES["squeezeformer"](speechlike(8000)), RECIPES["squeezeformer"](0.01 * speechlike(8000))
    torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=0)


def test_empty_batches():
    features, frames = RECIPES["nemo"](torch.zeros(0, 1600), torch.zeros(0, dtype=torch.int64))
    assert features.shape == (0, 10, 80) and frames.shape == (0,)
    features, frames = RECIPES["nemo"](torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
    assert features.shape == (2, 0, 80) and frames.tolist() == [0, 0]


def test_dither_is_noise_on_real_samples():
    preprocess = RECIPES["streaming"]
    padded, lengths = pad_features([torch.zeros(16000), torch.zeros(1600)])
    features, frames = preprocess(padded, lengths, dither=1e-2)
    silence = preprocess(torch.zeros(16000))
    assert (features[0] > silence).all() and (features[0].mean(0) > silence[0] + 2).all()
    assert not features[1, frames[1] :].any()
    torch.manual_seed(3)
    first = preprocess(tone(0.2), dither=1e-5)
    assert not torch.equal(first, preprocess(tone(0.2), dither=1e-5))
    torch.manual_seed(3)
    assert torch.equal(first, preprocess(tone(0.2), dither=1e-5))


def test_autocast_changes_nothing():
    waveform = speechlike(4000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RECIPES["nemo"](waveform)
    assert torch.equal(found, RECIPES["nemo"](waveform))


@pytest.mark.parametrize(
    ("waveforms", "lengths", "message"),
    [
        (torch.zeros(2, 5), None, r"must be \[S\], got \[2, 5\]; average the channels, or give lengths with a batch"),
        (torch.zeros(5), torch.tensor([5]), r"must be \[B, S\], got \[5\]"),
        (torch.zeros(5, dtype=torch.int16), None, "floating point, from -1 to 1, got int16; divide by 32768"),
        (np.zeros((5, 2)), None, r"must be \[S\], got \[5, 2\]; average the channels"),
        (np.zeros(5, np.int16), None, "got int16; divide by 32768"),
        ([0.0, 0.0], None, r"audio must be a path or a waveform \[S\], got list"),
        (b"a.wav", None, "got bytes"),
        (torch.zeros(1, 5), torch.tensor([6]), "a length of 6 exceeds the waveforms' 5"),
    ],
)
def test_wrong_waveforms(waveforms: Any, lengths: Tensor | None, message: str):
    with pytest.raises(ValueError, match=message):
        AudioPreprocess()(waveforms, lengths)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mels": 0}, "mels must be an integer from 1 to 1024, got 0"),
        ({"rate": 16000.0}, "rate must be an integer >= 1, got 16000.0"),
        ({"hop": True}, "hop must be an integer"),
        ({"window": 600}, "window <= fft"),
        ({"hop": 401}, "hop must be <= window and window <= fft"),
        ({"peak": 1}, "peak must be true or false, got 1"),
        ({"preemphasis": 1.0}, "preemphasis must be < 1"),
        ({"preemphasis": "x"}, "preemphasis must be a number"),
        ({"floor": 0}, "floor must be >= 1.2e-38, got 0"),
        ({"floor": math.nan}, "floor must be a number"),
        ({"lowest": -1}, "lowest must be a number from 0 to 1e\\+06"),
        ({"highest": 8001.0}, "highest <= 8000.0"),
        ({"lowest": 500.0, "highest": 500.0}, "lowest must be < highest"),
        ({"scale": "bark"}, "unknown scale 'bark'; allowed: slaney, htk"),
        ({"log": "log2"}, "unknown log 'log2'; allowed: ln, db"),
        ({"normalize": "batch"}, "unknown normalize 'batch'; allowed: bin, utterance, none"),
        ({"top_db": 80.0}, "top_db needs log='db', got log='ln'"),
        ({"fft": 10**12}, "fft must be an integer from 1 to 16384, got 1000000000000"),
        ({"fft": 10**30}, "fft must be an integer from 1 to 16384, got an integer of 100 bits"),
        ({"mels": 2000}, "mels must be an integer from 1 to 1024"),
        ({"rate": 10**7, "hop": 10**5}, "sample rate must be 1000 to 768000 Hz, got 10000000"),
        ({"hop": 1}, r"fft must be <= 64 \* hop, got fft=512, hop=1"),
        ({"top_db": 1e300, "log": "db"}, "top_db must be a number from 0 to 1e"),
        ({"floor": 10**400}, "floor must be a number"),
        ({"size": 3}, "unknown preprocess key size; allowed: rate, mels"),
    ],
    ids=str,
)
def test_wrong_fields(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        AudioPreprocess.from_dict(values)
    assert "\n" not in str(error.value)


def test_dict_round_trip():
    for preprocess in RECIPES.values():
        values = preprocess.to_dict()
        assert set(values) == {field.name for field in fields(AudioPreprocess)}
        assert AudioPreprocess.from_dict(values) == preprocess
    assert AudioPreprocess.from_dict({"mels": 40}) == AudioPreprocess(mels=40)
    with pytest.raises(ValueError, match="must be a mapping, got list"):
        AudioPreprocess.from_dict([])  # pyright: ignore


def test_too_many_mels():
    with pytest.raises(ValueError, match=r"^mels=300 are too many for fft=512"):
        AudioPreprocess(mels=300)(tone(0.1))


# Streams


@pytest.mark.parametrize("samples", [0, 1, 100, 159, 160, 399, 401, 4057])
@pytest.mark.parametrize("piece", [1, 7, 160, 1000, 50000])
def test_streaming_features(samples: int, piece: int):
    waveform = speechlike(samples) + 0.1
    stream = StreamingFeatures(RECIPES["streaming"])
    for _ in range(2):  # the second time shows that finish leaves nothing behind
        parts = [stream.push(waveform[start : start + piece]) for start in range(0, samples, piece)]
        parts += [stream.push(waveform[:0]), stream.finish()]
        expected = RECIPES["streaming"](waveform)
        assert torch.cat(parts).shape == expected.shape
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(400, 160, 400), (256, 256, 512), (511, 100, 512)])
def test_streaming_with_other_windows(sizes: tuple[int, int, int]):
    window, hop, fft = sizes
    preprocess = replace(RECIPES["streaming"], window=window, hop=hop, fft=fft, mels=20, periodic=True)
    waveform = speechlike(5000)
    stream = StreamingFeatures(preprocess)
    parts = [stream.push(piece) for piece in waveform.split(333)] + [stream.finish()]
    torch.testing.assert_close(torch.cat(parts), preprocess(waveform), atol=1e-5, rtol=0)


def test_streaming_is_prompt_and_small():
    stream = StreamingFeatures(RECIPES["streaming"])
    made = 0
    for _ in range(100):
        made += len(stream.push(speechlike(160)))
        assert len(stream.waiting) < 1000
    assert made == 99  # the window reaches 200 samples beyond its centre


@pytest.mark.parametrize("recipe", ["nemo", "squeezeformer"])
def test_streaming_refuses_what_needs_the_whole(recipe: str):
    with pytest.raises(ValueError, match=r"^normalize='\w+' needs the whole utterance.*use recipe 'streaming'$"):
        StreamingFeatures(RECIPES[recipe])
    with pytest.raises(ValueError, match="peak=True needs the whole"):
        StreamingFeatures(replace(RECIPES["streaming"], peak=True))
    with pytest.raises(ValueError, match=r"samples must be \[n\] in floating point"):
        StreamingFeatures(RECIPES["streaming"]).push(torch.zeros(3, dtype=torch.int16))


@pytest.mark.parametrize("recipe", RECIPES)
def test_centres_are_where_the_bands_peak(recipe: str):
    from torchaudio.functional import melscale_fbanks

    made = replace(RECIPES[recipe], mels=20, lowest=50.0, highest=7000.0)
    filters = melscale_fbanks(8193, 50.0, 7000.0, 20, made.rate, None, made.scale)
    peaks = torch.linspace(0, made.rate / 2, 8193)[filters.argmax(0)]
    torch.testing.assert_close(made.centres, peaks.double(), atol=made.rate / 16384, rtol=0)


# What a person has at hand


def test_files_and_arrays(tmp_path: Path):
    waveform, made = tone(0.5), RECIPES["nemo"]
    soundfile.write(tmp_path / "a.wav", waveform.numpy(), 16000, subtype="FLOAT")
    for given in (
        waveform.numpy(),
        waveform.numpy().astype(np.float64)[::1],
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
    ):
        torch.testing.assert_close(made(given), made(waveform), atol=1e-4, rtol=0)
    with pytest.raises(UnreadableAudio, match="nowhere.wav: No such file"):
        made("nowhere.wav")


def test_parts_are_features_of_stretches_and_silence_is_told(tmp_path: Path):
    made = RECIPES["streaming"]
    whole = torch.cat([tone(0.5), torch.zeros(16000), 0.01 + torch.zeros(4000), tone(0.5)])
    soundfile.write(tmp_path / "a.wav", whole.numpy(), 16000, subtype="FLOAT")
    for given in (whole, tmp_path / "a.wav"):
        parts = list(made.parts(given, 0.5))
        at = [round(part.start * 16000) for part in parts]
        ends = [start + round(part.seconds * 16000) for start, part in zip(at, parts, strict=True)]
        assert at == [0, *ends[:-1]] and ends[-1] == len(whole)
        assert any(part.features is None for part in parts) and parts[0].features is not None
        for part, start in zip(parts, at, strict=True):
            piece = whole[start : start + round(part.seconds * 16000)]
            assert (part.features is None) == (float(piece.max() - piece.min()) < 1e-6)
            assert part.features is None or torch.allclose(part.features, made(piece), atol=1e-5)
    (alone,) = made.parts(torch.zeros(1000))
    assert alone.features is None and alone.seconds == 1000 / 16000


# What is kept of a first call


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(kind: torch.dtype):
    made = replace(RECIPES["streaming"], mels=73 if kind == torch.float64 else 71)  # of no other test
    waveform = tone(0.2)
    torch.set_default_dtype(kind)
    try:
        found = [made(waveform), made(waveform.double()), made.sample(torch.Generator().manual_seed(0))]
        stream = StreamingFeatures(made)
        found += [
            stream.push(waveform),
            stream.finish(),
            made(waveform[:0]),
            *made(waveform[None, :0], torch.tensor([0]))[:1],
        ]
        found += [
            change
            for change in (resample(waveform, 8000, 16000), next(iter(split_at_silence([waveform], 16000, 1.0)))[1])
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {one.dtype for one in found} == {torch.float32}
    assert torch.equal(found[0], made(waveform)) and torch.equal(
        torch.cat(found[3:5]), torch.cat([stream.push(waveform), stream.finish()])
    )


def test_another_default_device_changes_nothing():
    waveform, made = tone(0.2), replace(RECIPES["streaming"], mels=67)
    with torch.device("meta"):
        stream = StreamingFeatures(made)
        found = [made(waveform), torch.cat([stream.push(waveform), stream.finish()])]
        found += [features for _, _, features in made.parts(waveform) if features is not None]
    assert torch.equal(found[0], made(waveform)) and {one.device.type for one in found} == {"cpu"}


def test_a_first_call_without_gradients_leaves_later_ones_theirs():
    made, waveform = replace(RECIPES["nemo"], mels=69), tone(0.2)
    with torch.inference_mode():
        made(waveform)
    waveform.requires_grad_()
    made(waveform).square().sum().backward()
    assert waveform.grad is not None and bool(waveform.grad.any())


@pytest.mark.parametrize(
    ("scale", "highest", "fft"), [("slaney", None, 512), ("htk", 7000.0, 512), ("slaney", 4000.0, 600)]
)
def test_filters_are_those_of_torchaudio(scale: str, highest: float | None, fft: int):
    made = AudioPreprocess(scale=scale, highest=highest, fft=fft, lowest=20.0)
    wanted = melscale_fbanks(
        fft // 2 + 1, 20.0, highest or 8000.0, 80, 16000, "slaney" if scale == "slaney" else None, scale
    )
    found = features.mel_filters(made, torch.device("cpu"))
    assert (found - wanted).abs().max() < 1e-4 * wanted.max()
