"""What the tests of checkpoints share: a small model, its checkpoint, ways to change one, and one of an old format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor, nn

import zoo
from helpers import randomise, rehash
from zoo.inputs.images import ImagePreprocess
from zoo.weights import CheckpointError, load_checkpoint, save_model

SMALL = {"dim": 32, "depth": 2, "heads": 2, "image": 16, "patch": 8, "classes": 5}
PREPROCESS = ImagePreprocess(size=16)
FIGURE: Any = {"data": "insects", "split": "val", "metric": "accuracy", "value": 0.875, "n": 360}
FIGURE |= {"interval": [0.8368, 0.9052], "command": "zoo evaluate x"}
LABELS = ["ant", "bee", "cat", "dog", "élan"]


def build(progress: float = 0.5, fused: bool = False, **choices: Any) -> Any:
    model = randomise(zoo.create_model("vit_micro", **{**SMALL, **choices}))
    zoo.advance(model, progress)
    return zoo.fuse(model) if fused else model


def save(folder: Path, model: nn.Module | None = None, **more: Any) -> Path:
    given = {"preset": "vit_micro", "preprocess": PREPROCESS, "labels": LABELS} | more
    return save_model(model if model is not None else build(norm="prepbn", mixer="sla"), folder, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = "model.safetensors") -> None:
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / file).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, folder / file)
    if "files" in json.loads((folder / "config.json").read_text()):
        rehash(folder)


def refusal(name: str | Path, check: bool = False) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(name, check=check)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    return str(error.value)


NEW = ("card", "license", "datasets", "figures", "base", "dtype", "parameters", "cost", "files")
OLD_CARD = """---
license: mit
---

# x

Tells insects apart.

| choice or figure | value |
|---|---|
| mixer | sla |
| fused | no |
| parameters | 1,234 |
| accuracy | 0.875 |
| n | 360 |
"""


def old(folder: Path, format: int, **changes: Any) -> None:
    """A checkpoint as format 1 or 2 wrote it: two fields of labels, `modulate`, one nameless input and output, and what
    is known of the model in the card alone."""

    def age(config: dict[str, Any]) -> None:
        config["format"] = format
        for name in NEW:
            del config[name]
        del config["model"]["modulation"]
        config["model"]["modulate"] = False
        if format == 2:
            config["tokenizer"] = None
        config |= changes

    edit(folder, age)
    (folder / "README.md").write_text(OLD_CARD)
    probe = safetensors.torch.load_file(folder / "probe.safetensors")
    named = {key.partition(".")[0]: tensor for key, tensor in probe.items()}
    safetensors.torch.save_file(named, folder / "probe.safetensors")
