"""Trained models with other layers: RMS norms that compute the same, and shared keys and values."""

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from helpers import randomise
from zoo.inputs.images import ImagePreprocess
from zoo.models import configure
from zoo.norms import LayerNorm
from zoo.weights import share_kv_heads, to_rmsnorm

EXACT = [name for name in zoo.list_models() if name.startswith(("vit_", "deit_"))]
KINDS = pytest.mark.parametrize("compressed", [False, True])


def vit(**choices: Any) -> Any:
    fields: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "image": 32, "patch": 8, "classes": 5}
    return randomise(zoo.create_model("vit_micro", **(fields | choices)).double()).eval()


def difference(model: Any, made: Any, images: Tensor, **more: Tensor) -> float:
    with torch.no_grad():
        old, new = model(images, **more), made(images, **more)
    assert old.shape == new.shape and old.abs().max() > 0.1
    return float((old - new).abs().max() / old.abs().max())


@pytest.mark.daily(4)
@KINDS
@pytest.mark.parametrize("name", EXACT)
def test_presets_compute_the_same(name: str, compressed: bool):
    model: Any = randomise(zoo.create_model(name, depth=2, image=64, layer_scale=0.5).double()).eval()
    made: Any = to_rmsnorm(model, compressed=compressed)
    assert difference(model, made, torch.randn(2, 3, 80, 48, dtype=torch.float64)) < 1e-12
    assert made.config.norm.startswith("crmsnorm" if compressed else "rmsnorm")
    assert made.config.dim == model.config.dim - compressed and not made.training
    assert not any(isinstance(part, LayerNorm) for part in made.modules())


REASONS = {
    "conformer_s": "the layout has a norm that writes the stream",
    "davit_tiny": "the layout has a convolution",
    "caformer_s18": "placement 'res_scale' has norms that do not read the stream",
    "flash_internimage_t": "only the family vit is exact; the stem and reductions of a Pyramid may have norms",
    "poolformer_s12": "norm 'groupnorm' cannot be converted",
    "dit_s_2": "the gates of modulation 'adaln' scale each channel by another factor",
    "dico_s": "the gates of modulation 'adaln' scale each channel by another factor",
    "jit_b_16": "norm 'rmsnorm' cannot be converted",
    "dimr_xl_2r": r"norm 'rmsnorm\(affine=False\)' cannot be converted",
    "rtdetr_vit_tiny": "placement 'post' has norms that do not read the stream",
    "detr_r50": "placement 'post' has norms that do not read the stream",
}


@pytest.mark.parametrize("name", REASONS)
def test_other_presets_are_refused(name: str):
    with torch.device("meta"):
        model = zoo.create_model(name)
    with pytest.raises(ValueError, match=f"^rmsnorm: {REASONS[name]}"):
        to_rmsnorm(model)


def test_every_family_is_exact_or_has_its_reason():
    families = {type(configure(name)) for name in zoo.list_models()}
    assert {type(configure(name)) for name in [*REASONS, *EXACT]} == families


FORMS: dict[str, dict[str, Any]] = {
    "learned positions, class token and registers": {"position": "learned", "class_token": True, "registers": 3},
    "a head of token and mean": {"class_token": True, "pool": "token_and_mean"},
    "two heads": {"class_token": True, "pool": "distilled", "position": "learned"},
    "norm after the mean": {"pool": "norm_after_mean"},
    "rotary positions": {"position": "rope"},
    "learned and rotary positions": {"position": "learned_rope"},
    "no positions": {"position": "none"},
    "swiglu": {"ffn": "swiglu", "position": "sincos(order='xy')"},
    "parallel branches": {"layout": ("mixer+ffn",)},
    "half feed-forward": {"layout": ("half", "mixer", "half"), "layer_scale": 0.1},
    "mixers alone": {"layout": ("mixer",)},
    "feed-forward layers alone": {"layout": ("ffn",)},
    "another eps": {"norm": "layernorm(eps=0.1)"},
    "norms without a bias": {"norm": "layernorm(bias=False)"},
    "norms in turn": {"norm": ("layernorm", "layernorm(affine=False)")},
    "no weights of norms": {"norm": "layernorm(affine=False)"},
    "no bias behind the branch": {"ffn": "mlp(out_bias=False)", "layer_scale": 0.2},
    "shared keys, normalized": {"mixer": "softmax(kv_heads=1, qk_norm='layernorm')"},
}


@KINDS
@pytest.mark.parametrize("form", FORMS)
def test_forms_compute_the_same(form: str, compressed: bool):
    model = vit(**FORMS[form])
    before = {name: each.clone() for name, each in model.state_dict().items()}
    made = to_rmsnorm(model, compressed=compressed)
    mask = torch.zeros(2, 40, 32, dtype=torch.bool)
    mask[0], mask[1, :24, :16] = True, True
    assert difference(model, made, torch.randn(2, 3, 40, 32, dtype=torch.float64), mask=mask) < 1e-12
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize(
    "fields", [{"classes": 0}, {"mixer": "softmax(bias=False)"}, {"position": "sine"}, {"mixer": "sla"}]
)
def test_a_bias_stays_in_the_norm_where_nothing_takes_it(fields: dict[str, Any]):
    model = vit(**fields)
    made = to_rmsnorm(model)
    assert difference(model, made, torch.randn(2, 3, 40, 32, dtype=torch.float64)) < 1e-12
    assert ("bias=True" in made.config.norm) == (fields != {"mixer": "sla"})
    with pytest.raises(ValueError, match=r"^crmsnorm: "):
        to_rmsnorm(model, compressed=True)


def test_a_converted_model_is_saved_and_trained(tmp_path):
    figure = {"data": "x", "split": "val", "metric": "accuracy", "value": 1.0, "n": 9, "interval": None, "command": ""}
    facts: Any = {"labels": [*"abcde"], "preprocess": ImagePreprocess(size=32), "license": "mit", "figures": [figure]}
    zoo.save_model(vit().float(), tmp_path / "model", **facts)
    model = zoo.load_model(tmp_path / "model")
    made = to_rmsnorm(model, compressed=True)
    assert next(made.parameters()).dtype == torch.float32
    again: Any = zoo.load_model(zoo.save_model(share_kv_heads(to_rmsnorm(model), 1), tmp_path / "shared"))
    assert again.labels == (*"abcde",) and again.about["figures"] == [] and again.about["license"] == "mit"
    again = zoo.load_model(zoo.save_model(made, tmp_path / "kept"))
    assert again.labels == (*"abcde",) and again.about["figures"] == [] and again.about["base"]["address"] == "model"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(made(images), again(images)) and difference(model, again, images) < 1e-5
    again.train()(images).sum().backward()
    assert all(each.grad is not None for each in again.parameters())


REFUSED: dict[str, dict[str, Any]] = {
    "norm 'rmsnorm' cannot be converted": {"norm": "rmsnorm"},
    "norm 'prepbn' cannot": {"norm": ("layernorm", "prepbn")},
    "placement 'peri'": {"placement": "peri"},
    "placement 'post'": {"placement": ("pre", "post")},
    "channel attention 'se'": {"channel": "se"},
    "layout has a norm": {"layout": ("mixer", "ffn", "norm")},
    "layout has a convolution": {"layout": ("mixer", "conv", "ffn")},
    "first_norm": {"first_norm": True},
    "pool 'attention'": {"pool": "attention"},
    "position 'cpe'": {"position": "cpe"},
    "position 'rope\\(absolute=True\\)'": {"position": "rope(absolute=True)"},
    "Pool has no output linear": {"mixer": "pool"},
}


@KINDS
@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_exact_is_refused(words: str, compressed: bool):
    with pytest.raises(ValueError, match=f"^c?rmsnorm: .*{words}"):
        to_rmsnorm(vit(**REFUSED[words]), compressed=compressed)


def test_a_fused_model_and_another_conversion_are_refused():
    with pytest.raises(ValueError, match="the model is fused"):
        to_rmsnorm(zoo.fuse(vit()))
    with pytest.raises(ValueError, match="cannot be converted"):
        to_rmsnorm(to_rmsnorm(vit()))


# Shared keys and values


@torch.no_grad()
def test_equal_heads_are_shared_without_a_change():
    model = vit(heads=4, mixer="softmax(qk_norm='rmsnorm')")
    for block in model.blocks:
        qkv = block.steps[0].branch.qkv
        for rows in (qkv.weight, qkv.bias):
            for start in (32, 64):
                heads = rows[start : start + 32].unflatten(0, (2, 2, 8))
                heads.copy_(heads[:, :1].expand_as(heads).clone())
    made = share_kv_heads(model, 2)
    assert made.config.mixer == "softmax(qk_norm='rmsnorm', kv_heads=2)"  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert difference(model, made, images) < 1e-12
    assert difference(model, share_kv_heads(made, 1), images) > 1e-3


def test_a_shared_head_is_the_mean():
    model = vit(heads=4, mixer=("softmax", "softmax(kv_heads=2)"))
    made: Any = share_kv_heads(model, 1)
    for index, heads in enumerate((4, 2)):
        old, new = (part.blocks[index].steps[0].branch.qkv.weight for part in (model, made))
        keys, values = old[32:].unflatten(0, (2, heads, 8)).mean(1)
        assert torch.equal(new[:32], old[:32]) and torch.allclose(new[32:], torch.cat([keys, values]))


def test_mixers_that_the_config_does_not_choose_stay():
    model: Any = zoo.create_model("rtdetr_micro", image=64, classes=2).eval()
    made: Any = share_kv_heads(model, 1)
    old, new = model.state_dict(), made.state_dict()
    changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.startswith("encoder") and ".qkv." in name} != set()


@pytest.mark.parametrize(
    ("fields", "number", "words"),
    [
        ({}, 3, "must divide"),
        ({"mixer": "softmax(kv_heads=1)"}, 2, "must divide the 1 that the model has"),
        ({"mixer": "sla"}, 1, "mixer 'sla' has no such option"),
        ({"mixer": "softmax(kv_heads=1)"}, 1, "has kv_heads=1 already"),
    ],
)
def test_heads_that_cannot_be_shared(fields: dict[str, Any], number: int, words: str):
    with pytest.raises(ValueError, match=words):
        share_kv_heads(vit(**fields), number)
