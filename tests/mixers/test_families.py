"""Every mixer in a detector and a diffusion model: it learns, or it is refused for a reason that it declares."""

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from helpers import randomise
from zoo.mixers import MIXERS

TRUNK = "timm:test_resnet"
SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2}
DETECTOR = SMALL | {"trunk": TRUNK, "queries": 6, "image": 64, "classes": 3, "encoder_depth": 2, "denoising": False}


def detected(model: Any) -> list[Tensor]:
    return [each for each in model(torch.randn(2, 3, 64, 64)).values() if each.requires_grad]


def denoised(model: Any) -> list[Tensor]:
    return [model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1]))]


# The preset, the field that takes the mixer, other fields, the axes of its tokens, what the model sets, how it runs.
FAMILIES: dict[str, Any] = {
    "encoder": ("rtdetr_micro", "mixer", DETECTOR, 2, {"code"}, detected),
    "decoder": ("rtdetr_micro", "decoder_mixer", DETECTOR, 1, {"code", "visible"}, detected),
    "diffusion": ("dit_micro", "mixer", SMALL | {"image": 8, "classes": 2}, 2, set(), denoised),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixer_runs_and_learns_or_is_refused(family, mixer):
    preset, field, fields, axes, sets, run = FAMILIES[family]
    row = MIXERS[mixer]
    try:
        model = zoo.create_model(preset, **fields, **{field: mixer})
    except ValueError as error:
        assert "\n" not in str(error) and f"'{mixer}'" in str(error)
        assert axes not in row.dimensions or row.causal or sets - row.reads_of(), error
        return
    assert axes in row.dimensions and not row.causal
    outputs = run(randomise(model).train())
    assert outputs and all(each.isfinite().all() for each in outputs)
    sum(each.square().mean() for each in outputs).backward()
    kinds = [module for module in model.modules() if type(module) is row]
    assert kinds
    for layer in kinds:
        assert all(each.grad is not None and each.grad.isfinite().all() for each in layer.parameters())
        assert not [*layer.parameters()] or any(bool(each.grad.any()) for each in layer.parameters())
