"""A checkpoint called with what a person has at hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import zoo
from helpers import randomise
from zoo.inputs.audio import RECIPES, AudioPreprocess
from zoo.inputs.images import ImagePreprocess
from zoo.outputs import greedy, transducer_greedy
from zoo.outputs.tokens import Characters
from zoo.weights import Checkpoint, load_checkpoint, save_model

LABELS = ["ant", "bee", "cat"]
LETTERS = Characters("abcdefgh ")


def classifier(folder: Path, **more: Any) -> Checkpoint:
    small: dict[str, Any] = {
        "dim": 32,
        "depth": 1,
        "heads": 2,
        "image": 16,
        "patch": 8,
        "classes": more.pop("classes", 3),
    }
    options = {"preprocess": ImagePreprocess(size=16), "labels": LABELS if small["classes"] else None} | more
    return load_checkpoint(save_model(randomise(zoo.create_model("vit_micro", **small)), folder, **options))


def recogniser(folder: Path, head: str = "ctc", preprocess: AudioPreprocess | None = RECIPES["nemo"]) -> Checkpoint:
    small: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "vocabulary": LETTERS.vocabulary, "head": head}
    model: Any = randomise(zoo.create_model("conformer_ctc_s", **small).eval())
    return load_checkpoint(save_model(model, folder, preprocess=preprocess, labels=LETTERS))


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)


def test_an_image_by_its_path_or_as_an_array(tmp_path: Path):
    loaded, values = classifier(tmp_path / "model"), np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert loaded.preprocess is not None
    with torch.no_grad():
        wanted = loaded.model(loaded.preprocess(values)[None])[0].softmax(-1)
    found = loaded(tmp_path / "a.png")
    assert found == loaded(str(tmp_path / "a.png")) == loaded(Image.fromarray(values)) == loaded(values)
    assert found == sorted(found, key=lambda guess: -guess.probability) and sum(p for _, p in found) == pytest.approx(1)
    assert {label: p for label, p in found} == pytest.approx(dict(zip(LABELS, wanted.tolist(), strict=True)), abs=1e-6)
    with pytest.raises(ValueError, match="nowhere.png: No such file"):
        loaded("nowhere.png")


def test_classes_without_names_are_numbered(tmp_path: Path):
    found = classifier(tmp_path / "model", labels=None)(np.zeros((9, 9), np.uint8))
    assert sorted(label for label, _ in found) == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("head", ["ctc", "transducer(hidden=16)"])
def test_a_sound_by_its_path_or_as_a_waveform(head: str, tmp_path: Path):
    loaded = recogniser(tmp_path / "model", head)
    soundfile.write(tmp_path / "a.wav", noise(2.0), 16000, subtype="FLOAT")
    model: Any = loaded.model
    assert loaded.preprocess is not None
    with torch.no_grad():
        made, lengths = model(loaded.preprocess(noise(2.0))[None], None)
        (tokens,) = greedy(made, lengths) if head == "ctc" else transducer_greedy(model.head, made, lengths)
    wanted = " ".join(LETTERS.decode(tokens).split())
    assert loaded(tmp_path / "a.wav") == loaded(noise(2.0)) == loaded(torch.from_numpy(noise(2.0))) == wanted != ""


def test_a_long_sound_is_cut_and_silence_has_no_text(tmp_path: Path):
    loaded = recogniser(tmp_path / "model")
    assert loaded(np.zeros(16000, np.float32)) == "" == loaded(np.full(100, 0.01, np.float32))
    gap = np.zeros(16000 * 31, np.float32)
    long = loaded(np.concatenate([noise(2.0), gap, noise(2.0)]))
    assert len(long.split()) > len(loaded(noise(2.0)).split())


def test_what_has_no_answer(tmp_path: Path):
    with pytest.raises(ValueError, match="has no preprocess"):
        classifier(tmp_path / "plain", preprocess=None)("a.png")
    with pytest.raises(ValueError, match="a backbone without a head"):
        classifier(tmp_path / "backbone", classes=0)("a.png")
    loaded = classifier(tmp_path / "broken")
    next(loaded.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's output is NaN or infinite"):
        loaded(np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="no tokenizer"):
        recogniser(tmp_path / "mute")._replace(labels=None)(noise(1.0))
