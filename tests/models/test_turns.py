"""Choices in turns, in every family: each block is that of its own choice, and what holds for a single choice holds."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import zoo
from helpers import prepared, randomise, relative
from zoo.choices import USES
from zoo.fusion import fuse
from zoo.models import configure, describe

VIT = {"dim": 32, "depth": 4, "heads": 2, "image": 16, "patch": 4, "classes": 5}
SPEECH = {"dim": 32, "depth": 4, "heads": 2, "mels": 20, "vocabulary": 11, "dropout": 0.0}
PYRAMID = {"dim": (16, 32), "depth": (2, 3), "heads": (2, 4), "image": 32, "classes": 5}
TURNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_micro",
        VIT
        | {"mixer": ("softmax", "sla"), "norm": ("prepbn", "layernorm", "batchnorm"), "channel": ("none", "eca", "se")}
        | {"placement": ("pre", "peri", "post", "sub"), "ffn": ("mlp", "swiglu"), "position": "rope"},
    ),
    "vit with convolutions": (
        "vit_micro",
        VIT
        | {"layout": ("conv", "mixer", "ffn"), "conv": ("glu(kernel=3)", "swish(kernel=5)")}
        | {"conv_norm": ("batchnorm", "layernorm", "prepbn"), "mixer": ("dcnv4", "window(size=2)", "pool")},
    ),
    "squeezeformer": (
        "squeezeformer_xs",
        SPEECH
        | {"mixer": ("relative", "sla", "dcnv4"), "norm": ("prepbn", "layernorm"), "channel": ("none", "se")}
        | {"placement": ("scaled", "pre"), "conv": ("swish(kernel=5)", "glu(kernel=7)")},
    ),
    "streaming conformer": (
        "conformer_ctc_s",
        SPEECH
        | {"mixer": ("relative", "softmax"), "norm": ("layernorm", "prepbn"), "conv_norm": ("layernorm", "batchnorm")}
        | {"chunk": 2, "left": 4, "subsampling": "conv4(padding='causal', channels=8)"},
    ),
    "efficient conformer": (
        "efficient_conformer_s",
        SPEECH
        | {"widths": (32, 40), "strided": (1,), "mixer": (("grouped(size=3)", "relative"), ("sla", "relative"))}
        | {"norm": ("batchnorm", ("layernorm", "prepbn")), "conv": ("glu(kernel=3)", "glu(kernel=5)")},
    ),
    "pyramid": (
        "davit_tiny",
        PYRAMID
        | {"mixer": ("sla", ("window(size=3)", "channel", "pool")), "norm": (("layernorm", "prepbn"), "batchnorm")}
        | {"ffn": ("swiglu", ("mlp", "mlp(ratio=2.0)")), "placement": ("pre", ("peri", "pre", "post"))}
        | {"channel": ("none", ("se", "none")), "conv": "depthwise"},
    ),
}
every_family = pytest.mark.parametrize("case", TURNS)


def build(case: str) -> Any:
    name, choices = TURNS[case]
    return zoo.create_model(name, **choices)


def given(case: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    if TURNS[case][1].keys() & {"mels"}:
        return torch.randn(2, 64, 20, generator=generator, dtype=dtype), torch.tensor([64, 45])
    return (torch.randn(2, 3, 24, 32, generator=generator, dtype=dtype),)


def logits(model: Any, case: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    output = model(*given(case, dtype))
    if isinstance(output, torch.Tensor):
        return output
    made, lengths = output
    return made.masked_fill(torch.arange(made.shape[1])[:, None] >= lengths[:, None, None], 0.0)


@every_family
def test_each_block_is_that_of_its_own_choices(case):
    """Blocks in turns compute what the blocks of configs compute that have a single choice each."""
    model = randomise(build(case)).eval()
    config = model.config
    blocks = [*model.blocks] if hasattr(model, "blocks") else [each for stage in model.stages for each in stage.blocks]
    places = [(stage, index) for stage, size in enumerate(config.stages) for index in range(size.depth)]
    assert len(blocks) == len(places)
    for number, ((stage, index), block) in enumerate(zip(places, blocks, strict=True)):
        if block.stride != 1:
            continue  # a strided block is halves of two stages
        one = config.block(stage, index)
        assert one.place.index == number and one.place.depth == len(blocks)
        alone = zoo.block.Block(one)
        alone.load_state_dict(block.state_dict())
        alone.eval()
        x = torch.randn(2, 12, one.dim)
        grid = (12,) if one.place.axes == 1 else (3, 4)
        context = zoo.layer.Context(grid=grid)
        if "rotary" in one.writes:
            context = model.position.place(context)
        assert torch.equal(alone(x, context), block(x, context))
        for name in ("mixer", "norm", "channel", "placement", "ffn", "conv", "conv_norm"):
            choice = getattr(config, name)
            choice = choice[stage] if config.staged and isinstance(choice, tuple) else choice
            assert getattr(one, name) == (choice if isinstance(choice, str) else choice[index % len(choice)])


@every_family
def test_a_step_of_training_lowers_the_loss(case):
    model = build(case).train()
    weight = torch.randn(logits(model, case).shape[-1])

    def loss() -> torch.Tensor:
        return (logits(model, case) * weight).square().mean()

    before = loss()
    before.backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    with torch.no_grad():
        length = sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt()
        for parameter in model.parameters():
            parameter -= 0.01 / length * parameter.grad
    assert loss() < before


@every_family
def test_folding_is_exact(case):
    model = prepared(build(case))
    fused = fuse(model)
    with torch.no_grad():
        assert relative(logits(fused, case, torch.float64), logits(model, case, torch.float64)) < 1e-12
    assert any(fold.into for fold in fused.fusion)


@every_family
def test_it_is_saved_and_loaded(case, tmp_path):
    model = randomise(build(case)).eval()
    zoo.advance(model, 1.0)
    folder = zoo.save_model(model, tmp_path / "kept", preset=TURNS[case][0])
    loaded = zoo.load_checkpoint(folder, check=True)
    assert loaded.model.config == model.config
    assert torch.equal(logits(loaded.model, case), logits(model, case))
    assert loaded.config["model"] == json.loads(json.dumps(asdict(model.config)))
    card = (folder / "README.md").read_text()
    assert f"| mixer | {model.config.described('mixer')} |" in card


def test_turns_are_shown_with_slashes_and_stages_with_commas(monkeypatch):
    monkeypatch.setitem(zoo.models.PRESETS, "turned", configure("vit_micro", mixer=("softmax", "sla")))
    staged = configure("davit_tiny", **TURNS["pyramid"][1])
    monkeypatch.setitem(zoo.models.PRESETS, "staged", staged)
    assert describe("turned")["fields"]["mixer"] == "softmax / sla"
    assert describe("staged")["fields"]["mixer"] == "sla, window(size=3) / channel / pool"


def test_turns_stream_as_they_run_offline():
    model = randomise(build("streaming conformer")).eval()
    zoo.advance(model, 1.0)
    features = torch.randn(1, 90, 20)
    stream = model.stream()
    with torch.no_grad():
        pieces = [stream.push(part) for part in features.split(7, 1)] + [stream.finish()]
        assert relative(torch.cat(pieces, 1), model(features)[0]) < 2e-6


@pytest.mark.all
@every_family
def test_it_is_exported(case):
    model = randomise(build(case)).eval()
    zoo.advance(model, 1.0)
    inputs = given(case)
    program = torch.export.export(model, inputs).module()
    got, wanted = program(*inputs), model(*inputs)
    pairs = [(got, wanted)] if isinstance(wanted, torch.Tensor) else [(got[0], wanted[0])]
    assert all(relative(one, other) < 1e-5 for one, other in pairs)


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("vit_micro", {"depth": 2, "mixer": ("softmax",) * 3}, "mixer must be 1 to 2 names for the"),
        ("vit_micro", {"mixer": ()}, "mixer must be 1 to 6 names"),
        (
            "vit_micro",
            {"mixer": (("softmax", "sla"), "sla")},
            "mixer must be a name, or a tuple of names that the blocks take in turn",
        ),
        ("vit_micro", {"mixer": ("softmax", 3)}, "mixer must be a name or a tuple of names, got ('softmax', 3)"),
        ("vit_micro", {"position": ("rope", "sincos")}, "position must be one name for all blocks, got"),
        (
            "vit_micro",
            {"mixer": ("softmax", "pool"), "position": "rope"},
            "blocks.1: mixer 'pool' does not read",
        ),
        ("vit_micro", {"mixer": ("softmax", "slo")}, "blocks.1: mixer: unknown name 'slo'; did you mean sla"),
        ("vit_micro", {"placement": ("pre", "sub"), "mixer": ("sla", "pool")}, "blocks.1: placement 'sub' needs the"),
        (
            "vit_micro",
            {"mixer": ("softmax", "pool"), "placement": ("hybrid", "pre", "pre")},
            "blocks.3: placement 'hybrid' needs the site 'query'; mixer 'pool' has: none",
        ),
        ("vit_micro", {"mixer": ("softmax", "softmax(kv_heads=2)")}, "blocks.1: mixer 'softmax(kv_heads=2)': kv_heads"),
        (
            "vit_micro",
            {"norm": ("layernorm", "groupnorm(groups=5)")},
            "blocks.1: norm 'groupnorm(groups=5)': groupnorm: groups must divide",
        ),
        ("vit_micro", {"norm": ("layernorm", "rms(")}, "norm: cannot read 'rms('"),
        ("vit_micro", {"patch": 0}, "image, patch and channels must be >= 1"),
        (
            "poolformer_s12",
            {"dim": (64, 120, 320, 512), "channel": "fca", "mixer": "pool"},
            "stages.1.blocks.0: ch",
        ),
        (
            "efficient_conformer_s",
            {"mixer": ("relative", ("relative", "loca"), "sla")},
            "blocks.6: mixer: unknown name",
        ),
        (
            "efficient_conformer_s",
            {"depth": 4, "strided": (3,), "widths": (120, 168), "mixer": ("relative", "grouped")},
            "mixer 'grouped' would be ignored: no block has it",
        ),
        (
            "efficient_conformer_s",
            {"depth": 4, "strided": (0,), "widths": (120, 168), "mixer": "relative", "conv": ("glu(kernel=3)", "glu")},
            "conv 'glu(kernel=3)' would be ignored: no block has it",
        ),
        (
            "efficient_conformer_s",
            {"depth": 4, "strided": (3,), "widths": (120, 168), "mixer": ()},
            "mixer has 0 choices",
        ),
        ("vit_micro", {"layout": ("norm",)}, "layout has no branch"),
        ("vit_micro", {"layer_scale": float("nan")}, "layer_scale must be finite, got nan"),
        ("vit_micro", {"position": "rope(base=0)"}, "position 'rope(base=0)': rope: base must be > 0"),
        ("vit_micro", {"modulate": True, "modulation": "none"}, "contradict each other"),
        ("conformer_ctc_s", {"mixers": ("relative", "sla")}, "mixers would be ignored: strided lists no block"),
        ("vit_micro", {"conv": ("glu", "swish")}, "conv 'glu / swish' would be ignored: the layout has no conv"),
        ("deit_tiny", {"channel": ("none", "none", "ela")}, "blocks.2: channel 'ela' does not read prefix"),
        (
            "vit_micro",
            {"mixer": ("softmax", "softmax(head_dim=16)"), "position": "rope"},
            "position 'rope' needs heads of one width, got [16, 32]",
        ),
        (
            "davit_tiny",
            {"mixer": ("sla", ("pool", "local"), "sla", "sla")},
            "stages.1.blocks.1: mixer 'local' works",
        ),
        ("davit_tiny", {"norm": ("layernorm", "rmsnorm")}, "norm has 2 choices for 4 stages"),
        (
            "davit_tiny",
            {"mixer": (("sla",) * 3, "sla", "sla", "sla")},
            "mixer must be 1 to 2 names for the 2 blocks in stage 0",
        ),
        ("conformer_ctc_s", {"mixer": ("relative", "window"), "chunk": 2}, "blocks.1: mixer 'window' does not read"),
        (
            "conformer_ctc_s",
            {"mixer": ("relative", "relative(window=4)"), "chunk": 2, "subsampling": "conv4(padding='causal')"},
            "blocks.1: mixer 'relative(window=4)' does not read visible, which this model, which works in chunks, sets",
        ),
        (
            "efficient_conformer_s",
            {"conv": ("glu", "swish", "glu")},
            "stages need conv 'glu', got 'glu, swish",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_names_the_field_or_the_block(name, choices, words):
    with pytest.raises(ValueError) as caught:
        zoo.create_model(name, **choices)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_choice_that_is_one_name_may_be_a_tuple_of_that_name():
    """A tuple of one name is that name, for every preset."""
    for name in ("vit_micro", "squeezeformer_xs", "poolformer_s12"):
        config: Any = configure(name)
        for field in zoo.config.CHOICES:
            single = getattr(config, field)
            if isinstance(single, str) and {*USES.get(field, config.words)} & {*config.words}:
                turned = replace(config, **{field: ((single,) if not config.staged else (single,) * 4)})
                assert [turned.block(0, index) for index in range(2)] == [config.block(0, index) for index in range(2)]


def test_heads_have_to_divide_dim_only_where_there_is_a_mixer():
    assert zoo.create_model("vit_micro", layout=("ffn",), heads=5)(torch.randn(1, 3, 8, 8)).shape == (1, 1000)
    with pytest.raises(ValueError, match="heads must divide dim 96, got 5; choose heads that do, or give head_dim"):
        zoo.create_model("vit_micro", heads=5)
    with pytest.raises(ValueError, match="heads must divide dim 96, got 5; choose heads that do$"):
        zoo.create_model("vit_micro", heads=5, mixer="window")


def test_whole_numbers_stand_for_real_ones():
    model = zoo.create_model("vit_micro", layer_scale=1, drop_path=0, norm="dyt(alpha=1)", ffn="mlp(ratio=2)")
    assert model.config.layer_scale == 1.0 and isinstance(model.config.layer_scale, float)
    assert model.blocks[0].steps[0].before.alpha.dtype == torch.float32
