"""What the tests of `zoo classify predict` share: a checkpoint, pictures, and the command."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from helpers import randomise
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess
from zoo.weights import save_model

LABELS = ["ant", "bee", "a cat, or whatever else purrs at home", "$dog_", "猫"]
PREPROCESS = ImagePreprocess(size=16)


def save(folder: Path, **more: Any) -> str:
    given = {"classes": 5, "channels": 3, "preprocess": PREPROCESS, "labels": LABELS} | more
    small = {key: given.pop(key) for key in ("classes", "channels")}
    torch.manual_seed(0)  # a fixture of the session comes before the test's own seed
    model: Any = randomise(zoo.create_model("vit_micro", dim=32, depth=1, heads=2, image=16, patch=8, **small))
    for parameter in model.head.parameters() if small["classes"] else ():
        parameter.data *= 3.0 if parameter.ndim == 2 else 0.0  # so that images differ in their answers
    return str(save_model(model, folder, preset="vit_micro", **given))


def noise(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> str:
    """A picture whose colours depend on the seed, so that answers differ."""
    generator = np.random.default_rng(seed)
    depth = {"L": (), "RGB": (3,), "RGBA": (4,)}.get(mode, ())
    values = generator.integers(0, 256, depth) * 0.7 + generator.integers(0, 77, (size[1], size[0], *depth))
    kind = np.uint16 if mode == "I;16" else np.uint8
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values * (257 if mode == "I;16" else 1)).astype(kind)).save(path)
    return str(path)


def break_pictures() -> list[str]:
    whole = Path("images/b/deep/RGB.JPG").read_bytes()
    Path("images/c.jpg").write_bytes(whole[: len(whole) // 2])
    Path("images/text.jpg").write_text("text")
    return ["images/c.jpg", "images/text.jpg"]


def predict(*arguments: object) -> list[dict[str, Any]]:
    main(["classify", "predict", *map(str, arguments)])
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs/predict"
    return json.loads(Path(str(output), "predictions.json").read_text(encoding="utf-8"))


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", *map(str, arguments)])
    sys.stderr.write(str(exit.value.code) if isinstance(exit.value.code, str) else "")
    text = capsys.readouterr().err
    assert exit.value.code == 2 or text.splitlines()[-1].startswith("zoo: error: ")
    return text
