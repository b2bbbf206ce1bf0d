"""Where speech is read from: folders in LibriSpeech's layout, manifests, and what is known of durations."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speech_sets import TRAIN, VAL, by_name, libri, texts, write, write_sets
from zoo.data import headers
from zoo.data import speech_sources as corpora
from zoo.data.speech import Batch, Speech
from zoo.inputs.audio import RECIPES, read_audio


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_sets(tmp_path)


def listed(folder: Path, lines: list[Any], **options: Any) -> Speech:
    """A manifest of these lines, for training and validation."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "list.json").write_text(text + "\n")
    given = {"dataset": "manifest", "train": [str(folder / "list.json")], "val": [str(folder / "list.json")]}
    return Speech(**(given | options))


# Folders in LibriSpeech's layout


def test_librispeech(root: Path):
    (root / "train-clean-100/1/7/.hidden.flac").write_bytes(b"")
    (root / "train-clean-100/.old").mkdir()
    data = libri(root)
    train = data.source("train")
    assert texts(train) == TRAIN and texts(data.source("val")) == VAL
    assert [train.name(index) for index in (0, 5)] == ["1-7-0000", "2-7-0001"]
    np.testing.assert_allclose(train.durations, [0.5, 0.6, 0.7, 0.8, 0.5, 0.6])
    found = by_name(data.val_dataloader())
    for number, text in enumerate(VAL):
        waveform = read_audio(root / f"dev-clean/3/7/3-7-000{number}.flac")
        assert found[f"3-7-000{number}"][0] == text
        torch.testing.assert_close(found[f"3-7-000{number}"][1], RECIPES["nemo"](waveform))
    (batch,) = data.val_dataloader()
    assert isinstance(batch, Batch) and batch.features.shape == (2, 60, 80) and batch.skipped == ()
    assert batch.features.dtype == torch.float32 and batch.lengths.dtype == torch.int64
    assert batch.lengths.tolist() == [60, 50] and batch.texts == (VAL[1], VAL[0])


def test_librispeech_one_folder_below(root: Path):
    (root / "LibriSpeech").mkdir()
    for name in ("train-clean-100", "dev-clean"):
        (root / name).rename(root / "LibriSpeech" / name)
    assert texts(libri(root).source("train")) == TRAIN == texts(libri(root / "LibriSpeech").source("train"))


def test_several_splits(root: Path):
    data = libri(root, train=["dev-clean", "train-clean-100"], test=["train-clean-100"])
    assert texts(data.source("train")) == VAL + TRAIN
    assert len(by_name(data.test_dataloader())) == 6


def test_missing_folders(root: Path, tmp_path: Path):
    (root / "file").write_text("")
    with pytest.raises(ValueError, match=r"^folder 'dev-other' not found in .*; found: dev-clean, train-clean-100$"):
        libri(root, val=["dev-other"]).setup("fit")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        libri(root / "nowhere").setup("fit")
    with pytest.raises(ValueError, match=r"^data.train is not given; it must list folders below root"):
        libri(root, train=None).setup("fit")
    with pytest.raises(ValueError, match=r"^data.val is not given; it must list folders below root$"):
        libri(root, val=None).setup("validate")
    with pytest.raises(ValueError, match=r"^data.test is not given; .* below root; `validate` measures data.val$"):
        libri(root).setup("test")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"void has no transcribed utterances; the layout is speaker/chapter/"):
        libri(root, val=["void"]).setup("validate")


def test_pairs_that_do_not_match_are_reported_in_one_line(root: Path):
    write(root / "train-clean-100/1/7/1-7-0009.flac", 0.5)
    transcript = root / "train-clean-100/2/7/2-7.trans.txt"
    transcript.write_text("2-7-0000 \n2-7-0001  GO  HOME \r\n\n2-7-0005 GONE\n2-7-0006 AWAY\n")
    data = libri(root)
    with pytest.warns(UserWarning) as caught:
        train = data.source("train")
    (message,) = [str(warning.message) for warning in caught]
    assert message == (
        f"{root / 'train-clean-100'}: omitted 1 utterances without a transcript (such as "
        f"{root / 'train-clean-100/1/7/1-7-0009.flac'}), 2 utterances without an audio file (such as 2-7-0005), "
        "1 utterances with an empty transcript (such as 2-7-0000)"
    )
    assert texts(train) == [*TRAIN[:4], "GO HOME"]
    with pytest.warns(UserWarning, match=r"2 utterances without an audio file \(such as 2-7-0005\)$"):
        assert texts(libri(root, val=["train-clean-100"]).source("val")) == [*TRAIN[:4], "", "GO HOME"]


def test_malformed_lines_of_transcripts_are_left_out(root: Path):
    path = root / "train-clean-100/1/7/1-7.trans.txt"
    path.write_text("1-7-0000 A\n\n 1-7-0001 B\n1-7-0002\tC\n1-7-0000 D\n1-7-0003 E\n")
    with pytest.warns(UserWarning) as caught:
        found = texts(libri(root).source("train"))
    (message,) = [str(warning.message) for warning in caught]
    first = f"{path}, line 3: must begin with an utterance's name and a space"
    assert f"3 malformed lines (such as {first}), 2 utterances without a transcript" in message
    assert found[:2] == ["A", "E"]

    path.write_text("1-7-0000\tA\n")
    why = "has no transcribed utterances; .*line 1: must begin with"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=why):
        libri(root, train=["train-clean-100/1"]).setup("fit")
    path.write_bytes(b"1-7-0000 A\n1-7-0001 \xff\n")
    with pytest.raises(ValueError, match=f"^{path}, line 2: not UTF-8$"):
        libri(root).setup("fit")


# Manifests


def test_manifest(tmp_path: Path):
    for number in range(3):
        write(tmp_path / f"audio/{number}.wav", 1.0 + number, number)
    lines = [
        {"audio_filepath": "audio/0.wav", "text": "Größe 漢", "duration": 1.0},
        {"audio_filepath": str(tmp_path / "audio/1.wav"), "text": "measured", "speaker": 3},
        {"audio_filepath": "audio/2.wav", "text": "a part", "offset": 0.5, "duration": 1.25},
    ]
    data = listed(tmp_path, lines, tokenizer="characters", seconds=20, padding=0.9)
    source = data.source("val")
    np.testing.assert_allclose(source.durations, [1.0, 2.0, 1.25])
    assert texts(source) == ["Größe 漢", "measured", "a part"] and source.name(2) == "audio/2.wav from 0.5 s"
    assert [len(source.waveform(index, 16000)) for index in range(3)] == [16000, 32000, 20000]
    assert torch.equal(source.waveform(2, 16000), read_audio(tmp_path / "audio/2.wav")[8000:28000])
    (batch,) = data.val_dataloader()
    assert batch.names == (str(tmp_path / "audio/1.wav"), "audio/2.wav from 0.5 s", "audio/0.wav")
    assert len(by_name(listed(tmp_path, lines, root=str(tmp_path), val=["list.json"]).val_dataloader())) == 3


def test_manifest_faults_are_reported_in_one_line(tmp_path: Path):
    write(tmp_path / "a.wav", 0.5)
    lines = [{"audio_filepath": "a.wav", "text": text} for text in ("A", "", " ")]
    lines += [{"audio_filepath": "gone.wav", "text": "B"}, {"audio_filepath": "a.wav"}]
    data = listed(tmp_path, lines)
    with pytest.warns(UserWarning) as caught:
        assert texts(data.source("train")) == ["A"]
    (message,) = [str(warning.message) for warning in caught]
    assert message == (
        f"{tmp_path / 'list.json'}: omitted 1 utterances without a transcript (such as a.wav), "
        f"1 utterances without an audio file (such as {tmp_path / 'gone.wav'}), "
        f"2 utterances with an empty transcript (such as a.wav)"
    )
    with pytest.warns(UserWarning, match="1 utterances without a transcript"):
        assert texts(data.source("val")) == ["A", "", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio_filepath": "a.wav", "text": "A", "text": "B"}', "key 'text' appears twice"),
        ('{"text": "A"', r"not JSON \(Expecting ',' delimiter\)"),
        ("[1]", "must be a JSON object, got list"),
        ({"text": "A"}, "audio_filepath must be a path, got None"),
        ({"audio_filepath": "a.wav", "text": 3}, "text must be a string, got 3"),
        ({"audio_filepath": "a.wav", "text": "A", "duration": 0}, "duration must be > 0, got 0"),
        ({"audio_filepath": "a.wav", "text": "A", "duration": "1"}, "duration must be a number of seconds, got '1'"),
        ('{"audio_filepath": "a.wav", "text": "A", "duration": NaN}', "duration must be a number of seconds, got nan"),
        ({"audio_filepath": "a.wav", "text": "A", "duration": 1, "offset": -1}, "offset must be >= 0, got -1"),
        (
            '{"audio_filepath": "a.wav", "text": "A", "duration": 1' + "0" * 400 + "}",
            "int too large to convert to float",
        ),
        ("[" * 100_000, "maximum recursion depth exceeded.*"),
        ({"audio_filepath": "a.wav", "text": "A", "offset": 1}, "offset needs a duration"),
    ],
    ids=str,
)
def test_malformed_lines_of_manifests_are_left_out(tmp_path: Path, line: Any, message: str):
    write(tmp_path / "a.wav", 0.5)
    data = listed(tmp_path, [{"audio_filepath": "a.wav", "text": "A"}, "", line])
    match = rf"list.json: omitted 1 malformed lines \(such as .*list.json, line 3: {message}\)$"
    with pytest.warns(UserWarning, match=match):
        assert texts(data.source("train")) == ["A"]
    alone = listed(tmp_path, [line])
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=f"list.json lists no transcribed utterances; .*, line 1: {message}$"),
    ):
        alone.setup("fit")


def test_missing_and_empty_manifests(tmp_path: Path):
    with pytest.raises(ValueError, match="gone.json is not a file; a manifest has one JSON object per line"):
        listed(tmp_path, [], train=["gone.json"]).setup("fit")
    with pytest.raises(ValueError, match="list.json lists no transcribed utterances"):
        listed(tmp_path, []).setup("fit")


# Durations


def test_durations_are_kept_and_read_again_when_files_change(root: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def counted(path: str) -> float:
        calls.append(path)
        return original(path)

    original = corpora.audio_seconds
    monkeypatch.setenv("ZOO_CACHE", str(root / "cache"))
    monkeypatch.setattr(corpora, "audio_seconds", counted)
    monkeypatch.setattr(headers, "SMALL", 0)
    first = libri(root).source("train").durations
    assert len(calls) == 6
    (kept,) = (root / "cache").iterdir()
    assert np.array_equal(libri(root).source("train").durations, first) and len(calls) == 6

    write(root / "train-clean-100/1/7/1-7-0002.flac", 2.0)
    changed = libri(root).source("train").durations
    assert changed[2] == 2 and len(calls) == 12 and len(list((root / "cache").iterdir())) == 2

    os.utime(root / "train-clean-100/1/7/1-7-0002.flac", (1, 1))
    assert np.array_equal(libri(root).source("train").durations, changed) and len(calls) == 18

    for place in (root / "cache").iterdir():
        place.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(libri(root).source("train").durations, changed) and len(calls) == 24

    monkeypatch.setenv("ZOO_CACHE", str(root / "train-clean-100/1/7/1-7.trans.txt"))
    assert np.array_equal(libri(root).source("train").durations, changed)


def test_small_sets_leave_no_cache(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZOO_CACHE", str(root / "cache"))
    libri(root).setup("fit")
    assert not (root / "cache").exists()


def test_filter_is_for_training_alone_and_said_once(root: Path, caplog: pytest.LogCaptureFixture):
    data = libri(root, shortest=0.55, longest=0.75, val=["train-clean-100"])
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        found = by_name(data.train_dataloader())
        by_name(data.train_dataloader())
    assert sorted(found) == ["1-7-0001", "1-7-0002", "2-7-0001"]
    said = [record.message for record in caplog.records if "omitted from training" in record.message]
    assert said == ["of 6 utterances, 2 shorter than 0.55 s and 1 longer than 0.75 s are omitted from training"]
    assert len(by_name(data.val_dataloader())) == 6
    with pytest.raises(ValueError, match="no utterance is left to train on: of 6, 6 longer than 0.4 s are omitted"):
        libri(root, shortest=0.0, longest=0.4).setup("fit")


def test_limit(root: Path):
    assert texts(libri(root, limit=3).source("train")) == TRAIN[::2]
    assert texts(libri(root, limit=99).source("train")) == TRAIN
    assert len(Speech(limit=10).source("val")) == 10
