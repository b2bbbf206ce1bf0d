"""`zoo page`: the graph inside gives the checkpoint's answers, and everything that is refused."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import zoo
from detecting import TINY
from helpers import randomise
from paging import config, seen, stand_in, unpacked
from training import refused
from zoo.__main__ import main
from zoo.inputs.audio import AudioPreprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.inputs.images import ImagePreprocess
from zoo.outputs.tokens import Characters
from zoo.tasks import predicting
from zoo.tasks.page.document import LARGEST
from zoo.weights import load_checkpoint, save_model


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_in(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def page(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of the digits."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    main(["page", "vit_micro.digits", "--output", str(path), "--runtime", runtime, "--top", "3"])
    assert path.stat().st_size < LARGEST
    return path.read_text("utf-8")


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digit(index: int) -> Image.Image:
    digits: Any = load_digits()
    return Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8))


def test_the_graph_gives_the_checkpoint_s_answers(page: str, tmp_path: Path):
    """From a file as Python reads it, and from the pixels that a browser has."""
    session: Any = onnxruntime.InferenceSession(unpacked(page, "model"))
    model, preprocess, labels, _ = load_checkpoint("vit_micro.digits")
    assert preprocess is not None and isinstance(labels, tuple) and config(page)["labels"] == [*labels]
    sizes = [(32, 32), (8, 8), (1, 1), (33, 31), (200, 90), (31, 400)]
    for number, (size, mode) in enumerate((size, mode) for size in sizes for mode in ("L", "RGB", "P")):
        path = tmp_path / f"{number}.png"
        image = digit(-1 - number).resize(size, Image.Resampling.BILINEAR).convert(mode)
        image.save(path)
        pixels = np.asarray(Image.open(path).convert("RGBA"))
        with torch.no_grad():
            wanted = model(preprocess(str(path))[None])[0].numpy()
        (got,) = session.run(["logits"], {"pixels": pixels})
        off, largest = np.abs(got[0] - wanted).max(), np.abs(wanted).max()
        assert off < 1e-3 if size == (32, 32) else off < 2e-2 * largest, (size, mode)
        assert got[0].argmax() == wanted.argmax()


def test_the_page_holds_the_card_and_the_options(page: str):
    assert config(page)["top"] == 3 and config(page)["task"] == "classify"
    assert "<title>vit_micro.digits</title>" in page
    assert "reads a single handwritten digit" in seen(page) and "0.9800 to 0.9985" in seen(page)
    notes = onnxruntime.InferenceSession(unpacked(page, "model")).get_modelmeta().custom_metadata_map
    assert notes["license"] == "apache-2.0" and notes["family"] == "vit"
    assert b".py" not in unpacked(page, "model"), "no line of code, with the folders of this machine"


def test_a_model_without_names_of_its_classes(runtime: str, tmp_path: Path):
    torch.manual_seed(0)
    made: Any = randomise(zoo.create_model("vit_micro", norm="prepbn", classes=3, image=16, channels=1, depth=2))
    zoo.advance(made, 1.0)
    preprocess = ImagePreprocess(size=16, channels=1, mean=(0.5,), std=(0.5,), fit="pad", crop=1.0)
    name = str(save_model(made, tmp_path / "grey", preprocess=preprocess))
    main(["page", name, "--output", "grey.html", "--runtime", runtime])
    assert config(Path("grey.html").read_text("utf-8"))["labels"] == ["class 0", "class 1", "class 2"]


# Refusals


def test_what_is_refused(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Path("page.html").write_text("precious")
    assert refused("page", "vit_micro.digits") == "page.html exists; delete it, or give another --output"
    assert Path("page.html").read_text() == "precious"
    wanted = "zoo page: dit_micro.digits is for `zoo generate`, which is not yet supported, only "
    assert refused("page", "dit_micro.digits", "-o", "other.html") == wanted + "classify, detect, transcribe"
    assert refused("page", "vit_micro.digits", "-o", "other.html", "--runtime", "nowhere").startswith("--runtime nowh")
    made: Any = zoo.create_model("vit_micro", classes=3, depth=1)
    name = str(save_model(made, tmp_path / "nearest", preprocess=ImagePreprocess(size=32, interpolation="nearest")))
    assert refused("page", name, "-o", "other.html") == "zoo page: interpolation 'nearest' is not yet supported"
    finder: Any = zoo.create_model(**TINY, classes=3)
    name = str(save_model(finder, tmp_path / "padded", preprocess=BoxPreprocess(size=64, fit="pad")))
    wanted = "zoo page: detection with fit 'pad' is not yet supported, only 'stretch'"
    assert refused("page", name, "-o", "other.html") == wanted
    finder = zoo.create_model(**TINY, classes=3, detection_nms=0.7)
    name = str(save_model(finder, tmp_path / "nms", preprocess=BoxPreprocess(size=64)))
    assert refused("page", name, "-o", "other.html").endswith("has non-maximum suppression, which is not yet supported")
    small: Any = {"vocabulary": 3, "depth": 1, "dim": 16, "heads": 2, "mels": 80}
    heard: Any = zoo.create_model("conformer_s", head="transducer", **small)
    name = str(save_model(heard, tmp_path / "rnnt", preprocess=AudioPreprocess(), labels=Characters(["a", "b"])))
    wanted = f"zoo page: {name} is a transducer, which is not yet supported, only CTC"
    assert refused("page", name, "-o", "other.html") == wanted
    monkeypatch.setattr(predicting, "find_spec", lambda name: None if name == "onnx" else SimpleNamespace())
    wanted = 'zoo page needs onnx; run: pip install "zoo[export]"'
    assert refused("page", "vit_micro.digits", "-o", "other.html") == wanted
    assert not Path("other.html").exists()


@pytest.mark.parametrize("command", ["page", "publish"])
def test_help_and_the_package_import_nothing_heavy(command: str):
    code = f"import sys\nfrom zoo.__main__ import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    code += "print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = shown.splitlines()[-1].split()
    assert not {"torch", "onnx", "onnxruntime", "onnxscript", "numpy", "huggingface_hub"} & {*loaded}
