"""Every checkpoint of the repository has the figures of its card, by `zoo evaluate`.

Data that is not made here is looked for in the folder of the environment variable ZOO_DATA. Figures of images were
measured with the version of Pillow in scripts/constraints.txt; others decode and resize in slightly different ways.

The average precision of a detector is the only figure that depends on the processor: processors round in different
ways, and detections whose scores differ by that change places. On the 127 images of Aquarium, that is in 38 places of
the ranks of 12,700 detections, between float32 and float64, and 5e-7 of AP50.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from zoo.__main__ import tasks
from zoo.tasks.evaluate.measure import evaluate

FOLDER = Path(__file__).parents[3] / "checkpoints"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
# By the end of a checkpoint's name: the folder of its data, None if it is made here, and further arguments.
DATA: dict[str, tuple[str | None, dict[str, Any]]] = {
    "digits": (None, {}),
    "digits_in_one_step": (None, {}),
    "aquarium": ("aquarium", {}),
    "blood_cells": ("bccd", {}),
    "spoken_digits": ("fsdd", {"splits": ["dev"]}),
    "clothing10": ("clothing10_s112", {}),
    "caltech": ("caltech101_s96", {}),
    "fashion_mnist": ("fashion_mnist", {"split": "test"}),
    "an4": ("an4", {"splits": ["dev"]}),
}
ROUNDED = 2e-6  # of an average precision on another processor


def cases() -> list[Any]:
    """Those whose data is not made here are slow."""
    found = []
    for name in NAMES:
        folder, given = DATA[name.partition(".")[2]]
        found.append(pytest.param(name, folder, given, id=name, marks=[pytest.mark.slow] if folder else []))
    return found


@pytest.mark.filterwarnings("ignore:no loss of", "ignore:.*omitted from a loss")  # AN4's dev has two unknown words
@pytest.mark.parametrize(("name", "folder", "given"), cases())
def test_a_checkpoint_has_the_figures_of_its_card(name: str, folder: str | None, given: dict[str, Any]):
    if folder is not None:
        if (home := os.environ.get("ZOO_DATA")) is None:
            pytest.skip("ZOO_DATA is not set, the folder with the data sets")
        if not (root := Path(home, folder)).is_dir():
            pytest.skip(f"{root} is not there")
        given = given | {"root": str(root), "workers": 2}
    found = evaluate(tasks(), str(FOLDER / name), device="cpu", **given)
    stated, seen = json.loads((FOLDER / name / "config.json").read_text())["figures"], 0
    for figure in found["figures"]:
        for card in stated:
            if card["metric"] == figure["metric"]:
                same = figure | {"data": card["data"], "command": card["command"]}
                if found["task"] == "detect":
                    numbers = ([each["value"], *(each["interval"] or ())] for each in (card, figure))
                    assert next(numbers) == pytest.approx(next(numbers), rel=0, abs=ROUNDED)
                    same |= {"value": card["value"], "interval": card["interval"]}
                assert card == same
                seen += 1
    assert seen
