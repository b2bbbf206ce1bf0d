"""The graphs inside pages of recognisers and detectors give the checkpoints' answers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import zoo
from detecting import TINY
from helpers import randomise
from paging import config, stand_in, unpacked
from zoo.__main__ import main
from zoo.inputs.audio import AudioPreprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import Tokenizer
from zoo.tasks.detect.export import paired
from zoo.tasks.page.graph import drawn, noise
from zoo.weights import load_checkpoint, save_model


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return stand_in(tmp_path / "runtime")


@pytest.mark.slow
def test_the_graph_hears_what_the_checkpoint_hears(runtime: str):
    main(["page", "squeezeformer_micro.spoken_digits", "--output", "speech.html", "--runtime", runtime])
    page = Path("speech.html").read_text("utf-8")
    session: Any = onnxruntime.InferenceSession(unpacked(page, "model"))
    model, preprocess, tokenizer, _ = load_checkpoint("squeezeformer_micro.spoken_digits")
    assert isinstance(preprocess, AudioPreprocess) and isinstance(tokenizer, Tokenizer)
    for seconds in (0.1, 1.0, 12.0):
        samples = noise(seconds, preprocess, torch.Generator().manual_seed(0))["samples"]
        features = preprocess(samples)
        with torch.no_grad():
            wanted, length = model(features[None], torch.tensor([len(features)]))
        got, count = session.run(["logits", "lengths"], {"samples": samples.numpy()})
        assert count.tolist() == length.tolist()
        assert np.abs(got - wanted.numpy()).max() < 1e-3
    pieces = config(page)["pieces"]
    assert len(pieces) == tokenizer.blank == wanted.shape[-1] - 1
    ids = tokenizer.encode("SEVEN TWO TWO")
    assert "".join(pieces[each] for each in ids).split() == ["SEVEN", "TWO", "TWO"]
    assert config(page)["step"] == 0.04 and config(page)["rate"] == 16000


@pytest.mark.slow
def test_the_graph_finds_what_the_detector_finds(runtime: str, tmp_path: Path):
    torch.manual_seed(0)
    made: Any = randomise(zoo.create_model(**TINY, classes=3))
    for head in made.scores:
        torch.nn.init.normal_(head.weight)
    preprocess = BoxPreprocess(size=64)
    save: Any = {"preprocess": preprocess, "labels": LabelMap(("a", "b", "</script>"), (7, 3, 90))}
    name = str(save_model(made, tmp_path / "boxes", **save))
    main(["page", name, "--output", "boxes.html", "--runtime", runtime])
    page = Path("boxes.html").read_text("utf-8")
    assert config(page)["labels"] == ["a", "b", "</script>"]
    session: Any = onnxruntime.InferenceSession(unpacked(page, "model"))
    for sides in ((64, 64), (90, 50), (300, 200)):
        pixels = drawn(*sides, torch.Generator().manual_seed(3))["pixels"]
        with torch.no_grad():
            wanted = made.eval()(next(preprocess.parts(pixels[..., :3])).image[None])
        names = ["logits", "boxes"]
        got = dict(zip(names, session.run(names, {"pixels": pixels.numpy()}), strict=True))
        found = paired(got, {name: wanted[name].numpy() for name in got})
        for output, values in found.items():
            allowed = 1e-3 if sides == (64, 64) else 2e-2
            assert np.abs(values - wanted[output].numpy()).max() < allowed * np.abs(values).max(), (sides, output)
