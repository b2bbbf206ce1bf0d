"""Diffusion models with branches of several resolutions: the published wiring and sizes, padding, further predictions,
programs, files, refused configs."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from generating import check_conditions, check_gradients, check_padding
from helpers import prepared, relative
from zoo.models import PRESETS
from zoo.models.base import count_parameters
from zoo.models.dimr import DiMRConfig
from zoo.schedules import SCHEDULES
from zoo.weights.trunks import misfits

TINY = {"dim": (32, 16), "depth": (5, 3), "heads": (2, 2), "image": 8, "channels": 3, "classes": 5}
FORMS: dict[str, dict[str, Any]] = {
    "published": {"schedule": "ddpm", "prediction": "noise"},
    "three branches": {
        "dim": (16, 12, 8),
        "depth": (3, 1, 3),
        "heads": (2, 2, 2),
        "patch": 2,
        "class_tokens": 2,
        "fine_layout": ("mixer", "ffn"),
        "mixer": ("softmax", ("sla",), ("dcnv4", "dico")),
        "position": ("sincos", "none", "none"),
    },
    "adaln": {"modulation": "adaln", "norm": "layernorm(affine=False)", "class_tokens": 0, "until": True},
    "adaln_single": {"modulation": "adaln_single", "position": ("rope", "none"), "depth": (1, 1)},
    "variance": {"schedule": "ddpm", "prediction": "noise", "variance": True, "patch": 3}
    | {"modulation": "tdn(shift=True)"},
}


def build(name: str = "published", **choices: Any) -> Any:
    """A tiny model in fp64 whose zeros are moved off."""
    return prepared(DiMRConfig(**TINY | FORMS[name] | choices).build()).eval()


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing(name):
    check_padding(build(name))


@pytest.mark.parametrize("name", FORMS)
def test_time_label_and_a_batch_mate(name):
    check_conditions(build(name), 1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_gets_a_gradient_from_the_predictions(name):
    model = DiMRConfig(**TINY | FORMS[name]).build()
    check_gradients(model, model.predictions)


# The published wiring


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def moved(part: Any, ratio: Tensor) -> Tensor:
    share = torch.sigmoid(part.weight * ratio[:, None] / 4 + part.bias)
    return (share * part.first + (1 - share) * part.second)[:, None]


def adjusted(layer: Any, x: Tensor, ratio: Tensor) -> Tensor:
    """TD-LN."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y * moved(layer.modulation, ratio) + moved(layer.modulation.shift, ratio)


def normed(step: Any, x: Tensor, ratio: Tensor) -> Tensor:
    """TD-RMSN."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * moved(step.modulation, ratio)


def feed_forward(step: Any, x: Tensor, ratio: Tensor) -> Tensor:
    gate, value = linear(step.branch.expand, normed(step, x, ratio)).chunk(2, -1)
    return x + linear(step.branch.out, F.gelu(gate) * value)


def attention(step: Any, x: Tensor, ratio: Tensor) -> Tensor:
    parts = linear(step.branch.qkv, normed(step, x, ratio)).chunk(3, -1)
    query, key, value = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in parts)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return x + linear(step.branch.out, (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def convolution(step: Any, x: Tensor, ratio: Tensor) -> Tensor:
    """7 x 7, each channel by itself, without a norm."""
    conv = step.branch.conv
    maps = F.conv2d(on_map(x, 8), conv.weight, conv.bias, padding=3, groups=x.shape[-1])
    return x + maps.flatten(2).transpose(1, 2)


def on_map(tokens: Tensor, side: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def blocks(branch: Any, x: Tensor, ratio: Tensor) -> list[Tensor]:
    """What goes into the first block, and what comes out of each; a stack of those before the middle is read behind."""
    mixed, seen, stack = attention if branch.up is None else convolution, [x], []
    half = len(branch.blocks) // 2
    for index, block in enumerate(branch.blocks):
        if index > half:
            x = linear(branch.skips[index - half - 1], torch.cat([x, stack.pop()], -1))
        x = feed_forward(block.steps[1], mixed(block.steps[0], x, ratio), ratio)
        if index < half:
            stack.append(x)
        seen.append(x)
    return seen


@torch.no_grad()
def test_it_is_the_published_form():
    model, x = build(), torch.randn(2, 3, 8, 8).double()
    time, labels = torch.tensor([0.2, 0.7]).double(), torch.tensor([1, 5])
    ratio = SCHEDULES["ddpm"].log_ratio(time)
    coarse, fine = model.branches
    tokens = F.conv2d(x, coarse.stem.conv.weight, coarse.stem.conv.bias, stride=2).flatten(2).transpose(1, 2)
    tokens = tokens + coarse.position.table
    own = (model.tokens[0, 0] + model.embeddings[0].label_table.weight[labels])[:, None]
    seen = [each[:, 1:] for each in blocks(coarse, torch.cat([own, tokens], 1), ratio)]
    predicted = coarse.out(on_map(adjusted(coarse.norm, seen[-1], ratio), 4))

    wide = linear(fine.up.expand, adjusted(fine.up.before, torch.cat(seen, -1), ratio))
    raised = torch.zeros(2, 64, 16).double()
    for row in range(8):
        for column in range(8):
            part = 2 * (row % 2) + column % 2
            raised[:, 8 * row + column] = wide[:, 4 * (row // 2) + column // 2, 16 * part : 16 * part + 16]
    tokens = fine.stem.conv(x).flatten(2).transpose(1, 2)
    tokens = tokens + fine.position.table + adjusted(fine.up.after, raised, ratio)
    wanted = fine.out(on_map(adjusted(fine.norm, blocks(fine, tokens, ratio)[-1], ratio), 8))
    assert relative(model(x, time, labels), wanted) < 1e-10
    found = model.predictions(x, time, labels)
    assert len(found) == 2 and relative(found[0], predicted) < 1e-10 and relative(found[1], wanted) < 1e-10


@torch.no_grad()
def test_predictions_of_odd_sides():
    model = build("three branches")
    x, time, labels = torch.randn(1, 3, 9, 6).double(), torch.tensor([0.3]).double(), torch.tensor([2])
    found = model.predictions(x, time, labels)
    assert model.config.scales == (4, 2) and [tuple(each.shape[2:]) for each in found] == [(3, 2), (5, 3), (9, 6)]
    assert torch.equal(found[-1], model(x, time, labels))
    both = build("variance").predictions(x, time, labels)
    assert [each.shape[1] for each in both] == [3, 6]


@torch.no_grad()
def test_features_are_maps_of_the_branches():
    model = build("three branches")
    x = torch.randn(1, 3, 18, 11).double()
    maps = model.features(x)
    assert model.strides == [8, 4, 2] and model.channels == [16, 12, 8]
    assert [tuple(each.shape[1:]) for each in maps] == [(16, 3, 2), (12, 5, 3), (8, 9, 6)]
    assert torch.equal(model.features(x, [-2])[0], maps[1]) and model.features(x, []) == []
    seen = []
    model.branches[-1].norm.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model(x, torch.zeros(1))
    assert torch.equal(seen[0], maps[-1].flatten(2).transpose(1, 2))


def test_other_classes_change_only_the_label_tables():
    for name, number in (("published", 1), ("adaln", 2)):
        parts = [DiMRConfig(**TINY | FORMS[name] | {"classes": each}).build() for each in (5, 7)]
        changed = misfits(parts[1].state_dict(), parts[0].state_dict())
        assert len(changed) == number and all(each.startswith(parts[0].replaceable) for each in changed)


# Sizes

PUBLISHED = {"xl": (505, 160), "g": (1060, 331)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_it_has_the_published_size(size):
    """Millions of parameters, and billions of multiply-adds at 32 x 32 latents."""
    with torch.device("meta"):
        model: Any = zoo.create_model(f"dimr_{size}_2r")
    config, (millions, products) = model.config, PUBLISHED[size]
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.5 if size == "xl" else 5)
    (wide, narrow), (depth, fine_depth) = config.dim, config.depth
    coarse, fine = 16**2, 32**2
    seen = coarse + config.class_tokens
    total = depth * (seen * 10 * wide**2 + 2 * seen**2 * wide) + depth // 2 * seen * 2 * wide**2
    total += coarse * (depth + 1) * wide * 4 * narrow
    total += fine * (fine_depth * (49 * narrow + 6 * narrow**2) + fine_depth // 2 * 2 * narrow**2)
    total += coarse * (4 * 4 + 9 * 4) * wide + fine * (4 + 9 * 4) * narrow
    assert round(total / 1e9) == products


def test_presets_have_names_of_their_sizes():
    found = {name for name, config in PRESETS.items() if isinstance(config, DiMRConfig)}
    assert found == {f"dimr_{size}_2r" for size in PUBLISHED}


# Programs and files


@pytest.mark.parametrize("name", ["published", "adaln"])
def test_a_checkpoint_round_trips(name, tmp_path):
    model = build(name).float()
    zoo.save_model(model, tmp_path / "model")
    loaded = zoo.load_checkpoint(tmp_path / "model").model
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([0.4])
    assert torch.equal(loaded(x, time), model(x, time))


@torch.no_grad()
def test_autocast_keeps_the_stream_in_the_precision_of_the_weights():
    model = build().float()
    x, time = torch.randn(1, 3, 9, 8), torch.tensor([0.4])
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.features(x, time=time)
    assert {each.dtype for each in maps} == {torch.float32}
    for got, wanted in zip(maps, model.features(x, time=time), strict=True):
        assert 0 < relative(got, wanted) < 0.1


@torch.no_grad()
def test_a_fused_model_gives_the_same():
    model = build(norm=("dyt", "layernorm"))
    x, time, labels = torch.randn(2, 3, 9, 8).double(), torch.rand(2).double(), torch.tensor([0, 5])
    wanted = model(x, time, labels)
    assert relative(zoo.fuse(copy.deepcopy(model))(x, time, labels), wanted) < 1e-12


@pytest.mark.all
@pytest.mark.parametrize("name", ["published", "three branches", "adaln_single"])
def test_it_compiles_as_one_graph_and_exports(name):
    torch._dynamo.reset()
    model = build(name)
    x, time, labels = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), torch.tensor([0, 5])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x, time, labels), model(x, time, labels)) < 1e-12
    height, width = (torch.export.Dim(each, min=9, max=64) for each in ("height", "width"))
    batch = torch.export.Dim("batch", min=4, max=64)
    free = {"x": {0: batch, 2: height, 3: width}, "time": {0: batch}, "labels": {0: batch}}
    example = (torch.randn(5, 3, 19, 26).double(), torch.rand(5).double(), torch.arange(5))
    program = torch.export.export(model, example, dynamic_shapes=free, strict=False).module()
    for size in ((9, 24), (17, 22)):
        given = (torch.randn(4, 3, *size).double(), torch.rand(4).double(), torch.arange(4))
        assert relative(program(*given), model(*given)) < 1e-12


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"dim": (8,), "depth": (1,), "heads": (1,)}, ["at least two branches", "(8,)"]),
        ({"dim": (8, 16, 32)}, ["one number for each", "(8, 16, 32)"]),
        ({"depth": (4, 3)}, ["depth must be odd", "got 4"]),
        ({"depth": (3, 0)}, ["depth must be odd", "got 0"]),
        ({"mixer": ("softmax",)}, ["1 choices for 2 stages"]),
        ({"fine_layout": ("norm",)}, ["layout has no branch"]),
        ({"fine_layout": ("ffm",)}, ["layout: unknown branch 'ffm'", "ffn"]),
        ({"fine_layout": ("ffn",), "modulation": "adaln_single"}, ["as many entries in fine_layout as in layout"]),
        ({"position": "rope"}, ["branches.1.blocks.0", "position 'rope' would be ignored"]),
        ({"class_tokens": 0}, ["does not see the class", "class_tokens"]),
        ({"mixer": "dico"}, ["branches.0.blocks.0", "mixer 'dico' does not read prefix"]),
        ({"norm": "batchnorm"}, ["norm 'batchnorm'", "statistics"]),
        ({"until": True}, ["until needs a modulation"]),
    ],
)
def test_refused_configs(choices, words):
    with pytest.raises(ValueError) as error:
        DiMRConfig(**TINY | choices).build()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_refused_inputs():
    model, x = DiMRConfig(**TINY).build(), torch.randn(1, 3, 8, 8)
    for arguments, message in (
        ((x, torch.tensor([1.5])), "time must be from 0"),
        ((x, torch.tensor([0.5]), torch.tensor([6])), "labels must be from 0 to 5"),
        ((x[:, :2], torch.tensor([0.5])), r"must be \[B, 3, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="takes no `until`"):
        model(x, torch.tensor([0.5]), until=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="branch 2 does not exist"):
        model.features(x, [2])
