"""Options, recordings and checkpoints that are wrong where a speech model is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

import zoo
from training import trainer
from transcribing import (
    LETTERS,
    RNNT,
    SHORT,
    STAGES,
    STREAMS,
    TINY,
    command,
    fit,
    flags_of,
    folder_flags,
    made,
    recogniser,
    refused,
    speak,
)
from zoo.data.speech import Speech
from zoo.inputs.audio import RECIPES
from zoo.inputs.images import ImagePreprocess
from zoo.outputs.tokens import train_characters
from zoo.tasks.classify.train import Classify
from zoo.tasks.transcribe.train import EMPTY, LONG, UNKNOWN, UNREADABLE, Transcribe
from zoo.weights import load_checkpoint, save_model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": {"vocabulary": 0}}, "a speech model with a vocabulary"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; choose from: cosine, noam, noam_hold"),
        ({"hold": 2.0}, "model.hold must be >= 0, and 0 unless schedule is noam_hold, got 2.0 with cosine"),
        ({"intermediate_weight": 1.0}, "model.intermediate_weight must be from 0 to 1"),
        ({"consistency": -1.0}, "model.consistency >= 0"),
        ({"intermediate": [1]}, "model.intermediate must list blocks before the last, from 0 to 0"),
        ({"intermediate": [0], "backbone": RNNT}, "need a CTC head; this model has a transducer"),
        (
            {"intermediate": [1], "backbone": STAGES},
            "model.intermediate: the head needs the width of blocks 2 and later",
        ),
        ({"consistency": 0.1, "backbone": RNNT}, "need a CTC head; this model has a transducer"),
        ({"chunks": [4]}, "model.chunks must list sizes >= 1, for a model whose config has a chunk"),
        ({"chunks": [4, 0], "backbone": STREAMS}, "model.chunks must list sizes >= 1"),
        ({"warp": 1.0}, "model.warp must be >= 0 and < 1"),
        ({"filter": -1.0}, "model.filter must be a finite number >= 0, got -1.0"),
        ({"time_share": 2.0}, "time_share from 0 to 1"),
        ({"frequency_masks": -1}, "must be >= 0"),
        ({"rate": 0.0}, "model.rate"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], words: str):
    with pytest.raises(ValueError) as error:
        recogniser(**options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_pictures_is_refused():
    with pytest.raises(ValueError, match="`zoo transcribe` cannot train this model.backbone; use `zoo classify`"):
        Transcribe({"name": "vit_micro"})
    with pytest.raises(ValueError, match="`zoo classify` cannot train this model.backbone; use `zoo transcribe`"):
        Classify(TINY)


@pytest.mark.parametrize(
    ("backbone", "flags", "words"),
    [
        (
            {"vocabulary": 30},
            [],
            "the model has 30 tokens with the blank, but the data has 10; omit model.backbone.vocabulary",
        ),
        (
            {"mels": 80},
            ["--data.mels=64"],
            "the model has 80 mel bands, but the data has 64; omit model.backbone.mels or set it to 64",
        ),
        ({}, ["--model.filter=0.5"], "model.filter needs features that are not normalised per band"),
        (STREAMS, ["--data.recipe=nemo"], "normalize='bin' needs the whole utterance, so it cannot be streamed"),
        ({}, ["--model.chunks=[4]"], "model.chunks"),
        ({"mels": 4}, ["--data.mels=2"], "4 mel bands, but the data has 2"),
        ({}, ["--data.tokenizer=nowhere.model"], "nowhere.model: No such file"),
    ],
    ids=str,
)
def test_data_that_does_not_fit_is_one_line(backbone: dict[str, Any], flags: list[str], words: str, tmp_path: Path):
    root = f"--trainer.default_root_dir={tmp_path}"
    assert words in refused("fit", *flags_of(backbone), *SHORT, root, *flags)


def test_faults_are_named_once_and_counted(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = [*folder_flags(faulty), "--trainer.max_epochs=2", "--data.limit=null", "--trainer.num_sanity_val_steps=0"]
    with pytest.warns(UserWarning) as seen:
        fit(tmp_path, *flags)
    messages = [str(each.message) for each in seen]
    named = [message for message in messages if message.startswith(("skipped ", "no loss of "))]
    assert len(named) == len(set(named)) == 7
    for words in (
        "skipped 1-2-0003: ",
        "fewer frames than its transcript needs, 599",
        "no loss of 1-2-0000: its transcript is empty",
        "no loss of 1-2-0002: the vocabulary has no 'R', 'Z', which is in 'A ZEBRA'",
        "fewer frames than its transcript needs, 400",
        "1-2-0001.flac: ",
        "1-2-0006.flac: cannot be read as audio",
    ):
        assert sum(words in message for message in named) == 1, (words, named)
    counts = {"training": {UNREADABLE: 1, LONG: 2}, "validation": {UNREADABLE: 1, LONG: 1, UNKNOWN: 1, EMPTY: 1}}
    wanted = [
        f"{kind} {'skipped' if stage == 'training' or kind == UNREADABLE else 'omitted from a loss'} "
        f"in the {stage} of epoch {epoch}: {number}"
        for stage, kinds in counts.items()
        for kind, number in kinds.items()
        for epoch in range(2)
    ]
    assert sorted(message for message in messages if " of epoch " in message) == sorted(wanted)

    # What cannot be learned from counts as words all the same, and the test set is that of validation.
    capsys.readouterr()
    for verb, run in {"validate": "validation", "test": "test"}.items():
        with pytest.warns(UserWarning) as seen:
            given = [*folder_flags(faulty), "--data.test=dev"]
            command(verb, *given, f"--model.weights={tmp_path}/last")
        assert f"unreadable files skipped in the {run}: 1" in [str(each.message) for each in seen]
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and "words in 7 utterances, 95 % interval" in first


def test_silent_and_clipped_files_are_used_and_counted(tmp_path: Path):
    paths = speak(tmp_path, "train", range(4), {})
    soundfile.write(paths[0], torch.zeros(8000).numpy(), 16000)
    soundfile.write(paths[1], torch.ones(8000).numpy(), 16000)
    with pytest.warns(UserWarning) as seen:
        fit(
            tmp_path / "run",
            "--data.dataset=librispeech",
            f"--data.root={tmp_path}",
            "--data.train=train",
            "--data.val=train",
            "--data.workers=0",
        )
    said = [str(each.message) for each in seen]
    assert "1-2-0000 is silent but has a transcript" in said
    assert "1-2-0001 is clipped: it was recorded too loud" in said
    for kind in ("silent files with a transcript", "clipped files"):
        assert f"{kind} used in the training of epoch 0: 1" in said


def test_a_validation_without_any_loss_has_none(tmp_path: Path):
    speak(tmp_path, "train", range(2), {0: "AB" * 200, 1: "BA" * 200})
    weights = save_model(made(), tmp_path / "ear", preset=TINY["name"], preprocess=RECIPES["nemo"], labels=LETTERS)
    task, data = Transcribe(weights=str(weights)), Speech("librispeech", str(tmp_path), val="train", workers=0)
    with pytest.warns(UserWarning) as seen:
        (found,) = trainer(1, 1, limit_val_batches=1.0).validate(task, datamodule=data, verbose=False)
    assert [str(each.message) for each in seen if "compute" in str(each.message)] == []
    assert found.keys() == {"val/wer", "val/cer"}


def test_training_on_nothing_is_an_error(tmp_path: Path):
    for path in speak(tmp_path, "train", range(4), {}):
        path.write_bytes(b"no sound")
    speak(tmp_path, "dev", range(20, 22), {})
    flags = [*flags_of({}), *SHORT, *folder_flags(tmp_path), f"--trainer.default_root_dir={tmp_path}/run"]
    with pytest.warns(UserWarning, match="skipped"):
        assert "no utterance of the training set could be used" in refused("fit", *flags)
    assert not (tmp_path / "run/last").exists() and not (tmp_path / "run/best").exists()


def test_what_does_not_fit_a_speech_model_is_refused(tmp_path: Path):
    for options, words in (
        ({"labels": train_characters(["ABC"])}, "the tokenizer has 4 pieces with the blank, but the model 10"),
        ({"labels": list("ABCDEFGHIJ")}, "labels must be a tokenizer, got list"),
        ({"preprocess": ImagePreprocess()}, "preprocess must be AudioPreprocess, got ImagePreprocess"),
        ({"preprocess": RECIPES["nemo"].from_dict({"mels": 64})}, "preprocess makes 64 mels, but the model takes 80"),
    ):
        with pytest.raises(ValueError) as error:
            save_model(made(), tmp_path / "kept", **options)
        assert words in str(error.value) and not (tmp_path / "kept").exists()
    with pytest.raises(ValueError, match="labels must be a list of names, one for each class, got Characters"):
        save_model(zoo.create_model("vit_micro", classes=10), tmp_path / "kept", labels=LETTERS)


def aged(config: dict[str, Any], format: int) -> dict[str, Any]:
    """The fields that a config.json of an older format has."""
    since = ("card", "license", "datasets", "figures", "base", "dtype", "parameters", "cost", "files")
    return {key: value for key, value in config.items() if key not in since} | {"format": format}


def test_a_config_from_before_tokenizers(tmp_path: Path):
    folder = save_model(made(), tmp_path / "kept", preprocess=RECIPES["nemo"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(aged(config, 1)))
    kept = load_checkpoint(folder, check=True)
    assert kept.labels is None and aged(kept.config, 1) == aged(config, 1)


def test_a_tokenizer_in_a_field_of_its_own_is_read(tmp_path: Path):
    """As format 2 had it."""
    folder = save_model(made(), tmp_path / "kept", preprocess=RECIPES["nemo"], labels=LETTERS)
    config = json.loads((folder / "config.json").read_text())
    old = aged(config, 2) | {"labels": None, "tokenizer": config["labels"]}
    (folder / "config.json").write_text(json.dumps(old))
    kept = load_checkpoint(folder, check=True)
    assert kept.labels == LETTERS and aged(kept.config, 2) == aged(config, 2)


def test_a_broken_tokenizer_is_one_line(tmp_path: Path):
    folder = save_model(made(), tmp_path / "kept", preprocess=RECIPES["nemo"], labels=LETTERS)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for tokenizer, words in (
        ({"kind": "letters"}, "unknown kind of tokenizer 'letters'"),
        ({"kind": "characters", "pieces": ["A", "B"]}, "the tokenizer has 3 pieces with the blank, but the model 10"),
        ({"kind": "pieces", "model": "????"}, "not valid base64"),
    ):
        path.write_text(json.dumps(config | {"labels": tokenizer}))
        with pytest.raises(ValueError, match="config.json") as error:
            load_checkpoint(folder)
        assert words in str(error.value) and "\n" not in str(error.value)
