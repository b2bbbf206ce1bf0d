"""Conversions of DiT, SiT and REPA, and back."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from helpers import prepared, relative
from zoo.convert import from_dit, to_dit
from zoo.inputs.latents import LatentPreprocess
from zoo.models.dit import DiT, DiTConfig
from zoo.schedules import SCHEDULES
from zoo.tasks.predicting import load_for


def original(kind: str, **fields: Any) -> tuple[dict[str, Tensor], DiT]:
    """Random weights in the original layout, and a model with them in our own terms of DiT, SiT or REPA."""
    names = {"dit": {"time": "sincos(count=True)", "schedule": "ddpm", "prediction": "noise"}}
    names |= {"sit": {"time": "sincos(scale=1.0, reverse=True)"}, "repa": {"time": "sincos(scale=1.0)"}}
    config = DiTConfig(dim=32, depth=2, heads=2, image=8, classes=5, **names[kind] | fields)
    model: Any = prepared(config.build()).eval()
    return to_dit(model), model


@pytest.mark.parametrize("kind", ["dit", "sit", "repa"])
@torch.no_grad()
def test_the_way_back(kind, tmp_path):
    state, model = original(kind, **({"variance": True} if kind == "dit" else {}))
    names = {name.split(".", 2)[2] for name in state if name.startswith("blocks.0.")}
    assert {"attn.qkv.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc2.bias", "adaLN_modulation.1.bias"} <= names
    assert state["pos_embed"].shape == (1, 16, 32) and state["blocks.1.adaLN_modulation.1.weight"].shape == (192, 32)
    torch.save({"ema": state, "args": __import__("argparse").Namespace(a=1)}, tmp_path / "file.pt")
    again = from_dit(tmp_path / "file.pt", kind, heads=2)
    assert again.config == model.config
    assert again.preprocess == LatentPreprocess(size=8, std=(1 / 0.18215,) * 4, decoder="stabilityai/sd-vae-ft-ema")
    x, time, labels = torch.randn(2, 4, 8, 8).double(), torch.tensor([0.1, 0.8]).double(), torch.tensor([1, 5])
    assert torch.equal(again(x, time, labels), model(x, time, labels))
    assert all(torch.equal(each, to_dit(again)[name]) for name, each in state.items())


@torch.no_grad()
def test_the_time_and_the_sign_of_sit():
    """A SiT model counts from the noise and predicts data - noise; the naive form calls DiT's layers so."""
    state, _ = original("sit")
    wide = {name: each.clone() for name, each in state.items()}
    for leaf in ("weight", "bias"):  # SiT has as many channels again that it does not use
        tensor = state[f"final_layer.linear.{leaf}"].unflatten(0, (4, 1, 4))
        wide[f"final_layer.linear.{leaf}"] = torch.cat([tensor, torch.randn_like(tensor)], 1).flatten(0, 2)
    ours = from_dit(wide, "sit", heads=2)
    forward = from_dit(state, "repa", heads=2)  # the same weights, as a function of SiT's own time
    x, time, labels = torch.randn(2, 4, 8, 8).double(), torch.tensor([0.3, 0.6]).double(), torch.tensor([1, 5])
    assert relative(ours(x, time, labels), -forward(x, 1 - time, labels)) < 1e-6
    data, noise = SCHEDULES["linear"].level(time)
    assert torch.equal(data, 1 - time) and torch.equal(noise, time)


def test_a_converted_model_is_saved_with_its_latents(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no names of classes
        zoo.save_model(from_dit(original("sit")[0], "sit", heads=2).float(), tmp_path / "sit")
    found = load_for("generate", str(tmp_path / "sit"))
    latents = torch.randn(4, 8, 8)
    assert torch.allclose(found.preprocess(latents), latents * 0.18215)  # pyright: ignore[reportOptionalCall]
    state, _ = original("repa", channels=6)
    assert from_dit(state, "repa", heads=2).preprocess is None  # of another autoencoder


def test_refused():
    state, model = original("dit")
    for change, message in (
        ({"heads": None}, "width 32 is not a published one"),
        ({"kind": "jit"}, "kind: unknown name 'jit'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dit(state, **{"heads": 2} | change)  # pyright: ignore
    with pytest.raises(ValueError, match="'blocks.1.mlp.fc1.bias' is missing"):
        from_dit({name: each for name, each in state.items() if name != "blocks.1.mlp.fc1.bias"}, heads=2)
    with pytest.raises(ValueError, match="'extra' is not used"):
        from_dit(state | {"extra": torch.ones(1)}, heads=2)
    with pytest.raises(ValueError, match="not the fixed table"):
        from_dit(state | {"pos_embed": state["pos_embed"].flip(-1)}, heads=2)
    with pytest.raises(ValueError, match="has its layout"):
        to_dit(DiTConfig(dim=32, depth=1, heads=2, image=8, mixer="sla").build())
    with pytest.raises(ValueError, match="has its layout"):
        to_dit(DiTConfig(dim=32, depth=1, heads=2, image=8, classes=0, time="sincos(scale=1.0)").build())
    assert model.config.variance is False
