"""What a run prints."""

import copy
import functools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import zoo
from training import PLAIN_FLAGS, classifier, fit
from zoo.data.boxes import Batch as Boxes
from zoo.data.images import Batch as Images
from zoo.data.speech import Batch as Speech
from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.boxes import Truth
from zoo.tasks.classify.train import Classify
from zoo.tasks.detect.train import Detect
from zoo.tasks.generate.train import Generate
from zoo.tasks.output import Output, duration, multiply_adds, readable_count
from zoo.tasks.task import Task
from zoo.tasks.transcribe.train import Transcribe


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (0, "0:00"),
        (6.6, "0:07"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3599.7, "1:00:00"),
        (3723, "1:02:03"),
        (35_999, "9:59:59"),
        (36_000, "10 h"),
    ],
)
def test_duration(seconds: float, wanted: str):
    assert duration(seconds) == wanted


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (0, "0"),
        (213, "213"),
        (999.6, "1 k"),
        (213_400, "213 k"),
        (4_624_000, "4.62 M"),
        (1.26e9, "1.26 G"),
        (3e12, "3 T"),
    ],
)
def test_readable_count(number: float, wanted: str):
    assert readable_count(number) == wanted


def test_multiply_adds_are_those_of_products_and_convolutions():
    """By hand, for one block of softmax attention and a feed-forward of the width 4 D."""
    fields = {"dim": 16, "depth": 1, "heads": 2, "patch": 4, "image": 16, "classes": 4}
    model, tokens, dim = zoo.create_model("vit_micro", **fields).train(), 16, 16
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stem, attention = tokens * 3 * 4 * 4 * dim, tokens * 4 * dim * dim + 2 * tokens * tokens * dim
    hidden = model.blocks[0].state_dict()
    ffn = tokens * sum(value.numel() for name, value in hidden.items() if value.ndim == 2) - tokens * 4 * dim * dim
    assert multiply_adds(model, (torch.zeros(1, 3, 16, 16),)) == stem + attention + ffn + dim * 4
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_multiply_adds_do_not_depend_on_the_dtype():
    model, inputs = classifier().model, (torch.zeros(1, 3, 16, 16),)
    wanted = multiply_adds(model, inputs)
    assert multiply_adds(model.bfloat16(), inputs) == wanted and model.head.weight.dtype == torch.bfloat16


def test_a_model_with_the_hooks_of_a_profiler_is_copied(tmp_path: Path):
    model, inputs = classifier().model, (torch.zeros(1, 3, 16, 16),)
    wanted = multiply_adds(model, inputs)
    hook = functools.partial(lambda lock, *_: None, threading.Lock())  # a lock cannot be copied
    model.register_forward_pre_hook(hook)
    model.head.register_forward_hook(hook)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.deepcopy(model)
    assert multiply_adds(model, inputs) == wanted
    zoo.save_model(model, tmp_path / "kept")
    assert len(model._forward_pre_hooks) == len(model.head._forward_hooks) == 1


def line_of(
    epoch: int, epochs: int, seconds: float, left: float, best: bool = True, amount: float = 0.0, ranks: int = 1
) -> str:
    """The line of an epoch that took that many seconds, half of them for training on so much, with so many left."""
    task, lines = classifier(), list[str]()
    task.total, task.loss_sum, task.loss_number = 1000 * epochs, torch.tensor(3 * 1.38424), 3
    found = SimpleNamespace(value=0.25, step=1000 * epoch)
    keep: Any = SimpleNamespace(name="val/accuracy", latest=found, best=found if best else None)
    output = Output(keep, "runs/x", "classify", bar=False)
    output.say = lines.append
    done, now = 1000 * epoch, time.monotonic()
    output.began, output.start = now - seconds, now - left * done / max(1, task.total - done)
    output.busy, output.amount = (seconds / 2 if amount else 0.0), amount
    steps = {"global_step": done, "max_epochs": epochs, "max_steps": -1, "current_epoch": epoch - 1}
    trainer: Any = SimpleNamespace(**steps, world_size=ranks)
    output.on_train_epoch_end(trainer, task)
    (line,) = lines
    return line


def test_the_line_of_an_epoch():
    assert line_of(2, 9, 7, 49) == "epoch 2/9  loss 1.3842  accuracy 0.2500  best 0.2500  0:07, 0:49 left"
    assert line_of(2, 300, 7, 3723, best=False) == (
        "epoch   2/300  loss 1.3842  accuracy 0.2500  best -  0:07, 1:02:03 left"
    )


def test_the_line_of_an_epoch_omits_its_duration_and_then_its_pace_where_it_is_too_long():
    head = "  loss 1.3842  accuracy 0.2500  best "
    assert line_of(2, 9, 8, 49, best=False, amount=400) == f"epoch 2/9{head}-  0:08, 100 images/s, 0:49 left"
    assert line_of(2, 9, 8, 49, amount=400, ranks=8) == f"epoch 2/9{head}0.2500  800 images/s, 0:49 left"
    assert line_of(2, 30, 8, 723, amount=50_000) == f"epoch  2/30{head}0.2500  12.5 k img/s, 12:03 left"
    assert line_of(2, 300, 8, 3723, amount=50_000) == f"epoch   2/300{head}0.2500  1:02:03 left"


@pytest.mark.parametrize(
    ("epochs", "seconds", "left"), [(1000, 360, 359_000), (300, 3723, 359_000), (9, 86400, 700000)]
)
@pytest.mark.parametrize("amount", [0, 1.0, 7e9])
def test_the_line_of_an_epoch_fits_80_columns(epochs: int, seconds: float, left: float, amount: float):
    line = line_of(1, epochs, seconds, left, amount=amount)
    assert len(line) <= 80 and line.endswith(" h left")


def test_what_a_batch_holds():
    images, speech = torch.zeros(3, 1, 8, 8), torch.zeros(2, 400, 80)
    assert Task.amount(classifier(), Images(images, torch.zeros(3), ("broken",))) == 3
    truth = Truth(*(torch.zeros(3, 0, *more) for more in ((), (4,), ())[: len(Truth._fields)]))
    boxes = Boxes(images, None, truth, torch.arange(3), torch.zeros(3, 2), ())
    task: Any = SimpleNamespace(
        data=SimpleNamespace(preprocess=AudioPreprocess(rate=8000, hop=80, window=200, fft=256))
    )
    heard = Speech(speech, torch.tensor([400, 150]), ("a", "b"), ("1", "2"), ())
    assert Detect.amount(task, boxes) == 3 == Generate.amount(task, Images(images, torch.zeros(3), ()))
    assert float(Transcribe.amount(task, heard)) == pytest.approx(5.5)
    assert Transcribe.unit == ("h of audio/h", "h/h") and {each.unit for each in (Detect, Generate)} == {Task.unit}


class Clock:
    """A clock in the place of `time.monotonic` of the output, that only training and validation move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float, check: float):
        self.now = 1000.0
        monkeypatch.setattr("zoo.tasks.output.time", SimpleNamespace(monotonic=lambda: self.now))
        for name, seconds in (("training_step", step), ("validation_step", check)):
            monkeypatch.setattr(Classify, name, self.slowed(getattr(Classify, name), seconds))

    def slowed(self, plain: Any, seconds: float) -> Any:
        def slow(task: Any, batch: Any, batch_idx: int) -> Any:
            self.now += seconds
            return plain(task, batch, batch_idx)

        return slow


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The ends of the lines of epochs."""
    lines = capsys.readouterr().err.splitlines()
    return [line.rpartition("  ")[2] for line in lines if line.startswith(("epoch ", "step "))]


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_the_pace_is_that_of_training_and_the_time_that_of_the_whole_run(
    interval: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Two batches of 16 images an epoch, of 4 s each; a validation takes 10 s, also in the middle of an epoch."""
    Clock(monkeypatch, 4.0, 10.0)
    flags = [*PLAIN_FLAGS, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    flags += ["--trainer.num_sanity_val_steps=1", f"--trainer.val_check_interval={interval}"]
    fit(tmp_path, *flags, "--trainer.max_epochs=3")
    each = 8 + (10 if interval == 1.0 else 20)
    pace = "4 images/s"
    assert printed(capsys) == [f"{pace}, {duration(each * left)} left" for left in (2, 1, 0)]


def test_the_pace_is_that_of_one_epoch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    clock, plain = Clock(monkeypatch, 0.0, 0.0), Classify.training_step

    def slower(task: Any, batch: Any, batch_idx: int) -> Any:
        clock.now += 4.0 * (task.current_epoch + 1)
        return plain(task, batch, batch_idx)

    monkeypatch.setattr(Classify, "training_step", slower)
    fit(tmp_path, *PLAIN_FLAGS, "--trainer.limit_train_batches=2", "--trainer.max_epochs=2")
    assert printed(capsys) == ["4 images/s, 0:08 left", "2 images/s, 0:00 left"]


def test_a_resumed_run_judges_by_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    flags = [*PLAIN_FLAGS, "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=0"]
    with monkeypatch.context() as patch:
        Clock(patch, 1.0, 0.0)
        fit(tmp_path, *flags, "--trainer.max_epochs=1")
    assert printed(capsys) == ["0:04, 16 images/s, 0:00 left"]
    Clock(monkeypatch, 100.0, 0.0)
    fit(tmp_path, *flags, "--trainer.max_epochs=3", f"--ckpt_path={tmp_path}")
    assert printed(capsys) == ["6:40, 0.16 images/s, 6:40 left", "6:40, 0.16 images/s, 0:00 left"]


def test_a_long_epoch_without_a_bar_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Batches of 400 s: a line after the second and the fourth, and that of the epoch."""
    Clock(monkeypatch, 400.0, 0.0)
    flags = [*PLAIN_FLAGS, "--trainer.limit_train_batches=5", "--trainer.limit_val_batches=1"]
    fit(tmp_path, *flags, "--trainer.max_epochs=1")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    starts = ["epoch 1/1  batch 2/5  loss ", "epoch 1/1  batch 4/5  loss ", "epoch 1/1  loss "]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert lines[0].endswith("  0.04 images/s, 20:00 left") and lines[1].endswith("  0.04 images/s, 6:40 left")


class Drawn:
    """A bar that notes what it shows."""

    bars: ClassVar[list[Any]] = []

    def __init__(self, total: int, desc: str, initial: int = 0, **_: Any):
        self.bars.append(self)
        self.total, self.desc, self.n, self.said = total, desc, initial, list[tuple[int, str]]()
        self.postfix, self.disable = "", False

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        assert not refresh
        self.postfix = text

    def update(self) -> None:
        self.n += 1
        self.said.append((self.n, self.postfix))

    def close(self) -> None: ...

    @staticmethod
    def write(line: str, file: Any) -> None:
        print(line, file=file)


def test_the_bar_has_the_time_left_for_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    Clock(monkeypatch, 1.0, 0.0)
    monkeypatch.setattr("zoo.tasks.output.tqdm", Drawn)
    monkeypatch.setattr(Drawn, "bars", [])
    flags = [*PLAIN_FLAGS, "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"]
    flags += ["--trainer.enable_progress_bar=true", "--trainer.max_epochs=2", "--trainer.val_check_interval=0.5"]
    fit(tmp_path, *flags)
    shown = [(bar.desc, bar.total, bar.said) for bar in Drawn.bars if bar.said]
    left = [f"run 0:0{number} left" for number in range(8, -1, -1)]
    checked = ("validation", 1, [(1, "")])
    assert shown == [
        ("epoch 1", 4, [(1, left[1]), (2, left[2])]),
        checked,
        ("epoch 1", 4, [(3, left[3]), (4, left[4])]),
        checked,
        ("epoch 2", 4, [(1, left[5]), (2, left[6])]),
        checked,
        ("epoch 2", 4, [(3, left[7]), (4, left[8])]),
        checked,
    ]


@pytest.mark.parametrize("batch", [512, 32])
def test_an_epoch_of_few_batches_is_remarked(batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever trainer.limit_train_batches makes of it; the synthetic set has 512 images."""
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
    fit(tmp_path, *limits, "--trainer.max_epochs=1", f"--data.batch={batch}")
    shown = capsys.readouterr().err.splitlines()
    assert any(line.startswith("training  1 epoch of 1 batch; ") for line in shown)
    remarks = [line for line in shown if line.startswith("warning: an epoch has ")]
    assert remarks == (["warning: an epoch has 1 batch; lower data.batch"] if batch == 512 else [])
