"""Streaming from the command: the text of the whole, from a file and from a pipe, in pieces of any size."""

import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

import zoo
from listening import (
    CHUNK,
    LEFT,
    LETTERS,
    PREPROCESS,
    RATE,
    TINY,
    Pipe,
    hear,
    loaded,
    pcm,
    sound,
    talkative,
    tokens_of,
    whole,
)
from training import refused
from zoo.__main__ import main
from zoo.inputs.audio import RECIPES, StreamingFeatures
from zoo.layer import Chunks
from zoo.outputs import words
from zoo.outputs.tokens import train_characters
from zoo.weights import save_model


@pytest.fixture(scope="module", params=["ctc", "transducer"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = talkative(LETTERS, request.param)
    return save_model(model, tmp_path_factory.mktemp("kept") / request.param, preprocess=PREPROCESS, labels=LETTERS)


# The text of the whole


def test_a_file_gives_the_text_of_the_whole(kept: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for number, seconds in enumerate((3.0, 1.2345, 0.001)):
        path = tmp_path / f"{number}.{('flac', 'wav')[number % 2]}"
        soundfile.write(path, sound(seconds).numpy(), RATE)
        main(["transcribe", "stream", str(kept), str(path)])
        text = capsys.readouterr().out
        assert text == whole(kept, sound(seconds)) + "\n"
        assert seconds < 3 or len(text.split()) > 5
    if loaded(kept).model.config.head == "ctc":  # letters that go on behind the end of a chunk are said once
        path = tokens_of(loaded(kept).model, sound())[1].argmax(-1).tolist()
        assert sum(path[at - 1] == path[at] != LETTERS.blank for at in range(CHUNK, len(path), CHUNK)) >= 2


@pytest.mark.parametrize("size", [321, 3201, 100_000])
def test_standard_input_gives_the_text_of_the_whole(size: int, kept: Path, capsys: Any, monkeypatch: Any):
    """Pieces may end within a sample, and what is left of the last one is ignored."""
    hear(monkeypatch, Pipe(pcm(sound()) + b"\x7f", size), kept)
    assert capsys.readouterr().out == whole(kept, sound()) + "\n"


@pytest.mark.parametrize("ahead", [0, 11])
def test_look_ahead(ahead: int, kept: Path, capsys: Any, monkeypatch: Any):
    hear(monkeypatch, Pipe(pcm(sound()), 3200), kept, "--look-ahead", ahead)
    visible = Chunks(ahead + 1, LEFT // (ahead + 1) * (ahead + 1))
    text = capsys.readouterr().out
    assert text == whole(kept, sound(), visible) + "\n"
    assert text != whole(kept, sound()) + "\n"


# Words as they come


def test_words_come_before_the_sound_ends(kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    seen: list[tuple[int, str]] = []
    hear(monkeypatch, Pipe(pcm(sound()), 640, lambda given: seen.append((given, capsys.readouterr().out))), kept)
    pieces = [text for _, text in seen] + [capsys.readouterr().out]
    assert "".join(pieces) == whole(kept, sound()) + "\n"
    first, *_ = (given for given, text in seen if text)
    # A chunk is there 4 * 40 ms - 30 ms after its start, and half a window later.
    assert first <= 2 * 0.5 * RATE and sum(map(bool, pieces)) > 10


def test_a_true_pipe_is_read_without_waiting_for_its_end(ctc: Path, capsys: Any, monkeypatch: Any):
    """What is written is answered while the pipe is still open."""
    reading, writing = os.pipe()
    said: list[str] = []
    printed = threading.Event()

    def note(text: str) -> int:
        said.append(text)
        printed.set()
        return len(text)

    def speak() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pcm(sound(1.0)))
            pipe.flush()
            answered.append(printed.wait(20))

    answered: list[bool] = []
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    monkeypatch.setattr(sys.stdout, "write", note)
    speaker = threading.Thread(target=speak)
    speaker.start()
    main(["transcribe", "stream", str(ctc), "-"])
    speaker.join()
    sys.stdin.close()
    assert answered == [True] and "".join(said) == whole(ctc, sound(1.0)) + "\n"


def test_times_are_those_of_the_best_path(ctc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    hear(monkeypatch, Pipe(pcm(sound()), 1000), ctc, "--times")
    tokens, logits = tokens_of(loaded(ctc).model, sound())
    wanted = [f"{word.start:8.2f}  {word.text}" for word in words(logits, tokens, LETTERS, 0.04)]
    assert capsys.readouterr().out.splitlines() == wanted and len(wanted) > 5


# Other sounds


def test_a_rate_of_8000(ctc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path):
    slow = (resample(sound(), RATE, 8000).clamp(-1, 1) * 32767).round() / 32768
    wanted = whole(ctc, resample(slow, 8000, RATE)) + "\n"
    hear(monkeypatch, Pipe(pcm(slow), 777), ctc, "--rate", 8000)
    assert capsys.readouterr().out == wanted and wanted != whole(ctc, sound()) + "\n"
    soundfile.write(tmp_path / "slow.wav", slow.numpy(), 8000)
    main(["transcribe", "stream", str(ctc), str(tmp_path / "slow.wav")])
    assert capsys.readouterr().out == wanted


def test_channels_are_averaged(ctc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    both = torch.stack([sound(1.0) * 1.5, sound(1.0) * 0.5], 1).clamp(-1, 32767 / 32768)
    both = (both * 32768).round() / 32768
    hear(monkeypatch, Pipe(pcm(both), 501), ctc, "--channels", 2)
    assert capsys.readouterr().out == whole(ctc, both.mean(1)) + "\n"


# Ends


def test_ctrl_c_ends_the_sound(ctc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    def interrupt(given: int) -> None:
        if given >= 32000:
            raise KeyboardInterrupt

    hear(monkeypatch, Pipe(pcm(sound()), 1000, interrupt), ctc)
    assert capsys.readouterr().out == whole(ctc, sound(1.0)) + "\n"


def test_ctrl_c_while_it_computes(ctc: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    push = StreamingFeatures.push

    def interrupted(self: StreamingFeatures, samples: Tensor) -> Tensor:
        if self.samples > 16000:
            raise KeyboardInterrupt
        return push(self, samples)

    monkeypatch.setattr(StreamingFeatures, "push", interrupted)
    hear(monkeypatch, Pipe(pcm(sound()), 1000), ctc)
    text = capsys.readouterr().out
    assert text.endswith("\n") and len(text) > 10 and whole(ctc, sound()).startswith(text[:-1])


def test_nobody_reads_on(ctc: Path, monkeypatch: pytest.MonkeyPatch):
    """As with `| head -c 5`: no error, and what Python flushes at its end goes nowhere."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        hear(monkeypatch, Pipe(pcm(sound()), 3200), ctc)
        out.write("more")


def test_an_ascii_terminal(ctc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = loaded(ctc).model
    odd = train_characters(["\x1bÄCDEFGH I"])
    folder = save_model(model, tmp_path / "odd", preprocess=PREPROCESS, labels=odd)
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    hear(monkeypatch, Pipe(pcm(sound()), 3200), folder)
    text = out.buffer.getvalue().decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    assert "\\xc4" in text and "\\x1b" in text and "\x1b" not in text and text.endswith("\n")


# Refusals


def changed(ctc: Path, folder: Path, recipe: str = "streaming", **choices: Any) -> Path:
    torch.manual_seed(0)
    labels = None if choices.get("vocabulary") == 0 else LETTERS
    model = zoo.create_model(**{**TINY, "vocabulary": LETTERS.vocabulary, **choices})
    return save_model(model.eval(), folder, preprocess=RECIPES[recipe], labels=labels)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (
            {"chunk": None, "left": 70},
            "cannot stream: its config has no chunk, so it needs the whole recording; use `zoo tr",
        ),
        ({"recipe": "nemo"}, "cannot stream: normalize='bin' needs the whole utterance"),
        ({"vocabulary": 0}, "is a backbone without a head, so it predicts nothing"),
    ],
    ids=str,
)
def test_models_that_do_not_stream(choices: dict[str, Any], reason: str, ctc: Path, tmp_path: Path):
    folder = changed(ctc, tmp_path / "other", **choices)
    soundfile.write(tmp_path / "a.wav", sound(0.5).numpy(), RATE)
    message = refused("transcribe", "stream", folder, tmp_path / "a.wav")
    assert message.startswith(f"{folder} {reason}")


def given(monkeypatch: pytest.MonkeyPatch, content: bytes, *arguments: object) -> str:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe(content, 3200)))
    return refused("transcribe", "stream", *arguments)


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (b"", [], "standard input is empty"),
        (b"\0", [], "standard input is empty"),
        (b"\0\0\0", ["--channels=2"], "standard input is empty"),
        (b"RIFF" + bytes(400), [], "standard input is a wav file; - takes raw samples"),
        (b"ID3" + bytes(400), [], "standard input is a mp3 file; - takes raw samples"),
        (bytes(400), ["--look-ahead=-1"], "--look-ahead must be >= 0, got -1"),
        (bytes(400), ["--rate=44"], "sample rate must be 1000 to 768000 Hz, got 44"),
        (bytes(400), ["--device=cuda"], "no CUDA device found"),
    ],
    ids=str,
)
def test_standard_input_that_is_wrong(content: bytes, options: list[str], reason: str, ctc: Path, monkeypatch: Any):
    if options == ["--device=cuda"]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in given(monkeypatch, content, ctc, "-", *options)


def test_a_terminal_is_no_sound(ctc: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Pipe, "isatty", lambda self: True)
    assert given(monkeypatch, b"", ctc, "-").startswith("standard input is not a pipe; pipe raw audio into it")


def test_files_that_are_wrong(ctc: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def said(path: Path, *options: str) -> str:
        return refused("transcribe", "stream", ctc, path, *options)

    good, short = tmp_path / "good.wav", tmp_path / "short.wav"
    soundfile.write(good, sound(2.0).numpy(), RATE, subtype="PCM_16")
    assert "--rate is for raw audio" in said(good, "--rate=16000")
    assert "--channels is for raw audio" in said(good, "--channels=1")
    assert said(tmp_path / "none.wav") == f"{tmp_path}/none.wav: No such file or directory"
    (tmp_path / "text.wav").write_text("no sound")
    assert "cannot be read as audio" in said(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    assert said(tmp_path / "empty.wav") == f"{tmp_path}/empty.wav: it has no samples"
    values = sound(1.0).numpy()
    values[-1] = np.nan
    soundfile.write(tmp_path / "nan.wav", values, RATE, subtype="FLOAT")
    assert said(tmp_path / "nan.wav").endswith("it has samples that are NaN, infinite or above 1e+06")
    capsys.readouterr()
    short.write_bytes(good.read_bytes()[: 44 + 32000])
    assert said(short) == f"{short}: truncated after 1.00 s"
    text = capsys.readouterr().out  # what is there is heard, and the error stands on its own line
    assert text.endswith("\n") and len(text) > 10 and whole(ctc, sound(2.0)).startswith(text.strip())
