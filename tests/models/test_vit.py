"""Whole models: every pair of choices, any picture, features, the config's refusals."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch

import zoo
from helpers import ON_PICTURES, randomise, relative
from signatures import pairs, pairwise, representatives
from zoo.channels import NoChannel
from zoo.choices import OUTER, PLACEMENTS
from zoo.mixers import CONVS
from zoo.models import PRESETS, configure
from zoo.spec import parse

TINY = {"dim": 32, "depth": 2, "heads": 2, "image": 24, "patch": 8, "classes": 5}
CHOICES = {
    "mixer": representatives(zoo.MIXERS, axes=2),
    "norm": representatives(zoo.NORMS),
    "channel": representatives(zoo.CHANNELS),
    "position": representatives(zoo.POSITIONS),
    "ffn": representatives(zoo.FFNS),
    "placement": list(PLACEMENTS),
    "pool": ["mean", "token", "norm_after_mean", "distilled", "token_and_mean", "attention"],
    "first_norm": [False, True],
    "registers": [0, 2],
    "causal": [False, True],
    "layer_scale": [None, 0.1],
    "conv": ["glu", "swish(kernel=5)", "depthwise"],
    "conv_norm": ["batchnorm", *representatives(zoo.NORMS)],
    "layout": [
        ("mixer", "ffn"),
        ("mixer+ffn",),
        ("half", "mixer", "conv", "half", "norm"),
        ("mixer", "ffn", "conv", "ffn"),
    ],
}


def choices_of(row: dict) -> dict:
    tokens = {"class_token": True} if row.get("pool") in ("token", "distilled", "token_and_mean") else {}
    return TINY | row | tokens


def causally(mixer: str) -> dict:
    """The mixer in a model that accepts it."""
    return {"mixer": mixer, "causal": zoo.MIXERS[mixer].causal}


def reasons(row: dict) -> set[str]:
    """Words of every rule that two choices break, from what rows declare; none where they go together."""
    mixer, layout = zoo.MIXERS[row.get("mixer", "softmax")], row.get("layout", ("mixer", "ffn"))
    conv = parse(row.get("conv", "glu"))[0]
    branches = [mixer, *([CONVS[conv]] if "conv" in layout else [])]
    gates = [zoo.CHANNELS[row.get("channel", "none")], zoo.POSITIONS[row.get("position", "sincos")]]
    mixing_tokens = [each for each in [*branches, *gates] if each.mixes and each is not NoChannel]
    found = set()
    if row.get("registers", 0) > 0 or row.get("pool") in ("token", "distilled", "token_and_mean"):
        found |= {"prefix" for each in mixing_tokens if "prefix" not in each.reads}
    if row.get("causal"):
        norms = [row.get("norm", "layernorm"), *([row.get("conv_norm", "batchnorm")] if "conv" in layout else [])]
        norms = [each for each in (zoo.NORMS[parse(norm)[0]] for norm in norms) if each.mixes]
        found |= {"order" for each in [*mixing_tokens, *norms] if "order" not in each.reads_of()}
    elif mixer.causal:
        found.add("needs a causal model")
    found |= {unread for unread in zoo.POSITIONS[row.get("position", "sincos")].writes if unread not in mixer.reads}
    ignored = conv != "glu" or row.get("conv_norm", "batchnorm") != "batchnorm"
    if ignored and ("conv" not in layout or (conv == "depthwise" and row.get("conv_norm", "batchnorm") != "batchnorm")):
        found.add("ignored")
    mixing, feeding = PLACEMENTS[row.get("placement", "pre")]
    for each in branches:
        sites = each.sites_of(32, 2)
        for site, what in {} if each.bare else mixing.items():
            if site not in OUTER and site not in sites:
                found.add(f"needs the site '{site}'")
            elif what == "heads" and not sites[site].heads:
                found.add("scales heads")
    if any(word in ("ffn", "half") for entry in layout for word in entry.split("+")):
        sites = zoo.FFNS[row.get("ffn", "mlp")].sites_of(32, 2)
        found |= {f"needs the site '{site}'" for site in feeding if site not in OUTER and site not in sites}
    if "mixer+ffn" in layout and {k: v for k, v in mixing.items() if k in OUTER} != {
        k: v for k, v in feeding.items() if k in OUTER
    }:
        found.add("share one norm")
    return found


@pytest.mark.parametrize("part", range(4))
def test_every_two_choices_go_together_or_are_refused_by_a_stated_rule(part):
    for row in pairs(CHOICES)[part::4]:
        stated = reasons(row)
        if not stated:
            configure("vit_micro", **choices_of(row))
            continue
        with pytest.raises(ValueError) as caught:
            configure("vit_micro", **choices_of(row))
        assert any(words in str(caught.value) for words in stated), (row, stated, str(caught.value))


DESIGN = pairwise(CHOICES, lambda row: not reasons(row))


@pytest.mark.daily(4)
@pytest.mark.parametrize("part", range(4))
def test_every_two_choices_that_go_together_train_a_step(part):
    """A step down the gradient lowers the loss, so short a step that the slope alone decides."""
    images, labels = torch.randn(2, 3, 24, 20, dtype=torch.double), torch.tensor([0, 3])
    for row in DESIGN[part::4]:
        model = zoo.create_model("vit_micro", **choices_of(row)).double()
        before = torch.nn.functional.cross_entropy(model(images), labels)
        before.backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, (row, missing)
        with torch.no_grad():
            length = sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt()
            for parameter in model.parameters():
                parameter -= 1e-6 / length * parameter.grad
        gain = before - torch.nn.functional.cross_entropy(model(images), labels)
        assert gain > 0.5e-6 * length, row


def test_the_design_holds_every_two_choices_that_go_together():
    met = {frozenset(pair) for row in DESIGN for pair in itertools.combinations(row.items(), 2)}
    wanted = [row for row in pairs(CHOICES) if not reasons({k: v[0] for k, v in CHOICES.items()} | row)]
    assert all(frozenset(row.items()) in met for row in wanted) and len(DESIGN) < 250


@pytest.mark.daily(8)
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


@pytest.mark.daily(2)
@pytest.mark.parametrize("mixer", ON_PICTURES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (7, 90), (1, 1)])
def test_any_picture_size(mixer, size):
    model = randomise(zoo.create_model("vit_micro", **(TINY | causally(mixer) | {"channels": 1}))).eval()
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
        {"position": "rope(centred=True)", "pool": "attention", "first_norm": True, "registers": 1},
        {"position": "learned_rope(reference=5, antialias=True)", "pool": "token_and_mean", "class_token": True},
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
    first, last = model.features(images, layers=[0, -1])
    assert torch.equal(last, model.features(images)[1]) and not torch.equal(first, last)
    tokens = last.flatten(2).transpose(1, 2)
    pooled = torch.nn.functional.layer_norm(tokens, (32,), model.norm.weight, model.norm.bias, 1e-6).mean(1)
    assert relative(model(images), pooled) < 1e-5
    x, context = model.embed(images, None)
    assert torch.equal(first.flatten(2).transpose(1, 2), model.blocks[0](x, context))
    with pytest.raises(ValueError, match="block 2 does not exist"):
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
        ("vit_tiny", {"mixer": "sloth"}, ["mixer", "sloth", "soft"]),
        ("vit_tiny", {"mixer": "pool(sise=5)"}, ["sise", "size"]),
        ("vit_tiny", {"mixer": "pool(size='five')"}, ["size", "five"]),
        ("vit_tiny", {"mixer": "pool(size=1.5)"}, ["size", "1.5"]),
        ("vit_tiny", {"mixer": "pool(5)"}, ["pool(5)", "size="]),
        ("vit_tiny", {"mixer": "__import__('os').system('true')"}, ["cannot read"]),
        ("vit_tiny", {"mixer": "softmax(qk_norm=open('x'))"}, ["cannot read"]),
        ("vit_tiny", {"mixer": "softmax(**{'qk_norm': True})"}, ["give each option once"]),
        ("vit_tiny", {"mixer": "softmax(qk_norm=" + "-" * 100000 + "1)"}, ["100018 characters"]),
        ("vit_tiny", {"mixer": "softmax(qk_norm=" + "-" * 400 + "1)"}, ["cannot read"]),
        ("vit_tiny", {"mixer": "pool(size=3, size=5)"}, ["once"]),
        ("vit_tiny", {"mixer": "pool(size=-1)"}, ["size", ">= 1"]),
        ("vit_tiny", {"mixer": "dcnv4(kernel=0)"}, ["kernel", ">= 1"]),
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
        ("vit_tiny", {"layout": ["half+mixer"]}, ["half+mixer", "cannot be joined"]),
        ("vit_tiny", {"layout": ["mixer", "cross"]}, ["cross", "memory"]),
        ("vit_tiny", {"layout": ["conv", "norm"], "conv": "depthwise"}, ["depthwise", "no norm of its own"]),
        ("vit_tiny", {"modulate": True}, ["modulation 'adaln'", "condition"]),
        ("vit_tiny", {"depth": "12"}, ["depth", "int"]),
        ("vit_tiny", {"depth": True}, ["depth", "int"]),
        ("vit_tiny", {"depth": 0}, ["depth", ">= 1"]),
        ("vit_tiny", {"heads": 5}, ["dim 192, got 5"]),
        ("vit_tiny", {"drop_path": 1.0}, ["drop_path"]),
        ("vit_tiny", {"pool": "max"}, ["pool", "max", "mean"]),
        ("vit_tiny", {"pool": "token"}, ["class_token=True"]),
        ("vit_tiny", {"mixer": "pool", "position": "rope"}, ["pool", "rotary", "rope", "softmax"]),
        ("deit_tiny", {"mixer": "dcnv4"}, ["dcnv4", "prefix", "softmax"]),
        ("deit_tiny", {"channel": "ela"}, ["ela", "prefix", "eca"]),
        ("vit_micro", {"position": "rope", "mixer": "softmax(head_dim=6)"}, ["rope", "6"]),
        ("vit_micro", {"pool": "attention", "heads": 5, "mixer": "softmax(head_dim=6)"}, ["attention", "divide", "5"]),
        ("vit_micro", {"pool": "token_and_mean"}, ["token_and_mean", "class_token=True"]),
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


@pytest.mark.all
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"mixer": "sla", "norm": "prepbn", "position": "rope"},
        {"mixer": "dcnv4", "channel": "fca"},
        {"position": "learned", "class_token": True, "pool": "distilled", "registers": 1},
        {"position": "learned_rope(reference=4)", "pool": "attention", "first_norm": True, "registers": 1},
        {"position": "rope(centred=True)", "class_token": True, "pool": "token_and_mean"},
        {"position": "rope", "mixer": "tape", "causal": True},
        {"position": "none", "mixer": "softmax(null=True, log_n=True)"},
        {"position": "none", "mixer": ("deltanet", "fnet")},
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
    choices = causally(mixer) | {"norm": "prepbn"}
    model = zoo.create_model("vit_micro", **(TINY | choices | ({} if choices["causal"] else {"channel": "ela"})))
    for training in (True, False):
        assert model.train(training)(torch.zeros(0, 3, 24, 20)).shape == (0, 5)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.all
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
