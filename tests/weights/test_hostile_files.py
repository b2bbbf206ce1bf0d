"""Thousands of changed config.json and model.safetensors: each loads, or is refused in one line."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

import zoo
from helpers import randomise, rehash
from zoo import quick
from zoo.inputs.images import ImagePreprocess
from zoo.weights import load_checkpoint, save_model

VALUES: list[Any] = [None, True, 0, -1, 1.5, 10**400, 1e308, "", "\n\x1b[31m", "x" * 3000, "1is 2", [], [None], {}]
VALUES += [{"a": {}}, [[[]]], "__import__('os')", ["a", "a"], {"multiply_adds": None}, [{"value": 10**400}], -(10**30)]
BYTES = [b"", b"\0", b"NaN", b"Infinity", b"1e999", b"{", b'"', b"\xff", b"[" * 50]
FIGURE: Any = {"data": "x", "split": "val", "metric": "m", "value": 0.5, "n": 8, "interval": [0.1, 0.9], "command": "c"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with checkpoints/small."""
    model = randomise(zoo.create_model("vit_micro", dim=16, depth=1, heads=2, image=16, patch=8, classes=3))
    given: dict[str, Any] = {"preprocess": ImagePreprocess(size=16), "labels": ["a", "b", "c"], "figures": [FIGURE]}
    save_model(model, tmp_path / "checkpoints/small", preset="vit_micro", **given)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, inner in pairs for each in places(inner, (*path, key)))]


def changed(config: dict[str, Any], draw: random.Random) -> bytes:
    """The text of config.json with one to three values replaced, removed or added, or with changed bytes."""
    made: Any = copy.deepcopy(config)
    for _ in range(draw.randint(1, 3)):
        *path, key = draw.choice([each for each in places(made) if each])
        owner = made
        for each in path:
            owner = owner[each]
        if isinstance(owner, dict) and draw.random() < 0.2:
            owner.pop(key) if draw.random() < 0.5 else owner.update({draw.choice(["odd", "\n", "y" * 3000]): 1})
        else:
            owner[key] = copy.deepcopy(draw.choice(VALUES))
    text = json.dumps(made).encode()
    if draw.random() < 0.2:
        start = draw.randrange(len(text))
        text = text[:start] + draw.choice(BYTES) + text[start + draw.randrange(8) :]
    return text


def check_line(error: ValueError) -> None:
    assert "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) <= 1000, error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_changed_configs_load_or_are_refused_in_one_line(seed: int, home: Path):
    path, draw = home / "checkpoints/small/config.json", random.Random(seed)
    config, loaded = json.loads(path.read_text()), 0
    for number in range(9000):
        path.write_bytes(changed(config, draw))
        try:
            load_checkpoint(path.parent)
            loaded += 1
        except ValueError as error:
            check_line(error)
        if number % 10 == 0:
            quick.listing("checkpoints")
            for show in (quick.info, quick.info_json):
                try:
                    show("small")
                except ValueError as error:
                    check_line(error)
    assert 0 < loaded < 9000


@pytest.mark.slow
def test_changed_tensor_files_load_or_are_refused_in_one_line(home: Path):
    """Half of them with a config.json that states their size and hash."""
    folder, draw = home / "checkpoints/small", random.Random(0)
    whole = (folder / "model.safetensors").read_bytes()
    for number in range(4000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(2000) if draw.random() < 0.8 else draw.randrange(len(data))
            data[start : start + draw.randrange(6)] = draw.randbytes(draw.randrange(6))
        (folder / "model.safetensors").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        if number % 2:
            rehash(folder)
        try:
            load_checkpoint(folder)
        except ValueError as error:
            check_line(error)
