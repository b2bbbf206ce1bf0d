"""Whole models: every pair of choices, any picture, features, the config's refusals."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch

import zoo
from helpers import ON_PICTURES, randomise, relative
from zoo.choices import PLACEMENTS
from zoo.models import PRESETS, configure

TINY = {"dim": 32, "depth": 2, "heads": 2, "image": 24, "patch": 8, "classes": 5}
CHOICES = {
    "mixer": ON_PICTURES,
    "norm": list(zoo.NORMS),
    "channel": list(zoo.CHANNELS),
    "position": list(zoo.POSITIONS),
    "ffn": list(zoo.FFNS),
    "placement": list(PLACEMENTS),
    "pool": ["mean", "token", "norm_after_mean", "distilled"],
    "registers": [0, 2],
    "layer_scale": [None, 0.1],
    "conv": ["glu", "swish(kernel=5)", "depthwise"],
    "conv_norm": list(zoo.NORMS),
    "layout": [
        ("mixer", "ffn"),
        ("mixer+ffn",),
        ("half", "mixer", "conv", "half", "norm"),
        ("mixer", "ffn", "conv", "ffn"),
    ],
}


def refused(choice: dict) -> str | None:
    """The rules, as README states them, written apart from the code."""
    mixer, placement = choice.get("mixer", "softmax"), choice.get("placement", "pre")
    prefix = choice.get("registers", 0) > 0 or choice.get("pool") in ("token", "distilled")
    layout = choice.get("layout", ("mixer", "ffn"))
    if prefix and mixer in ("window", "pool", "sepconv", "dcnv4", "identity"):
        return "prefix"
    if prefix and (choice.get("channel") == "ela" or "conv" in layout):
        return "prefix"
    if choice.get("position") == "rope" and mixer not in ("softmax", "sla"):
        return "rotary"
    if choice.keys() & {"conv", "conv_norm"} and "conv" not in layout:
        ignored = choice.get("conv", "glu") != "glu" or choice.get("conv_norm", "batchnorm") != "batchnorm"
        return "ignored" if ignored else None
    if placement == "sub" and mixer in ("pool", "identity"):
        return "inner"
    if placement == "hybrid" and mixer not in ("softmax", "window", "sla", "channel"):
        return "query"
    if placement == "hybrid" and "conv" in layout:
        return "query"
    if placement == "normformer" and mixer in ("pool", "identity"):
        return "inner"
    if placement == "normformer" and (mixer == "sepconv" or "conv" in layout):
        return "heads"
    if layout == ("mixer+ffn",) and placement in ("hybrid", "normformer"):
        return "share one norm"
    return None


PAIRS = [
    {first: one, second: other}
    for first, second in itertools.combinations(CHOICES, 2)
    for one, other in itertools.product(CHOICES[first], CHOICES[second])
]


@pytest.mark.parametrize("chunk", range(8))
def test_all_pairs_of_choices_train_a_step_or_are_refused_by_a_stated_rule(chunk):
    images, labels = torch.randn(2, 3, 24, 20), torch.tensor([0, 3])
    for choice in PAIRS[chunk::8]:
        tokens = {"class_token": True} if choice.get("pool") in ("token", "distilled") else {}
        reason = refused(choice)
        if reason is not None:
            with pytest.raises(ValueError, match=reason):
                zoo.create_model("vit_micro", **(TINY | choice | tokens))
            continue
        model = zoo.create_model("vit_micro", **(TINY | choice | tokens))
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing and loss.isfinite(), (choice, missing)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        assert model(images).isfinite().all(), choice


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_on_the_meta_device_and_round_trips(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    taken = set(dir(torch.nn.Module())) | set(dir(torch.fx.GraphModule)) | {"code", "graph", "meta"}
    keys = [*model.state_dict(), *(key for key, _ in model.named_modules()), *(key for key, _ in model.named_buffers())]
    assert not [key for key in keys if taken & set(key.split("."))]
    stored = json.loads(json.dumps(asdict(model.config)))
    assert type(model.config)(**stored) == PRESETS[name]


@pytest.mark.parametrize("mixer", ON_PICTURES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (7, 90), (1, 1)])
def test_any_picture_size(mixer, size):
    model = randomise(zoo.create_model("vit_micro", **(TINY | {"mixer": mixer, "channels": 1}))).eval()
    images = torch.randn(2, 1, *size)
    logits = model(images)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    maps = model.features(images)
    assert [tuple(each.shape[1:]) for each in maps] == [(32, -(-size[0] // 8), -(-size[1] // 8))] * 2


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"mixer": "sla", "norm": "prepbn", "channel": "ela"},
        {"mixer": "dcnv4", "position": "cpe", "channel": "fca"},
        {"position": "rope", "registers": 2},
        {"position": "learned", "class_token": True, "pool": "token"},
        {"pool": "norm_after_mean", "mixer": "pool"},
    ],
)
def test_pictures_of_several_sizes_share_a_batch(choices):
    """A picture of 17 x 30 pixels gives the same logits alone and in the corner of a larger, masked one."""
    model = randomise(zoo.create_model("vit_micro", **(TINY | choices))).eval()
    picture = torch.randn(1, 3, 17, 30)
    batch, mask = torch.randn(2, 3, 40, 33), torch.zeros(2, 40, 33, dtype=torch.bool)
    batch[0, :, :17, :30], mask[0, :17, :30], mask[1] = picture[0], True, True
    assert relative(model(batch, mask)[:1], model(picture)) < 1e-5


def test_a_patch_that_does_not_divide_the_picture_is_padded_with_zeros():
    model = randomise(zoo.create_model("vit_micro", **TINY)).eval()
    picture = torch.randn(1, 3, 20, 24)
    assert torch.equal(model(picture), model(torch.nn.functional.pad(picture, (0, 0, 0, 4))))


def test_features_and_the_bare_backbone():
    model = randomise(zoo.create_model("vit_micro", **(TINY | {"classes": 0}))).eval()
    images = torch.randn(2, 3, 24, 24)
    assert model(images).shape == (2, 32)
    first, last = model.features(images, layers=[0, -1])
    assert torch.equal(last, model.features(images)[1]) and not torch.equal(first, last)
    x, context = model.embed(images, None)
    assert torch.equal(first.flatten(2).transpose(1, 2), model.blocks[0](x, context))
    with pytest.raises(ValueError, match="no block 2"):
        model.features(images, layers=[2])


def test_depth_and_sizes_follow_the_config():
    model = zoo.create_model("deit_tiny", depth=3, registers=4, classes=7)
    assert len(model.blocks) == 3 and model.tokens.shape == (1, 5, 192) and model.head.out_features == 7
    assert model.position.table.shape == (1, 5 + 196, 192)


@pytest.mark.parametrize(
    "name,choices,words",
    [
        ("vit_tini", {}, ["vit_tini", "vit_tiny"]),
        ("vit_tiny", {"mixre": "sla"}, ["mixre", "mixer"]),
        ("vit_tiny", {"mixer": "sloth"}, ["mixer", "sloth", "softmax", "sla"]),
        ("vit_tiny", {"mixer": "pool(sise=5)"}, ["sise", "size"]),
        ("vit_tiny", {"mixer": "pool(size='five')"}, ["size", "five"]),
        ("vit_tiny", {"mixer": "pool(size=1.5)"}, ["size", "1.5"]),
        ("vit_tiny", {"mixer": "pool(5)"}, ["pool(5)", "size="]),
        ("vit_tiny", {"mixer": "__import__('os').system('true')"}, ["cannot read"]),
        ("vit_tiny", {"mixer": "softmax(qk_norm=open('x'))"}, ["cannot read"]),
        ("vit_tiny", {"mixer": "softmax(**{'qk_norm': True})"}, ["each option is written once"]),
        ("vit_tiny", {"mixer": "softmax(qk_norm=" + "-" * 100000 + "1)"}, ["100018 characters"]),
        ("vit_tiny", {"mixer": "softmax(qk_norm=" + "-" * 400 + "1)"}, ["cannot read"]),
        ("vit_tiny", {"mixer": "pool(size=3, size=5)"}, ["once"]),
        ("vit_tiny", {"mixer": "pool(size=-1)"}, ["size", "at least 1"]),
        ("vit_tiny", {"mixer": "dcnv4(kernel=0)"}, ["kernel", "at least 1"]),
        ("vit_tiny", {"norm": "layernorm(eps=1e999)"}, ["eps", "finite"]),
        ("vit_tiny", {"layout": ("mixer", 3)}, ["layout", "3"]),
        ("vit_tiny", {"layout": ()}, ["layout is empty"]),
        ("vit_tiny", {"conv": "swish(kernel=99)"}, ["swish", "ignored"]),
        ("vit_tiny", {"layout": ("ffn",), "mixer": "sla"}, ["sla", "ignored"]),
        ("vit_tiny", {"layout": ("ffn",), "position": "rope"}, ["rope", "ignored"]),
        ("vit_tiny", {"channel": "ela(groups=5)"}, ["ela", "5"]),
        ("vit_tiny", {"mixer": "pool", "placement": "sub"}, ["sub", "inner", "pool", "none"]),
        ("vit_tiny", {"layout": ("mixer", "conv"), "placement": "normformer"}, ["heads", "conv 'glu'"]),
        ("vit_tiny", {"norm": ""}, ["norm", "cannot read"]),
        ("vit_tiny", {"placement": "prae"}, ["placement", "prae", "peri"]),
        ("vit_tiny", {"layout": ["mixer", "fnn"]}, ["layout", "fnn", "ffn"]),
        ("vit_tiny", {"layout": ["half+mixer"]}, ["half", "alone"]),
        ("vit_tiny", {"layout": ["mixer", "cross"]}, ["cross", "memory"]),
        ("vit_tiny", {"layout": ["conv", "norm"], "conv": "depthwise"}, ["depthwise", "bare"]),
        ("vit_tiny", {"modulate": True}, ["modulate"]),
        ("vit_tiny", {"depth": "12"}, ["depth", "int"]),
        ("vit_tiny", {"depth": True}, ["depth", "int"]),
        ("vit_tiny", {"depth": 0}, ["depth", "at least 1"]),
        ("vit_tiny", {"heads": 5}, ["5 heads", "192"]),
        ("vit_tiny", {"drop_path": 1.0}, ["drop_path"]),
        ("vit_tiny", {"pool": "max"}, ["pool", "max", "mean"]),
        ("vit_tiny", {"pool": "token"}, ["class_token=True"]),
        ("vit_tiny", {"mixer": "pool", "position": "rope"}, ["pool", "rotary", "rope", "softmax"]),
        ("deit_tiny", {"mixer": "dcnv4"}, ["dcnv4", "prefix", "sla"]),
        ("deit_tiny", {"channel": "ela"}, ["ela", "prefix", "eca"]),
        ("vit_micro", {"position": "rope", "mixer": "softmax(head_dim=6)"}, ["rope", "6"]),
        ("vit_micro", {"dim": 30, "position": "sincos"}, ["sincos", "30"]),
        ("vit_micro", {"dim": 24, "channel": "fca"}, ["fca", "24"]),
        ("vit_micro", {"mixer": "sla(kernel=4)"}, ["odd", "4"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, choices, words):
    with pytest.raises(ValueError) as caught:
        zoo.create_model(name, **choices)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_wrong_pictures_are_refused():
    model = zoo.create_model("vit_micro", **TINY)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model(torch.randn(2, 1, 24, 24))
    with pytest.raises(ValueError, match="boolean"):
        model(torch.randn(2, 3, 24, 24), torch.ones(24, 24, dtype=torch.bool))


def test_list_models():
    assert zoo.list_models("deit_*") == ["deit_base", "deit_small", "deit_tiny"]
    assert set(zoo.list_models()) == set(PRESETS)
    assert configure("vit_tiny", depth=3).depth == 3


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"mixer": "sla", "norm": "prepbn", "position": "rope"},
        {"mixer": "dcnv4", "channel": "fca"},
        {"position": "learned", "class_token": True, "pool": "distilled", "registers": 1},
    ],
)
def test_export_of_a_whole_model_takes_any_batch(choices):
    model = randomise(zoo.create_model("vit_micro", **(TINY | choices))).eval()
    program = torch.export.export(
        model, (torch.randn(2, 3, 24, 24),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    )
    images = torch.randn(5, 3, 24, 24)
    assert relative(program.module()(images), model(images)) < 1e-5


@pytest.mark.parametrize("mixer", ON_PICTURES)
def test_an_empty_batch(mixer):
    model = zoo.create_model("vit_micro", **(TINY | {"mixer": mixer, "norm": "prepbn", "channel": "ela"}))
    for training in (True, False):
        assert model.train(training)(torch.zeros(0, 3, 24, 20)).shape == (0, 5)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("choices", [{"position": position} for position in zoo.POSITIONS] + [{"layer_scale": 0.1}])
@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_the_stream_keeps_the_precision_of_the_weights(choices, masked):
    """Whatever the choices; values are near those in fp32, and a model in bf16 stays in bf16."""
    model = randomise(zoo.create_model("vit_micro", **(TINY | choices))).eval()
    images = torch.randn(2, 3, 24, 32)
    mask = torch.ones(2, 24, 32, dtype=torch.bool) if masked else None
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x, _ = model.embed(images, mask)
        near = model(images, mask)
    assert x.dtype == torch.float32 and set(seen) == {torch.float32}
    assert relative(near.float(), model(images, mask)) < 0.05
    half = model.to(torch.bfloat16)
    assert half.embed(images.bfloat16(), mask)[0].dtype == torch.bfloat16
    assert half(images.bfloat16(), mask).dtype == torch.bfloat16


def test_tables_made_under_a_mode_do_not_outlive_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = zoo.create_model("vit_micro", **TINY).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(1, 3, 16, 40))
    assert type(model(torch.randn(1, 3, 16, 40))) is torch.Tensor


def test_tables_made_for_inference_serve_training():
    model = zoo.create_model("vit_micro", **(TINY | {"position": "rope"}))
    with torch.inference_mode():
        model(torch.randn(1, 3, 8, 72))
    model(torch.randn(1, 3, 8, 72)).sum().backward()
