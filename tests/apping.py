"""What the tests of `zoo app` share: a recording, a streaming recogniser, and a drawing for a detector."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw, ImageFilter

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


def cells(path: Path, seed: int) -> Path:
    """A drawing of red and violet cells on a light ground, 640 x 480."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (640, 480), (224, 216, 200))
    drawing = ImageDraw.Draw(image)
    for _ in range(10):
        x, y, radius = random.uniform(50, 590), random.uniform(50, 430), random.uniform(35, 50)
        colour = (110, 70, 170) if random.random() < 0.2 else (205, 140, 130)
        drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    image.filter(ImageFilter.GaussianBlur(2)).save(path)
    return path


def talker(folder: Path) -> str:
    """A streaming recogniser with random weights whose text for `voice` has many letters."""
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
