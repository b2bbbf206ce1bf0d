"""Modulations, against naive forms."""

import math

import pytest
import torch

from helpers import relative
from zoo.layer import Context
from zoo.modulations import MODULATIONS


@pytest.mark.parametrize("shift", [False, True])
def test_time_dependent_gains_are_their_formula(shift):
    """DiMR's: the gain, and with `shift` the shift, of each channel moves between two values with the noise."""
    layer = MODULATIONS["tdn"](6, shift=shift).double()
    found = dict(layer.named_parameters())
    for each in found.values():
        torch.nn.init.normal_(each)
    x, ratio = torch.randn(3, 4, 6).double(), torch.tensor([-9.0, 0.5, 12.0]).double()
    y, gate = layer(x, Context(grid=(2, 2), cond=ratio[:, None, None]))
    assert gate is None

    def moved(name: str, sample: int, channel: int) -> float:
        weight, bias, first, second = (
            found[name + each][channel].item() for each in ("weight", "bias", "first", "second")
        )
        share = 1 / (1 + math.exp(-(weight * ratio[sample].item() / 4 + bias)))
        return share * first + (1 - share) * second

    wanted = torch.tensor(
        [
            [
                [
                    x[sample, token, channel].item() * moved("", sample, channel)
                    + (moved("shift.", sample, channel) if shift else 0.0)
                    for channel in range(6)
                ]
                for token in range(4)
            ]
            for sample in range(3)
        ],
        dtype=torch.float64,
    )
    assert relative(y, wanted) < 1e-12


def test_time_dependent_gains_start_as_the_identity_and_tell_times_apart():
    """As published: the share is sigmoid(ratio / 4), so that both ends learn different values from the first step."""
    layer = MODULATIONS["tdn"](4, shift=True)
    x = torch.randn(1, 3, 4)
    y, _ = layer(x, Context(grid=(1, 3), cond=torch.full((1, 1, 1), 8.0)))
    assert torch.equal(y, x)
    y.sum().backward()
    found = {name: each.grad for name, each in layer.named_parameters()}
    for name in ("", "shift."):
        first, second = found[f"{name}first"], found[f"{name}second"]
        assert first is not None and second is not None
        assert torch.allclose(first / second, torch.full((4,), math.exp(2.0)), rtol=1e-4)
