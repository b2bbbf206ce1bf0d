"""The loss to a frozen teacher: its value, what it trains, what it leaves alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import zoo
from detecting import fit
from zoo.tasks.alignment import Alignment
from zoo.tasks.detect.train import Detect

TEACHER = "poolformer_s12(dim=(8, 8, 16, 24), depth=(1, 1, 1, 1))"


@torch.no_grad()
def naive(module: Alignment, tokens: torch.Tensor, maps: torch.Tensor, mask: torch.Tensor) -> float:
    """One token after the other."""
    found, number = 0.0, 0
    for row in range(len(tokens)):
        for place in range(tokens.shape[1]):
            if mask[row, place]:
                one, other = module.project(tokens[row, place]), maps[row, :, place // 3, place % 3]
                found += 1.0 - float(one @ other / (one.norm() * other.norm()))
                number += 1
    return found / number


def test_it_is_the_mean_distance_of_real_tokens():
    module = Alignment(12, TEACHER, None, hidden=16)
    (teacher,) = module._teacher
    images, tokens = torch.randn(2, 3, 64, 96), torch.randn(2, 6, 12)
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    pixels = torch.zeros(2, 64, 96, dtype=torch.bool)
    pixels[0], pixels[1, :32, :64] = True, True
    maps = teacher(images, pixels)[0][0].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    wanted = naive(module, tokens, maps, mask)
    assert abs(module(tokens, (2, 3), mask, images, pixels).item() - wanted) < 1e-5
    whole = module(tokens, (2, 3), None, images)
    assert abs(whole.item() - module(tokens, (2, 3), torch.ones_like(mask), images).item()) < 1e-6


def test_a_teacher_of_another_stride_is_resized():
    module = Alignment(12, "vit_tiny(dim=16, depth=1, heads=2)", None, hidden=16)
    (teacher,) = module._teacher
    images, tokens = torch.randn(1, 3, 64, 96), torch.randn(1, 6, 12)
    maps = teacher(images, None)[0][0].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, (2, 3), mode="bilinear", antialias=True)
    wanted = naive(module, tokens, maps, torch.ones(1, 6, dtype=torch.bool))
    assert abs(module(tokens, (2, 3), None, images).item() - wanted) < 1e-5


def test_padding_changes_nothing():
    """An image of 40 x 48 pixels on two canvases."""
    module, losses = Alignment(12, "vit_tiny(dim=16, depth=1, heads=2)", None, hidden=16), []
    image, tokens = torch.randn(3, 40, 48), torch.randn(2, 2, 12)
    for height, width in ((64, 64), (96, 160)):
        images, pixels = torch.zeros(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool)
        images[0, :, :40, :48], pixels[:, :40, :48] = image, True
        grid = height // 32, width // 32
        placed, mask = torch.randn(*grid, 12), torch.zeros(grid, dtype=torch.bool)
        placed[:2, :2], mask[:2, :2] = tokens, True
        losses.append(module(placed.flatten(0, 1)[None], grid, mask.flatten()[None], images, pixels).item())
    assert abs(losses[0] - losses[1]) < 1e-6


def test_a_stride_that_does_not_divide_is_refused():
    module = Alignment(12, "vit_tiny(dim=16, depth=1, heads=2, patch=14)", None, hidden=16)
    with pytest.raises(ValueError, match="has the stride 14, which does not divide 56 x 64 pixels"):
        module(torch.randn(1, 4, 12), (2, 2), None, torch.randn(1, 3, 56, 64))


def test_the_teacher_learns_nothing_and_is_not_saved():
    module = Alignment(12, TEACHER, None, hidden=16).train()
    (teacher,) = module._teacher
    assert not teacher.training and {name.split(".")[0] for name in module.state_dict()} == {"project"}
    tokens = torch.randn(1, 6, 12, requires_grad=True)
    module(tokens, (2, 3), None, torch.randn(1, 3, 64, 96)).backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    assert all(each.grad is not None for each in module.parameters())
    assert all(each.grad is None for each in teacher.parameters())


def test_a_detector_trains_with_it(tmp_path):
    zoo.save_model(zoo.create_model("poolformer_s12", classes=3, depth=(1, 1, 1, 1)), tmp_path / "teacher")
    flags = ["--model.teacher=poolformer_s12(depth=(1, 1, 1, 1))", f"--model.teacher_weights={tmp_path / 'teacher'}"]
    fit(tmp_path / "run", *flags)
    names = load_file(tmp_path / "run/best/model.safetensors")
    assert names and not any("project" in name or "teacher" in name for name in names)


def test_it_counts_in_the_loss_and_in_the_optimizer():
    backbone: dict[str, Any] = {"name": "rtdetr_micro", "dim": 16, "depth": 1, "heads": 2, "queries": 5, "classes": 3}
    task = Detect(backbone, teacher="vit_tiny(dim=16, depth=1, heads=2)", teacher_weights=None, alignment=2.0)
    assert task.alignment is not None
    inside = {id(each) for group in task.groups() for each in group["params"]}
    assert {id(each) for each in task.alignment.parameters()} <= inside
    with pytest.raises(ValueError, match="alignment must be"):
        Detect(backbone, teacher="vit_tiny", teacher_weights=None, alignment=0.0)
    with pytest.raises(ValueError, match="model.teacher: trunk: unknown image model 'nothing'"):
        Detect(backbone, teacher="nothing")
    with pytest.raises(ValueError, match="model.teacher: trunk 'vit_tiny' has no published weights"):
        Detect(backbone, teacher="vit_tiny")
    with pytest.raises(ValueError, match="encoder_depth is 0"):
        Detect(backbone | {"encoder_depth": 0}, teacher="vit_tiny", teacher_weights=None)
