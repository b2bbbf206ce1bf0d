"""Noise schedules, and conversions between predictions."""

import math

import pytest
import torch

from zoo.schedules import SCHEDULES, Parts, parts_of, predicted

KINDS = ("velocity", "noise", "data")


def test_ddpm_is_the_product_of_its_steps():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    steps = torch.tensor([1, 2, 500, 1000])
    signal, noise = SCHEDULES["ddpm"].level(steps / 1000)
    assert torch.allclose(signal.square(), kept[steps - 1], rtol=1e-12) and torch.allclose(
        noise.square(), 1 - kept[steps - 1], rtol=1e-9
    )
    assert SCHEDULES["ddpm"].level(torch.zeros(1)).signal.item() == 1.0
    between = SCHEDULES["ddpm"].level(torch.tensor([0.4995])).signal
    assert between.item() == pytest.approx(math.sqrt(math.sqrt(kept[498].item() * kept[499].item())), rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ratio_falls_and_is_bounded(name):
    ratios = SCHEDULES[name].log_ratio(torch.linspace(0, 1, 101))
    assert (ratios.diff() < 0).all() or (ratios[1:-1].diff() < 0).all()
    assert ratios.isfinite().all() and ratios[0] == 20.0
    signal, noise = SCHEDULES[name].level(torch.tensor([0.3]))
    found = SCHEDULES[name].log_ratio(torch.tensor([0.3])).item()
    assert found == pytest.approx(2 * math.log(signal.item() / noise.item()))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_round_trip(name, kind):
    if kind == "velocity" and name == "ddpm":
        return
    data, noise = torch.randn(5, 3, 4, 4).double(), torch.randn(5, 3, 4, 4).double()
    time = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999])
    level = SCHEDULES[name].level(time.view(-1, 1, 1, 1))
    x = level.signal * data + level.noise * noise
    for other in KINDS:
        found = parts_of(kind, predicted(kind, Parts(data, noise)), x, level)
        assert (found.data - data).abs().max() < 1e-6 and (found.noise - noise).abs().max() < 1e-6
        again = parts_of(kind, predicted(kind, found), x, level)
        assert (predicted(other, again) - predicted(other, Parts(data, noise))).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_conversions_are_finite_at_both_ends(kind, time):
    x = torch.randn(2, 3, 4, 4)
    found = parts_of(kind, torch.randn(2, 3, 4, 4), x, SCHEDULES["linear"].level(torch.full((2, 1, 1, 1), time)))
    assert found.data.isfinite().all() and found.noise.isfinite().all()
