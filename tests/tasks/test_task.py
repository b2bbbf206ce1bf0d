"""What every task shares: the optimizer, the schedule, the averaged copy, batch statistics."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training import classifier, difference, images, trainer
from zoo.block import Block
from zoo.tasks.classify.train import Classify

# Optimizer

RATE, DECAY = 1e-3, 0.05


class Schedule:
    """What configure_optimizers asks of a trainer: 10 batches an epoch, 100 steps."""

    estimated_stepping_batches, num_training_batches, accumulate_grad_batches, max_epochs = 100, 10, 1, 10
    precision, fit_loop = "32-true", SimpleNamespace(setup_data=lambda: None)
    gradient_clip_val: float | None = None


def optimizers(task: Classify, plan: type[Schedule] = Schedule) -> tuple[torch.optim.Optimizer, Any]:
    held = plan()
    task._trainer = held  # pyright: ignore
    (optimizer,), (scheduler,) = task.configure_optimizers()
    return optimizer, scheduler["scheduler"]


CHOICES: list[dict[str, Any]] = [
    {"class_token": True, "registers": 2, "pool": "token", "position": "learned", "layer_scale": 0.1},
    {"mixer": "sla", "norm": "prepbn", "position": "cpe", "channel": "eca"},
    {"mixer": "dcnv4", "norm": "dyt", "channel": "se", "ffn": "swiglu"},
]


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: choices.get("mixer", "softmax"))
def test_matrices_decay_and_nothing_else(choices: dict[str, Any], layer_decay: float):
    task = classifier(backbone=choices, weight_decay=DECAY, layer_decay=layer_decay, average=0.9)
    optimizer, _ = optimizers(task)
    decays = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)
    assert set(decays) == set(task.model.parameters())
    spared = {name for name, parameter in task.model.named_parameters() if decays[parameter] == 0.0}
    norms = {n for n, p in task.model.named_parameters() if p.ndim < 2}
    assert spared == norms | ({"tokens", "position.table"} if "registers" in choices else set())
    assert {decay for decay in decays.values()} == {0.0, DECAY}
    if choices.get("norm") in ("prepbn", "dyt"):
        assert any(parameter.numel() == 1 and decays[parameter] == 0.0 for parameter in task.model.parameters())


@pytest.mark.parametrize(
    ("precision", "clip", "fused"), [("32-true", 1.0, True), ("bf16-mixed", None, True), ("bf16-mixed", 1.0, False)]
)
def test_only_clipped_gradients_of_mixed_precision_need_the_plain_optimizer(precision, clip, fused):
    plan = type("Plan", (Schedule,), {"precision": precision, "gradient_clip_val": clip})
    optimizer, _ = optimizers(classifier(backbone={}), plan)
    assert all(group["fused"] is fused for group in optimizer.param_groups)


def test_layer_decay_slows_lower_blocks():
    choices = {"depth": 3, "class_token": True, "pool": "token", "position": "learned"}
    task = classifier(backbone=choices, rate=RATE, layer_decay=0.5)
    optimizer, _ = optimizers(task)
    rates = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"stem": 1 / 16, "tokens": 1 / 16, "position": 1 / 16, "norm": 1 / 2, "head": 1}
    expected |= {"blocks.0": 1 / 8, "blocks.1": 1 / 4, "blocks.2": 1 / 2}
    for name, parameter in task.model.named_parameters():
        (scale,) = [scale for start, scale in expected.items() if name.startswith(start)]
        assert rates[parameter] == pytest.approx(RATE * scale), name


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"max_epochs": -1},  # ended by max_steps
        {"max_epochs": 1000},  # ended by max_steps before
        {"num_training_batches": 40, "accumulate_grad_batches": 4},
    ],
    ids=str,
)
def test_warm_up_then_half_a_cosine(plan: dict[str, int]):
    task = classifier(rate=RATE, warmup=2.0, final_rate=1e-5)
    _, scheduler = optimizers(task, type("Plan", (Schedule,), plan))
    (factor,) = set(scheduler.lr_lambdas)
    low = 1e-5 / RATE
    known = {0: 1 / 21, 9: 10 / 21, 19: 20 / 21, 20: 1.0, 60: (1 + low) / 2, 100: low, 120: low}
    known[40] = low + (1 - low) * (1 + math.cos(math.pi / 4)) / 2
    for step, value in known.items():
        assert factor(step) == pytest.approx(value), step


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(ValueError, match="max_epochs or trainer.max_steps"):
        optimizers(classifier(), type("Endless", (Schedule,), {"estimated_stepping_batches": float("inf")}))


# Randomness


def test_a_step_seeds_the_accelerator_too(monkeypatch: pytest.MonkeyPatch):
    """With the same number in a resumed run, another in each step, and not at all where there is no accelerator."""
    seeds: list[int] = []
    task = classifier()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    task._trainer = SimpleNamespace(current_epoch=3, global_rank=0)
    task.on_train_batch_start(None, 0)
    assert seeds == []
    monkeypatch.setattr(Classify, "device", torch.device("cuda"))
    for batch_idx in (0, 1, 0):
        task.on_train_batch_start(None, batch_idx)
    assert len(seeds) == 3 and seeds[0] == seeds[2] != seeds[1]


# The averaged copy


class Watched(Classify):
    """Remembers the weights, the averaged weights and both sets of buffers after each batch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        models = (self.model, self.measured)
        values = [[p.detach().clone() for p in model.parameters()] for model in models]
        buffers = [{name: b.clone() for name, b in model.named_buffers()} for model in models]
        self.__dict__.setdefault("seen", []).append((self.global_step, values, buffers))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_is_of_parameters_and_copies_statistics_and_progress(accumulate: int):
    task = classifier(Watched, backbone={"norm": "prepbn"}, average=0.6, rate=1e-2)
    start = [parameter.detach().clone() for parameter in task.model.parameters()]
    trainer(2, 4, accumulate_grad_batches=accumulate).fit(task, datamodule=images())
    seen = task.seen
    assert [step for step, _, _ in seen] == [(batch + 1) // accumulate for batch in range(8)]
    average, done = start, 0
    for step, (weights, averaged), (buffers, copied) in seen:
        if step > done:
            decay = 0.0 if step == 1 else min(0.6, 1 - step ** (-2 / 3))
            average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
            assert difference(buffers, copied) is None
            done = step
        torch.testing.assert_close(averaged, average, rtol=1e-5, atol=1e-7)
    assert done == 8 // accumulate
    _, (weights, averaged), (buffers, _) = seen[-1]
    assert any((a - w).abs().max() > 1e-3 for a, w in zip(averaged, weights, strict=True))
    assert buffers["norm.blend"] == 0.0 and buffers["norm.running_mean"].abs().max() > 1e-3


def cross_entropy(model: nn.Module, data: Any) -> float:
    batches = list(data.val_dataloader())
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch.images) for batch in batches])
    return F.cross_entropy(logits, torch.cat([batch.labels for batch in batches])).item()


def test_validation_measures_the_averaged_copy():
    task, data = classifier(average=0.99, rate=1e-2), images(batch=24)
    run = trainer(1, 12, limit_val_batches=1.0)
    run.fit(task, datamodule=data)
    logged = run.callback_metrics["val/loss"].item()
    assert logged == pytest.approx(cross_entropy(task.average.module, data), rel=1e-5)
    assert abs(logged - cross_entropy(task.model, data)) > 1e-3


# Statistics


def test_checkpointing_gives_the_same_step_and_moves_statistics_once():
    found, calls = [], []
    for checkpointing in (False, True):
        task = classifier(backbone={"norm": "prepbn", "drop_path": 0.5}, checkpointing=checkpointing, rate=1e-2)
        count = []
        for block in task.model.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(lambda module, inputs, count=count: count.append(module))
        trainer(1, 2).fit(task, datamodule=images())
        found.append(task.model.state_dict())
        calls.append(len(count))
    assert calls[1] == 2 * calls[0] == 8
    assert difference(*found) is None
    assert found[0]["norm.running_mean"].abs().max() > 0


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_refresh_changes_running_statistics_only(average: float):
    found = []
    for refresh in (0, 3):
        task = classifier(backbone={"norm": "prepbn", "drop_path": 0.3}, average=average, refresh=refresh)
        trainer(2, 4, limit_val_batches=1).fit(task, datamodule=images())
        found.append(task.state_dict())
    changed = {key for key in found[0] if not torch.equal(found[0][key], found[1][key])}
    start = "average.module" if average else "model"
    assert changed == {key for key in found[0] if key.startswith(start) and "running" in key}


def test_refreshed_statistics_are_those_of_fresh_training_batches():
    task, data = classifier(backbone={"norm": "batchnorm"}, refresh=3), images()
    trainer(1, 4, limit_val_batches=1).fit(task, datamodule=data)
    loader: Any = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(1)
    twin, means = copy.deepcopy(task.model).eval(), []
    first = twin.blocks[0].steps[0].before
    first.register_forward_pre_hook(lambda layer, inputs: means.append(inputs[0].mean((0, 1))))
    with torch.no_grad():
        for batch, _ in zip(loader, range(3), strict=False):
            twin(batch.images)
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
