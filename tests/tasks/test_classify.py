"""Training by the real command and by a Trainer: the schedule, the averaged copy, resuming, what a run leaves."""

import copy
import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import PLAIN_FLAGS, classifier, command, difference, fit, images, state, trainer

import zoo
from zoo.block import Block
from zoo.data.images import Batch
from zoo.norms import PRepBN
from zoo.tasks.classify import Classify
from zoo.weights import load_checkpoint, save_model

# Resuming

STEPS, EPOCHS = 4, 3
RANDOM = ["--model.backbone.mixer=sla", "--model.backbone.norm=prepbn(until=1.0)", "--model.backbone.drop_path=0.3"]
RANDOM += ["--model.average=0.9", "--model.refresh=2", "--trainer.gradient_clip_val=1.0"]
RANDOM += [f"--trainer.limit_train_batches={STEPS}", "--trainer.limit_val_batches=2", f"--trainer.max_epochs={EPOCHS}"]


class Stopped(Exception):
    pass


def blend_of(model: nn.Module) -> float:
    return next(layer.blend.item() for layer in model.modules() if isinstance(layer, PRepBN))


class Run(NamedTuple):
    root: Path
    blends: list[float]  # in front of each step

    def state(self) -> dict[str, Any]:
        return state(self.root / "resume" / "last.ckpt")


def randomly(root: Path, *flags: str, stop: bool = False) -> Run:
    """A run with all that is random in it; with stop it dies in the middle of the last epoch."""
    blends = []

    def watch(task: Classify, batch: Batch, batch_idx: int) -> None:
        blends.append(blend_of(task.model))
        if stop and task.current_epoch == EPOCHS - 1 and batch_idx == 1:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classify, "on_train_batch_start", watch)
        if stop:
            with pytest.raises(Stopped):
                fit(root, *RANDOM, *flags)
        else:
            fit(root, *RANDOM, *flags)
    return Run(root, blends)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return randomly(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module", params=[0, 2], ids=lambda workers: f"{workers} workers")
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("resumed")
    stopped = randomly(root, f"--data.workers={request.param}", stop=True)
    assert len(stopped.blends) == STEPS * (EPOCHS - 1) + 2
    assert stopped.state()["global_step"] == STEPS * (EPOCHS - 1)
    return randomly(root, f"--ckpt_path={root}/resume/last.ckpt")


def test_resuming_gives_bitwise_the_run_that_never_stopped(whole: Run, resumed: Run):
    one, other = whole.state(), resumed.state()
    assert one["global_step"] == other["global_step"] == STEPS * EPOCHS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch"):
        assert difference(one[part], other[part]) is None
    for name in ("best", "last"):
        files = [run.root / name / "model.safetensors" for run in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_is_as_random_as_it_says(whole: Run, tmp_path: Path):
    """Other seeds of data and of task each give other weights, so the comparison above compares something."""
    found = []
    for flag in ("--model.seed=0", "--model.seed=1", "--data.seed=1"):
        found.append(randomly(tmp_path / flag, flag, "--trainer.max_epochs=1").state()["state_dict"])
    assert difference(found[0], found[1]) and difference(found[0], found[2])


def test_blend_follows_the_step_and_resumes(whole: Run, resumed: Run):
    assert whole.blends == pytest.approx([1 - step / (STEPS * EPOCHS) for step in range(STEPS * EPOCHS)])
    assert resumed.blends == whole.blends[STEPS * (EPOCHS - 1) :]
    kept = zoo.load_model(whole.root / "last")
    assert blend_of(kept) == 0.0
    zoo.fuse(kept)


def test_what_is_kept_is_the_averaged_copy(whole: Run):
    found = whole.state()["state_dict"]
    averaged = {key.removeprefix("average.module."): value for key, value in found.items() if "average" in key}
    plain = {key.removeprefix("model."): value for key, value in found.items() if key.startswith("model.")}
    kept = zoo.load_model(whole.root / "last").state_dict()
    assert difference(kept, averaged) is None
    assert difference(kept, plain)


# Optimizer

RATE, DECAY = 1e-3, 0.05


class Schedule:
    """What configure_optimizers asks of a trainer: 10 batches an epoch, 100 steps."""

    estimated_stepping_batches, num_training_batches, accumulate_grad_batches, max_epochs = 100, 10, 1, 10


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
        assert any(parameter.ndim == 0 and decays[parameter] == 0.0 for parameter in task.model.parameters())


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


# Unreadable pictures and odd batches

EMPTY = Batch(torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.int64), ("a.png", "b.png"))


class Given(lightning.LightningDataModule):
    """Batches as they are."""

    classes, batch, preprocess = list("abcd"), 16, None

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # pyright: ignore

    val_dataloader = train_dataloader


def batch_of(number: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(number, 3, 16, 16, generator=generator), torch.arange(number) % 4, ())


def test_a_batch_without_a_readable_picture_changes_nothing():
    task = classifier(backbone={"norm": "prepbn"}, weight_decay=0.0)
    before = copy.deepcopy(task.model.state_dict())
    with pytest.warns(UserWarning) as seen:
        trainer(1, 1).fit(task, datamodule=Given([EMPTY]))
    messages = [str(each.message) for each in seen]
    assert sum("skipped a.png" in message for message in messages) == 1
    assert "2 unreadable pictures were skipped in the training of epoch 0" in messages
    after = task.model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.endswith("blend")
    }
    loss = task.training_step(EMPTY, 0)
    task.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in task.model.parameters())


@pytest.mark.parametrize("number", [1, 5, 6])
def test_mixing_takes_pairs_of_an_odd_batch(number: int):
    task = classifier(mixup=0.8, cutmix=1.0)
    used: list[int] = []
    task.model.register_forward_pre_hook(lambda model, inputs: used.append(len(inputs[0])))
    trainer(1, 1).fit(task, datamodule=Given([batch_of(number)]))
    assert used == ([number // 2 * 2] if number > 1 else [])


# A recipe that learns, and what it leaves

LEARN = [*PLAIN_FLAGS, "--model.backbone.patch=4", "--model.backbone.dim=32", "--data.batch=32"]
LEARN += ["--model.mixup=0", "--model.cutmix=0", "--model.rate=3e-3", "--trainer.max_epochs=8"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("learned")
    choices = ["--model.backbone.mixer=sla", "--model.backbone.norm=prepbn", "--model.average=0.9"]
    fit(root, *LEARN, *choices, "--trainer.logger=null", "--trainer.max_epochs=6")
    return root


def rows_of(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / "csv/version_0/metrics.csv").read_text().splitlines()))


def accuracies(root: Path) -> list[float]:
    return [float(row["val/accuracy"]) for row in rows_of(root) if row["val/accuracy"]]


def test_learns_with_linear_attention_and_batch_statistics(learned: Path):
    found = accuracies(learned)
    assert len(found) == 6 and found[-1] >= 0.95 and found[0] < 0.9


def test_learns_with_softmax_and_layernorm(tmp_path: Path):
    fit(tmp_path, *LEARN)
    assert right(zoo.load_model(tmp_path / "best"), images().val_dataloader()) >= 0.9


def right(model: nn.Module, loader: Any) -> float:
    with torch.no_grad():
        hits: list[Tensor] = [model(batch.images).argmax(1) == batch.labels for batch in loader]
    return torch.cat(hits).float().mean().item()


def test_best_and_last_are_checkpoints(learned: Path):
    for name in ("best", "last"):
        kept = load_checkpoint(learned / name, check=True)
        assert kept.labels == tuple(images().classes) and kept.preprocess == images().preprocess
        assert kept.config["preset"] == "vit_micro" and not kept.config["fused"]
        assert kept.config["model"]["mixer"] == "sla" and kept.config["model"]["dim"] == 32
    found = accuracies(learned)
    loader = images().val_dataloader()
    assert right(zoo.load_model(learned / "best"), loader) == pytest.approx(max(found))
    assert right(zoo.load_model(learned / "last"), loader) == pytest.approx(found[-1])
    assert f"epoch {found.index(max(found)) + 1}" in load_checkpoint(learned / "best").config["source"]
    assert sorted(path.name for path in (learned / "resume").iterdir()) == ["best.ckpt", "last.ckpt"]
    steps = [state(learned / "resume" / name)["global_step"] for name in ("best.ckpt", "last.ckpt")]
    assert steps == [16 * (found.index(max(found)) + 1), 16 * 6]


def test_logs_and_config(learned: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = rows_of(learned)
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert sorted(losses) == list(range(16 * 6)) and losses[95] < losses[0]
    rates = {int(row["step"]): float(row["lr-AdamW/pg1"]) for row in rows if row["lr-AdamW/pg1"]}
    assert rates[0] == pytest.approx(3e-3 / 17) and max(rates.values()) == rates[16] == pytest.approx(3e-3)
    assert {"val/loss", "val/balanced_accuracy"} <= rows[0].keys()
    (folder,) = learned.glob("tensorboard/version_0")
    events = EventAccumulator(str(folder))
    events.Reload()
    drawn = [event.value for event in events.Scalars("val/accuracy")]
    assert drawn == pytest.approx(accuracies(learned)) and "train/loss" in events.Tags()["scalars"]
    assert "mixer: sla" in (learned / "config.yaml").read_text()


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_measuring_a_kept_model_gives_the_logged_accuracy(verb: str, learned: Path, monkeypatch: Any, tmp_path: Path):
    """The config that a run leaves is one to start from, and measuring leaves nothing behind."""
    lines: list[str] = []
    monkeypatch.setattr("zoo.tasks.classify.rank_zero_info", lines.append)
    monkeypatch.chdir(tmp_path)
    before = sorted(learned.rglob("*"))
    flags = ["--trainer.default_root_dir=null"] if verb == "validate" else []
    command(verb, "--config", learned / "config.yaml", f"--model.weights={learned}/best", *flags)
    if verb == "validate":
        (line,) = lines
        assert line.startswith(f"accuracy {max(accuracies(learned)):.4f} (n = 128, 95 % interval ")
    assert sorted(learned.rglob("*")) == before and not list(tmp_path.iterdir())


def test_a_state_to_go_on_from_can_be_measured(learned: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr("zoo.tasks.classify.rank_zero_info", lines.append)
    command("validate", "--config", learned / "config.yaml", f"--ckpt_path={learned}/resume/last.ckpt")
    assert lines[0].startswith(f"accuracy {accuracies(learned)[-1]:.4f} ")


def test_starting_from_a_checkpoint_trains_all_of_it(learned: Path, tmp_path: Path):
    """A loaded model is in eval mode; in training its statistics move and its paths drop again."""
    torch.manual_seed(0)
    task = Classify(weights=str(learned / "last"), warmup=0.0, mixup=0.0, cutmix=0.0)
    before = copy.deepcopy(task.model.state_dict())
    trainer(1, 1).fit(task, datamodule=images())
    after = task.model.state_dict()
    assert all(module.training for module in task.model.modules())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert {key for key in before if "running" in key} | {"head.weight", "stem.conv.weight"} <= set(moved)


def test_a_fused_model_can_be_measured_and_not_trained(learned: Path, tmp_path: Path):
    kept = load_checkpoint(learned / "last")
    folder = save_model(zoo.fuse(kept.model), tmp_path / "fused", preprocess=kept.preprocess, labels=kept.labels)
    task = Classify(weights=str(folder), mixup=0.0, cutmix=0.0)
    run = trainer(1, 1, limit_val_batches=1.0)
    (found,) = run.validate(task, datamodule=images(), verbose=False)
    assert found["val/accuracy"] == pytest.approx(accuracies(learned)[-1])
    with pytest.raises(ValueError, match="fused model is for inference and cannot be trained"):
        trainer(1, 1).fit(task, datamodule=images())
