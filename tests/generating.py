"""What the tests of generators share: tiny checkpoints."""

from pathlib import Path
from typing import Any

import torch

import zoo
from helpers import randomise
from zoo.inputs.images import ImagePreprocess

DIGITS = tuple("0123456789")


def generator(folder: Path, **more: Any) -> str:
    """A diffusion model of 8 x 8 grey pixels with random weights."""
    torch.manual_seed(0)
    fields = {"depth": 1, "dim": 32, "heads": 2, "image": 8, "channels": 1, "classes": 10} | more
    preprocess = ImagePreprocess(size=8, channels=1, mean=(0.5,), std=(0.5,), crop=1.0)
    labels = DIGITS[: fields["classes"]] or None
    model = randomise(zoo.create_model("dit_micro", **fields))
    return str(zoo.save_model(model, folder, preset="dit_micro", preprocess=preprocess, labels=labels))


def classifier(folder: Path, labels: tuple[str, ...] = DIGITS) -> str:
    """A classifier of 8 x 8 grey pixels with random weights and features of 16 values."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "image": 8, "patch": 4, "channels": 1}
    model = randomise(zoo.create_model("vit_micro", **fields, classes=len(labels)))
    preprocess = ImagePreprocess(size=8, channels=1, mean=(0.4,), std=(0.3,), crop=1.0)
    return str(zoo.save_model(model, folder, preset="vit_micro", preprocess=preprocess, labels=labels))
