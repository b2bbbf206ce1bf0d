"""Speech encoders: padding, and what else shares a batch, changes nothing, in inference and in training."""

import pytest
import torch

import zoo
from helpers import randomise, relative
from signatures import pairwise, representatives
from speech_cases import ALONG_TIME, LAYOUTS, NAMES, PADDINGS, TINY, in_company, tiny, trained
from zoo.models import PRESETS, configure


def narrowed(name: str) -> dict:
    heads = PRESETS[name].heads
    return TINY | {"heads": heads, "dim": 8 * heads}


CHOICES = {
    # Narrowed, presets that differ in width and depth alone are the same.
    "name": list({configure(name, **narrowed(name)): name for name in reversed(NAMES)}.values()),
    "mixer": [
        *({"mixer": mixer} for mixer in (*ALONG_TIME, "relative(window=4)", "local(window=8, tokens=1)")),
        *({"mixer": mixer, "position": "rope"} for mixer in ("softmax", "sla", "local(window=5)")),
    ],
    "norm": representatives(zoo.NORMS),
    "conv_norm": representatives(zoo.NORMS),
    "progress": [0.0, 0.4, 1.0],  # prepbn blends LayerNorm in at 1, 0.5 and 0
    "kind": ["conv4", "depthwise4", "depthwise8"],
    "padding": PADDINGS,
    "stem_channel": representatives(zoo.CHANNELS),
    "channel": ["none", "se", "ela"],
}


ROWS = pairwise(CHOICES)


def chosen(row: dict, **choices) -> torch.nn.Module:
    """The preset of a row, narrowed, in fp64, where rounding cannot be mistaken for a leak."""
    stem = f"{row['kind']}(padding='{row['padding']}', channels=32, channel='{row['stem_channel']}')"
    choices |= row["mixer"] | {kind: row[kind] for kind in ("norm", "conv_norm", "channel")} | {"subsampling": stem}
    model = tiny(row["name"], **(narrowed(row["name"]) | {"depth": 3} | choices))
    zoo.advance(model, row["progress"])
    return model.double()


def leak(model: torch.nn.Module, clips: list[torch.Tensor]) -> float:
    """The most by which company changes a clip."""
    with torch.no_grad():
        together, lengths = model(*in_company(clips, 150))
        alone = [model(clip[None])[0][0, :length] for clip, length in zip(clips, lengths, strict=False)]
    pairs = zip(together, alone, strict=False)
    return max(relative(row[: len(each)], each) for row, each in pairs if len(each))


@pytest.mark.daily(6)
@pytest.mark.parametrize("part", range(6))
def test_company_changes_no_clip_whatever_the_choices(part):
    for number, row in list(enumerate(ROWS))[part::6]:
        clips = [torch.randn(frames, 20, dtype=torch.double) for frames in (97 + number % 7, 1)]
        assert leak(chosen(row), clips) < 1e-6, row


@pytest.mark.parametrize("name", LAYOUTS)
def test_company_changes_no_clip_of_an_encoder_as_it_is(name):
    model = randomise(zoo.create_model(name, depth=4)).eval()
    assert leak(model, [torch.randn(frames, 80) for frames in (*range(97, 104), 1)]) < 1e-5


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_long_clip_is_subsampled_as_training_does_it(name, padding):
    """Inference may cut the time into slices."""
    kind = "depthwise8" if name == "fastconformer_s" else "conv4"
    model = tiny(name, depth=2, subsampling=f"{kind}(padding='{padding}', channels=8)")
    batch, lengths = in_company([torch.randn(frames, 20) for frames in (1500, 1025, 1024, 1023, 513, 3)], 1601)
    wanted, real = model.stem(batch, torch.arange(1601) < lengths[:, None])
    with torch.no_grad():
        got, same = model.stem(batch, torch.arange(1601) < lengths[:, None])
        assert torch.equal(real, same) and torch.equal(real.sum(1), model.stem.tokens(lengths))
        assert relative(got[real], wanted[real]) < 1e-5
        with torch.enable_grad():  # then all frames at once
            whole = model.stem(batch)[0]
        assert relative(model.stem(batch)[0], whole) < 1e-5


@pytest.mark.parametrize("channel", ["se", "ela"])
@pytest.mark.parametrize("frames", [1, 5])
def test_a_clip_of_one_token_has_channel_attention(channel, frames):
    model = tiny("squeezeformer_xs", dim=16, channel=channel, subsampling=f"depthwise4(channel='{channel}')")
    assert model(torch.randn(1, frames, 20))[0].isfinite().all()


TRAINED = pairwise({kind: CHOICES[kind] for kind in ("norm", "conv_norm", "progress")} | {"name": LAYOUTS})


@pytest.mark.parametrize("part", range(3))
def test_padding_changes_no_frame_statistic_loss_or_gradient_in_training(part):
    """In fp64, where 1e-6 leaves a leak no room."""
    for number, row in list(enumerate(TRAINED))[part::3]:
        rest = {kind: CHOICES[kind][number % len(CHOICES[kind])] for kind in CHOICES if kind not in row}
        model = chosen(row | rest, depth=2)
        clips = [torch.randn(frames, 20, dtype=torch.double) for frames in (97 + number % 7, 50)]
        batch, lengths = in_company(clips, 110, size=1.0)
        padded = torch.cat([batch, 100 * torch.randn(batch.shape).double()], 1)
        (wanted, slopes, buffers), (got, others, moved) = (
            trained(model, batch, lengths),
            trained(model, padded, lengths),
        )
        assert max(relative(one, other) for one, other in zip(got, wanted, strict=True)) < 1e-6, row
        assert relative(others, slopes) < 1e-6 and slopes.isfinite().all(), row
        assert all(relative(moved[key].double(), buffers[key].double()) < 1e-6 for key in buffers), row
        start = dict(model.named_buffers())
        assert not [key for key in buffers if "running" in key and torch.equal(buffers[key], start[key])]


@pytest.mark.parametrize("mixer", ALONG_TIME)
def test_an_empty_batch(mixer):
    model = tiny("squeezeformer_xs", mixer=mixer, norm="prepbn", conv_norm="prepbn", channel="ela")
    for lengths in (None, torch.zeros(0, dtype=torch.long)):
        logits, real = model(torch.zeros(0, 40, 20), lengths)
        assert logits.shape == (0, 10, 11) and real.shape == (0,)
