"""Whether a state fits the run that is resumed from it: damaged files, changed options, errors of other origin."""

import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from training import PLAIN_FLAGS, difference, fit, said, state
from zoo.data.images import Images
from zoo.tasks.classify.train import Classify
from zoo.tasks.resuming import unlike
from zoo.tasks.states import States, drop_later

FLAGS = [*PLAIN_FLAGS, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--model.backbone.depth=1"]
FLAGS += ["--model.layer_decay=0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder, *FLAGS, "--trainer.max_epochs=1")
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of its state."""
    path = tmp_path / "copy.ckpt"
    path.write_bytes((run / "resume/last.ckpt").read_bytes())
    return path


def resume(folder: Path, path: Path, *flags: str) -> None:
    fit(folder, *FLAGS, "--trainer.max_epochs=2", f"--ckpt_path={path}", *flags)


# Damage


def test_a_damaged_state_is_the_same_or_refused(copied: Path):
    """One bit anywhere, and any length."""
    whole, wanted, numbers = copied.read_bytes(), state(copied), random.Random(0)
    refusals = 0
    for place in numbers.sample(range(len(whole)), 150):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << numbers.randrange(8)
        copied.write_bytes(flipped)
        try:
            assert difference(States().load_checkpoint(copied), wanted) is None, place
        except ValueError as error:
            refusals += 1
            assert str(error).startswith(f"{copied} is "), place
    assert refusals > 50
    for size in numbers.sample(range(len(whole)), 20):
        copied.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="copy.ckpt is truncated or not the state of a training run"):
            States().load_checkpoint(copied)


def test_a_damaged_tensor_is_one_line(copied: Path, tmp_path: Path):
    content = copied.read_bytes()
    value = state(copied)["state_dict"]["model.head.bias"].numpy().tobytes()
    copied.write_bytes(content.replace(value, bytes([value[0] ^ 1]) + value[1:]))
    with pytest.raises(SystemExit) as stop:
        resume(tmp_path / "new", copied)
    assert said(stop.value).startswith(f"{copied} is damaged: the checksum of ")


def test_the_form_of_a_state():
    usual = {"a": [0, 0.0], "b": {"c": torch.zeros(2)}}
    for found, wanted in (
        ({"a": [3, 1.0], "b": {"c": torch.ones(2)}}, None),
        ({"a": [3, 1.0]}, "x must have the keys a, b"),
        ({"a": [3], "b": {"c": torch.ones(2)}}, "x.a must have 2 values, got 1"),
        ({"a": [3, None], "b": {"c": torch.ones(2)}}, "x.a.1 must be of type float, got None"),
        ({"a": [True, 1.0], "b": {"c": torch.ones(2)}}, "x.a.0 must be of type int, got True"),
        ({"a": [-3, 1.0], "b": {"c": torch.ones(2)}}, "x.a.0 must be >= 0, got -3"),
        ({"a": [3, 1.0], "b": {"c": torch.ones(3)}}, "x.b.c must be torch.float32 of shape (2,)"),
    ):
        assert unlike(found, usual, "x") == wanted


# Options


def test_a_changed_rate_takes_effect(copied: Path, tmp_path: Path):
    """And a changed weight decay; the schedule is that of the new options."""
    resume(tmp_path / "same", copied)
    resume(tmp_path / "other", copied, "--model.rate=0.01", "--model.weight_decay=0.2")
    one, other = (state(tmp_path / name / "resume/last.ckpt") for name in ("same", "other"))
    assert one["lr_schedulers"][0]["last_epoch"] == other["lr_schedulers"][0]["last_epoch"] == 6
    groups = zip(one["optimizer_states"][0]["param_groups"], other["optimizer_states"][0]["param_groups"], strict=True)
    for before, after in groups:
        assert after["initial_lr"] == pytest.approx(10 * before["initial_lr"])
        assert after["weight_decay"] == 4 * before["weight_decay"]
    assert difference(one["state_dict"], other["state_dict"])


def test_another_layer_decay_is_one_line(copied: Path, tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        resume(tmp_path / "new", copied, "--model.layer_decay=1")
    assert said(stop.value).startswith("--ckpt_path: model.layer_decay, and which parameters are trained,")


# Errors of other origin


@pytest.mark.parametrize(
    ("kind", "method"),
    [(Images, "setup"), (Classify, "configure_optimizers"), (Classify, "training_step"), (Classify, "validation_step")],
)
def test_an_error_of_other_origin_is_no_fault_of_the_state(
    kind: type, method: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a fault of the program")

    monkeypatch.setattr(kind, method, broken)
    with pytest.raises(KeyError, match="a fault of the program"):
        resume(tmp_path / "new", copied)


# The loss


def test_the_loss_of_an_epoch_is_of_all_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Also where the run was stopped between them."""

    def loss() -> str:
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch 1/1"))
        return line.split()[3]

    fit(tmp_path / "whole", *FLAGS, "--trainer.max_epochs=1")
    wanted, plain = loss(), Classify.training_step

    def struck(self: Classify, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Classify, "training_step", struck)
        fit(run, *FLAGS, "--trainer.max_epochs=1")
    assert state(run / "resume/last.ckpt")["epoch_loss"]["number"] == 2
    fit(run, *FLAGS, "--trainer.max_epochs=1", f"--ckpt_path={run}/resume/last.ckpt")
    assert loss() == wanted
    states = [state(folder / "resume/last.ckpt")["epoch_loss"] for folder in (tmp_path / "whole", run)]
    assert difference(*states) is None and states[0]["number"] == 3


def counted(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str, stop: bool = False) -> list[str]:
    """Trains with a faulty sample in every batch, until SIGTERM after two of three; the numbers that are reported."""
    plain = Classify.training_step

    def faulty(self: Classify, batch: Any, batch_idx: int) -> Any:
        self.note(["skipped a.png"], self.faulty[0], "training")
        if stop and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.warns(UserWarning) as seen:
        patch.setattr(Classify, "training_step", faulty)
        with pytest.raises(SystemExit) if stop else contextlib.nullcontext():
            fit(folder, *FLAGS, "--trainer.max_epochs=2", *flags)
    start = "unreadable images skipped in the training of "
    messages = [str(each.message) for each in seen]
    return [message.removeprefix(start) for message in messages if message.startswith(start)]


@pytest.mark.daily(2)
def test_the_faults_of_an_epoch_are_those_of_all_its_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Also where the run was stopped between them, or ended by steps; a state of an earlier version has none."""
    path = tmp_path / "run/resume/last.ckpt"
    assert counted(monkeypatch, tmp_path / "run", stop=True) == []
    found = state(path)
    assert found["faults"] == {"unreadable images": 2}
    del found["faults"]
    torch.save(found, tmp_path / "old.ckpt")
    assert counted(monkeypatch, tmp_path / "run", f"--ckpt_path={path}") == ["epoch 0: 3", "epoch 1: 3"]
    old = f"--ckpt_path={tmp_path}/old.ckpt"
    assert counted(monkeypatch, tmp_path / "old", old) == ["epoch 0: 1", "epoch 1: 3"]
    assert counted(monkeypatch, tmp_path / "steps", "--trainer.max_steps=2") == ["epoch 0: 2"]
    more = ["--trainer.max_steps=-1", f"--ckpt_path={tmp_path}/steps/resume/last.ckpt"]
    assert counted(monkeypatch, tmp_path / "steps", *more) == ["epoch 0: 3", "epoch 1: 3"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "faults must be of type dict, got 3"),
        ({"unreadable images": -1}, "faults.unreadable images must be >= 0, got -1"),
        ({"other": 1}, "faults must have the keys unreadable images"),
    ],
    ids=str,
)
def test_faults_of_another_form_are_one_line(value: Any, message: str, copied: Path, tmp_path: Path):
    torch.save(state(copied) | {"faults": value}, copied)
    with pytest.raises(SystemExit) as stop:
        resume(tmp_path / "new", copied)
    assert said(stop.value).endswith(f"is not a state that this run can be resumed from: TypeError: {message}")


def test_files_of_similar_names_beside_the_states_stay(tmp_path: Path):
    own = tmp_path / "step-final.ckpt"
    own.write_text("mine")
    states = States(keep=2)
    for step in (3, 6, 9):
        states.save_checkpoint({"global_step": step}, tmp_path / "last.ckpt")
    states.wait()
    assert sorted(tmp_path.glob("step-0*")) == [tmp_path / f"step-{step:09}.ckpt" for step in (6, 9)] and own.exists()
    drop_later(tmp_path, 6)
    assert [*tmp_path.glob("step-0*")] == [tmp_path / "step-000000006.ckpt"] and own.exists()
