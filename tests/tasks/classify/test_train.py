"""Training by the real command: resuming, unreadable pictures, a recipe that learns, and what a run leaves."""

import copy
import csv
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zoo
from training import BACKBONE, PLAIN_FLAGS, classifier, command, difference, fit, images, refused, state, trainer
from zoo.data.images import Batch
from zoo.inputs.images import ImagePreprocess
from zoo.norms import PRepBN
from zoo.tasks.classify.train import Classify
from zoo.tasks.task import Task
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
        Task.on_train_batch_start(task, batch, batch_idx)
        blends.append(blend_of(task.model))
        if stop and task.current_epoch == EPOCHS - 1 and batch_idx == 1:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.tasks.run.OVERHEAD", 0.0)
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


@pytest.mark.slow
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


# Unreadable pictures and odd batches

EMPTY = Batch(torch.empty(0, 3, 16, 16), torch.empty(0, dtype=torch.int64), ("a.png", "b.png"))


class Given(lightning.LightningDataModule):
    """Batches as they are."""

    classes, labelled, batch, preprocess = list("abcd"), 4, 16, ImagePreprocess()

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
    assert "unreadable images skipped in the training of epoch 0: 2" in messages
    after = task.model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.endswith("blend")
    }
    loss = task.training_step(EMPTY, 0)
    task.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in task.model.parameters())


@pytest.mark.parametrize("number", [1, 5, 6])
def test_mixing_leaves_no_image_of_an_odd_batch_out(number: int):
    task = classifier(mixup=0.8, cutmix=1.0)
    used: list[int] = []
    task.model.register_forward_pre_hook(lambda model, inputs: used.append(len(inputs[0])))
    trainer(1, 1).fit(task, datamodule=Given([batch_of(number)]))
    assert used == [number]


def test_an_odd_image_is_not_mixed():
    task = classifier(mixup=0.8)
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    mixed, shares = task.mixed(images.clone(), labels)
    assert torch.allclose(mixed[0], images[0]) and shares[0].argmax() == 0
    assert all(
        torch.allclose(mixed[place] + mixed[5 - place], images[place] + images[5 - place], atol=1e-6)
        for place in (1, 2)
    )
    assert not torch.allclose(mixed[1:], images[1:]) and mixed.shape == images.shape
    assert torch.allclose(shares.sum(1), torch.ones(5))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_cross_entropy_with_smoothed_labels(mixed: bool, monkeypatch: pytest.MonkeyPatch):
    task, batch = classifier(mixup=0.8 * mixed, cutmix=1.0 * mixed, smoothing=0.1), batch_of(6)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    task._trainer = SimpleNamespace(global_step=0)
    images, targets = batch.images, torch.full((6, 4), 0.1 / 4)
    targets[range(6), batch.labels] += 0.9
    if mixed:
        images, targets = task.mix(images.clone(), batch.labels)
        monkeypatch.setattr(task, "mix", lambda *_: (images, targets))
        assert torch.allclose(targets.sum(1), torch.ones(6)) and torch.allclose(targets.amin(1), torch.tensor(0.1 / 4))
    wanted = -(targets * task.model(images).log_softmax(1)).sum(1).mean()
    assert task.training_step(batch, 0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_balanced_accuracy_is_that_of_scikit_learn():
    """Class 2 is answered once and asked never; what is measured is the mean of the others."""
    labels, answers = [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 2, 0]
    metric = classifier().metrics["balanced_accuracy"]
    for part in (slice(0, 4), slice(4, 6)):
        metric.update(torch.eye(4)[answers[part]], torch.tensor(labels[part]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            metric.compute().item() == pytest.approx(balanced_accuracy_score(labels, answers)) == pytest.approx(7 / 18)
        )


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


@pytest.mark.slow
def test_learns_with_linear_attention_and_batch_statistics(learned: Path):
    found = accuracies(learned)
    assert len(found) == 6 and found[-1] >= 0.95 and found[0] < 0.9


@pytest.mark.slow
def test_learns_with_softmax_and_layernorm(tmp_path: Path):
    fit(tmp_path, *LEARN)
    assert right(zoo.load_model(tmp_path / "best"), images().val_dataloader()) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_in_bfloat16(precision: str, tmp_path: Path):
    choices = ["--model.backbone.mixer=sla", "--model.backbone.norm=prepbn", "--model.average=0.9", "--model.refresh=2"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", f"--trainer.precision={precision}"]
    fit(tmp_path, *choices, *short)
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert state(tmp_path / "resume" / "last.ckpt")["state_dict"]["model.head.weight"].dtype == kind
    load_checkpoint(tmp_path / "last", check=True)


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
    done = [0.0] * 4 + found[4:]  # prepbn blends until 0.8 of 6 epochs
    loader = images().val_dataloader()
    assert right(zoo.load_model(learned / "best"), loader) == pytest.approx(max(done))
    assert right(zoo.load_model(learned / "last"), loader) == pytest.approx(found[-1])
    best = done.index(max(done)) + 1
    for name, epoch in (("best", best), ("last", 6)):
        source = load_checkpoint(learned / name).config["source"]
        assert source == f"trained by zoo on synthetic, epoch {epoch}, step {16 * epoch}"
    assert sorted(path.name for path in (learned / "resume").iterdir()) == ["last.ckpt", "last.json"]
    assert state(learned / "resume/last.ckpt")["global_step"] == 16 * 6


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


def wilson(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson 1927."""
    middle, spread = share + z**2 / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / number) ** 2 / 4)
    return (middle - spread) / (1 + z**2 / number), (middle + spread) / (1 + z**2 / number)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_measuring_a_kept_model_gives_the_logged_accuracy(
    verb: str, learned: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """With the config that its run has left, which may be omitted. Measuring leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    before = sorted(learned.rglob("*"))
    capsys.readouterr()
    flags = ["--config", learned / "config.yaml", "--trainer.default_root_dir=null"] if verb == "validate" else []
    command(verb, *flags, f"--model.weights={learned}/best")
    wanted = max(accuracies(learned))
    if verb == "test":
        wanted = right(zoo.load_model(learned / "best"), images().test_dataloader())
    low, high = wilson(wanted, 128)
    shown = capsys.readouterr().out
    assert shown == f"accuracy {wanted:.4f} (n = 128, 95 % interval {low:.4f} to {high:.4f})\n"
    assert sorted(learned.rglob("*")) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["resume/last.ckpt", ""])
def test_the_state_of_a_run_can_be_measured(path: str, learned: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    command("validate", f"--ckpt_path={learned / path}")
    assert capsys.readouterr().out.startswith(f"accuracy {accuracies(learned)[-1]:.4f} ")


def test_starting_from_a_checkpoint_trains_all_of_it(learned: Path):
    """A loaded model is in eval mode; in training its statistics move and its paths drop again."""
    torch.manual_seed(0)
    task = Classify(weights=str(learned / "last"), warmup=0.0, mixup=0.0, cutmix=0.0)
    before = copy.deepcopy(task.model.state_dict())
    trainer(1, 1).fit(task, datamodule=images())
    after = task.model.state_dict()
    assert all(module.training for module in task.model.modules())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert {key for key in before if "running" in key} | {"head.weight", "stem.conv.weight"} <= set(moved)


def test_a_fused_model_can_be_measured(learned: Path, tmp_path: Path):
    kept = load_checkpoint(learned / "last")
    folder = save_model(zoo.fuse(kept.model), tmp_path / "fused", preprocess=kept.preprocess, labels=kept.labels)
    task = Classify(weights=str(folder), mixup=0.0, cutmix=0.0)
    run = trainer(1, 1, limit_val_batches=1.0)
    (found,) = run.validate(task, datamodule=images(), verbose=False)
    assert found["val/accuracy"] == pytest.approx(accuracies(learned)[-1])


# Fine-tuning


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint of 24 pixels and 7 classes, with statistics of its own."""
    torch.manual_seed(0)
    fields = BACKBONE | {"image": 24, "classes": 7}
    names, preprocess = [f"class {index}" for index in range(7)], ImagePreprocess(size=24, mean=(0.1, 0.2, 0.3))
    model = zoo.create_model(**fields).eval()
    return save_model(model, tmp_path / "other", preset="vit_micro", preprocess=preprocess, labels=names)


TUNE = ["--data.dataset=synthetic", "--data.batch=16", "--trainer.logger=false", "--trainer.max_epochs=1"]
TUNE += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--model.rate=1e-4", *PLAIN_FLAGS]


def test_fine_tuning_takes_classes_of_the_data_and_preprocessing_of_the_checkpoint(
    other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    lines: list[str] = []
    for module in ("tasks.task", "data.loading"):
        monkeypatch.setattr(f"zoo.{module}.rank_zero_info", lines.append)
    command("fit", *TUNE, f"--model.weights={other}", f"--trainer.default_root_dir={tmp_path}/run")
    number = len(load_checkpoint(other).model.state_dict()) - 2
    assert lines == [
        f"started   from {other}: {number} tensors taken; new: head.weight, head.bias",
        "taken     classes=4 from the data",
    ]
    kept, start = load_checkpoint(tmp_path / "run/last", check=True), load_checkpoint(other)
    assert kept.preprocess == start.preprocess and kept.labels == tuple(images().classes)
    assert kept.model.config == replace(start.model.config, classes=4)
    old, new = dict(start.model.named_parameters()), dict(kept.model.named_parameters())
    moves = [float((new[name] - old[name]).detach().abs().max()) for name in old if not name.startswith("head")]
    assert 0 < max(moves) <= 2e-4  # by one step at a rate of 1e-4


def test_what_the_data_decides_may_be_stated_and_must_then_be_right(other: Path, tmp_path: Path):
    flags = ["classify", "fit", *TUNE, f"--trainer.default_root_dir={tmp_path}/run"]
    words = "the checkpoint has 7 classes, but the data has 4"
    assert refused(*flags, f"--model.weights={other}", "--model.backbone.classes=7") == (
        "the model has 7 classes, but the data has 4; omit model.backbone.classes or set it to 4"
    )
    assert refused("classify", "validate", *TUNE, f"--model.weights={other}") == words


def test_a_new_model_takes_classes_and_channels_of_the_data(tmp_path: Path):
    """And is what it would be if they had been stated."""
    flags = [*TUNE, "--data.size=16", "--data.channels=1", "--model.average=0.9"]
    flags += [f"--model.backbone.{field}={value}" for field, value in BACKBONE.items() if field != "classes"]
    command("fit", *flags, f"--trainer.default_root_dir={tmp_path}/taken")
    stated = ["--model.backbone.classes=4", "--model.backbone.channels=1"]
    command("fit", *flags, *stated, f"--trainer.default_root_dir={tmp_path}/stated")
    taken, stated = (load_checkpoint(tmp_path / name / "last") for name in ("taken", "stated"))
    assert taken.model.config == stated.model.config and taken.model.config.channels == 1
    assert difference(taken.model.state_dict(), stated.model.state_dict()) is None
