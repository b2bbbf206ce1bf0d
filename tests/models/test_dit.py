"""Diffusion transformers: the published function and sizes, padding, conditions, class tokens, refused configs."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from generating import check_conditions, check_padding, check_start_and_gradients
from helpers import prepared, relative
from zoo.layer import Context
from zoo.models import PRESETS
from zoo.models.base import count_parameters
from zoo.models.dit import DiTConfig
from zoo.spec import check
from zoo.stems.conditions import TIMES

TINY = {"dim": 32, "depth": 2, "heads": 2, "image": 8, "channels": 3, "classes": 5}
FORMS: dict[str, dict[str, Any]] = {
    "adaln": {},
    "adaln_single": {"modulation": "adaln_single"},
    "tdn": {"modulation": "tdn", "norm": "rmsnorm(affine=False)", "class_tokens": 1, "position": "learned"},
    "jit": {
        "class_tokens": 3,
        "class_block": 1,
        "mixer": "softmax(qk_norm='rmsnorm')",
        "position": "rope(absolute=True)",
        "ffn": "swiglu(multiple=1)",
        "norm": "rmsnorm",
        "bottleneck": 8,
        "prediction": "data",
    },
    "mixers": {"mixer": ("sla", "dcnv4"), "position": "none", "depth": 2},
    "until": {"until": True},
    "variance": {"schedule": "ddpm", "prediction": "noise", "variance": True},
    "decoupled": {"head_depth": 2, "head_dim": 48, "head_heads": 3, "class_tokens": 1, "until": True},
    "decoupled, one width": {"head_depth": 1, "modulation": "adaln_single", "position": "rope"},
    "crossed": {"layout": ("mixer", "cross", "ffn"), "modulation": "cross"},
    "text": {"layout": ("mixer", "cross", "ffn"), "memory_dim": 6, "modulation": ("adaln", "adaln(gate=False)")},
}


def build(name: str = "adaln", **choices: Any) -> Any:
    """A tiny model in fp64 whose zeros are moved off."""
    return prepared(DiTConfig(**TINY | FORMS[name] | choices).build()).eval()


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing(name):
    check_padding(build(name))


@pytest.mark.parametrize("name", FORMS)
def test_time_label_and_a_batch_mate(name):
    check_conditions(build(name), 1e-3)


@pytest.mark.parametrize("name", FORMS)
def test_it_starts_at_zero_and_every_parameter_gets_a_gradient(name):
    check_start_and_gradients(DiTConfig(**TINY | FORMS[name]).build())


def test_blocks_start_as_the_identity():
    model = DiTConfig(**TINY).build()
    tokens, context = model.embed(torch.randn(1, 3, 8, 8), None)
    cond = model.conditions(torch.tensor([0.5]), torch.tensor([1]), None).cond
    for block in model.blocks:
        assert torch.equal(block(tokens, context._replace(cond=cond)), tokens)
    layer = model.blocks[0].steps[0].branch.qkv
    bound = math.sqrt(6 / (32 + 96))
    assert layer.weight.abs().max() <= bound and layer.weight.detach().std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not layer.bias.any()


def test_a_naive_block_with_a_shared_linear():
    model: Any = build("adaln_single")
    block, x = model.blocks[1], torch.randn(2, 4, 32).double()
    embedding = torch.randn(2, 1, 32).double()
    shared = nn.functional.linear(nn.functional.silu(embedding), model.condition.weight, model.condition.bias)
    context = Context(grid=(2, 2), cond=model.condition(embedding))
    wanted = x
    for index, step in enumerate(block.steps):
        parts = shared[..., 96 * index : 96 * index + 96].unflatten(-1, (3, 32)) + step.modulation.table
        shift, scale, gate = parts.unbind(-2)
        normed = nn.functional.layer_norm(wanted, (32,), eps=1e-6)
        wanted = wanted + gate * step.branch(normed * (1 + scale) + shift, context)
    assert relative(block(x, context), wanted) < 1e-12


# Sizes

MILLIONS = {"s": 33.0, "b": 130.5, "l": 458.1, "xl": 675.1}
PRODUCTS = {"s_2": 6.06, "s_4": 1.41, "s_8": 0.36, "b_2": 23.01, "b_4": 5.57, "b_8": 1.42}
PRODUCTS |= {"l_2": 80.70, "l_4": 19.70, "l_8": 5.01, "xl_2": 118.62, "xl_4": 29.04, "xl_8": 7.39}


@pytest.mark.parametrize("size", PRODUCTS)
def test_dit_has_the_published_size(size):
    """Millions of parameters, with the fixed table of positions that theirs counts, and billions of multiply-adds."""
    with torch.device("meta"):
        model: Any = zoo.create_model(f"dit_{size}")
    config = model.config
    tokens, dim = (32 // config.patch) ** 2, config.dim
    if config.patch == 2:
        millions = (count_parameters(model) + tokens * dim) / 1e6
        assert millions == pytest.approx(MILLIONS[size.partition("_")[0]], abs=0.05)
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim + 6 * dim**2
    ends = tokens * dim * config.patch**2 * 12 + 256 * dim + dim**2 + 2 * dim**2
    assert (config.depth * block + ends) / 1e9 == pytest.approx(PRODUCTS[size], abs=0.006)


@pytest.mark.parametrize(("name", "millions"), [("jit_b_16", 131), ("jit_l_16", 459), ("jit_h_16", 953)])
def test_jit_has_the_published_size(name, millions):
    with torch.device("meta"):
        assert round(count_parameters(zoo.create_model(name)) / 1e6) == millions


@pytest.mark.parametrize(("name", "millions"), [("ddt_xl_2", 675), ("dit_dh_xl_1", 838)])
def test_decoupled_heads_have_the_published_size(name, millions):
    """DDT-XL/2 (22en6de) is published as 675 M, and DiT-DH-XL as 839 M."""
    with torch.device("meta"):
        assert round(count_parameters(zoo.create_model(name)) / 1e6) == millions


def test_lightningdit_has_the_published_size():
    """With the fixed table of positions that theirs counts."""
    with torch.device("meta"):
        assert round((count_parameters(zoo.create_model("lightningdit_xl_1")) + 256 * 1152) / 1e6) == 675


# Conditions


@pytest.mark.parametrize("reverse", [False, True])
def test_the_waves_of_a_time(reverse):
    waves = TIMES["sincos"](scale=1000.0, count=True, reverse=reverse)
    time = torch.tensor([0.001, 0.25, 1.0])
    place = 1000 * (1 - time if reverse else time).double() - 1
    rates = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    wanted = torch.cat([torch.cos(place[:, None] * rates), torch.sin(place[:, None] * rates)], 1)
    assert (waves(time) - wanted).abs().max() < 2e-4
    assert check(TIMES, "sincos(scale=1.0)")["scale"] == 1.0


def test_until_is_by_default_the_time_itself():
    model = build("until")
    x, time = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.5, 0.8]).double()
    assert torch.equal(model(x, time), model(x, time, until=time))
    assert (model(x, time) - model(x, time, until=time * 0)).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_maps_of_the_tokens():
    model = build("jit")
    x = torch.randn(1, 3, 10, 6).double()
    first, last = model.features(x, [0, -1])
    assert first.shape == last.shape == (1, 32, 5, 3) and model.strides == [2, 2] and model.channels == [32, 32]
    assert torch.equal(last, model.features(x)[1])
    seen = []
    model.norm.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model(x, torch.zeros(1))
    assert torch.equal(seen[0], last.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["adaln", "jit"])
def test_a_checkpoint_round_trips(name, tmp_path):
    model = build(name).float()
    zoo.save_model(model, tmp_path / "model")
    loaded = zoo.load_checkpoint(tmp_path / "model").model
    x, time = torch.randn(1, 3, 8, 8), torch.tensor([0.4])
    assert torch.equal(loaded(x, time), model(x, time))


@pytest.mark.all
@pytest.mark.parametrize("name", FORMS)
def test_it_compiles_as_one_graph_and_exports(name):
    torch._dynamo.reset()
    model = build(name)
    x, time, labels = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), torch.tensor([0, 5])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x, time, labels), model(x, time, labels)) < 1e-12
    batch, height, width = (torch.export.Dim(each, min=4, max=64) for each in ("batch", "height", "width"))
    free = {"x": {0: batch, 2: height, 3: width}, "time": {0: batch}, "labels": {0: batch}}
    example = (torch.randn(5, 3, 9, 14).double(), torch.rand(5).double(), torch.arange(5))
    program = torch.export.export(model, example, dynamic_shapes=free, strict=False).module()
    for size in ((8, 8), (7, 12)):
        given = (torch.randn(4, 3, *size).double(), torch.rand(4).double(), torch.arange(4))
        assert relative(program(*given), model(*given)) < 1e-12


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"norm": "batchnorm"}, ["norm 'batchnorm'", "statistics"]),
        ({"modulation": ("adaln", "tdn")}, ["same in all blocks", "adaln, tdn"]),
        ({"modulation": "tdn"}, ["does not see the class", "class_tokens"]),
        ({"schedule": "cosine"}, ["schedule", "linear, ddpm"]),
        ({"schedule": "ddpm"}, ["velocity", "schedule 'linear'"]),
        ({"prediction": "score"}, ["prediction", "velocity, noise, data"]),
        ({"prediction": "noise"}, ["prediction 'noise' needs schedule 'ddpm'"]),
        ({"variance": True}, ["variance needs"]),
        ({"class_block": 1}, ["class_tokens"]),
        ({"class_tokens": 1, "classes": 0}, ["class_tokens needs classes"]),
        ({"class_tokens": 1, "mixer": "dcnv4"}, ["does not read prefix"]),
        ({"time": "sincos(width=3)"}, ["width must be even"]),
        ({"time": "fourier"}, ["time", "sincos"]),
        ({"modulation": "none"}, ["does not see the time"]),
        ({"modulation": "tdn", "class_tokens": 1, "until": True}, ["until needs"]),
        ({"patch": 0}, ["patch must be >= 1"]),
    ],
)
def test_refused_configs(choices, words):
    with pytest.raises(ValueError) as error:
        DiTConfig(**TINY | choices).build()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.randn(1, 3, 8, 8), torch.tensor([1.5])), ["time must be from 0", "1.5"]),
        ((torch.randn(1, 3, 8, 8), torch.tensor([math.nan])), ["time must be from 0"]),
        ((torch.randn(1, 3, 8, 8), torch.tensor(0.5)), ["time must be floating point [B]"]),
        ((torch.randn(2, 3, 8, 8), torch.rand(3)), ["time must be [B], one for each of the 2 images, got [3]"]),
        ((torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1])), ["labels must be [B] as the 2 times, got [1]"]),
        ((torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([1.0])), ["labels must be integers [B]"]),
        ((torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([6])), ["labels must be from 0 to 5", "no class"]),
        ((torch.randn(1, 4, 8, 8), torch.tensor([0.5])), ["must be [B, 3, H, W]"]),
    ],
)
def test_refused_inputs(arguments, words):
    with pytest.raises(ValueError) as error:
        DiTConfig(**TINY).build()(*arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="takes no labels"):
        DiTConfig(**TINY | {"classes": 0}).build()(torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([1]))
    with pytest.raises(ValueError, match="takes no `until`"):
        DiTConfig(**TINY).build()(torch.randn(1, 3, 8, 8), torch.tensor([0.5]), until=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="until must be from 0, data, to 1, noise, got .2.0."):
        model = DiTConfig(**TINY | {"until": True}).build()
        model(torch.randn(1, 3, 8, 8), torch.tensor([0.5]), until=torch.tensor([2.0]))
    with pytest.raises(ValueError, match="image must be at least a patch of 2, got 1"):
        DiTConfig(**TINY | {"image": 1})


def test_presets_have_names_of_their_sizes():
    assert {name for name, config in PRESETS.items() if isinstance(config, DiTConfig)} == {
        *(f"dit_{size}" for size in (*PRODUCTS, "tiny", "micro")),
        *("jit_b_16", "jit_l_16", "jit_h_16", "lightningdit_xl_1", "lightningdit_b_1", "ddt_xl_2", "dit_dh_xl_1"),
    }
