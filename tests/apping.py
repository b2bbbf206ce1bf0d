"""What the tests of `zoo app` share: a sound, and a model that hears much in it."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import zoo
from helpers import randomise
from zoo.inputs.audio import RECIPES
from zoo.outputs.tokens import train_characters


def voice(path: Path, seconds: float, rate: int = 16000) -> str:
    """A file with noise of changing levels over a rising pitch."""
    time, random = np.arange(round(seconds * rate)) / rate, np.random.default_rng(0)
    levels = random.uniform(0, 0.4, 1 + int(seconds * 10))[(time * 10).astype(int)]
    harmonics = sum(np.sin(2 * np.pi * (110 + 20 * time) * time * each) / each for each in range(1, 20))
    soundfile.write(path, 0.1 * harmonics + levels * random.uniform(-1, 1, len(time)), rate)
    return str(path)


def talker(folder: Path) -> str:
    """A streaming recogniser with random weights that hears many letters in `voice`."""
    torch.manual_seed(6)
    labels, preprocess = train_characters(["ABCDEFGH I"]), RECIPES["streaming"]
    fields: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "conv": "glu(kernel=5)", "chunk": 4, "left": 8}
    fields |= {"subsampling": "conv4(padding='causal', channels=8)", "vocabulary": labels.vocabulary}
    model: Any = zoo.create_model("conformer_ctc_s", **fields).eval()
    randomise(model)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model.head.weight *= 3
        features = preprocess(voice(folder / "voice.wav", 3.0))
        model.head.bias -= model(features[None])[0][0].mean(0)
    return str(zoo.save_model(model, folder / "model", preprocess=preprocess, labels=labels))
