"""Streams: what they give is what the whole clip gives, in memory that does not grow, without a look at the future."""

import random

import pytest
import torch
from torch import Tensor

import zoo
from helpers import prepared, randomise, relative
from zoo.layer import Chunks

LEFT = 70
TINY = {"dim": 32, "depth": 2, "heads": 2, "mels": 20, "vocabulary": 11, "conv": "glu(kernel=9)"}
STEMS = {"conv4": "conv4(padding='causal', channels=8)", "depthwise4": "depthwise4(padding='causal', channels=8)"}
STEMS |= {"depthwise8": "depthwise8(padding='causal', channels=8)"}
MIXERS = {"relative": {}, "rope": {"mixer": "softmax", "position": "rope"}}
CLIPS = (1, 7, 8, 9, 157, 800)


def streaming(name: str = "conformer_ctc_s", look_ahead: int = 1, stem: str = "conv4", **choices) -> torch.nn.Module:
    chunks = {"chunk": look_ahead + 1, "left": LEFT, "subsampling": STEMS[stem]}
    return randomise(zoo.create_model(name, **(TINY | chunks | choices))).eval()


def streamed(model: torch.nn.Module, features: Tensor, sizes=None, visible: Chunks | None = None) -> Tensor:
    """What a stream gives of features that come in pieces of those sizes, or all at once."""
    stream, made, start = model.stream(len(features), visible), [], 0
    while start < features.shape[1]:
        size = features.shape[1] if sizes is None else random.choice(sizes)
        made.append(stream.push(features[:, start : start + size]))
        start += size
    return torch.cat([*made, stream.finish()], 1)


def check(model: torch.nn.Module, frames: int, visible: Chunks | None = None) -> None:
    random.seed(frames)
    features = torch.randn(2, frames, 20)
    with torch.no_grad():
        wanted, lengths = model(features, None, visible)
    assert lengths.tolist() == [wanted.shape[1]] * 2
    for sizes in ((0, 1, 2, 7, 40), None)[: 2 if frames < 800 else 1]:
        got = streamed(model, features, sizes, visible)
        assert got.shape == wanted.shape and relative(got, wanted) < 1e-5


@pytest.mark.daily(5)
@pytest.mark.parametrize("look_ahead", [0, 1, 6, 13])
@pytest.mark.parametrize("number", range(3))
def test_streamed_is_offline(look_ahead, number):
    """Every subsampling, mixer and norm of the convolution meets every look-ahead, at every length."""
    stem = list(STEMS)[number]
    place = number + [0, 1, 6, 13].index(look_ahead)
    mixer, norm = list(MIXERS)[place % 2], ("layernorm", "batchnorm")[(place + number) // 2 % 2]
    model = streaming("conformer_ctc_s", look_ahead, stem, conv_norm=norm, **MIXERS[mixer])
    for frames in CLIPS:
        check(model, frames)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("norm", [norm for norm in zoo.NORMS if norm != "groupnorm"])
def test_streamed_is_offline_for_each_norm_and_mixer(mixer, norm):
    model = streaming("fastconformer_s", 1, "depthwise8", norm=norm, conv_norm=norm, **MIXERS[mixer])
    zoo.advance(model, 0.4)
    check(model, 157)


LAYOUT = {"layout": ("mixer", "ffn", "conv", "ffn"), "conv": "swish(kernel=9)", "placement": "scaled"}


@pytest.mark.parametrize(
    "choices",
    [
        LAYOUT,
        {"first_norm": True, "scale_input": False},
        {"mixer": "softmax(kv_heads=1, qk_norm='rmsnorm')", "position": "rope"},
        {"mixer": "softmax"},
        {"conv": "glu(kernel=1)"},
        {"left": 0},
        {"left": 140},
        {"vocabulary": 0},
        {"head": "transducer(hidden=16)"},
    ],
    ids=str,
)
def test_streamed_is_offline_whatever_else_is_chosen(choices):
    check(streaming(**choices), 157)


def test_the_look_ahead_may_change_at_run_time():
    model = streaming(look_ahead=13)
    features = torch.randn(1, 157, 20)
    outcomes = []
    for chunk in (14, 1, 2, 7, 10):
        visible = Chunks(chunk, LEFT)
        check(model, 157, visible)
        other = streaming(look_ahead=chunk - 1)
        other.load_state_dict(model.state_dict())
        outcomes.append(model(features, None, visible)[0])
        assert torch.equal(other(features)[0], outcomes[-1])
        assert torch.equal(streamed(other, features), streamed(model, features, None, visible))
    assert torch.equal(outcomes[0], model(features)[0])
    assert all(relative(other, outcomes[0]) > 1e-3 for other in outcomes[1:])


@pytest.mark.parametrize("visible", [Chunks(4, 10), Chunks(0, 0), Chunks(2, -2)])
def test_chunks_that_do_not_divide_left_are_refused_at_run_time(visible):
    model = streaming()
    with pytest.raises(ValueError, match="chunk"):
        model.stream(1, visible)
    with pytest.raises(ValueError, match="chunk"):
        model(torch.randn(1, 60, 20), None, visible)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("look_ahead", [0, 1, 6])
def test_later_frames_change_no_earlier_output(stem, look_ahead):
    """A chunk sees the frame of its last token and none behind it."""
    model = streaming("conformer_ctc_s", look_ahead, stem)
    chunk, stride = look_ahead + 1, model.config.stride
    features = torch.randn(1, 160, 20)
    before, _ = model(features)
    for frame in (1, 40, 97, 98, 99, 100, 101):
        changed = features.clone()
        changed[:, frame:] += torch.randn(1, 160 - frame, 20)
        first = -(-frame // stride) // chunk * chunk  # of the chunk of the first token that reads the frame
        after, _ = model(changed)
        assert relative(after[:, :first], before[:, :first]) < 1e-6 if first else True
        assert ((after - before)[:, first:].abs().amax(2) > 1e-4).all()


def test_the_past_is_seen_as_far_as_left_goes():
    model = streaming(look_ahead=1, left=4, depth=1, conv="glu(kernel=1)")
    features = torch.randn(1, 160, 20)
    changed = features.clone()
    changed[:, 80:81] += 1.0  # reaches tokens 20 (and 21), the chunk of which is seen by the next two
    moved = ((model(changed)[0] - model(features)[0]).abs().amax((0, 2)) > 1e-6).nonzero().flatten()
    assert moved.tolist() == [20, 21, 22, 23, 24, 25]


@pytest.mark.parametrize("stem", STEMS)
def test_tokens_come_as_soon_as_their_chunk_is_whole(stem):
    model = streaming(stem=stem)
    stream, stride, given = model.stream(1), model.config.stride, 0
    for frames in range(1, 60):
        given += stream.push(torch.randn(1, 1, 20)).shape[1]
        assert given == (frames + stride - 1) // (2 * stride) * 2
    assert given + stream.finish().shape[1] == model.stem.tokens(59)


def test_company_changes_no_clip_of_a_model_with_chunks():
    model = streaming(look_ahead=6, stem="depthwise8", norm="batchnorm")
    clips = [torch.randn(1, frames, 20) for frames in (1, 97, 100, 103)]
    batch = 100 * torch.randn(4, 300, 20)
    for row, clip in zip(batch, clips, strict=True):
        row[: clip.shape[1]] = clip[0]
    logits, lengths = model(batch, torch.tensor([1, 97, 100, 103]))
    for row, number, clip in zip(logits, lengths, clips, strict=True):
        assert relative(row[None, :number], model(clip)[0]) < 1e-5


def held(stream) -> tuple[int, int]:
    """Tensors that a stream holds, and their bytes in memory."""
    tensors = [each for each in vars(stream).values() if isinstance(each, Tensor)] + list(stream.cache.values())
    return len(tensors), sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.slow
def test_memory_does_not_grow():
    model = streaming(look_ahead=0, dim=8, heads=1, depth=1, mels=4, layout=("mixer", "conv"))
    stream = model.stream(2)
    keys, start = set(stream.cache), held(stream)
    for number in range(2000):
        assert stream.push(torch.randn(2, 4, 4)).shape == (2, 1, 11)
        if number % 100 == 0:
            assert held(stream) == start and set(stream.cache) == keys
    assert held(stream) == start and set(stream.cache) == keys
    assert all(tensor.isfinite().all() for tensor in stream.cache.values())
    assert not any(tensor.requires_grad for tensor in stream.cache.values())
    stream.push(torch.randn(2, 1601, 4))
    assert held(stream)[0] == start[0] and held(stream)[1] < start[1] + 2 * 4 * 4 * 5


def test_streams_of_one_model_do_not_meet():
    model = streaming()
    first, second = torch.randn(2, 1, 120, 20).unbind()
    one, other, made = model.stream(1), model.stream(1), []
    for start in range(0, 120, 10):
        made.append([one.push(first[:, start : start + 10]), other.push(second[:, start : start + 10])])
    made.append([one.finish(), other.finish()])
    for parts, features in zip(zip(*made, strict=True), (first, second), strict=True):
        assert relative(torch.cat(parts, 1), model(features)[0]) < 1e-5


def test_a_fused_model_streams_the_same():
    choices = TINY | {"chunk": 2, "left": 4, "subsampling": STEMS["conv4"], "norm": "prepbn", "conv_norm": "prepbn"}
    model = prepared(zoo.create_model("conformer_ctc_s", **choices))
    features = torch.randn(2, 157, 20, dtype=torch.double)
    with torch.no_grad():
        assert relative(streamed(zoo.fuse(model), features), model(features)[0]) < 1e-12


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_in_chunks_is_causal_too(mixer):
    model = streaming(norm="layernorm", conv_norm="layernorm", dropout=0.0, **MIXERS[mixer]).train()
    features = torch.randn(2, 60, 20, requires_grad=True)
    logits, _ = model(features)
    weights = torch.randn(11)
    for tokens in (2, 4, 10):  # ends of chunks
        (slope,) = torch.autograd.grad((logits[:, :tokens] @ weights).sum(), features, retain_graph=True)
        last = 4 * (tokens - 1)  # the frame of the last token
        assert (slope[:, last].abs().amax(-1) > 0).all() and not slope[:, last + 1 :].any()
    with torch.no_grad():
        assert relative(model.eval()(features)[0], logits) < 1e-5


def test_what_cannot_stream_is_refused():
    whole = zoo.create_model("conformer_ctc_s", **TINY).eval()
    with pytest.raises(ValueError, match="cannot stream; its config has no chunk"):
        whole.stream()
    with pytest.raises(ValueError, match="no chunk"):
        whole.stream(1, Chunks(2, 4))
    with pytest.raises(ValueError, match="no chunk"):
        whole(torch.randn(1, 60, 20), None, Chunks(2, 4))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        streaming().train().stream()


def test_a_stream_refuses_wrong_shapes_and_ends_once():
    stream = streaming().stream(2)
    for shape in ((1, 5, 20), (2, 5, 21), (5, 20), (2, 1, 5, 20)):
        with pytest.raises(ValueError, match=r"features must be \[2, any, 20\]"):
            stream.push(torch.randn(shape))
    assert stream.push(torch.randn(2, 0, 20)).shape == (2, 0, 11)
    assert stream.finish().shape == (2, 0, 11)
    for call in (stream.finish, lambda: stream.push(torch.randn(2, 5, 20))):
        with pytest.raises(ValueError, match="has ended"):
            call()
