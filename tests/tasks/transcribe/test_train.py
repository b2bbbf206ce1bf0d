"""Training of speech models by the real command: losses, schedules, resuming, faults, and what a run leaves."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import rnnt_loss
from torchmetrics.functional.text import word_error_rate

import zoo
from training import QUIET, difference, state, trainer
from training import refused as refused_by
from zoo.__main__ import main
from zoo.data.speech import Batch, Speech
from zoo.data.speech_sources import Tones
from zoo.inputs.audio import RECIPES
from zoo.inputs.images import ImagePreprocess
from zoo.layer import Chunks
from zoo.norms import PRepBN
from zoo.outputs import greedy
from zoo.outputs.tokens import Characters, Tokenizer, train_characters, train_pieces
from zoo.tasks.classify.train import Classify
from zoo.tasks.task import Task
from zoo.tasks.transcribe.train import BETWEEN, EMPTY, LONG, UNKNOWN, UNREADABLE, Transcribe, divergence
from zoo.weights import load_checkpoint, save_model

LETTERS = Characters(" ABCDEFGH")
TINY: dict[str, Any] = {"name": "squeezeformer_xs", "dim": 16, "depth": 2, "heads": 2, "conv": "swish(kernel=5)"}
TINY |= {"vocabulary": LETTERS.vocabulary}
STREAMS = {"name": "conformer_ctc_s", "conv": "glu(kernel=5)", "subsampling": "conv4(padding='causal', channels=8)"}
STREAMS |= {"chunk": 8, "left": 16}
RNNT = {"name": "conformer_s", "conv": "glu(kernel=5)", "head": "transducer(hidden=16)"}
STAGES = {
    "name": "efficient_conformer_s",
    "conv": "glu(kernel=5)",
    "depth": 4,
    "strided": (0, 2),
    "widths": (16, 16, 32),
    "mixers": (),
}
SHORT = ["--data.tokenizer=characters", "--data.limit=16", "--data.batch=8", "--trainer.max_epochs=1"]


def flags_of(backbone: dict[str, Any]) -> list[str]:
    return [f"--model.backbone.{field}={value}" for field, value in (TINY | backbone).items()]


def command(verb: str, *flags: Any) -> None:
    precision = torch.get_float32_matmul_precision()
    try:
        main(["transcribe", verb, *(f"--trainer.{flag}" for flag in QUIET), *map(str, flags)])
    finally:
        torch.set_float32_matmul_precision(precision)


def fit(root: Path, *flags: Any, backbone: dict[str, Any] | None = None) -> None:
    """Trains a tiny model on generated tones, without logs; later flags win."""
    base = [*SHORT, "--model.warmup=1", "--trainer.logger=false", f"--trainer.default_root_dir={root}"]
    command("fit", *flags_of(backbone or {}), *base, *flags)


def refused(verb: str, *flags: Any) -> str:
    return refused_by("transcribe", verb, *(f"--trainer.{flag}" for flag in QUIET), "--trainer.logger=false", *flags)


def recogniser(backbone: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    task = Transcribe(TINY | (backbone or {}), **options)
    task.tokenizer = LETTERS
    return task


def rows_of(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / "csv/version_0/metrics.csv").read_text().splitlines()))


def logged(root: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows_of(root) if row.get(name)]


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


# Losses


def utterances(lengths: list[int], mels: int = 80) -> Batch:
    features = torch.randn(len(lengths), max(lengths), mels)
    names = tuple(f"utterance {index}" for index in range(len(lengths)))
    return Batch(features, torch.tensor(lengths), ("AB CD", "A", "HH")[: len(lengths)], names, ())


def test_ctc_losses_are_those_of_one_utterance_at_a_time():
    task = recogniser()
    logits, lengths = torch.randn(3, 12, 10, requires_grad=True), torch.tensor([12, 3, 7])
    tokens = [LETTERS.encode(text) for text in ("AB CD", "A", "HH")]
    found = task.losses(logits, lengths, tokens, task.model.head)
    for loss, row, length, ids in zip(found, logits, lengths.tolist(), tokens, strict=True):
        alone = (row[:length].log_softmax(-1), torch.tensor(ids), torch.tensor(length), torch.tensor(len(ids)))
        assert loss.item() == pytest.approx(F.ctc_loss(*alone, blank=9, reduction="none").item(), rel=1e-5)
    found[1].backward()
    assert logits.grad is not None and not logits.grad[0].any() and not logits.grad[1, 3:].any()
    low = task.losses(logits.detach().bfloat16(), lengths, tokens, task.model.head)
    assert low.dtype == torch.float32 and torch.allclose(low, found.detach(), rtol=0.02)


def test_transducer_losses_are_those_of_one_utterance_at_a_time():
    task = recogniser(RNNT)
    encoded, lengths = torch.randn(3, 12, 16), torch.tensor([12, 3, 7])
    tokens = [LETTERS.encode(text) for text in ("AB CD", "A", "HH")]
    found = task.losses(encoded, lengths, tokens, task.model.head)
    for loss, row, length, ids in zip(found, encoded, lengths.tolist(), tokens, strict=True):
        logits = task.model.head(row[None, :length], torch.tensor([ids]))
        sizes = (torch.tensor([length]).int(), torch.tensor([len(ids)]).int())
        wanted = rnnt_loss(logits, torch.tensor([ids]).int(), *sizes, blank=9, reduction="none")
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    # The longest clip was left out: its frames are in the batch, and no loss has them.
    assert torch.equal(task.losses(encoded[1:], lengths[1:], tokens[1:], task.model.head), found[1:])


def test_an_intermediate_block_with_too_few_frames_is_counted():
    task = recogniser({"depth": 3}, intermediate=[1])
    task.trainer = SimpleNamespace(world_size=1)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(UserWarning, match="no intermediate loss of second: too few frames"):
        tokens = [LETTERS.encode("AB"), LETTERS.encode("AABBC")]
        fits = task.fitting_frames([torch.tensor([5, 5])], tokens, ["first", "second"])
    assert fits.tolist() == [[1.0, 0.0]] and task.faults["training", BETWEEN] == 1


def test_a_run_goes_on_with_its_own_tokens():
    before, after, run = recogniser(), recogniser(), trainer(1, 1)
    loops = {name: getattr(run, name).state_dict() for name in ("fit_loop", "validate_loop", "test_loop")}
    saved: dict[str, Any] = {"state_dict": before.state_dict(), "loops": loops}
    before._trainer = run
    before.on_save_checkpoint(saved)
    assert "epoch_loss" in saved
    after._trainer = run
    after.on_load_checkpoint(saved)
    after.tokenizer = Characters(tuple(reversed(LETTERS.pieces)))
    with pytest.warns(UserWarning, match="the tokenizer of --ckpt_path is kept"):
        after.on_load_checkpoint(saved)
    assert after.labels == LETTERS


def test_rates_decay_from_block_to_block():
    task = recogniser({"depth": 3, "position": "learned"}, rate=1e-3, layer_decay=0.5, weight_decay=0.01)
    plan = {"estimated_stepping_batches": 100, "num_training_batches": 10, "accumulate_grad_batches": 1}
    plan |= {"precision": "32-true", "fit_loop": SimpleNamespace(setup_data=lambda: None)}
    task._trainer = SimpleNamespace(**plan)
    (optimizer,), _ = task.configure_optimizers()
    found = {
        each: (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for each in group["params"]
    }
    assert set(found) == set(task.model.parameters())
    shares = {"stem": 1 / 16, "first": 1 / 16, "position": 1 / 16}
    shares |= {"blocks.0": 1 / 8, "blocks.1": 1 / 4, "blocks.2": 1 / 2, "reduce": 1 / 2, "recover": 1 / 2, "head": 1}
    for name, parameter in task.model.named_parameters():
        (share,) = [share for start, share in shares.items() if name.startswith(start)]
        spared = parameter.ndim < 2 or name.endswith((".content", ".offset", "position.table"))
        assert found[parameter] == (pytest.approx(1e-3 * share), 0.0 if spared else 0.01), name


def test_divergence():
    first, second = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    lengths = [7, 2, 4]
    logits = torch.cat([first, second]).requires_grad_()
    wanted = 0.0
    for p, q, length in zip(first.softmax(-1), second.softmax(-1), lengths, strict=True):
        p, q = p[:length], q[:length]
        wanted += 0.5 * float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 3
    found = divergence(logits, torch.tensor(lengths * 2))
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    found.backward()
    assert logits.grad is not None and all(half.abs().sum() > 0 for half in logits.grad.chunk(2))
    assert not logits.grad[1, 2:].any() and not logits.grad[4, 2:].any()
    # Each view is drawn to the other, which is held fixed: d/dz KL(q || softmax(z)) = softmax(z) - q.
    assert torch.allclose(logits.grad[0], (first[0].softmax(-1) - second[0].softmax(-1)) / 6, atol=1e-6)
    assert divergence(torch.cat([first, first]), torch.tensor(lengths * 2)).item() == 0.0


def test_a_loss_of_intermediate_blocks_and_of_two_views(monkeypatch: pytest.MonkeyPatch):
    """The parts of a step, computed one by one on what the step has masked."""
    options = {"intermediate": [0, 1], "intermediate_weight": 0.4, "consistency": 0.5}
    task = recogniser({"depth": 3, "dropout": 0.0, "unet": False}, **options)
    logs: dict[str, float] = {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: logs.update({name: value.item()}))
    task._trainer = SimpleNamespace(world_size=1, global_step=0)
    batch, seen = utterances([60, 40, 33]), list[Tensor]()
    task.model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = task.training_step(batch, 0)
    (features,) = seen
    assert len(features) == 6 and not torch.equal(features[:3], features[3:])
    lengths, tokens = batch.lengths.repeat(2), [LETTERS.encode(text) for text in batch.texts] * 2
    made = task.model.encode(features, lengths, None, (0, 1, 2))
    losses = [
        task.losses(task.model.logits(each.tokens), each.lengths, tokens, task.model.head).mean() for each in made
    ]
    apart = divergence(task.model.logits(made[-1].tokens), made[-1].lengths)
    wanted = 0.6 * losses[2] + 0.4 * (losses[0] + losses[1]) / 2 + 0.5 * apart
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert logs["train/divergence"] == pytest.approx(apart.item(), rel=1e-3)


def stepping(task: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The task, so that a training step can be taken without a trainer."""
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    task._trainer = SimpleNamespace(world_size=1, global_step=0)
    return task


def test_a_step_warps_filters_and_masks_in_this_order(monkeypatch: pytest.MonkeyPatch):
    task, calls = stepping(recogniser(warp=0.1, filter=0.3, time_masks=2), monkeypatch), list[Any]()
    task.centres = RECIPES["squeezeformer"].centres
    for name in ("warp_frequencies", "filter_bands", "spec_augment"):

        def record(features: Tensor, *given: Any, name: str = name) -> Tensor:
            calls.append((name, features, given))
            return 2 * features

        monkeypatch.setattr(f"zoo.tasks.transcribe.train.{name}", record)
    task.model.stem.register_forward_pre_hook(lambda _, inputs: calls.append(("stem", inputs[0], ())))
    batch = utterances([60, 40, 33])
    task.training_step(batch, 0)
    assert [name for name, _, _ in calls] == ["warp_frequencies", "filter_bands", "spec_augment", "stem"]
    assert all(torch.equal(features, batch.features * 2**number) for number, (_, features, _) in enumerate(calls))
    warped, filtered, masked, _ = (given for _, _, given in calls)
    assert warped[0] is task.centres
    assert torch.equal(filtered[0], batch.lengths) and torch.equal(masked[0], batch.lengths)
    assert warped[1:] == (0.1,) and filtered[1:] == (0.3,) and masked[1:] == (2, 27, 2, 0.05)


@pytest.mark.parametrize("numbers", [(2, 5, 1), (3, 0, 4)], ids=str)
def test_the_mean_over_ranks_is_that_over_utterances(numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    task, losses = recogniser(), [torch.rand(number) for number in numbers]
    task._trainer = SimpleNamespace(world_size=3)
    monkeypatch.setattr(task, "all_gather", lambda own: torch.tensor(numbers).float())
    shares = [float(task.share(number)) for number in numbers]
    means = [float(each.mean()) if len(each) else 0.0 for each in losses]
    found = sum(mean * share for mean, share in zip(means, shares, strict=True)) / 3  # as gradients are averaged
    assert found == pytest.approx(float(torch.cat(losses).mean()))
    task._trainer = SimpleNamespace(world_size=1)
    assert task.share(7) == 1.0


def test_a_rank_without_an_utterance_takes_part(monkeypatch: pytest.MonkeyPatch):
    """It gathers as the others do, and sees each batch statistic, which the others share with it."""
    task, asked, seen = recogniser({"norm": "prepbn"}), list[float](), list[nn.Module]()
    task._trainer = SimpleNamespace(world_size=2)
    monkeypatch.setattr(task, "all_gather", lambda own: asked.append(float(own)) or torch.tensor([0.0, 3.0]))
    norms = [module for module in task.model.modules() if isinstance(module, PRepBN)]
    for module in norms:
        module.register_forward_hook(lambda module, inputs, output: seen.append(module))
    loss = task.training_step(Batch(torch.zeros(0, 0, 80), torch.zeros(0).long(), (), (), ()), 0)
    loss.backward()
    assert asked == [0.0] and seen == norms and loss.item() == 0.0
    assert all(each.grad is not None and not each.grad.any() for each in task.model.parameters())


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "noam", "noam_hold"])
def test_schedules(schedule: str):
    hold = 3.0 if schedule == "noam_hold" else 0.0
    task = recogniser(schedule=schedule, rate=2e-3, final_rate=1e-4, warmup=2.0, hold=hold)
    per_epoch, steps, warm = 10, 1000, 20
    found = [task.factor(step, per_epoch, steps) for step in range(steps)]
    for number, factor in enumerate(found, 1):  # Vaswani et al. and Kim et al. count steps from 1
        if schedule == "noam":
            wanted = math.sqrt(warm) * min(number**-0.5, number * warm**-1.5)
        elif schedule == "noam_hold":
            wanted = number / warm if number <= warm else 1.0 if number <= warm + 30 else warm / (number - 30)
        elif number <= warm:
            wanted = number / (warm + 1)
        else:
            wanted = 0.05 + 0.95 * (1 + math.cos(math.pi * (number - 1 - warm) / (steps - warm))) / 2
        assert factor == pytest.approx(wanted if number <= warm else max(wanted, 0.05))
    assert max(found) == pytest.approx(1.0) and 0.05 <= found[-1] < 0.15


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


def test_a_step_works_in_the_chunk_that_was_drawn(monkeypatch: pytest.MonkeyPatch):
    task, seen = stepping(recogniser(STREAMS, chunks=[1]), monkeypatch), list[Any]()
    task.model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].visible))
    task.training_step(utterances([60, 40, 33]), 0)
    assert seen == [Chunks(1, 16)]


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


# Real folders and their faults


def speak(folder: Path, split: str, indices: range, texts: dict[int, str]) -> list[Path]:
    """Generated tones as LibriSpeech lays out its recordings; texts replaces some of the transcripts."""
    tones, place = Tones("train", indices), folder / split / "1" / "2"
    place.mkdir(parents=True)
    lines, paths = [], []
    for index in range(len(tones)):
        paths.append(place / f"1-2-{index:04}.flac")
        soundfile.write(paths[-1], tones.waveform(index, 16000).numpy(), 16000)
        lines.append(f"1-2-{index:04} {texts.get(index, tones.text(index))}\n")
    (place / "1-2.trans.txt").write_text("".join(lines))
    return paths


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faulty")
    paths = speak(root, "train", range(12), {3: "A" * 300, 5: "GH " * 80})
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    paths = speak(root, "dev", range(20, 28), {0: "", 2: "A ZEBRA", 4: "AB" * 200})
    paths[6].write_bytes(b"no sound")
    return root


def folder_flags(root: Path) -> list[str]:
    return [
        "--data.dataset=librispeech",
        f"--data.root={root}",
        "--data.train=[train]",
        "--data.val=[dev]",
        "--data.workers=0",
    ]


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


@pytest.mark.slow
def test_nothing_to_measure(faulty: Path, transducer: Path, tmp_path: Path):
    path = speak(tmp_path, "dev", range(1), {})[0]
    flags = ["--data.dataset=librispeech", f"--data.root={tmp_path}", f"--model.weights={transducer}/last"]
    path.write_bytes(b"")
    with pytest.warns(UserWarning):
        message = refused("validate", *flags, "--data.val=[dev]")
    assert message == "no utterance of the validation set could be read, or none has a transcript"
    assert "--model.weights" in refused("validate", *flags_of({}), *SHORT)


def test_a_batch_without_an_utterance_changes_nothing():
    task = recogniser()
    task._trainer = SimpleNamespace(world_size=1)
    empty = Batch(torch.zeros(0, 0, 80), torch.zeros(0).long(), (), (), ("a.flac: it is truncated",))
    with pytest.warns(UserWarning, match="skipped a.flac: it is truncated"):
        loss = task.training_step(empty, 0)
    loss.backward()
    assert loss.item() == 0 and task.faults == {("training", UNREADABLE): 1}
    assert all(each.grad is not None and not each.grad.any() for each in task.model.parameters())


def test_repeats_need_a_blank_between_them():
    """4 frames hold ABCD and not AABB, for a transducer both."""
    batch = Batch(torch.zeros(2, 16, 80), torch.tensor([16, 16]), ("ABCD", "AABB"), ("one", "two"), ())
    with pytest.warns(UserWarning, match="skipped two: it has fewer frames than its transcript needs, 6"):
        assert recogniser({"unet": False}).encoded(batch, "training")[0] == [0]
    assert recogniser(RNNT).encoded(batch, "training")[0] == [0, 1]


# Checkpoints


def made(**choices: Any) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(**(TINY | choices)).eval()


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
