"""What `zoo transcribe predict` writes: texts, times of words, the picture; and how it searches."""

import csv
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from hearing import (
    PAUSE,
    RATE,
    TEXTS,
    TOKENIZER,
    TONE,
    Ear,
    predict,
    record,
    spoken,
)
from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.align import TAIL
from zoo.tasks.transcribe import predict as command
from zoo.tasks.transcribe import transcripts


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
