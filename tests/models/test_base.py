"""What every model has: a number of features, and no part that cannot be copied, pickled or quantized."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.choices import TABLES
from zoo.ffns import ACTIVATIONS
from zoo.heads import HEADS, SPEECH_HEADS
from zoo.outputs import transducer_greedy
from zoo.stems import REDUCTIONS, STEMS, SUBSAMPLINGS

SMALL = {"depth": 1, "dim": 32, "heads": 2}
SPEECH = {"mixer", "conv", "conv_norm", "norm", "position", "subsampling"}
PYRAMID = {"dim": (16, 32), "depth": (1, 1), "heads": (2, 4), "image": 32, "classes": 3, "ffn": "mlp"}
TINY = {"vit": SMALL | {"image": 16, "patch": 8, "classes": 3}, "pyramid": PYRAMID}
TINY["conformer"] = SMALL | {"mels": 16, "vocabulary": 9}


def small(preset: str, **choices: Any) -> nn.Module:
    from zoo.models import FAMILIES, PRESETS

    family = next(name for name, kind in FAMILIES.items() if type(PRESETS[preset]) is kind)
    return zoo.create_model(preset, **TINY[family] | choices)


def survives(model: nn.Module) -> None:
    """The model can be pickled and copied, with the same weights."""
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert twin.config == model.config
        wanted = model.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in twin.state_dict().items())


@pytest.mark.daily(8)
@pytest.mark.parametrize("name", zoo.list_models())
def test_every_preset_can_be_pickled(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    twin = pickle.loads(pickle.dumps(model))
    assert twin.config == model.config
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert model.num_features == model.channels[-1]


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    "field", [*sorted(set(TABLES) - {"cross", "modulation"}), "stem", "reduction", "head", "subsampling"]
)
def test_every_row_can_be_pickled(field):
    tables = TABLES | {"stem": STEMS, "reduction": REDUCTIONS, "head": HEADS, "subsampling": SUBSAMPLINGS}
    made = 0
    for row in tables[field]:
        for preset in ("pvt_sla_tiny", "conformer_ctc_s") if field in SPEECH else ("pvt_sla_tiny",):
            layout = {"layout": ("conv", "mixer", "ffn")} if field in ("conv", "conv_norm") else {}
            try:
                model = small(preset, **{field: row}, **layout)
            except ValueError:
                continue  # the other family takes it
            survives(model)
            made += 1
    assert made >= len(tables[field]) or field == "subsampling"


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "star_relu"])
def test_every_activation_can_be_pickled(activation):
    survives(small("vit_micro", ffn=f"mlp(activation={activation!r})"))


def test_heads_of_speech_models_can_be_pickled():
    for head in SPEECH_HEADS:
        survives(small("conformer_s", head=head))


def quantized(model: nn.Module, *kinds: type[nn.Module]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model.eval(), set(kinds), dtype=torch.qint8)


@pytest.mark.parametrize("kinds", [(nn.Linear,), (nn.Linear, nn.LSTM)])
def test_a_quantized_transducer_searches(kinds):
    model = quantized(small("conformer_s", head="transducer(hidden=16)"), *kinds)
    tokens, lengths = model(torch.randn(2, 80, 16))
    assert len(transducer_greedy(model.head, tokens, lengths)) == 2


@torch.no_grad()
def test_a_quantized_model_streams():
    torch.manual_seed(0)
    choices = {"chunk": 2, "left": 4, "subsampling": "depthwise4(padding='causal')", "conv_norm": "layernorm"}
    model, features = small("conformer_ctc_s", **choices).eval(), torch.randn(1, 95, 16)
    wanted, got = model(features)[0], quantized(model, nn.Linear).stream()
    logits = torch.cat([got.push(features[:, :40]), got.push(features[:, 40:]), got.finish()], 1)
    assert logits.shape == wanted.shape and (logits - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("preset", ["vit_micro", "pvt_sla_tiny", "poolformer_s12", "flash_internimage_t"])
def test_a_quantized_classifier_answers(preset):
    model = small(preset).eval()
    images = torch.randn(1, 3, 32, 32)
    wanted, got = model(images), quantized(copy.deepcopy(model), nn.Linear)(images)
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()


ZERO = [("ffn", "mlp(ratio=0.0)"), ("ffn", "swiglu(ratio=0.0)"), ("mixer", "sepconv(ratio=0.01)")]
ZERO += [("head", "mlp(ratio=0.0)"), ("head", "conv(ratio=0.0)"), ("ffn", "mlp(ratio=1e300)")]
ZERO += [("head", "mlp(ratio=1e6)"), ("ffn", "swiglu(ratio=1e6)")]


@pytest.mark.parametrize("field, spec", ZERO)
def test_a_layer_without_channels_or_with_too_many_is_refused(field, spec):
    with pytest.raises(ValueError, match=f"^(.*: )?{field} '.*': ratio must give 1 to 1,000,000 hidden channels"):
        small("pvt_sla_tiny", **{field: spec})


def test_refusals_name_the_field():
    with pytest.raises(ValueError, match=r"^head 'transducer\(dropout=2.0\)': dropout must be < 1, got 2.0$"):
        small("conformer_s", head="transducer(dropout=2.0)")
    one = {"dim": (16,), "depth": (1,), "heads": (2,)}
    with pytest.raises(ValueError, match=r"^reduction 'conv\(kernel=3, padding=1\)' would be ignored"):
        small("poolformer_s12", **one, reduction="conv(kernel=3, padding=1)")
    assert small("poolformer_s12", **one, reduction="conv").num_features == 16


@pytest.mark.parametrize("field", ["depth", "dim", "heads", "patch", "image", "classes", "registers"])
def test_absurd_sizes_are_refused_before_anything_is_built(field):
    with pytest.raises(ValueError, match=f"^{field} must be <= [0-9,]+, got 1000000000000000000000000000000$"):
        small("vit_micro", **{field: 10**30})
    with pytest.raises(ValueError, match="option kernel of 'dcnv4' must be <= 1,000"):
        small("vit_micro", mixer="dcnv4(kernel=1000000)")
    for mixer, option in (
        ("moa", "experts"),
        ("softmax", "head_dim"),
        ("ecoformer", "anchors"),
        ("mla", "rotary"),
        ("latte", "latents"),
    ):
        with pytest.raises(ValueError, match=f"option {option} of '{mixer}' must be <= [0-9,]+, got"):
            small("vit_micro", mixer=f"{mixer}({option}=1000000)")


# torch.jit.trace

TRACED = [
    ("vit_micro", {"mixer": mixer})
    for mixer in ("softmax", "window", "area", "sla", "dcnv4", "pool", "sepconv", "channel")
]
TRACED += [("vit_micro", {"position": position}) for position in ("learned", "rope", "alibi", "cpe")]
TRACED += [("vit_micro", {"norm": norm}) for norm in ("prepbn", "batchnorm", "rmsnorm", "groupnorm")]
TRACED += [("vit_micro", {"channel": channel}) for channel in ("se", "eca", "fca")]
TRACED += [("poolformer_s12", {}), ("pvt_sla_tiny", {}), ("flash_internimage_t", {})]
TRACED += [
    ("conformer_ctc_s", {"mixer": mixer})
    for mixer in ("relative", "relative(window=8)", "grouped", "local", "sla", "dcnv4")
]
TRACED += [("squeezeformer_xs", {"depth": 3}), ("fastconformer_s", {})]


@pytest.mark.all
@pytest.mark.parametrize("preset, choices", TRACED, ids=lambda value: str(value))
def test_a_model_can_be_traced(preset, choices):
    """As timm's models can; the program of a model whose weights do not depend on the size takes other sizes too."""
    model: Any = small(preset, **choices).eval()
    speech = model.config.input == "audio"
    one, other = (
        (torch.randn(2, 80, 16), torch.randn(1, 131, 16))
        if speech
        else (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 40, 56))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (one,))
    with torch.no_grad():
        for inputs in (one,) if choices.get("position") == "learned" else (one, other):
            got, wanted = traced(inputs), model(inputs)
            for a, b in zip(got, wanted, strict=True) if speech else ((got, wanted),):
                assert torch.equal(a, b) or (a - b).abs().max() < 1e-5 * b.abs().max()


def test_a_quantized_model_is_not_fused():
    with pytest.raises(ValueError, match=r"^'blocks.0.*' is quantized .*; fuse the model before quantizing it$"):
        zoo.fuse(quantized(small("vit_micro", norm="batchnorm"), nn.Linear))
    assert quantized(zoo.fuse(small("vit_micro", norm="batchnorm")), nn.Linear)(torch.randn(1, 3, 16, 16)).shape == (
        1,
        3,
    )
