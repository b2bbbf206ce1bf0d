"""Diffusion models with stages down and up: padding, published sizes, conditions, stages, refused configs. The whole
function of DiCo is compared with a naive form in tests/convert/test_dico.py."""

import copy
from typing import Any

import pytest
import torch

import zoo
from generating import check_conditions, check_padding, check_start_and_gradients
from helpers import prepared, relative
from zoo.models import PRESETS
from zoo.models.base import count_parameters
from zoo.models.udit import UDiTConfig
from zoo.weights.trunks import misfits

TINY = {"dim": (8, 16, 32, 16, 12), "depth": (1, 2, 1, 1, 2), "heads": (2, 2, 2, 2, 2)}
TINY |= {"image": 8, "channels": 3, "classes": 5}
FORMS: dict[str, dict[str, Any]] = {
    "dico": {},
    "adaln_single": {"modulation": "adaln_single", "patch": 2},
    "tdn": {
        "modulation": "tdn",
        "norm": "rmsnorm(affine=False)",
        "class_tokens": 2,
        "mixer": ("dico", "dico", "softmax", "softmax", "dico"),
        "position": ("none", "sincos", "learned", "rope", "none"),
    },
    "mixers": {"mixer": ("dico", "dcnv4", "sla", ("pool",), ("dcnv4", "dico")), "position": "sincos"},
    "until": {"until": True, "dim": (8,), "depth": (2,), "heads": (2,)},
    "variance": {"schedule": "ddpm", "prediction": "noise", "variance": True, "patch": 3},
}


def build(name: str = "dico", **choices: Any) -> Any:
    """A tiny model in fp64 whose zeros are moved off."""
    return prepared(UDiTConfig(**TINY | FORMS[name] | choices).build()).eval()


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing(name):
    check_padding(build(name))


@pytest.mark.parametrize("name", FORMS)
def test_time_label_and_a_batch_mate(name):
    check_conditions(build(name), 1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_it_starts_at_zero_and_every_parameter_gets_a_gradient(name):
    check_start_and_gradients(UDiTConfig(**TINY | FORMS[name]).build())


def test_blocks_start_as_the_identity():
    """Each stage is what leads to it, and nothing else."""
    model = UDiTConfig(**TINY).build()
    x, time, labels = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([1])
    maps = model.features(x, time=time, labels=labels)
    stages: Any = model.stages
    assert torch.equal(maps[0], model.stem.conv(x))
    wide = torch.nn.functional.pixel_unshuffle(stages[1].down.conv(maps[0]), 2)
    assert torch.allclose(maps[1], wide, atol=1e-6)
    fine = torch.nn.functional.pixel_shuffle(stages[3].up.conv(maps[2]), 2)
    both = torch.einsum("bchw,dc->bdhw", torch.cat([fine, maps[1]], 1), stages[3].up.out.weight)
    assert torch.allclose(maps[3], both, atol=1e-6)


@torch.no_grad()
def test_features_are_maps_of_the_stages():
    model = build(patch=2)
    x = torch.randn(1, 3, 18, 11).double()
    maps = model.features(x)
    assert model.strides == [2, 4, 8, 4, 2] and model.channels == [8, 16, 32, 16, 12]
    sides = [(9, 6), (5, 3), (3, 2), (5, 3), (9, 6)]
    assert [tuple(each.shape[1:]) for each in maps] == [(c, *s) for c, s in zip(model.channels, sides, strict=True)]
    assert torch.equal(model.features(x, [-2])[0], maps[3])
    seen = []
    model.norm.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model(x, torch.zeros(1))
    assert torch.equal(seen[0], maps[-1].flatten(2).transpose(1, 2))


def test_stages_of_one_width_share_their_embeddings():
    model = UDiTConfig(**TINY | {"dim": (8, 16, 32, 16, 16)}).build()
    assert [each.label_table.embedding_dim for each in model.embeddings] == [8, 16, 32]
    assert model.embedding_of == [0, 1, 2, 1, 1]
    more = UDiTConfig(**TINY | {"dim": (8, 16, 32, 16, 16), "classes": 7}).build()
    changed = misfits(more.state_dict(), model.state_dict())
    assert len(changed) == 3 and all(name.startswith(model.replaceable) for name in changed)


# Sizes

PUBLISHED = {"s": (33, 4.25), "b": (130, 16.9), "l": (464, 60.2), "xl": (701, 87.3)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_dico_has_the_published_size(size):
    """Millions of parameters, and billions of multiply-adds, of which the published figures count those of single
    values, too: five for each value of a block, the scales, gates and channel attention."""
    with torch.device("meta"):
        model: Any = zoo.create_model(f"dico_{size}")
    config, (millions, products) = model.config, PUBLISHED[size]
    assert round(count_parameters(model) / 1e6) == millions
    tokens = [(32 // config.stride(stage)) ** 2 for stage in range(5)]
    total = tokens[0] * 9 * 4 * config.dim[0] + tokens[4] * (9 * 8 + 1) * config.dim[4]
    for stage, (count, dim) in enumerate(zip(tokens, config.dim, strict=True)):
        block = count * (6 * dim**2 + 9 * dim + 5 * dim) + dim**2 + 6 * dim**2
        if 0 < stage <= 2:
            total += tokens[stage - 1] * 9 * config.dim[stage - 1] * dim // 4
        elif stage > 2:
            skip = config.dim[4 - stage]
            total += tokens[stage - 1] * 9 * config.dim[stage - 1] * 4 * skip + count * 2 * skip * dim
        total += config.depth[stage] * block
    widths = sorted({*config.dim})
    total += sum(256 * dim + dim**2 for dim in widths) + 2 * config.dim[4] ** 2
    assert total / 1e9 == pytest.approx(products, abs=0.005 if products < 10 else 0.05)


def test_presets_have_names_of_their_sizes():
    found = {name for name, config in PRESETS.items() if isinstance(config, UDiTConfig)}
    assert found == {f"dico_{size}" for size in (*PUBLISHED, "micro")}


# Programs and files


@pytest.mark.parametrize("name", ["dico", "tdn"])
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
    model = build(norm=("layernorm(affine=False)", "dyt", "layernorm", "dyt", "layernorm"))
    x, time, labels = torch.randn(2, 3, 9, 8).double(), torch.rand(2).double(), torch.tensor([0, 5])
    wanted = model(x, time, labels)
    assert relative(zoo.fuse(copy.deepcopy(model))(x, time, labels), wanted) < 1e-12


@pytest.mark.all
@pytest.mark.parametrize("name", ["tdn", "mixers", "variance"])
def test_it_compiles_as_one_graph_and_exports(name):
    torch._dynamo.reset()
    model = build(name)
    x, time, labels = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), torch.tensor([0, 5])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x, time, labels), model(x, time, labels)) < 1e-12
    height, width = (torch.export.Dim(each, min=16, max=64) for each in ("height", "width"))
    batch = torch.export.Dim("batch", min=4, max=64)
    free = {"x": {0: batch, 2: height, 3: width}, "time": {0: batch}, "labels": {0: batch}}
    example = (torch.randn(5, 3, 19, 26).double(), torch.rand(5).double(), torch.arange(5))
    program = torch.export.export(model, example, dynamic_shapes=free, strict=False).module()
    for size in ((16, 24), (17, 22)):
        given = (torch.randn(4, 3, *size).double(), torch.rand(4).double(), torch.arange(4))
        assert relative(program(*given), model(*given)) < 1e-12


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"dim": (8, 16)}, ["odd number of stages", "(8, 16)"]),
        ({"dim": (8, 16, 16, 8), "depth": (1,) * 4, "heads": (1,) * 4}, ["odd number of stages"]),
        ({"depth": (1, 0, 1, 1, 1)}, ["depth must be >= 1"]),
        ({"dim": (8, 18, 32, 16, 12)}, ["multiple of 4", "18"]),
        ({"mixer": ("dico", "dico")}, ["2 choices for 5 stages"]),
        ({"modulation": "tdn"}, ["does not see the class", "class_tokens"]),
        ({"modulation": ("adaln", "tdn", "tdn", "tdn", "tdn")}, ["same in all blocks"]),
        ({"class_tokens": 1}, ["stages.2.blocks.0", "mixer 'dico' does not read prefix"]),
        ({"norm": "batchnorm"}, ["norm 'batchnorm'", "statistics"]),
        ({"schedule": "ddpm"}, ["velocity", "schedule 'linear'"]),
        ({"patch": 0}, ["patch must be >= 1"]),
    ],
)
def test_refused_configs(choices, words):
    with pytest.raises(ValueError) as error:
        UDiTConfig(**TINY | choices).build()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_refused_inputs():
    model, x = UDiTConfig(**TINY).build(), torch.randn(1, 3, 8, 8)
    for arguments, message in (
        ((x, torch.tensor([1.5])), "time must be from 0"),
        ((x, torch.tensor([0.5]), torch.tensor([6])), "labels must be from 0 to 5"),
        ((x[:, :2], torch.tensor([0.5])), r"must be \[B, 3, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="takes no `until`"):
        model(x, torch.tensor([0.5]), until=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="takes no labels"):
        UDiTConfig(**TINY | {"classes": 0}).build()(x, torch.tensor([0.5]), torch.tensor([1]))
    with pytest.raises(ValueError, match="stage 5 does not exist"):
        model.features(x, [5])
