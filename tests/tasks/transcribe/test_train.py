"""Training of speech models by the real command: learning, resuming, chunks, transducers, and what a run leaves."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.functional.text import word_error_rate

import zoo
from training import difference, state
from transcribing import (
    LETTERS,
    RNNT,
    SHORT,
    STREAMS,
    TINY,
    command,
    fit,
    flags_of,
    logged,
    made,
    recogniser,
    refused,
    speak,
)
from zoo.data.speech import Batch, Speech
from zoo.data.speech_sources import Tones
from zoo.inputs.audio import RECIPES
from zoo.norms import PRepBN
from zoo.outputs import greedy
from zoo.outputs.tokens import Tokenizer, train_pieces
from zoo.tasks.task import Task
from zoo.tasks.transcribe.train import Transcribe
from zoo.weights import load_checkpoint, save_model

# A recipe that learns, and what it leaves


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("learned")
    easy = ["--model.rate=5e-3", "--model.time_masks=0", "--model.frequency_width=4", "--trainer.gradient_clip_val=5"]
    easy += ["--data.limit=128", "--data.batch=null", "--data.seconds=40", "--trainer.max_epochs=6"]
    choices = {"dim": 48, "norm": "prepbn", "dropout": 0.0}
    fit(root, *easy, "--trainer.logger=null", backbone=choices)
    return root


@pytest.mark.slow
def test_learns(learned: Path):
    found = logged(learned, "val/wer")
    assert len(found) == 6 and found[0] > 0.9 and found[-1] < 0.5
    losses = logged(learned, "train/loss")
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert logged(learned, "val/cer")[-1] < found[-1] and logged(learned, "val/loss")[-1] < 3


@pytest.mark.slow
def test_best_has_the_smallest_error_of_what_can_be_folded(learned: Path):
    found = logged(learned, "val/wer")
    done = [math.inf] * 4 + found[4:]  # prepbn blends until 0.8 of 6 epochs
    kept = load_checkpoint(learned / "best", check=True)
    assert any(isinstance(module, PRepBN) for module in kept.model.modules())
    assert all(value.item() == 0 for key, value in kept.model.state_dict().items() if key.endswith("blend"))
    zoo.fuse(kept.model)
    figures = {each["metric"]: each["value"] for each in kept.config["figures"]}
    assert figures["word error rate"] == pytest.approx(min(done), abs=1e-6)
    assert f"{min(done):.4f}" in (learned / "best" / "README.md").read_text()
    steps, epoch = state(learned / "resume/last.ckpt")["global_step"], done.index(min(done)) + 1
    assert steps % 6 == 0 and kept.config["source"].endswith(f"epoch {epoch}, step {steps // 6 * epoch}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "last"])
def test_what_is_kept_gives_the_logged_error(name: str, learned: Path, capsys: pytest.CaptureFixture[str]):
    model, preprocess, tokenizer, config = load_checkpoint(learned / name, check=True)
    assert preprocess == RECIPES["nemo"] and tokenizer == LETTERS and config["preset"] == "squeezeformer_xs"
    said, texts = [], []
    for batch in Speech(tokenizer="characters", limit=128).val_dataloader():
        with torch.no_grad():
            said += [LETTERS.decode(each) for each in greedy(*model(batch.features, batch.lengths))]
        texts += batch.texts
    found = logged(learned, "val/wer")
    wanted = min(found[4:]) if name == "best" else found[-1]
    assert float(word_error_rate(said, texts)) == pytest.approx(wanted, abs=1e-6)
    capsys.readouterr()
    command("validate", f"--model.weights={learned}/{name}")
    words = sum(len(text.split()) for text in texts)
    shown = capsys.readouterr().out
    assert shown.startswith(f"word error rate {wanted:.4f}, character error rate 0.")
    assert f"(n = {words} words in 64 utterances, 95 % interval 0." in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_the_test_set_is_another(learned: Path, capsys: pytest.CaptureFixture[str]):
    command("test", "--config", learned / "config.yaml", f"--model.weights={learned}/best")
    words, shown = sum(len(text.split()) for text in Tones("test", range(64)).texts), capsys.readouterr().out
    assert f"(n = {words} words in 64 utterances, 95 % interval" in shown and float(shown.split()[3][:-1]) < 0.6


# Resuming

STEPS, EPOCHS = 2, 3
RANDOM = ["--model.average=0.9", "--model.refresh=2", "--model.intermediate=[0]", "--model.consistency=0.2"]
RANDOM += ["--data.speeds=[0.9,1.0,1.1]", "--data.noise=[10,40]", "--data.recipe=squeezeformer"]
RANDOM += ["--model.warp=0.1", "--model.filter=0.3", f"--trainer.limit_train_batches={STEPS}"]
RANDOM += ["--trainer.limit_val_batches=1", f"--trainer.max_epochs={EPOCHS}", "--model.checkpointing=true"]
ALL = {"norm": "prepbn(until=1.0)", "drop_path": 0.2}


class Stopped(Exception):
    pass


def stop(task: Transcribe, batch: Batch, batch_idx: int) -> None:
    Task.on_train_batch_start(task, batch, batch_idx)
    if task.current_epoch == EPOCHS - 1 and batch_idx == 1:
        raise Stopped


@pytest.mark.slow
def test_resuming_gives_bitwise_the_run_that_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zoo.tasks.run.OVERHEAD", 0.0)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    fit(whole, *RANDOM, backbone=ALL)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Transcribe, "on_train_batch_start", stop)
        fit(resumed, *RANDOM, backbone=ALL)
    assert state(resumed / "resume/last.ckpt")["global_step"] == STEPS * (EPOCHS - 1)
    fit(resumed, *RANDOM, f"--ckpt_path={resumed}/resume/last.ckpt", backbone=ALL)
    one, other = (state(root / "resume/last.ckpt") for root in (whole, resumed))
    assert one["global_step"] == other["global_step"] == STEPS * EPOCHS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch"):
        assert difference(one[part], other[part]) is None
    files = [(root / "last/model.safetensors").read_bytes() for root in (whole, resumed)]
    assert files[0] == files[1]
    zoo.fuse(zoo.load_model(whole / "last"))
    short, found = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--model.refresh=0"], []
    for flag in ("--model.seed=0", "--model.seed=1", "--data.seed=1"):
        fit(tmp_path / flag, *RANDOM, *short, flag, backbone=ALL)
        found.append(state(tmp_path / flag / "resume/last.ckpt")["state_dict"])
    assert difference(found[0], found[1]) and difference(found[0], found[2])  # so that the equality says something


# Options


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("streams")
    fit(root, "--data.recipe=streaming", "--model.chunks=[1,4,8]", backbone=STREAMS)
    return root


@pytest.mark.slow
def test_chunks(streams: Path):
    assert load_checkpoint(streams / "last", check=True).preprocess == RECIPES["streaming"]
    task = recogniser(STREAMS, chunks=[1, 3, 8])
    found = {task.visible() for _ in range(40)}
    assert {(each.chunk, each.left) for each in found} == {(1, 16), (3, 15), (8, 16)}
    assert recogniser(STREAMS).visible() is None


def test_the_validation_loss_of_a_transducer_is_that_of_the_averaged_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plain, seen = Transcribe.losses, set[tuple[bool, bool]]()

    def losses(self: Transcribe, logits: Any, lengths: Any, tokens: Any, head: Any) -> Any:
        own: Any = self.average
        seen.add((torch.is_grad_enabled(), head is own.module.head))
        return plain(self, logits, lengths, tokens, head)

    monkeypatch.setattr(Transcribe, "losses", losses)
    fit(tmp_path, "--model.average=0.9", backbone=RNNT)
    assert seen == {(True, False), (False, True)}  # the trained head in training, the averaged one in validation


@pytest.fixture(scope="module")
def transducer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transducer")
    fit(root, "--trainer.logger=null", backbone=RNNT)
    return root


@pytest.mark.slow
def test_transducer(transducer: Path):
    kept = load_checkpoint(transducer / "last", check=True)
    assert kept.model.head.__class__.__name__ == "TransducerHead" and kept.labels == LETTERS
    assert logged(transducer, "val/wer") and logged(transducer, "val/loss")[0] > 0
    before = recogniser(RNNT).model.state_dict()
    torch.manual_seed(0)
    moved = [key for key, value in kept.model.state_dict().items() if not torch.equal(value, before[key])]
    assert {"head.out.weight", "head.predictor.weight_ih_l0", "head.embedding.weight"} <= set(moved)
    assert not kept.model.head.embedding.weight[-1].any()  # pyright: ignore


@pytest.mark.slow
def test_the_tokenizer_of_a_checkpoint_stays(transducer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It is what the weights were trained with; another .model file is refused, and a new vocabulary is a new head."""
    (tmp_path / "same.model").write_bytes(train_pieces(["AB CD", "EF"] * 3, 9).model)
    flags = [f"--model.weights={transducer}/last", f"--trainer.default_root_dir={tmp_path}/run", *SHORT]
    message = refused("fit", *flags, f"--data.tokenizer={tmp_path}/same.model")
    assert message == "data.tokenizer differs from the tokenizer of model.weights; omit one of the two"
    monkeypatch.setattr(Speech, "tokenizer", property(lambda self: pytest.fail("it is not needed")))
    command("validate", *flags[:2], "--data.limit=4")


@pytest.mark.slow
def test_a_start_from_a_checkpoint_with_a_new_vocabulary(learned: Path, tmp_path: Path):
    (tmp_path / "new.model").write_bytes(train_pieces(["AB CD", "EF GH", "A HEAD"] * 3, 12).model)
    flags = [f"--data.tokenizer={tmp_path}/new.model", "--model.backbone.vocabulary=13", "--trainer.logger=false"]
    flags = [*SHORT, *flags, "--data.limit=8", "--trainer.limit_train_batches=1"]
    command("fit", *flags, f"--model.weights={learned}/last", f"--trainer.default_root_dir={tmp_path}/run")
    kept = load_checkpoint(tmp_path / "run/last")
    assert isinstance(kept.labels, Tokenizer) and kept.labels.vocabulary == 13
    old, new = (dict(model.named_parameters()) for model in (zoo.load_model(learned / "last"), kept.model))
    assert new["head.weight"].shape == (13, 48) and old["head.weight"].shape == (10, 48)
    moves = [float((new[key] - old[key]).detach().abs().max()) for key in old if not key.startswith("head")]
    assert 0 < max(moves) <= 2e-3  # by one step at a rate of 1e-3


@pytest.mark.slow
def test_nothing_to_measure(faulty: Path, transducer: Path, tmp_path: Path):
    path = speak(tmp_path, "dev", range(1), {})[0]
    flags = ["--data.dataset=librispeech", f"--data.root={tmp_path}", f"--model.weights={transducer}/last"]
    path.write_bytes(b"")
    with pytest.warns(UserWarning):
        message = refused("validate", *flags, "--data.val=[dev]")
    assert message == "no utterance of the validation set could be read, or none has a transcript"
    assert "--model.weights" in refused("validate", *flags_of({}), *SHORT)


def test_a_checkpoint_is_measured_on_its_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fit(tmp_path / "run", "--data.recipe=squeezeformer", "--data.mels=40", "--model.rate=1e-2")
    kept = load_checkpoint((tmp_path / "run/last").rename(tmp_path / "ear"))  # away from the config of its run
    assert kept.model.config.mels == kept.preprocess.mels == 40 and kept.preprocess.normalize == "utterance"
    lines: list[str] = []
    monkeypatch.setattr("zoo.data.loading.rank_zero_info", lines.append)
    weights = f"--model.weights={tmp_path}/ear"
    capsys.readouterr()
    for flags in (["--data.recipe=squeezeformer", "--data.mels=40"], []):
        command("validate", weights, "--data.limit=16", *flags)
    assert not lines
    command("validate", weights, "--data.limit=16", "--data.recipe=nemo")
    (line,) = lines
    assert line.startswith("measured with the preprocessing of the checkpoint: ")
    assert "mels 40 (not 80)" in line and "normalize utterance (not bin)" in line
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == second == third and first.startswith("word error rate ")
    fit(tmp_path / "on", weights, "--data.mels=40", "--data.recipe=nemo")
    assert "inputs are preprocessed as in the checkpoint, except for " in lines[1]
    assert "normalize bin (was utterance)" in lines[1] and "mels" not in lines[1]
    assert load_checkpoint(tmp_path / "on/last").preprocess == replace(RECIPES["nemo"], mels=40)


@pytest.mark.parametrize(
    ("choices", "labels"),
    [
        ({}, LETTERS),
        (RNNT | {"vocabulary": 12}, train_pieces(["AB CD", "EF GH", "A HEAD"] * 3, 11)),
        (STREAMS, None),
        ({"vocabulary": 0}, None),
    ],
    ids=["ctc", "transducer", "streams", "encoder"],
)
def test_a_checkpoint_of_speech(choices: dict[str, Any], labels: Tokenizer | None, tmp_path: Path):
    model, recipe = made(**choices), RECIPES["streaming"]
    folder = save_model(model, tmp_path / "kept", preset=TINY["name"], preprocess=recipe, labels=labels)
    kept = load_checkpoint(folder, check=True)
    assert kept.preprocess == recipe and kept.labels == labels and kept.model.config == model.config
    assert difference(model.state_dict(), kept.model.state_dict()) is None
    features, lengths = torch.randn(2, 50, 80), torch.tensor([50, 31])
    with torch.no_grad():
        assert torch.equal(model(features, lengths)[0], kept.model(features, lengths)[0])
    if labels is not None:
        assert isinstance(kept.labels, Tokenizer) and kept.labels.decode(labels.encode("AB CD")) == "AB CD"
    card = (folder / "README.md").read_text()
    kind = "feature-extraction" if choices.get("vocabulary") == 0 else "automatic-speech-recognition"
    assert f"pipeline_tag: {kind}\n" in card and "tokenizer" in card
