"""Speech encoders: sizes, lengths, what is refused, taps, heads, folding, export."""

import pytest
import torch
import torch.nn.functional as F

import zoo
from block_cases import check_dropout
from helpers import prepared, relative
from speech_cases import ALONG_TIME, LAYOUTS, MILLIONS, NAMES, PADDINGS, TINY, in_company, real_mask, tiny, trained
from zoo.layer import Context
from zoo.mixers import CONVS, MIXERS
from zoo.models import PRESETS
from zoo.models.base import count_parameters
from zoo.norms import Affine, BatchNorm, LayerNorm
from zoo.spec import check

# Sizes and lengths


@pytest.mark.daily(3)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_with_a_ctc_head_of_128_are_those_published(name):
    with torch.device("meta"):
        model = zoo.create_model(name, head="ctc", vocabulary=128)
    assert round(count_parameters(model) / 1e6, 1) == MILLIONS[name]


PUBLISHED = {  # dim, depth, heads, kernel
    "conformer_s": (144, 16, 4, 31),
    "conformer_m": (256, 16, 4, 31),
    "conformer_l": (512, 17, 8, 31),
    "conformer_ctc_s": (144, 16, 4, 31),
    "conformer_ctc_m": (256, 16, 4, 31),
    "conformer_ctc_l": (512, 18, 8, 31),
    "squeezeformer_xs": (144, 16, 4, 31),
    "squeezeformer_s": (196, 18, 4, 31),
    "squeezeformer_sm": (256, 16, 4, 31),
    "squeezeformer_m": (324, 20, 4, 31),
    "squeezeformer_ml": (512, 18, 8, 31),
    "squeezeformer_l": (640, 22, 8, 31),
    "efficient_conformer_s": (120, 15, 4, 15),
    "fastconformer_s": (176, 16, 4, 9),
    "fastconformer_m": (256, 16, 4, 9),
    "fastconformer_l": (512, 17, 8, 9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_that_the_number_of_parameters_does_not_show(name):
    config = PRESETS[name]
    kernel = check(CONVS, config.conv)["kernel"]
    assert (config.dim, config.depth, config.heads, kernel) == PUBLISHED[name]


def test_parameters_of_squeezeformer_xs_are_exact():
    with torch.device("meta"):
        assert count_parameters(zoo.create_model("squeezeformer_xs", vocabulary=0)) == 9_013_248


TOKENS = {
    ("conv4", "symmetric"): (25, 250, 251),
    ("depthwise4", "right"): (25, 250, 250),
    ("depthwise4", "causal"): (26, 251, 251),
    ("depthwise8", "symmetric"): (13, 125, 126),
    ("depthwise8", "right"): (12, 125, 125),
    ("depthwise8", "causal"): (14, 126, 126),
}


@pytest.mark.parametrize("name", ["conformer_ctc_s", "squeezeformer_xs"])
@pytest.mark.parametrize(("kind", "padding"), TOKENS)
def test_tokens_of_100_1000_and_1001_frames(name, kind, padding):
    model = tiny(name, subsampling=f"{kind}(padding='{padding}', channels=8)")
    sizes, wanted = (100, 1000, 1001), TOKENS[kind, padding]
    assert model.stem.tokens(torch.tensor(sizes)).tolist() == list(wanted)
    logits, lengths = model(torch.randn(3, 1001, 20), torch.tensor(sizes))
    assert logits.shape == (3, wanted[2], 11) and lengths.tolist() == list(wanted)
    for size, tokens in zip(sizes, wanted, strict=True):
        assert model.stem.tokens(size) == tokens
        logits, lengths = model(torch.randn(1, size, 20))
        assert logits.shape == (1, tokens, 11) and lengths.tolist() == [tokens]


@pytest.mark.parametrize("padding", PADDINGS)
def test_short_clips_have_the_length_that_they_have_in_company(padding):
    model = tiny("fastconformer_s", subsampling=f"depthwise8(padding='{padding}', channels=8)")
    _, lengths = model(torch.randn(20, 20, 20), torch.arange(1, 21))
    for frames in range(1, 21):
        _, alone = model(torch.randn(1, frames, 20))
        assert alone.tolist() == lengths[frames - 1 : frames].tolist()


def test_causal_subsampling_leaves_another_row_of_frequencies():
    widths = {padding: f"depthwise8(padding='{padding}')" for padding in PADDINGS}
    models = {padding: tiny("fastconformer_s", mels=80, subsampling=spec) for padding, spec in widths.items()}
    assert {padding: model.stem.out.in_features for padding, model in models.items()} == {
        "symmetric": 2560,
        "right": 2560,
        "causal": 2816,
    }


# Taps, heads, checkpointing, folding


def test_encode_gives_what_each_block_makes_and_its_frames():
    model = tiny("squeezeformer_xs")  # halved before block 1, restored before block 3
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    features, lengths = torch.randn(2, 101, 20), torch.tensor([101, 57])
    taps = model.encode(features, lengths, layers=[0, 1, 2, 3])
    assert all(torch.equal(tap.tokens, output) for tap, output in zip(taps, seen, strict=True))
    assert [tap.tokens.shape[1] for tap in taps] == [26, 13, 13, 26]
    assert [tap.lengths.tolist() for tap in taps] == [[26, 15], [13, 8], [13, 8], [26, 15]]
    assert all(torch.equal(tap.context.mask.sum(1), tap.lengths) for tap in taps)
    (last,) = model.encode(features, lengths)
    assert torch.equal(last.tokens, taps[3].tokens) and torch.equal(
        model.logits(last.tokens), model(features, lengths)[0]
    )
    assert [tap.lengths for tap in model.encode(features, layers=[-1, 0])] == [None, None]


@pytest.mark.parametrize("left", range(5))
def test_the_unet_adds_what_it_saved_to_frames_repeated_twice(left):
    model = tiny("squeezeformer_xs", depth=2, reduce_left=left)  # halved before block 0, restored before block 1
    features = torch.randn(1, 101, 20)
    x, context = model.embed(features, None)
    padded = F.pad(x.transpose(1, 2), (left, 8 - left))
    reduced = model.reduce.point(model.reduce.conv(padded).transpose(1, 2)[:, :13])
    y = model.blocks[0](reduced, context._replace(grid=(13,)))
    restored = x + model.recover(y[:, torch.arange(26) // 2])
    assert relative(model(features)[0], model.head(model.blocks[1](restored, context))) < 1e-5


def test_without_a_vocabulary_a_model_gives_tokens():
    model = tiny("conformer_ctc_s", vocabulary=0)
    features, lengths = torch.randn(2, 60, 20), torch.tensor([60, 31])
    tokens, real = model(features, lengths)
    assert model.head is None and tokens.shape == (2, 15, 32) and real.tolist() == [15, 8]
    assert torch.equal(tokens, model.encode(features, lengths)[0].tokens)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_transducer_gives_the_same_step_by_step(layers):
    model = tiny("conformer_s", head=f"transducer(hidden=24, layers={layers})")
    encoded, _ = model(torch.randn(2, 60, 20))
    targets, head = torch.tensor([[1, 4, 4], [0, 9, 2]]), model.head
    logits = head(encoded, targets)
    assert encoded.shape == (2, 15, 32) and logits.shape == (2, 15, 4, 11)
    assert not head.embedding.weight[10].any()
    predicted, _ = head.predictor(head.embedding.weight[torch.tensor([[10, 1, 4, 4], [10, 0, 9, 2]])])
    one, other = F.linear(encoded, head.encoded.weight, head.encoded.bias), F.linear(predicted, head.predicted.weight)
    hidden = torch.tanh(one[:, :, None] + other[:, None])
    assert relative(logits, F.linear(hidden, head.out.weight, head.out.bias)) < 1e-6
    said, state = head.start(2)
    for number in range(4):
        assert relative(head.joint(encoded, said[:, None]), logits[:, :, number]) < 1e-5
        if number < 3:
            said, state = head.predict(targets[:, number], (said, state))


def test_advance_moves_the_blend_of_a_transducer():
    model = zoo.create_model("conformer_s", **(TINY | {"norm": "prepbn"}))
    zoo.advance(model, 0.4)
    assert {module.share for module in model.modules() if isinstance(module, zoo.NORMS["prepbn"])} == {0.5}


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpointing_changes_no_gradient_and_moves_statistics_once(name):
    model = tiny(name, dropout=0.1, drop_path=0.2, norm="batchnorm")
    batch, lengths = torch.randn(3, 90, 20), torch.tensor([90, 50, 70])
    outcomes, calls = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(model.checkpointing))
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        torch.manual_seed(5)
        outcomes.append(trained(model, batch, lengths))
    assert calls == [False] * 4 + [True] * 8
    (_, slopes, buffers), (_, others, moved) = outcomes
    assert torch.equal(others, slopes) and slopes.abs().max() > 0
    assert all(torch.equal(moved[key], buffers[key]) for key in buffers)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_encoders_give_the_same(name):
    model = prepared(zoo.create_model(name, **(TINY | {"norm": "prepbn", "conv_norm": "prepbn"})))
    fused = zoo.fuse(model)
    batch, lengths = in_company([torch.randn(frames, 20).double() for frames in (97, 40)], 130)
    with torch.no_grad():
        (wanted, real), (got, same) = model(batch, lengths), fused(batch, lengths)
    assert torch.equal(real, same)
    assert (
        relative(torch.cat([row[:n] for row, n in zip(got, real, strict=True)]), wanted[real_mask(wanted, real)])
        < 1e-12
    )
    assert not [module for module in fused.modules() if isinstance(module, BatchNorm)]
    assert [fold.layer.split(".")[1] for fold in fused.fusion if fold.into == "the head"] == ["3"]
    assert all(fold.into or fold.reason for fold in fused.fusion)
    affines = sum(isinstance(module, Affine) for module in fused.modules())
    assert affines == {"conformer_ctc_s": 3, "squeezeformer_xs": 1 + 4 * 4 - 1, "fastconformer_s": 3}[name]


def test_a_fused_model_whose_last_block_is_strided_gives_the_same():
    fields = {"depth": 2, "widths": (32, 48), "strided": (1,), "mixer": "grouped(size=3)", "heads": 2}
    model = tiny("efficient_conformer_s", dim=32, vocabulary=7, norm="prepbn", **fields).double()
    zoo.advance(model, 1.0)
    fused, features = zoo.fuse(model), torch.randn(1, 90, 20, dtype=torch.float64)
    assert relative(fused(features)[0], model(features)[0]) < 1e-12
    assert fused.fusion[0].into == "the head" and "back" in fused.fusion[0].layer


# Dropout and stages


def test_training_drops_single_values_of_the_tokens_behind_the_subsampling():
    model = tiny("conformer_ctc_s", dropout=0.3).train()
    x, context = torch.randn(8, 12, 32), Context(grid=(12,))
    check_dropout(model.start(x, context), x * 32**0.5, 0.3)


def test_a_transducer_drops_what_its_predictor_reads():
    head, seen = tiny("conformer_s", head="transducer(hidden=32, dropout=0.3)").head.train(), []
    head.predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 1:]))
    targets = torch.randint(10, (8, 12))
    head(torch.randn(8, 1, 32), targets)
    check_dropout(seen[0], head.embedding(targets), 0.3)


STAGED = {"dim": 32, "widths": (32, 40, 48), "strided": (0, 2)}


def test_a_strided_block_is_its_formula():
    """A linear of every second token, and Conformer's convolution with stride 2."""
    block = tiny("efficient_conformer_s", **STAGED).blocks[0].double()
    real = torch.arange(11) < torch.tensor([11, 6])[:, None]
    tokens, context = torch.randn(2, 11, 32, dtype=torch.float64), Context(grid=(11,), mask=real)
    x = block.front(tokens, context)
    y = F.layer_norm(x, (32,), block.norm.weight, block.norm.bias, 1e-6)
    y = F.linear(y, block.conv.expand.weight, block.conv.expand.bias)
    y = y[..., :40] * torch.sigmoid(y[..., 40:]) * real[..., None]
    conv, norm = block.conv.conv, block.conv.norm
    y = F.conv1d(y.transpose(1, 2), conv.weight, conv.bias, stride=2, padding=7, groups=40)
    y = F.silu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)).transpose(1, 2)
    y = F.linear(y, block.conv.out.weight, block.conv.out.bias)
    shortcut = F.linear(x[:, ::2], block.shortcut.weight, block.shortcut.bias)
    wanted = block.back(shortcut + y, Context(grid=(6,), mask=real[:, ::2]))
    assert relative(block(tokens, context)[real[:, ::2]], wanted[real[:, ::2]]) < 1e-12


def test_a_strided_block_drops_single_values_of_its_convolution():
    block, seen = tiny("efficient_conformer_s", dropout=0.3, **STAGED).blocks[0].double().train(), []
    for part in (block.conv, block.shortcut):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block.back.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(torch.randn(8, 24, 32, dtype=torch.float64), Context(grid=(24,)))
    made, shortcut, whole = seen
    check_dropout(whole - shortcut, made, 0.3)


@torch.no_grad()
def test_company_changes_no_clip_of_an_encoder_with_stages():
    model = tiny("efficient_conformer_s", **STAGED).double()
    clips = [torch.randn(frames, 20, dtype=torch.double) for frames in (97, 98, 100, 103, 1)]
    together, lengths = model(*in_company(clips, 150))
    for row, length, clip in zip(together, lengths, clips, strict=False):
        alone, real = model(clip[None])
        assert real.item() == length and relative(row[:length], alone[0]) < 1e-12


def test_padding_changes_no_training_step_of_an_encoder_with_stages():
    model = tiny("efficient_conformer_s", norm="batchnorm", **STAGED).double()
    batch, lengths = in_company([torch.randn(frames, 20, dtype=torch.double) for frames in (97, 50)], 110, size=1.0)
    padded = torch.cat([batch, 100 * torch.randn(batch.shape).double()], 1)
    (wanted, slopes, buffers), (got, others, moved) = trained(model, batch, lengths), trained(model, padded, lengths)
    assert max(relative(one, other) for one, other in zip(got, wanted, strict=True)) < 1e-9
    assert relative(others, slopes) < 1e-9
    assert all(relative(moved[key], buffers[key]) < 1e-9 for key in buffers)


# What is refused

CHUNKS = {"chunk": 2, "left": 4, "subsampling": "conv4(padding='causal')"}
WHOLE = [name for name in ALONG_TIME if MIXERS[name].mixes and "visible" not in MIXERS[name].reads_of()]
STAGES = {"dim": 32, "widths": (32, 48), "strided": (0,), "mixer": ("relative", "relative")}


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"unet": True, "depth": 1}, ["reduce", "depth"]),
        ({"unet": True, "depth": 4, "reduce": 3}, ["reduce", "0..2"]),
        ({"unet": True, "depth": 4, "reduce": -1}, ["reduce", "0..2"]),
        ({"unet": True, "reduce_left": 5}, ["reduce_left", "from 0 to 4"]),
        ({"reduce": 1}, ["reduce", "unet"]),
        (CHUNKS | {"unet": True}, ["unet", "chunks"]),
        (CHUNKS | {"subsampling": "conv4"}, ["subsampling", "causal"]),
        (CHUNKS | {"subsampling": "conv4(padding='right')"}, ["subsampling", "causal"]),
        (CHUNKS | {"subsampling": "conv4(padding='causal', channel='se')"}, ["subsampling", "channel", "chunks"]),
        (CHUNKS | {"norm": "groupnorm"}, ["norm 'groupnorm'", "chunks", "batchnorm"]),
        (CHUNKS | {"conv_norm": "groupnorm"}, ["conv_norm 'groupnorm'", "chunks", "layernorm"]),
        (CHUNKS | {"channel": "se"}, ["channel 'se'", "chunks", "none"]),
        (CHUNKS | {"conv": "depthwise"}, ["conv 'depthwise'", "chunks", "glu"]),
        (CHUNKS | {"mixer": "relative(window=4)"}, ["mixer", "window"]),
        *((CHUNKS | {"mixer": mixer}, [f"mixer '{mixer}'", "chunks", "relative"]) for mixer in WHOLE),
        *((CHUNKS | {"position": each, "mixer": "softmax"}, [each, "rope"]) for each in ("sincos", "learned", "cpe")),
        *(
            (CHUNKS | {"position": each, "mixer": "softmax"}, [each, "start of a stream"])
            for each in ("rope(absolute=True)", "rope(reference=4)", "rope(centred=True)", "learned_rope")
        ),
        (CHUNKS | {"chunk": 3}, ["chunk=3", "left=4"]),
        (CHUNKS | {"chunk": 0}, ["chunk=0", ">= 1"]),
        (CHUNKS | {"left": -2}, ["left=-2"]),
        ({"position": "rope"}, ["relative", "rope", "softmax"]),
        ({"mixer": "xyz"}, ["mixer", "relative", "sla"]),
        ({"vocabulary": 1}, ["vocabulary", "2", "0"]),
        ({"vocabulary": -1}, ["vocabulary"]),
        ({"mels": 0}, ["mels", "1"]),
        ({"subsampling": "conv8"}, ["subsampling", "conv4", "depthwise8"]),
        ({"subsampling": "conv4(width=8)"}, ["subsampling", "width", "channels"]),
        ({"subsampling": "conv4(padding='left')"}, ["subsampling", "left", "causal"]),
        ({"subsampling": "conv4(channel='eca2')"}, ["channel", "eca2", "ela"]),
        ({"head": "rnnt"}, ["head", "ctc", "transducer"]),
        ({"head": "ctc(hidden=8)"}, ["head", "hidden"]),
        ({"layout": ("mixer", "cross", "conv")}, ["cross", "memory"]),
        ({"modulate": True}, ["modulation", "condition"]),
        ({"modulation": "adaln"}, ["modulation", "condition"]),
        (STAGES | {"mixer": ("sla", "sla", "sla")}, ["mixer has 3 choices for 2 stages"]),
        ({"mixers": ("relative", "sla"), "mixer": "sla"}, ["mixer 'sla' would be ignored", "mixers"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(choices, words):
    with pytest.raises(ValueError) as caught:
        zoo.create_model("conformer_ctc_s", **(TINY | choices))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("mixer", [name for name in ALONG_TIME if 2 not in MIXERS[name].dimensions])
def test_a_mixer_along_time_is_refused_on_pictures(mixer):
    with pytest.raises(ValueError, match=f"mixer '{mixer}' works along time only; .*softmax"):
        zoo.create_model("vit_tiny", mixer=mixer)


def test_wrong_features_lengths_and_layers_are_refused():
    model = tiny("conformer_ctc_s")
    features = torch.randn(2, 40, 20)
    for wrong in (torch.randn(2, 40, 21), torch.randn(40, 20), torch.randn(2, 1, 40, 20)):
        with pytest.raises(ValueError, match=r"features must be \[B, T, 20\]"):
            model(wrong)
    with pytest.raises(ValueError, match="features must be floating point, got int16; use the checkpoint's preproc"):
        model(features.to(torch.int16))
    with pytest.raises(ValueError, match="one number per clip"):
        model(features, torch.tensor([40]))
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"layers: block {layer} does not exist; choose from 0 to 3"):
            model.encode(features, layers=[0, layer])


def test_efficient_conformer_is_as_published():
    """Burchi's code neither scales the input nor has another eps than 1e-6 in a layer norm."""
    model = zoo.create_model(
        "efficient_conformer_s", depth=3, strided=(1,), dim=24, widths=(24, 32), mixer="relative"
    ).eval()
    assert {module.eps for module in model.modules() if isinstance(module, LayerNorm)} == {1e-6}
    features = torch.randn(1, 50, 80)
    tokens, _ = model.embed(features, None)
    assert torch.equal(tokens, model.stem(features)[0])
