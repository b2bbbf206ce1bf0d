"""scripts/evaluate, from outside, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from torchmetrics.functional.text import word_error_rate

import zoo
from helpers import randomise
from zoo.data.images import Images
from zoo.data.speech import Speech
from zoo.inputs.audio import RECIPES
from zoo.outputs import greedy
from zoo.outputs.tokens import train_characters

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts/evaluate"


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    choices = {"dim": 16, "depth": 1, "heads": 2, "patch": 8, "classes": 10}
    model = randomise(zoo.create_model("vit_micro", **choices)).eval()
    data = Images(size=16, crop=1.0)
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    zoo.save_model(model, folder, preprocess=data.preprocess, labels=data.classes)
    with torch.inference_mode():
        right = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in data.val_dataloader())
    return folder, right / 360


def test_the_accuracy_is_that_of_the_model_on_the_checkpoints_own_preprocessing(checkpoint):
    folder, wanted = checkpoint
    done = evaluate(str(folder))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["val/accuracy"] == pytest.approx(wanted, abs=1e-6)
    low, high = figures["interval"]
    assert figures["n"] == 360 and low < wanted < high
    (line,) = done.stderr.splitlines()
    assert line.startswith("accuracy 0.") and "n = 360" in line


def test_help_has_examples_and_needs_no_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, "--help"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "examples:" in lines and len(lines) <= 24 and max(map(len, lines)) <= 80


def test_what_is_wrong_is_one_line(checkpoint):
    done = evaluate(str(checkpoint[0]), "--root", "/nowhere")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("scripts/evaluate: error: ")
    assert "Traceback" not in done.stderr


def test_a_speech_checkpoint_is_measured_on_folders_in_librispeechs_layout(tmp_path):
    tokenizer = train_characters(["ABC"])
    choices = {"dim": 16, "depth": 2, "heads": 2, "vocabulary": tokenizer.vocabulary}
    model = randomise(zoo.create_model("squeezeformer_xs", **choices)).eval()
    zoo.save_model(model, tmp_path / "model", preprocess=RECIPES["nemo"], labels=tokenizer)
    chapter = tmp_path / "data/dev/1/2"
    chapter.mkdir(parents=True)
    for number in range(3):
        soundfile.write(chapter / f"1-2-000{number}.flac", 0.1 * torch.randn(8000 + number).numpy(), 16000)
    (chapter / "1-2.trans.txt").write_text("1-2-0000 ABC\n1-2-0001 A B\n1-2-0002 C\n")
    data = Speech(dataset="librispeech", root=str(tmp_path / "data"), val=["dev"])
    said, wanted = [], []
    for batch in data.val_dataloader():
        with torch.inference_mode():
            said += [tokenizer.decode(tokens) for tokens in greedy(*model(batch.features, batch.lengths))]
        wanted += batch.texts
    done = evaluate(str(tmp_path / "model"), "--root", str(tmp_path / "data"), "--splits", "dev")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["n"], found["utterances"], len(found["interval"])) == (4, 3, 2)
    assert any(said) and found["val/wer"] == pytest.approx(word_error_rate(said, wanted).item(), abs=1e-6)
    assert "4 words in 3 utterances" in done.stdout + done.stderr
    done = evaluate(str(tmp_path / "model"))
    assert done.returncode == 1 and "--splits" in done.stderr.splitlines()[-1]
