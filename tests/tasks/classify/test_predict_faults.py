"""What `zoo classify predict` says of images and arguments that are wrong, what faults leave, and its help."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from classifying import break_pictures, failure, predict, save
from zoo import weights
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess
from zoo.tasks.classify import answers
from zoo.tasks.classify.predict import FILES
from zoo.weights import load_checkpoint, load_model


def test_unreadable_pictures_stop_no_other(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    good = predict(model, "images", "--output", "good")
    broken = break_pictures()
    capsys.readouterr()
    text = failure(capsys, model, "images").splitlines()
    assert [line.split(": ")[:2] for line in text[:2]] == [["zoo", path] for path in broken]
    assert text[-1] == "zoo: error: 2 of 6 images had an error" and len(text) == 4
    entries = json.loads(Path("runs/predict/predictions.json").read_text())
    assert [entry["path"] for entry in entries] == sorted([*images, *broken])
    failed = [entry for entry in entries if "error" in entry]
    assert [entry["path"] for entry in failed] == broken
    assert all(entry.keys() == {"path", "error"} for entry in failed)
    assert failed[0]["error"].startswith("image file is truncated") and failed[1]["error"].startswith("not an image")
    rest = [entry for entry in entries if "error" not in entry]
    assert [entry["label"] for entry in rest] == [entry["label"] for entry in good]
    with open("runs/predict/predictions.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows[broken[0]]["error"] == failed[0]["error"] and rows[broken[0]]["label"] == ""


def test_nothing_readable_writes_nothing(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    before = predict(model, "images")
    broken = break_pictures()
    text = failure(capsys, model, *broken)
    assert text.endswith("error: no prediction for any of the 2 images; nothing was written to runs/predict")
    assert json.loads(Path("runs/predict/predictions.json").read_text()) == before
    failure(capsys, model, *broken, "--output", "fresh")
    assert os.listdir("fresh") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "nowhere"], "file or folder not found: 'nowhere'"),
        (["MODEL", ""], "file or folder not found: ''"),
        (["MODEL", "images", "empty"], "no image in folder 'empty' (.jpg .jpeg"),
        (["nowhere", "images"], "checkpoint 'nowhere' not found"),
        (["plain", "images"], "plain has no preprocess in its config.json"),
        (["backbone", "images"], "backbone is a backbone without a head"),
        (
            ["MODEL", "images", "--output", "images/deep.png"],
            "--output must be a folder; images/deep.png is a file",
        ),
        (["MODEL", "images", "--top", "0"], "must be an integer from 1 to 999999999, got '0'"),
        (["MODEL", "images", "--batch", "1.5"], "must be an integer from 1 to 999999999, got '1.5'"),
        (["MODEL", "images", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["MODEL", "images", "--prec", "bf16"], "unrecognized arguments: --prec"),
        (["MODEL"], "required: PATH (see --help)"),
        ([], "required: NAME, PATH (see --help)"),
        (["run", "images"], "run is a run, not a checkpoint; did you mean run/best?"),
    ],
    ids=str,
)
def test_bad_arguments(
    arguments: list[str], words: str, model: str, images: list[str], capsys: pytest.CaptureFixture[str]
):
    Path("empty/.hidden").mkdir(parents=True)
    if "plain" in arguments:
        save(Path("plain"), preprocess=None)
    if "run" in arguments:
        save(Path("run/best"))
    if "backbone" in arguments:
        save(Path("backbone"), classes=0, labels=None)
    capsys.readouterr()
    text = failure(capsys, *(model if word == "MODEL" else word for word in arguments))
    assert words in text and not Path("runs").exists()
    assert len(text.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(model: str, images: list[str], capsys: pytest.CaptureFixture[str]):
    assert "no CUDA device found" in failure(capsys, model, "images", "--device", "cuda")


class Odd(torch.nn.Module):
    """A model that answers a white image with NaN, and refuses a black one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = images.mean((1, 2, 3))
        if (level < -1.95).any():
            raise RuntimeError("too dark\nfor a model")
        return self.model(images).where((level < 2)[:, None], float("nan"))


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_fault_of_one_image_ends_no_other(
    batch: int, model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    good = predict(model, *images)
    for name, level in (("white", 255), ("black", 0)):
        Image.new("RGB", (9, 9), (level, level, level)).save(f"{name}.png")
    loaded = load_checkpoint(model)
    odd: Any = Odd(loaded.model)
    monkeypatch.setattr(weights, "load_checkpoint", lambda name: loaded._replace(model=odd))
    prepare = ImagePreprocess.__call__

    def strange(self: ImagePreprocess, image: Any) -> torch.Tensor:
        if image.size == (7, 5):
            raise KeyError("no such thing")
        return prepare(self, image)

    monkeypatch.setattr(ImagePreprocess, "__call__", strange)
    Image.new("RGB", (7, 5)).save("strange.png")
    capsys.readouterr()
    text = failure(capsys, model, "white.png", images[0], "black.png", "strange.png", *images[1:], "--batch", batch)
    assert "zoo: white.png: the model's output is NaN or infinite" in text
    assert "zoo: black.png: RuntimeError: too dark for a model" in text
    assert "zoo: strange.png: KeyError: 'no such thing'" in text
    assert text.splitlines()[-1] == "zoo: error: 3 of 7 images had an error"
    entries = json.loads(Path("runs/predict/predictions.json").read_text())
    assert [entry["path"] for entry in entries if "error" in entry] == ["white.png", "black.png", "strange.png"]
    answered = [entry for entry in entries if "error" not in entry]
    assert [entry["label"] for entry in answered] == [entry["label"] for entry in good]


def test_answers_that_are_all_nan(images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    broken = load_model(save(Path("broken")))
    list(broken.parameters())[-1].data.fill_(float("nan"))
    loaded = load_checkpoint("broken")._replace(model=broken)
    monkeypatch.setattr(weights, "load_checkpoint", lambda name: loaded)
    text = failure(capsys, "broken", "images")
    assert text.count("the model's output is NaN or infinite") == 4
    assert text.endswith("no prediction for any of the 4 images; nothing was written to runs/predict")
    assert os.listdir("runs/predict") == []


def test_a_figure_that_cannot_be_drawn_costs_no_answers(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def odd(*given: object) -> None:
        raise KeyError("a font")

    monkeypatch.setattr(answers, "draw", odd)
    assert len(predict(model, "images")) == 4 and sorted(os.listdir("runs/predict")) == sorted(FILES[:2])
    assert "zoo: predictions.png could not be drawn: 'a font'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_nobody_reads_on(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Answers that are read no further, or cannot be printed at all, are written."""
    reading, writing = os.pipe()
    os.close(reading)
    full = "zoo: standard output: No space left on device\n"
    for stream, said in ((os.fdopen(writing, "w"), ""), (open("/dev/full", "w"), full), (None, "")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        entries = predict(model, "images", "--batch", 1)
        end = "zoo: 4 of 4 images done; wrote predictions.json, predictions.csv, predictions.png to runs/predict\n"
        assert len(entries) == 4 and capsys.readouterr().err == said + end
        Path("runs/predict/predictions.json").unlink()
        if stream is not None:
            stream.write("what Python flushes at its end")
            stream.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_pipe_into_head(model: str, images: list[str]):
    environment = os.environ | {"PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    command = f"{sys.executable} -m zoo classify predict {model} images --batch 1 | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stderr.splitlines()[0].startswith("zoo: 4 of 4 images done")
    assert len(json.loads(Path("runs/predict/predictions.json").read_text())) == 4


def test_help_needs_no_heavy_library():
    code = "import sys, zoo.__main__ as z\ntry: z.main(['TASK', 'VERB', '-h'])\nfinally: print(*sys.modules)"
    for task, verb in (("classify", "predict"), ("transcribe", "predict"), ("transcribe", "stream")):
        lines = code.replace("TASK", task).replace("VERB", verb)
        done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
        *text, modules = done.stdout.splitlines()
        assert text[0].startswith(f"usage: zoo {task} {verb}") and len(text) <= 32 and max(map(len, text)) < 82
        assert text[-2] == "example:" and not {"torch", "numpy", "PIL", "tqdm"} & set(modules.split())


def test_full_disk_leaves_the_files_before_whole(
    model: str, images: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = predict(model, "images")

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(answers, "draw", full)
    text = failure(capsys, model, "images/b")
    assert text.endswith("zoo: error: cannot write to runs/predict: No space left on device")
    assert sorted(os.listdir("runs/predict")) == sorted(FILES)
    assert json.loads(Path("runs/predict/predictions.json").read_text()) == before


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and text.startswith("usage: zoo classify predict")
    for flag in ("NAME", "PATH", "--output", "--top", "--device"):
        assert flag in text
    with pytest.raises(SystemExit) as exit:
        main(["classify", "predict", "--help-all"])
    whole = capsys.readouterr().out
    assert exit.value.code == 0
    for flag in ("--batch", "--precision"):
        assert flag in whole and flag not in text
