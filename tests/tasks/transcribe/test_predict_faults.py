"""What `zoo transcribe predict` says of files and arguments that are wrong, and its help."""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from hearing import (
    RATE,
    Ear,
    predict,
    spoken,
)
from zoo.inputs.audio import AudioPreprocess
from zoo.tasks.transcribe import predict as command


def test_unreadable_files_stop_no_other(ear: Ear, capsys: pytest.CaptureFixture[str]):
    good = predict("ear", "sounds", "--output", "good")
    whole = Path("sounds/z.wav").read_bytes()
    Path("sounds/deep/b.wav").write_bytes(whole[: 44 + (len(whole) - 44) * 6 // 10])
    Path("sounds/text.wav").write_text("text")
    capsys.readouterr()
    with pytest.raises(ValueError, match="^2 of 6 files had an error$"):
        predict("ear", "sounds")
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in said[:2]] == [["zoo", "sounds/deep/b.wav"], ["zoo", "sounds/text.wav"]]
    entries = json.loads(Path("runs/predict/transcripts.json").read_text())
    assert [entry for entry in entries if "error" not in entry] == good
    cut, text = (entry for entry in entries if "error" in entry)
    assert cut["error"].startswith("truncated after 0.9") and cut["text"] == "cab"  # what was there is heard
    assert text.keys() == {"path", "error"} and text["error"].startswith("cannot be read as audio")
    assert [f"zoo: {entry['path']}: {entry['error']}" for entry in (cut, text)] == said[:2]
    with open("runs/predict/transcripts.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows["sounds/text.wav"]["error"] == text["error"] and rows["sounds/text.wav"]["text"] == ""


def test_nothing_readable_writes_nothing(ear: Ear):
    Path("empty.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="^no prediction for the file; nothing was written to runs/predict$"):
        predict("ear", "empty.wav")
    assert os.listdir("runs/predict") == []


@pytest.mark.daily(2)
@pytest.mark.parametrize("seconds", [0.1, 3, 120])
@pytest.mark.parametrize("model", ["ear", "transducer"])
def test_a_fault_of_one_file_ends_no_other(
    model: str, seconds: float, ear: Ear, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    good = predict(model, "sounds", "--output", "good")
    for name, level in (("nan.wav", 0.9), ("bad.wav", -0.9)):
        soundfile.write(f"sounds/{name}", level + 0.01 * spoken("abc").numpy(), RATE, subtype="FLOAT")
    forward = Ear.forward

    def odd(self: Ear, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if (features[:, 0, 0] == -9).any():
            raise RuntimeError("too odd")
        made, lengths = forward(self, features, lengths)
        return made.where((features[:, 0, 0] != 9)[:, None, None], math.nan), lengths

    call = AudioPreprocess.__call__

    def marked(self: AudioPreprocess, waveform: Any) -> Tensor:
        level = float(torch.as_tensor(waveform).mean())
        return call(self, waveform) if abs(level) < 0.5 else torch.full((40, 80), math.copysign(9, level))

    monkeypatch.setattr(Ear, "forward", odd)
    monkeypatch.setattr(AudioPreprocess, "__call__", marked)
    with pytest.raises(ValueError, match="^2 of 6 files had an error$"):
        predict(model, "sounds", "--seconds", seconds)
    said = capsys.readouterr().err
    assert "zoo: sounds/nan.wav: the model's output is NaN or infinite" in said
    assert "zoo: sounds/bad.wav: RuntimeError: too odd" in said
    entries = json.loads(Path("runs/predict/transcripts.json").read_text())
    assert [entry["text"] for entry in entries if "error" not in entry] == [entry["text"] for entry in good]


def test_answers_that_are_all_nan(ear: Ear):
    ear.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="^no prediction for any of the 4 files"):
        predict("ear", "sounds")
    assert os.listdir("runs/predict") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ear", "nowhere"], "file or folder not found: 'nowhere'"),
        (["ear", "sounds", "empty"], "no audio file in folder 'empty' (.wav "),
        (["vision", "sounds"], "`zoo transcribe` cannot use vision; use `zoo classify predict`"),
        (["encoder", "sounds"], "encoder is a backbone without a head"),
        (["ear", "sounds", "--output", "sounds/z.wav"], "--output must be a folder; sounds/z.wav is a file"),
        (["transducer", "sounds", "--decode", "beam"], "transducer is a transducer, which supports only greedy"),
        (["ear", "sounds", "--beam", "4"], "--beam needs --decode beam or flashlight"),
        (["ear", "sounds", "--lm", "x"], "--lm needs --decode beam or flashlight"),
        (["ear", "sounds", "--decode", "beam", "--beta", "1"], "--beta needs --lm FILE"),
        (["ear", "sounds", "--decode", "beam", "--unit", "word"], "--unit needs --lm FILE"),
        (["ear", "sounds", "--decode", "beam", "--lm", "x", "--alpha", "-1"], ">= 0, got -1.0"),
        (
            ["ear", "sounds", "--decode", "beam", "--lm", "x", "--beta", "nan"],
            "--beta must be a finite number, got nan",
        ),
    ],
    ids=str,
)
def test_bad_input(arguments: list[str], words: str, ear: Ear):
    Path("empty").mkdir()
    with pytest.raises(ValueError) as error:
        command.main(arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists() and not ear.batches


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ear"], "required: PATH"),
        (["ear", "sounds", "--longest", "0.01"], "a number of seconds >= 0.1, got '0.01'"),
        (["ear", "sounds", "--seconds", "nan"], "a number of seconds >= 0.1, got 'nan'"),
        (["ear", "sounds", "--beam", "0"], "must be an integer from 1 to 999999999, got '0'"),
        (["ear", "sounds", "--decode", "best"], "invalid choice: 'best'"),
        (["ear", "sounds", "--prec", "bf16"], "unrecognized arguments: --prec"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[str], words: str, ear: Ear, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    text = capsys.readouterr().err
    assert exit.value.code == 2 and words in text and text.startswith("zoo transcribe predict: error: ")
    assert text.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        command.main(["--help-all"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for flag in ("NAME", "PATH", "--output", "--decode", "--beam", "--lm", "--unit", "--alpha", "--beta"):
        assert flag in text
    for flag in ("--longest", "--seconds", "--device", "--precision"):
        assert flag in text
