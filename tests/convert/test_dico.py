"""Conversion of DiCo: equal to its formulas, written naively in its own names; and back."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from helpers import relative
from zoo.convert import from_dico, to_dico
from zoo.models.udit import UDiTConfig

DEPTHS = {"encoder_level_1": 2, "encoder_level_2": 1, "latent": 2, "decoder_level_2": 1, "decoder_level_1": 2}
WIDTHS = {"encoder_level_1": 1, "encoder_level_2": 2, "latent": 4, "decoder_level_2": 2, "decoder_level_1": 2}


def checkpoint(width: int = 8, classes: int = 5, ratio: int = 2) -> dict[str, Tensor]:
    """Random weights of a small DiCo, fp64, none of them zero."""
    torch.manual_seed(0)
    layers = {"x_embedder.proj": (width, 4, 3), "final_layer.out_proj": (8, 2 * width, 3)}
    layers |= {"final_layer.adaLN_modulation.1": (4 * width, 2 * width, 0)}
    layers |= {"reduce_chan_level2": (2 * width, 4 * width, 1), "reduce_chan_level1": (2 * width, 2 * width, 1)}
    for level in range(3):
        wide = width * 2**level
        layers |= {f"t_embedder_{level + 1}.mlp.0": (wide, 256, 0), f"t_embedder_{level + 1}.mlp.2": (wide, wide, 0)}
    for stage, depth in DEPTHS.items():
        wide = width * WIDTHS[stage]
        for index in range(depth):
            block = {"conv1": (wide, wide, 1), "conv2": (wide, 1, 3), "ca.1": (wide, wide, 1), "conv3": (wide, wide, 1)}
            block |= {"conv4": (ratio * wide, wide, 1), "conv5": (wide, ratio * wide, 1)}
            block |= {"adaLN_modulation.1": (6 * wide, wide, 0)}
            layers |= {f"{stage}.{index}.{name}": size for name, size in block.items()}
    state = {}
    for name, (outputs, inputs, kernel) in layers.items():
        size = (outputs, inputs, *([kernel] * 2 if kernel else []))
        state[f"{name}.weight"] = torch.randn(size).double() / math.sqrt(inputs * max(kernel, 1) ** 2)
        state[f"{name}.bias"] = 0.3 * torch.randn(outputs).double()
    for name, outputs, inputs in (
        ("down1_2", width // 2, width),
        ("down2_3", width, 2 * width),
        ("up3_2", 8 * width, 4 * width),
        ("up2_1", 4 * width, 2 * width),
    ):
        state[f"{name}.body.0.weight"] = torch.randn(outputs, inputs, 3, 3).double() / math.sqrt(9 * inputs)
    for level in range(3):
        state[f"y_embedder.embedding_table_{level}.weight"] = torch.randn(classes + 1, width * 2**level).double()
    return state


def waves_of(steps: Tensor) -> Tensor:
    angles = steps[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], 1).double()


def naive(state: dict[str, Tensor], x: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
    """DiCo on maps: U-shaped, with the condition of a width for all blocks of it."""

    def apply(name: str, y: Tensor, groups: int = 1) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return (
            F.linear(y, weight, bias)
            if weight.ndim == 2
            else F.conv2d(y, weight, bias, 1, weight.shape[2] // 2, 1, groups)
        )

    def condition(level: int) -> Tensor:
        time = apply(f"t_embedder_{level}.mlp.2", F.silu(apply(f"t_embedder_{level}.mlp.0", waves_of(steps))))
        return F.silu(time + state[f"y_embedder.embedding_table_{level - 1}.weight"][labels])

    def normed(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        return y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    def stage(name: str, y: Tensor, cond: Tensor) -> Tensor:
        for index in range(DEPTHS[name]):
            block = f"{name}.{index}"
            shift, scale, gate, late_shift, late_scale, late_gate = apply(f"{block}.adaLN_modulation.1", cond).chunk(
                6, 1
            )
            z = F.gelu(apply(f"{block}.conv2", apply(f"{block}.conv1", normed(y, shift, scale)), y.shape[1]))
            z = z * torch.sigmoid(apply(f"{block}.ca.1", z.mean((2, 3), keepdim=True)))
            y = y + gate[:, :, None, None] * apply(f"{block}.conv3", z)
            z = F.gelu(apply(f"{block}.conv4", normed(y, late_shift, late_scale)))
            y = y + late_gate[:, :, None, None] * apply(f"{block}.conv5", z)
        return y

    def raised(name: str, y: Tensor, skip: Tensor, joint: str) -> Tensor:
        return apply(joint, torch.cat([F.pixel_shuffle(apply(f"{name}.body.0", y), 2), skip], 1))

    first, second, third = (condition(level) for level in (1, 2, 3))
    fine = stage("encoder_level_1", apply("x_embedder.proj", x), first)
    coarse = stage("encoder_level_2", F.pixel_unshuffle(apply("down1_2.body.0", fine), 2), second)
    y = stage("latent", F.pixel_unshuffle(apply("down2_3.body.0", coarse), 2), third)
    y = stage("decoder_level_2", raised("up3_2", y, coarse, "reduce_chan_level2"), second)
    y = stage("decoder_level_1", raised("up2_1", y, fine, "reduce_chan_level1"), second)
    shift, scale = apply("final_layer.adaLN_modulation.1", second).chunk(2, 1)
    return apply("final_layer.out_proj", normed(y, shift, scale))


@torch.no_grad()
def test_equal_to_its_formulas():
    state = checkpoint()
    x, steps, labels = torch.randn(3, 4, 8, 12).double(), torch.tensor([0, 417, 999]), torch.tensor([0, 3, 5])
    model = from_dico(state, image=8)
    assert model.preprocess.size == 8 and model.preprocess.std == (1 / 0.18215,) * 4
    assert relative(model(x, (steps + 1) / 1000, labels), naive(state, x, steps, labels)) < 1e-6  # waves are fp32
    model = model.double()
    for each in model.embeddings:  # the same waves, in fp64
        each.time.waves.forward = lambda time: waves_of(steps)  # pyright: ignore
    assert relative(model(x, (steps + 1) / 1000, labels), naive(state, x, steps, labels)) < 1e-12


@torch.no_grad()
def test_the_way_back(tmp_path):
    state = checkpoint()
    torch.save({"ema": state, "args": __import__("argparse").Namespace(a=1)}, tmp_path / "file.pt")
    model = from_dico(tmp_path / "file.pt", image=8)
    again = to_dico(model)
    assert again.keys() == state.keys() and all(torch.equal(each, again[name]) for name, each in state.items())
    assert from_dico(again, image=8).config == model.config
    assert (model.config.depth, model.config.variance) == ((2, 1, 2, 1, 2), True)
    narrow = {name: each[:4] if name.startswith("final_layer.out_proj") else each for name, each in state.items()}
    assert not from_dico(narrow).config.variance


def test_a_published_size_is_the_preset():
    preset = zoo.create_model("dico_s")
    assert from_dico(to_dico(preset)).config == preset.config  # pyright: ignore


def test_refused(tmp_path):
    state = checkpoint()
    name = "latent.1.ca.1.bias"
    for given, message in (
        ({key: each for key, each in state.items() if key != name}, f"'{name}' is missing"),
        (state | {name: torch.ones(3)}, re.escape(f"'{name}' has shape [3], but this model needs [32]")),
        (state | {"extra": torch.ones(1)}, "'extra' is not used"),
        (state | {name: state[name] * math.nan}, "NaN or infinite"),
        ({"blocks.0.attn.qkv.weight": torch.ones(3, 1)}, "'x_embedder.proj.weight' is missing"),
        ({key: each for key, each in state.items() if not key.startswith("latent")}, "depth must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            from_dico(given)
        assert "\n" not in str(error.value)
    (tmp_path / "file.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"file\.pt cannot be read"):
        from_dico(tmp_path / "file.pt")
    small = {
        "depth": (1,) * 5,
        "heads": (1,) * 5,
        "time": "sincos(count=True)",
        "schedule": "ddpm",
        "prediction": "noise",
    }
    same = {"dim": (8, 16, 32, 16, 16), "classes": 5} | small
    to_dico(UDiTConfig(**same).build())
    for change in (
        {"mixer": "sepconv"},
        {"dim": (8, 16, 32, 16, 8)},
        {"patch": 2},
        {"schedule": "linear", "prediction": "velocity"},
        {"norm": "rmsnorm(affine=False)"},
        {"layer_scale": 0.1},
        {"classes": 0},
        {"dim": (8, 16, 8), "depth": (1,) * 3, "heads": (1,) * 3},
    ):
        with pytest.raises(ValueError, match="of DiCo has its layout"):
            to_dico(UDiTConfig(**same | change).build())
