"""What a checkpoint says, its figures above all, stays with its weights and does not pass to changed ones."""

import copy
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from helpers import randomise
from zoo.inputs.images import ImagePreprocess
from zoo.weights import load_checkpoint, load_model, save_model

PREPROCESS = ImagePreprocess(size=16)
FIGURE: Any = {"data": "insects", "split": "val", "metric": "accuracy", "value": 0.8765, "n": 360, "interval": None}
FIGURE |= {"command": "zoo evaluate start"}
SAID: dict[str, Any] = {"figures": [FIGURE], "source": "zoo classify fit", "card": "Tells insects apart."}
KEPT: dict[str, Any] = {"license": "mit", "datasets": ["insects"]}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A checkpoint with batch norms and prepbn behind their blend, so that it has buffers and can be fused."""
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "image": 16, "patch": 8, "classes": 3}
    model: Any = randomise(zoo.create_model("vit_micro", norm="prepbn", **sizes))
    zoo.advance(model, 1.0)
    return save_model(model, tmp_path / "start", preprocess=PREPROCESS, labels=[*"abc"], **SAID, **KEPT)


def train(model: Any) -> Any:
    """One step of an own training loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(torch.randn(4, 3, 16, 16)).square().mean().backward()
    optimizer.step()
    return model


def last_bit(model: Any) -> Any:
    """The least change of one weight, past autograd and its counters."""
    weight = model.head.weight.data.numpy()
    weight[0, 0] += abs(weight[0, 0]) * 2e-7
    return model


@torch.no_grad()
def statistics_alone(model: Any) -> Any:
    model.train()(torch.randn(4, 3, 16, 16))
    return model


@torch.no_grad()
def rows_swapped(model: Any) -> Any:
    model.head.weight.copy_(model.head.weight.flip(0))
    return model


def trained_back(model: Any) -> Any:
    """Trained, and then given the checkpoint's weights again."""
    before = copy.deepcopy(model.state_dict())
    train(model).load_state_dict(before)
    return model.eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "trained": train,
    "last bit": last_bit,
    "statistics": statistics_alone,
    "rows swapped": rows_swapped,
    "rounded": lambda model: model.bfloat16(),
    "fused when trained": lambda model: zoo.fuse(train(model)),
    "trained when fused": lambda model: last_bit(zoo.fuse(model)),
    "a copy, trained": lambda model: train(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}
SAME: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda model: model.train(),
    "fused": zoo.fuse,
    "float64 and back": lambda model: model.double().float(),
    "trained back": trained_back,
    "frozen": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_lose_the_figures(change: str, start: Path, tmp_path: Path):
    saved = load_checkpoint(save_model(CHANGES[change](load_model(start)), tmp_path / "new"))
    assert saved.config["figures"] == [] and saved.config["source"] == saved.config["card"] == ""
    assert {key: saved.config[key] for key in KEPT} == KEPT
    assert saved.config["base"] == {"address": "start", "commit": None, "layout": "zoo"}
    assert (saved.labels, saved.preprocess) == (("a", "b", "c"), PREPROCESS)
    card = (tmp_path / "new/README.md").read_text()
    assert "0.8765" not in card and "Tells insects" not in card and "Made from start." in card
    model = CHANGES[change](load_model(start))
    own = load_checkpoint(save_model(model, tmp_path / "own", figures=[FIGURE | {"value": 0.5}], card="Mine."))
    assert own.config["figures"][0]["value"] == 0.5 and own.config["card"] == "Mine.", "what is given is written"


@pytest.mark.parametrize("change", SAME)
def test_the_same_weights_keep_them(change: str, start: Path, tmp_path: Path):
    again = save_model(SAME[change](load_model(start)), tmp_path / "new")
    saved = load_checkpoint(save_model(load_model(again), tmp_path / "third"))
    assert {key: saved.config[key] for key in SAID | KEPT} == SAID | KEPT and saved.config["base"] is None
    assert "0.8765" in (tmp_path / "third/README.md").read_text()


def test_half_precision_that_loses_nothing_keeps_them(start: Path, tmp_path: Path):
    half = save_model(load_model(start).half(), tmp_path / "half", **SAID)
    loaded: Any = load_model(half)
    assert loaded.head.weight.dtype == torch.float32
    for model in (loaded, load_model(half).half()):
        assert load_checkpoint(save_model(model, tmp_path / "new")).config["figures"] == [FIGURE]


def test_another_preprocessing_loses_the_figures(start: Path, tmp_path: Path):
    other = replace(PREPROCESS, crop=0.5)
    model: Any = load_model(start)
    given = save_model(model, tmp_path / "given", preprocess=other)
    model.preprocess = other
    for folder in (given, save_model(model, tmp_path / "set")):
        assert load_checkpoint(folder).preprocess == other and load_checkpoint(folder).config["figures"] == []
    model.preprocess = None
    bare = save_model(model, tmp_path / "bare", **SAID)
    added = load_checkpoint(save_model(load_model(bare), tmp_path / "added", preprocess=PREPROCESS))
    assert added.config["figures"] == [FIGURE], "there was none to differ from"


def test_the_base_of_a_trained_model_is_the_checkpoint_that_it_was_read_from(start: Path, tmp_path: Path):
    base = {"address": "https://example.org/theirs", "commit": "abc", "layout": "timm"}
    based = save_model(load_model(start), tmp_path / "based", base=base)
    assert load_checkpoint(save_model(load_model(based), tmp_path / "same")).config["base"] == base
    trained = load_checkpoint(save_model(train(load_model(based)), tmp_path / "new"))
    assert trained.config["base"] == {"address": "based", "commit": None, "layout": "zoo"}


def test_a_base_in_the_cache_of_the_hub_has_its_commit(start: Path, tmp_path: Path):
    folder = tmp_path / "models--owner--name/snapshots" / ("0123456789" * 4)
    folder.parent.mkdir(parents=True)
    shutil.copytree(start, folder)
    saved = load_checkpoint(save_model(train(load_model(folder)), tmp_path / "new"))
    assert saved.config["base"] == {"address": folder.name, "commit": folder.name, "layout": "zoo"}


def test_folders_of_this_machine_are_in_no_base(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(start)
    for name in (start, str(start), ".", "../start", "./"):
        saved = load_checkpoint(save_model(train(load_model(name)), tmp_path / "new"))
        assert saved.config["base"]["address"] == "start"


def test_a_model_without_weights_is_not_saved(tmp_path: Path):
    model = zoo.create_model("vit_micro", depth=1, classes=3).to("meta")
    with pytest.raises(ValueError, match="on the meta device and has no weights to save"):
        zoo.save_model(model, tmp_path / "made")
    assert not (tmp_path / "made").exists()
