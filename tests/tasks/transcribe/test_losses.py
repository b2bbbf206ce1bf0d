"""Losses of speech models, the steps and rates of their training, and batches that have no loss."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import rnnt_loss

from training import trainer
from transcribing import LETTERS, RNNT, STREAMS, recogniser
from zoo.data.speech import Batch
from zoo.inputs.audio import RECIPES
from zoo.layer import Chunks
from zoo.norms import PRepBN
from zoo.outputs.tokens import Characters
from zoo.tasks.transcribe.train import BETWEEN, UNREADABLE, divergence


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


def test_a_step_works_in_the_chunk_that_was_drawn(monkeypatch: pytest.MonkeyPatch):
    task, seen = stepping(recogniser(STREAMS, chunks=[1]), monkeypatch), list[Any]()
    task.model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].visible))
    task.training_step(utterances([60, 40, 33]), 0)
    assert seen == [Chunks(1, 16)]


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
