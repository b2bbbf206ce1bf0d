"""The folder of a run: its lock, what is written into it when, and how training ends."""

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import zoo
from training import BACKBONE, PLAIN_FLAGS, difference, fit, refused, state
from zoo.tasks import run as running
from zoo.tasks.classify.train import Classify
from zoo.tasks.run import PATIENCE, Run
from zoo.tasks.states import States
from zoo.weights import load_checkpoint

SHORT = [*PLAIN_FLAGS, "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
FLAGS = ["--data.dataset=synthetic", "--data.size=16", "--trainer.accelerator=cpu", "--trainer.logger=false"]
FLAGS += [f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()]


def source(folder: Path) -> str:
    return load_checkpoint(folder).config["source"].removeprefix("trained by zoo on synthetic, ")


# The lock


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path):
    with FileLock(tmp_path / ".lock"):
        message = refused("classify", "fit", *FLAGS, f"--trainer.default_root_dir={tmp_path}")
    assert message == f"another run is training in {tmp_path}; choose another --trainer.default_root_dir"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    fit(tmp_path, "--trainer.fast_dev_run=true")
    FileLock(tmp_path / ".lock").acquire(blocking=False)  # a run that has ended holds it no longer


def test_the_lock_goes_with_its_process(tmp_path: Path):
    run, (reading, writing) = Run(tmp_path), os.pipe()
    if not (child := os.fork()):
        try:
            run.open(resumed=False)
            os.write(writing, b"locked")
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 6) == b"locked"
        begin = time.monotonic()
        with pytest.raises(ValueError, match="another run is training"):
            run.open(resumed=False)
        assert time.monotonic() - begin < PATIENCE / 2  # while the other lives there is nothing to wait for
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run.open(resumed=False)
    run.close()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", fails)
    message = refused("classify", "fit", *FLAGS, f"--trainer.default_root_dir={tmp_path}")
    assert message == f"cannot lock {tmp_path}: No locks available; choose another --trainer.default_root_dir"


# What a folder holds already


def test_a_folder_whose_run_died_early_starts_again(tmp_path: Path):
    (tmp_path / "resume").mkdir()
    (tmp_path / "csv/version_0").mkdir(parents=True)
    for name in (".lock", "config.yaml", "csv/version_0/metrics.csv"):
        (tmp_path / name).write_text("old")
    fit(tmp_path, *SHORT, "--trainer.logger=null")
    assert "vit_micro" in (tmp_path / "config.yaml").read_text()
    assert state(tmp_path / "resume/last.ckpt")["global_step"] == 4
    assert (tmp_path / "csv/version_0/metrics.csv").read_text() == "old"
    assert "val/accuracy" in (tmp_path / "csv/version_1/metrics.csv").read_text()


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(ValueError, match="run is a file; choose another --trainer.default_root_dir"):
        Run(tmp_path / "run").open(resumed=False)


@pytest.mark.parametrize("name", ["best", "last", "resume/last.ckpt"])
def test_a_run_is_not_written_over(name: str, tmp_path: Path):
    (tmp_path / name).mkdir(parents=True)
    way = f"resume it with --ckpt_path={tmp_path}/resume/last.ckpt" if "resume" in name else "delete it"
    with pytest.raises(ValueError, match=f"already holds a run; {way}, or choose another"):
        Run(tmp_path).open(resumed=False)
    Run(tmp_path).open(resumed=True)


def test_a_run_without_a_state_to_resume_may_start_again(tmp_path: Path):
    """What was written before its first state is lost anyway."""
    Run(tmp_path).open(resumed=False)
    for name in ("best", "last"):
        (tmp_path / name).mkdir()
        Run(tmp_path).open(resumed=False)
    fit(tmp_path, *SHORT)
    with pytest.raises(ValueError, match="already holds a run"):
        Run(tmp_path).open(resumed=False)


def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path: Path):
    fit(tmp_path, *SHORT)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = refused(
        "classify",
        "fit",
        "--ckpt_path",
        tmp_path,
        "--model.backbone.dim=32",
        "--trainer.max_epochs=2",
        "--trainer.logger=null",
    )
    assert "--ckpt_path belongs to another model" in message and not list(tmp_path.glob("csv/*"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# When files are written


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is written, in its order, and the step that it is of."""
    found: list[tuple[str, int]] = []
    plain_save, plain_state = running.save_model, States.save_checkpoint

    def save(model: Any, folder: Path, **given: Any) -> Any:
        found.append((folder.name, int(given["source"].split()[-1])))
        return plain_save(model, folder, **given)

    def save_state(plugin: States, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        found.append(("state", checkpoint["global_step"]))
        plain_state(plugin, checkpoint, path, storage_options)

    monkeypatch.setattr(running, "save_model", save)
    monkeypatch.setattr(States, "save_checkpoint", save_state)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights that each validation measured; accuracies are 0.1, 0.9, 0.9 and 0.3."""
    found: list[dict[str, torch.Tensor]] = []
    plain = Classify.log_dict

    def log(task: Classify, values: dict[str, Any], **given: Any) -> None:
        if task.fitting:
            found.append({name: value.clone() for name, value in task.measured.state_dict().items()})
            values = values | {"val/accuracy": torch.tensor((0.1, 0.9, 0.9, 0.3)[task.current_epoch])}
        plain(task, values, **given)

    monkeypatch.setattr(Classify, "log_dict", log)
    return found


@pytest.mark.parametrize("overhead", [0.0, 1e9])
def test_best_last_and_state_are_written_in_this_order(
    overhead: float, writes: Any, seen: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(running, "OVERHEAD", overhead)
    fit(tmp_path, *SHORT, "--trainer.max_epochs=4")
    first, end = [("best", 4), ("last", 4), ("state", 4)], [("last", 16), ("state", 16)]
    if overhead:
        assert writes == [*first, ("best", 8), *end]
    else:
        assert writes == [*first, ("best", 8), ("last", 8), ("state", 8), ("last", 12), ("state", 12), *end]
    for name, epoch in (("best", 2), ("last", 4)):
        assert source(tmp_path / name) == f"epoch {epoch}, step {4 * epoch}"
        kept = zoo.load_model(tmp_path / name).state_dict()
        assert difference(kept, seen[epoch - 1]) is None and difference(kept, seen[1 - epoch])
        assert (
            f"| val | top-1 accuracy | {(0.9, 0.3)[name == 'last']:.4f} |"
            in (tmp_path / name / "README.md").read_text()
        )


def test_the_best_score_is_remembered_over_a_resume(writes: Any, seen: Any, tmp_path: Path):
    fit(tmp_path, *SHORT, "--trainer.max_epochs=2")
    fit(tmp_path, *SHORT, "--trainer.max_epochs=4", f"--ckpt_path={tmp_path}/resume/last.ckpt")
    assert [step for name, step in writes if name == "best"] == [4, 8]
    assert source(tmp_path / "best") == "epoch 2, step 8" and source(tmp_path / "last") == "epoch 4, step 16"


def test_states_do_not_ask_for_checkpoints(writes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Checkpoints keep to their share of the time, however often states are written."""
    monkeypatch.setattr(running, "OVERHEAD", 1e9)
    flags = ["--save.every_n_train_steps=2", "--trainer.limit_val_batches=0"]
    fit(tmp_path, *SHORT, *flags, "--trainer.max_epochs=4")
    assert [step for name, step in writes if name == "last"] == [16]
    assert [step for name, step in writes if name == "state"] == [*range(2, 17, 2)]


@pytest.mark.daily(2)
def test_a_run_that_goes_back_keeps_the_best_of_what_it_leaves(
    writes: Any, seen: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    flags = [*SHORT, "--save.every_n_train_steps=2", "--save.keep=9", "--trainer.max_epochs=3"]
    fit(tmp_path, *flags)
    left = (tmp_path / "best/model.safetensors").read_bytes()
    assert source(tmp_path / "best") == "epoch 2, step 8"
    fit(tmp_path, *flags, "--model.rate=1e-4", f"--ckpt_path={tmp_path}/resume/step-000000006.ckpt")
    assert (tmp_path / "best-of-step-8/model.safetensors").read_bytes() == left
    assert source(tmp_path / "best") == "epoch 2, step 8"
    assert (tmp_path / "best/model.safetensors").read_bytes() != left
    assert [step for name, step in writes if name == "best"] == [4, 8, 8]
    assert f"moved     the best of step 8 to {tmp_path}/best-of-step-8: the run resumes" in caplog.text
    fit(tmp_path, *flags, "--trainer.max_epochs=4", f"--ckpt_path={tmp_path}/resume/last.ckpt")
    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best", "best-of-step-8"]
    again = (tmp_path / "best/model.safetensors").read_bytes()
    fit(tmp_path, *flags, "--model.rate=1e-5", f"--ckpt_path={tmp_path}/resume/step-000000006.ckpt")
    assert (tmp_path / "best-of-step-8/model.safetensors").read_bytes() == left
    assert (tmp_path / "best-of-step-8-2/model.safetensors").read_bytes() == again


def test_a_run_that_was_killed_after_its_best_was_moved_has_one_again(seen: Any, tmp_path: Path):
    flags = [*SHORT, "--save.every_n_train_steps=2", "--save.keep=9", "--trainer.max_epochs=3"]
    fit(tmp_path, *flags, "--trainer.max_epochs=1")
    (tmp_path / "best").rename(tmp_path / "best-of-step-4")
    fit(tmp_path, *flags, f"--ckpt_path={tmp_path}/resume/last.ckpt")
    assert source(tmp_path / "best") == "epoch 2, step 8"


@pytest.mark.daily(3)
@pytest.mark.parametrize("text", ["[1]", "{", '{"source": 3}'])
def test_a_damaged_best_does_not_keep_a_run_from_going_back(text: str, tmp_path: Path):
    flags = [*SHORT, "--save.every_n_train_steps=2", "--save.keep=9"]
    fit(tmp_path, *flags)
    (tmp_path / "best/config.json").write_text(text)
    fit(tmp_path, *flags, f"--ckpt_path={tmp_path}/resume/step-000000002.ckpt")
    assert state(tmp_path / "resume/last.ckpt")["global_step"] == 4


# How training ends


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Classify]:
    """The tasks that have been trained."""
    found: list[Classify] = []
    monkeypatch.setattr(Classify, "on_fit_end", lambda task: found.append(task))
    return found


@pytest.mark.daily(3)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("more", [[], ["--trainer.max_epochs=99"]], ids=["alone", "with max_epochs"])
def test_training_in_steps_ends_with_the_model_of_the_last_step(
    more: list[str], accumulate: int, tasks: list[Classify], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """In the middle of an epoch: it is finished, measured and kept like one of a whole number of epochs."""
    lines: list[str] = []
    monkeypatch.setattr("zoo.tasks.task.rank_zero_info", lines.append)
    flags = [flag for flag in SHORT if "max_epochs" not in flag]
    flags += ["--model.backbone.norm=prepbn", "--model.refresh=2", f"--trainer.max_steps={6 // accumulate}", *more]
    fit(tmp_path, *flags, f"--trainer.accumulate_grad_batches={accumulate}")
    (task,) = tasks
    assert lines == ["batch statistics recomputed on 2 batches"]
    assert state(tmp_path / "resume/last.ckpt")["global_step"] == 6 // accumulate
    for name in ("best", "last"):
        assert source(tmp_path / name) == f"epoch 2, step {6 // accumulate}"
        kept = zoo.load_model(tmp_path / name)
        assert difference(kept.state_dict(), task.measured.state_dict()) is None
        assert zoo.fuse(kept)  # so that every norm has its final form
    assert difference(state(tmp_path / "resume/last.ckpt")["state_dict"], task.state_dict()) is None
    accuracy = float(task.trainer.callback_metrics["val/accuracy"])
    assert f"| synthetic | val | top-1 accuracy | {accuracy:.4f} |" in (tmp_path / "last/README.md").read_text()


def test_the_end_is_validated_whatever_check_val_every_n_epoch_says(tmp_path: Path):
    fit(tmp_path, *SHORT, "--trainer.check_val_every_n_epoch=5", "--trainer.max_epochs=2")
    for name in ("best", "last"):
        assert source(tmp_path / name) == "epoch 2, step 8"
        assert "| val | top-1 accuracy |" in (tmp_path / name / "README.md").read_text()


def test_without_validation_there_is_a_last_and_a_state(tmp_path: Path):
    fit(tmp_path, *SHORT, "--trainer.limit_val_batches=0", "--trainer.max_epochs=2")
    assert source(tmp_path / "last") == "epoch 2, step 8" and not (tmp_path / "best").exists()
    assert state(tmp_path / "resume/last.ckpt")["global_step"] == 8


def test_a_run_in_steps_resumes_to_more_steps(
    tasks: list[Classify], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    batches: list[tuple[int, int]] = []
    plain = Classify.training_step

    def watch(task: Classify, batch: Any, batch_idx: int) -> Any:
        batches.append((task.current_epoch, batch_idx))
        return plain(task, batch, batch_idx)

    monkeypatch.setattr(Classify, "training_step", watch)
    flags = [flag for flag in SHORT if "max_epochs" not in flag]
    fit(tmp_path, *flags, "--trainer.max_steps=6")
    capsys.readouterr()
    fit(tmp_path, *flags, "--trainer.max_steps=9", f"--ckpt_path={tmp_path}/resume/last.ckpt")
    assert batches == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line[:9] for line in shown] == ["step 8/9 ", "step 9/9 "] and all(
        re.search(r"  (0:\d\d, )?[\d.]+( k)? images/s, 0:\d\d left$", line) for line in shown
    )
    assert tasks[-1].global_step == 9 and state(tmp_path / "resume/last.ckpt")["global_step"] == 9
