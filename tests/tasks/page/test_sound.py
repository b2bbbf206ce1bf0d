"""Log-mel features in a graph: what the preprocessing computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import relative
from zoo.inputs.audio import RECIPES
from zoo.tasks.page.graph import noise
from zoo.tasks.page.sound import Sound

CHANGES: list[dict[str, Any]] = [
    {},
    {"fft": 400, "window": 399, "hop": 100},
    {"rate": 8000, "lowest": 50.0, "highest": 3900.0, "mels": 40, "preemphasis": 0.0},
    {"normalize": "bin", "peak": True},
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_it_is_what_the_preprocessing_computes(recipe: str, change: dict[str, Any]):
    made = replace(RECIPES[recipe], **change)
    for index, seconds in enumerate((0.1, 0.333, 1.7)):
        samples = noise(seconds, made, torch.Generator().manual_seed(index))["samples"]
        assert relative(Sound(made)(samples)[0], made(samples)) < 1e-4


def test_a_tone_beside_silence():
    """Bands that hold nothing but rounding are cut off at the floor by both."""
    made = RECIPES["squeezeformer"]
    tone = 0.5 * (torch.arange(8000) * 0.3).sin() * (torch.arange(8000) > 4000)
    assert (Sound(made)(tone)[0] - made(tone)).abs().max() < 1e-3
