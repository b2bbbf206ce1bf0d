"""The names in a checkpoint are pinned, and checkpoints of earlier formats are read."""

from pathlib import Path
from typing import Any

import pytest

import zoo
import zoo.weights.format
from checkpoint_cases import LABELS, PREPROCESS, build, edit, edit_tensors, old, refusal, save
from zoo.weights import load_checkpoint

# The names in a checkpoint. A change here breaks every checkpoint that exists: write a migration, and raise FORMAT.
NORM = {"weight": [16], "bias": [16], "alpha": [1], "running_mean": [16], "running_var": [16], "blend": []}
NORM |= {"layernorm.weight": [16], "layernorm.bias": [16]}
PINNED = {
    "stem.conv.weight": [16, 3, 8, 8],
    "stem.conv.bias": [16],
    "position.conv.weight": [16, 1, 3, 3],
    "position.conv.bias": [16],
    "blocks.0.steps.0.branch.weight": [8, 1, 5, 5],
    "blocks.0.steps.0.branch.bias": [8],
    "blocks.0.steps.0.branch.qkv.weight": [48, 16],
    "blocks.0.steps.0.branch.qkv.bias": [48],
    "blocks.0.steps.0.branch.out.weight": [16, 16],
    "blocks.0.steps.0.branch.out.bias": [16],
    "blocks.0.steps.0.channel.conv.weight": [1, 1, 3],
    "blocks.0.steps.1.branch.expand.weight": [64, 16],
    "blocks.0.steps.1.branch.expand.bias": [64],
    "blocks.0.steps.1.branch.out.weight": [16, 64],
    "blocks.0.steps.1.branch.out.bias": [16],
    "blocks.0.steps.1.channel.conv.weight": [1, 1, 3],
    **{f"blocks.0.steps.0.before.{name}": shape for name, shape in NORM.items()},
    **{f"blocks.0.steps.1.before.{name}": shape for name, shape in NORM.items()},
    **{f"norm.{name}": shape for name, shape in NORM.items()},
    "head.weight": [5, 16],
    "head.bias": [5],
}


def test_names_are_pinned():
    model = build(dim=16, depth=1, norm="prepbn", mixer="sla", channel="eca", position="cpe")
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == PINNED


def test_migration(folder, monkeypatch):
    """A file of an older format loads through the table, step by step, and is what the newest writes."""

    def age(config: dict[str, Any]) -> None:
        config["format"] = -1
        config["names"] = config.pop("labels")
        config["model"]["attention"] = config["model"].pop("mixer")

    def rename_labels(config: dict[str, Any], folder: Path) -> dict[str, Any]:
        return config | {"format": 0, "labels": config.pop("names")}

    def rename_mixer(config: dict[str, Any], folder: Path) -> dict[str, Any]:
        return config | {"format": 4, "model": config["model"] | {"mixer": config["model"].pop("attention")}}

    newest = load_checkpoint(folder).config
    edit(folder, age)
    assert "format -1" in refusal(folder)
    table = zoo.weights.format.MIGRATIONS | {-1: rename_labels, 0: rename_mixer}
    monkeypatch.setattr(zoo.weights.format, "MIGRATIONS", table)
    loaded = load_checkpoint(folder, check=True)
    assert loaded.labels == tuple(LABELS)
    assert loaded.config == newest
    monkeypatch.setattr(zoo.weights.format, "MIGRATIONS", {-1: rename_labels})
    assert "format 0" in refusal(folder)


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("preprocess", [PREPROCESS, None])
def test_what_the_first_edition_wrote_is_read(format, preprocess, tmp_path):
    path = save(tmp_path / "x", preprocess=preprocess)
    newest = load_checkpoint(path)
    old(path, format)
    loaded = load_checkpoint(path, check=True)
    unknown = {"model": {}, "files": {}, "cost": None}
    figure = {"data": "", "split": "", "metric": "accuracy", "value": 0.875, "n": 360, "interval": None, "command": ""}
    said = {"license": "mit", "card": "Tells insects apart.", "parameters": 1234, "figures": [figure]}
    assert loaded.config | unknown == newest.config | unknown | said
    assert loaded.model.config == newest.model.config and loaded.labels == tuple(LABELS)
    edit_tensors(path, lambda probe: probe["output"].add_(0.1), "probe.safetensors")
    assert "is off by" in refusal(path, check=True)


def test_what_is_wrong_in_an_old_format_is_said(folder):
    old(folder, 2, tokenizer={"kind": "characters", "pieces": ["a"]})
    assert "it has both labels and a tokenizer" in refusal(folder)
    edit(folder, lambda config: config.update(labels=None))
    assert "labels" in refusal(folder)
    edit(folder, lambda config: config.update(tokenizer=None, labels=LABELS))
    edit(folder, lambda config: config["model"].update(modulate="yes"))
    assert "the model field 'modulate', which zoo" in refusal(folder)
    edit(folder, lambda config: config["model"].update(modulate=True))
    assert "no condition" in refusal(folder)


def test_a_family_s_own_migration_names_the_file(tmp_path):
    small = {"dim": 16, "widths": (16, 24), "strided": (0,), "depth": 2, "heads": 2, "mixer": "relative"}
    path = zoo.save_model(zoo.create_model("efficient_conformer_s", **small).eval(), tmp_path / "x")

    def age(config: dict[str, Any]) -> None:
        config |= {"format": 2, "tokenizer": None}
        config["model"] |= {"mixers": ["grouped(size=3)", "sla"], "mixer": "softmax"}

    edit(path, age)
    assert "mixer 'softmax' would be ignored: mixers gives one for each stage" in refusal(path)
    edit(path, lambda config: config["model"].update(mixer="relative"))
    assert "does not fit" in refusal(path), "it is read as a model whose second stage has another mixer"
