import csv
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo import weights
from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.align import TAIL
from zoo.outputs.tokens import Characters
from zoo.tasks.transcribe import predict as command
from zoo.tasks.transcribe import transcripts
from zoo.weights import Checkpoint

RATE, STRIDE, TONE, PAUSE = 16000, 4, 0.1, 0.3
PREPROCESS = AudioPreprocess(normalize="none")
TOKENIZER = Characters(" abc")
PITCHES = {" ": 500.0, "a": 1000.0, "b": 2000.0, "c": 4000.0}


def spoken(text: str) -> Tensor:
    """A language of tones: a letter is a pitch, a word begins with the pitch of a space and ends with a pause."""
    time = torch.arange(int(TONE * RATE)) / RATE
    parts = [torch.zeros(int(PAUSE * RATE))]
    for word in text.split():
        parts += [0.5 * torch.sin(2 * math.pi * PITCHES[letter] * time) for letter in f" {word}"]
        parts.append(torch.zeros(int(PAUSE * RATE)))
    return torch.cat(parts)


class Ear(nn.Module):
    """Hears that language: the logit of a letter is the loudness of its mel band, that of the blank a threshold."""

    def __init__(self, head: str = "ctc") -> None:
        super().__init__()
        tones = [
            spoken(letter)[int((PAUSE + TONE) * RATE) :][: int(TONE * RATE)] for letter in PITCHES if letter != " "
        ]
        tones.insert(0, spoken("a")[int(PAUSE * RATE) :][: int(TONE * RATE)])
        bands = torch.stack([PREPROCESS(tone)[3] for tone in tones]).argmax(1)
        assert len(set(bands.tolist())) == 4
        self.weight = nn.Parameter(F.one_hot(bands, 80).float())
        self.config = SimpleNamespace(
            headed=True, task="transcribe", labelled=5, vocabulary=5, stride=STRIDE, transducer=head == "transducer"
        )
        self.head: Any = Joint() if head == "transducer" else nn.Identity()
        self.batches: list[tuple[int, int]] = []

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append((len(features), features.shape[1]))
        last = torch.arange(0, features.shape[1], STRIDE)
        logits = F.linear(features[:, last], self.weight)
        if self.config.transducer:  # it may ask twice for what one frame holds
            logits = logits.where(logits == logits.amax(-1, keepdim=True), -99.0)
        return F.pad(logits, (0, 1), value=-2.0), (lengths + STRIDE - 1) // STRIDE


class Joint:
    """The encoder's logits without the token that was put out last."""

    def start(self, batch: int) -> Any:
        return torch.zeros(batch, 5), ()

    def predict(self, tokens: Tensor, state: Any) -> Any:
        return 99.0 * F.one_hot(tokens, 5), ()

    def joint(self, encoded: Tensor, g: Tensor) -> Tensor:
        return encoded - g


class Checkpoints:
    """What `load_checkpoint` gives here."""

    def __init__(self) -> None:
        parts: Any = PREPROCESS, TOKENIZER, {}
        self.made: dict[str, Checkpoint] = {
            "ear": Checkpoint(Ear(), *parts),  # pyright: ignore
            "transducer": Checkpoint(Ear("transducer"), *parts),  # pyright: ignore
            "vision": Checkpoint(Ear(), *parts),  # pyright: ignore
            "encoder": Checkpoint(Ear(), *parts),  # pyright: ignore
        }
        self.made["encoder"].model.config.headed = False
        self.made["vision"].model.config.task = "classify"

    def __call__(self, name: str) -> Checkpoint:
        return self.made[name]


TEXTS = {"b.flac": "ab c", "deep/a.wav": "ba cab abc ca", "deep/c.WAV": "a", "z.wav": "cab ba"}


def record(path: Path, text: str, rate: int = RATE) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, spoken(text).numpy(), rate)
    return str(path)


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ear:
    """The model "ear"; the test runs beside a folder of recordings, which is sorted."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints()
    monkeypatch.setattr(weights, "load_checkpoint", checkpoints)
    for name, text in TEXTS.items():
        record(Path("sounds", name), text)
    record(Path("sounds/.hidden.wav"), "c")
    Path("sounds/notes.txt").write_text("no sound")
    return checkpoints.made["ear"][0]


def predict(*arguments: object) -> list[dict[str, Any]]:
    command.main([*map(str, arguments)])
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs/predict"
    return json.loads(Path(str(output), "transcripts.json").read_text(encoding="utf-8"))


def times(text: str) -> list[tuple[str, float, float]]:
    """When the letters of each word are heard, the pitch of the space left out."""
    found, now = [], PAUSE
    for word in text.split():
        found.append((word, now + TONE, now + TONE * (1 + len(word))))
        now += TONE * (1 + len(word)) + PAUSE
    return found


def check_words(entry: dict[str, Any], text: str) -> None:
    assert entry["text"] == text
    for word, (letters, start, end) in zip(entry["words"], times(text), strict=True):
        assert word["text"] == letters and 0.5 < word["probability"] <= 1
        assert word["start"] == pytest.approx(start, abs=0.055) and end - 0.055 < word["end"] < end + TAIL + 0.055


# What is written


def test_texts_in_the_order_given(ear: Ear, capsys: pytest.CaptureFixture[str]):
    entries = predict("ear", "sounds/z.wav", "sounds")
    names = ["z.wav", "b.flac", "deep/a.wav", "deep/c.WAV"]
    assert [entry["path"] for entry in entries] == [f"sounds/{name}" for name in names]
    for entry, name in zip(entries, names, strict=True):
        assert entry.keys() == {"path", "text", "seconds", "words"}
        assert entry["seconds"] == round(len(spoken(TEXTS[name])) / RATE, 6)
        check_words(entry, TEXTS[name])
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{'sounds/' + name:17}  {TEXTS[name]}" for name in names]
    wrote = "wrote transcripts.json, transcripts.csv, transcripts.png to runs/predict"
    assert said.err == f"zoo: 4 of 4 files done; {wrote}\n"
    assert sorted(os.listdir("runs/predict")) == sorted(command.FILES)


def test_csv_says_what_json_says(ear: Ear):
    entries = predict("ear", record(Path('a, "b".wav'), "ab"), "sounds")
    with open("runs/predict/transcripts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "text", "seconds", "error"]
    for entry, row in zip(entries, rows, strict=True):
        assert (row["path"], row["text"], row["error"]) == (entry["path"], entry["text"], "")
        assert float(row["seconds"]) == entry["seconds"]


def test_batches_are_of_one_duration_and_change_nothing(ear: Ear):
    names = [record(Path(f"many/{index:02}.wav"), "ab " * (1 + 5 * index % 7)) for index in range(14)]
    whole = predict("ear", "many", "--seconds", 1000)
    assert [number for number, _ in ear.batches] == [14]
    ear.batches.clear()
    assert predict("ear", "many", "--seconds", 9) == whole
    assert len(ear.batches) > 2 and sum(number for number, _ in ear.batches) == len(names)
    assert all(number * frames <= 900 or number == 1 for number, frames in ear.batches)
    padded = sum(number * frames for number, frames in ear.batches)
    assert padded < 1.2 * 100 * sum(entry["seconds"] for entry in whole)
    ear.batches.clear()
    assert predict("ear", "many", "--seconds", 0.1) == whole and len(ear.batches) == 14
    assert [entry["text"].count("ab") for entry in whole] == [1 + 5 * index % 7 for index in range(14)]


def test_lines_come_before_all_is_read(ear: Ear, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    said = []
    parts = AudioPreprocess.parts

    def read(self: AudioPreprocess, path: Any, longest: float = 30.0) -> Any:
        said.append(capsys.readouterr().out.count("\n"))
        return parts(self, path, longest)

    monkeypatch.setattr(AudioPreprocess, "parts", read)
    predict("ear", "sounds", "--seconds", 0.3)
    assert [sum(said[: place + 1]) for place in range(4)] == [0, 1, 2, 2]  # a.wav is one of them


def test_a_long_file_is_computed_while_it_is_read(ear: Ear, monkeypatch: pytest.MonkeyPatch):
    """Features of all its parts are never held at once."""
    text = "abc ba cab " * 40
    record(Path("long.wav"), text.strip())
    computed = []
    batches = transcripts._batches
    monkeypatch.setattr(
        transcripts, "_batches", lambda parts, most: computed.append(len(parts)) or batches(parts, most)
    )
    (entry,) = predict("ear", "long.wav", "--longest", 5, "--seconds", 5)
    check_words(entry, text.strip())
    assert entry["seconds"] > 80 and len(computed) > 4 and max(computed) <= 7


def test_long_files_are_cut_at_silence(ear: Ear):
    text = "abc ba cab " * 12
    record(Path("long.wav"), text.strip())
    (whole,) = predict("ear", "long.wav", "--longest", 1000)
    assert len(ear.batches) == 1
    ear.batches.clear()
    (cut,) = predict("ear", "long.wav", "--longest", 5, "--seconds", 10)
    assert max(frames for _, frames in ear.batches) <= 500 and sum(number for number, _ in ear.batches) >= 5
    check_words(whole, text.strip())
    check_words(cut, text.strip())
    assert whole["seconds"] == cut["seconds"] > 20


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3", "opus", "wav"])
def test_formats(ear: Ear, ending: str):
    kind = {"format": "OGG", "subtype": "OPUS"} if ending == "opus" else {}
    sound = spoken("ab cab").numpy()
    Path("other").mkdir()
    if ending == "wav":
        soundfile.write("other/sound.wav", np.stack([2 * sound, np.zeros_like(sound)], 1), RATE)
    else:
        soundfile.write(f"other/sound.{ending}", sound, RATE, **kind)
    (entry,) = predict("ear", "other")
    check_words(entry, "ab cab")


def test_other_rates_are_resampled(ear: Ear):
    sound = torch.nn.functional.interpolate(spoken("ab cab")[None, None], scale_factor=2, mode="linear")[0, 0]
    soundfile.write("fast.wav", sound.numpy(), 2 * RATE)
    (entry,) = predict("ear", "fast.wav")
    check_words(entry, "ab cab")


def test_nothing_said(ear: Ear, capsys: pytest.CaptureFixture[str]):
    soundfile.write("silence.wav", np.zeros(RATE), RATE)
    soundfile.write("click.wav", np.zeros(3), RATE)
    entries = predict("ear", "silence.wav", "click.wav")
    assert [(entry["text"], entry["words"], entry["seconds"]) for entry in entries] == [
        ("", [], 1.0),
        ("", [], round(3 / RATE, 6)),
    ]
    said = capsys.readouterr()
    assert said.out == "silence.wav\nclick.wav\n" and not ear.batches
    assert said.err.splitlines()[:2] == ["zoo: silence.wav: silence", "zoo: click.wav: silence"]
    soundfile.write("both.wav", np.concatenate([np.zeros(16 * RATE), spoken("ab").numpy(), np.zeros(16 * RATE)]), RATE)
    (entry,) = predict("ear", "both.wav", "--longest", 4)
    assert entry["text"] == "ab" and ear.batches and "silence" not in capsys.readouterr().err


def test_transducer(ear: Ear):
    entries = predict("transducer", "sounds", "--seconds", 4)
    assert [entry["text"] for entry in entries] == list(TEXTS.values())
    assert all(entry["words"] is None for entry in entries)


def test_bf16_hears_the_same(ear: Ear):
    exact, near = predict("ear", "sounds"), predict("ear", "sounds", "--precision", "bf16", "--device", "cpu")
    assert [entry["text"] for entry in near] == [entry["text"] for entry in exact]
    pairs = [zip(one["words"], two["words"], strict=True) for one, two in zip(exact, near, strict=True)]
    apart = [abs(one["probability"] - two["probability"]) for one, two in itertools.chain(*pairs)]
    assert 0 < max(apart) < 0.05


# Searches


def test_beam(ear: Ear, monkeypatch: pytest.MonkeyPatch):
    used = []
    search = transcripts.beam
    monkeypatch.setattr(
        transcripts, "beam", lambda *given, **options: used.append(options) or search(*given, **options)
    )
    entries = predict("ear", "sounds", "--decode", "beam", "--beam", 4)
    assert [entry["text"] for entry in entries] == list(TEXTS.values())
    assert used == [{"size": 4}] * 5  # once to see whether it works
    predict("ear", "sounds", "--decode", "beam")
    assert used[-1] == {"size": 16}


class Deaf:
    """A language without b: a language model over tokens."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def start(self) -> None:
        return None

    def extend(self, state: None, token: int) -> tuple[None, float, int]:
        return None, -500.0 if TOKENIZER.pieces[token] == "b" else 0.0, 1

    def finish(self, state: None) -> tuple[float, int]:
        return 0.0, 0


def test_language_model(ear: Ear, monkeypatch: pytest.MonkeyPatch):
    used: list[dict[str, Any]] = []
    search = transcripts.beam
    monkeypatch.setattr(
        transcripts, "beam", lambda *given, **options: used.append(options) or search(*given, **options)
    )
    monkeypatch.setattr(transcripts, "KenLM", Deaf)
    entries = predict("ear", "sounds", "--decode", "beam", "--lm", "words.arpa")
    assert [entry["text"] for entry in entries] == [text.replace("b", "") for text in TEXTS.values()]
    assert used[-1].pop("lm").given == ("words.arpa", TOKENIZER, "word")
    assert used[-1] == {"size": 16, "alpha": 0.5, "beta": 1.5}
    more = ["--unit", "token", "--alpha", "0", "--beta", "-0.25"]
    entries = predict("ear", "sounds", "--decode", "beam", "--lm", "words.arpa", *more)
    assert [entry["text"] for entry in entries] == list(TEXTS.values())
    assert used[-1].pop("lm").given[2] == "token" and used[-1] == {"size": 16, "alpha": 0.0, "beta": -0.25}


def test_flashlight(ear: Ear):
    try:
        from torchaudio.models.decoder import ctc_decoder
    except RuntimeError:
        with pytest.raises(ValueError, match="needs flashlight-text, which is not installed"):
            predict("ear", "sounds", "--decode", "flashlight")
        assert not Path("runs").exists() and not ear.batches
    else:
        assert ctc_decoder is not None
        entries = predict("ear", "sounds", "--decode", "flashlight")
        assert [entry["text"] for entry in entries] == list(TEXTS.values())


# The picture


@pytest.mark.parametrize("number", [1, 9])
def test_picture_grows_with_the_files(ear: Ear, number: int):
    for index in range(number):
        record(Path(f"few/{index}.wav"), "ab cab " * (index + 1))
    predict("ear", "few")
    with Image.open("runs/predict/transcripts.png") as picture:
        rows = min(number, transcripts.SHOWN)
        assert picture.format == "PNG" and picture.size[0] == 1320 and 150 * rows < picture.size[1] < 330 * rows
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def entry_of(text: str, seconds: float, every: float) -> dict[str, Any]:
    said = [
        {"text": word, "start": index * every, "end": index * every + 0.04, "probability": 0.9}
        for index, word in enumerate(text.split())
    ]
    return {"path": "a/b/sound.wav", "text": text, "seconds": seconds, "words": said}


def test_words_stand_where_they_are_heard_and_apart():
    text = "THE QUICK BROWN FOX JUMPS OVER INCOMPREHENSIBILITIES AND WELL KNOWN LAZY DOGS"
    entry = entry_of(text, 4.0, 0.33)
    figure = transcripts.draw([entry], [(entry, torch.randn(400, 80))])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.texts]
    assert [label.get_text() for label in axes.texts] == text.split()
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert all(
        box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.texts[0].get_window_extent().y0 for box in boxes
    )
    assert len({round(box.y0) for box in boxes}) > 1
    for label, word in zip(axes.texts, entry["words"], strict=True):
        assert label.get_position()[0] == pytest.approx(word["start"]) or word["start"] > 3.0
    marks = sorted(line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 3)
    assert marks == pytest.approx([word["start"] for word in entry["words"]])
    assert [text.get_text() for text in figure.texts] == ["sound.wav", "4.0 s", ""]


def test_picture_says_what_it_leaves_out():
    long, empty = entry_of("ab " * 60, 30.0, 0.5), entry_of("", 2.0, 1.0)
    unheard = entry_of("$a_b$ c", 2.0, 1.0) | {"words": None}
    late = entry_of("ab", 30.0, 1.0)
    late["words"][0] |= {"start": 20.0, "end": 20.1}
    broken = {"path": "c", "error": "broken"}
    given = [long, empty, unheard, late]
    shown = [(entry, torch.zeros(int(100 * min(10, entry["seconds"])), 80)) for entry in given]
    figure = transcripts.draw([*given, broken, *[empty] * 3], shown)
    figure.draw_without_rendering()
    assert len(figure.axes[0].texts) == 20
    assert [axes.texts[0].get_text() for axes in figure.axes] == [
        "ab",
        "no words",
        "$a_b$ c",
        "no words in the first 10 s",
    ]
    assert figure.texts[1].get_text() == "the first 10 s of 30.0 s" and figure.texts[3].get_text() == "2.0 s"
    assert figure.texts[-1].get_text() == "and 3 more in transcripts.json; 1 had an error"


@pytest.mark.parametrize(
    ("seconds", "number", "last"), [(0.06, 7, "0.06 s"), (0.62, 7, "0.6 s"), (3.0, 7, "3 s"), (30.0, 11, "10 s")]
)
def test_every_file_fills_the_page_and_has_its_own_scale_in_seconds(seconds: float, number: int, last: str):
    entry, long = entry_of("ab", seconds, 0.5), entry_of("ab", 10.0, 0.5)
    bands = torch.zeros(int(100 * min(10, seconds)), 80)
    figure = transcripts.draw([entry, long], [(entry, bands), (long, torch.zeros(1000, 80))])
    figure.draw_without_rendering()
    first, second = figure.axes
    assert first.get_position().width == second.get_position().width > 0.9
    ticks = [label.get_text() for label in first.get_xticklabels()]
    assert (len(ticks), ticks[0], ticks[-1]) == (number, "0 s", last)
    places = [label.get_window_extent() for label in first.get_xticklabels()]
    assert not any(one.overlaps(two) for one, two in itertools.pairwise(places))
    assert first.lines[0].get_xdata()[0] == 0.0 and first.get_xlim() == (0.0, min(10.0, seconds))


# What is wrong


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
