"""SIGINT, SIGTERM and SIGUSR1 at every kind of moment: the resumed run equals one that was never stopped."""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Timer

from training import PLAIN_FLAGS, fit, state, weights
from zoo.data.images import Images
from zoo.tasks.classify.train import Classify

FLAGS = [
    *PLAIN_FLAGS,
    "--model.backbone.norm=prepbn",
    "--model.backbone.drop_path=0.2",
    "--model.average=0.9",
    "--model.refresh=2",
    "--trainer.limit_train_batches=4",
    "--trainer.max_epochs=3",
]


def stopped(monkeypatch: pytest.MonkeyPatch, number: int, step: str, call: int, run: Any) -> str:
    """Runs until the signal arrives in that call of a step, at workers, too; the exit status, which is checked."""
    plain, seen = getattr(Classify, step), [0]

    def struck(self: Classify, batch: Any, batch_idx: int) -> Any:
        if self.trainer.sanity_checking:
            return plain(self, batch, batch_idx)
        seen[0] += 1
        if seen[0] == call:
            os.kill(os.getpid(), number)
            if workers := [str(worker.pid) for worker in multiprocessing.active_children()]:
                subprocess.run(["kill", f"-{number}", *workers], check=True)  # signals of a parent mean something else
                time.sleep(1)
                assert len(multiprocessing.active_children()) == len(workers)
        return plain(self, batch, batch_idx)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Classify, step, struck)
        run()
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    return str(stop.value.code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder, *FLAGS)
    return weights(folder)


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("number", "step", "call", "steps"),
    [
        (signal.SIGTERM, "training_step", 2, 2),
        (signal.SIGINT, "training_step", 5, 5),
        (signal.SIGTERM, "training_step", 7, 7),
        (signal.SIGTERM, "training_step", 8, 8),  # the last of an epoch: its validation is interrupted
        (signal.SIGINT, "validation_step", 1, 4),
        (signal.SIGTERM, "validation_step", 8, 4),  # its last: at the end of the epoch
    ],
)
def test_a_stopped_run_resumes_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    whole: dict[str, torch.Tensor],
    number: int,
    step: str,
    call: int,
    steps: int,
):
    run = tmp_path / "a run"
    stopped(monkeypatch, number, step, call, lambda: fit(run, *FLAGS))
    said = capsys.readouterr().err
    assert f"resume with: zoo classify fit --ckpt_path='{run}/resume/last.ckpt'" in said
    assert state(run / "resume/last.ckpt")["global_step"] == steps
    fit(run, *FLAGS, f"--ckpt_path={run}/resume/last.ckpt")
    found = weights(run)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


STEPS = ["--trainer.max_epochs=-1", "--trainer.max_steps=6"]
BETWEEN = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=0.5"]


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("flags", "step", "call"),
    [
        (STEPS, "validation_step", 8),  # the end of an epoch, where steps end the run
        (BETWEEN, "validation_step", 1),  # gradients wait for those of the next batch
        (["--data.workers=2"], "training_step", 2),
    ],
    ids=["steps", "accumulation", "workers"],
)
def test_a_stopped_run_of_another_kind_resumes_where_it_was(
    flags: list[str], step: str, call: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    fit(tmp_path / "whole", *FLAGS, *flags)
    stopped(monkeypatch, signal.SIGTERM, step, call, lambda: fit(tmp_path / "run", *FLAGS, *flags))
    fit(tmp_path / "run", *FLAGS, *flags, f"--ckpt_path={tmp_path}/run/resume/last.ckpt")
    found, wanted = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("flags", [STEPS, ["--trainer.check_val_every_n_epoch=2"]], ids=["steps", "epochs"])
def test_the_last_validation_is_not_stopped(flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plain = Classify.validation_step

    def struck(self: Classify, batch: Any, batch_idx: int) -> Any:
        if self.progress == 1.0 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Classify, "validation_step", struck)
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, *FLAGS, *flags)
    assert (tmp_path / "best").exists() and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.daily(2)
@pytest.mark.parametrize("step", [3, 10])  # in the first and in the last epoch
def test_a_run_that_max_time_ends_resumes_where_it_was(
    step: int, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def over(timer: Timer, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= step

    with monkeypatch.context() as patch:
        patch.setattr(Timer, "on_train_batch_end", over)
        fit(tmp_path, *FLAGS, "--trainer.max_time=01:00:00:00")
    assert state(tmp_path / "resume/last.ckpt")["global_step"] == step
    fit(tmp_path, *FLAGS, f"--ckpt_path={tmp_path}/resume/last.ckpt")
    found = weights(tmp_path)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.daily(2)
@pytest.mark.parametrize("place", ["on_train_batch_end", "on_validation_end"])
def test_a_run_is_not_ended_between_gradients_that_are_summed(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """By max_time, or by early stopping in the middle of an epoch; a state has no gradients."""

    def over(timer: Timer, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.fit_loop.epoch_loop.total_batch_idx == 1

    fit(tmp_path / "whole", *FLAGS, *BETWEEN)
    with monkeypatch.context() as patch:
        patch.setattr(Timer, place, over)
        fit(tmp_path / "run", *FLAGS, *BETWEEN, "--trainer.max_time=01:00:00:00")
    assert state(tmp_path / "run/resume/last.ckpt")["global_step"] == 1
    fit(tmp_path / "run", *FLAGS, *BETWEEN, f"--ckpt_path={tmp_path}/run/resume/last.ckpt")
    found, wanted = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def scontrol(folder: Path, status: int) -> None:
    """A stand-in for SLURM's command, which notes how it was called."""
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexit {status}\n')
    (folder / "scontrol").chmod(0o755)


JOB = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "zoo", "SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
JOB |= {"SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    ("job", "status", "said"),
    [
        (JOB, 0, "SLURM job 71 is queued again"),
        (JOB | {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, 0, "SLURM job 70_3 is queued again"),
        pytest.param(JOB, 1, "resume with: zoo classify fit --ckpt_path=", marks=pytest.mark.slow),
        pytest.param({}, 0, "resume with: zoo classify fit --ckpt_path=", marks=pytest.mark.slow),
    ],
    ids=["job", "array", "refused", "no job"],
)
def test_the_warning_of_slurm_queues_the_job_again(
    job: dict[str, str],
    status: int,
    said: str,
    whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    scontrol(tmp_path / "bin", status)
    for name, value in ({"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | job).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning.fabric.plugins.environments.slurm._is_srun_used", lambda: True)
    line = [*FLAGS, "--ckpt_path=last", "--data.workers=1"]
    stopped(monkeypatch, signal.SIGUSR1, "training_step", 6, lambda: fit(tmp_path / "run", *line))
    assert f"stopped by SIGUSR1 in epoch 2, step 6; {said}" in capsys.readouterr().err
    number = said.split()[2] if job and not status else "71"
    assert not job or (tmp_path / "bin/calls").read_text() == f"requeue {number}\n"
    assert not [*(tmp_path / "run").glob("hpc*")]  # Lightning wrote no state of its own
    fit(tmp_path / "run", *line)
    found = weights(tmp_path / "run")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


# Before training

EARLY = {
    "data": (Images, "find"),
    "model": (Classify, "built"),
    "optimizer": (Classify, "configure_optimizers"),
    "first validation": (Classify, "validation_step"),
}


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("number", "place", "resumed"),
    [
        (signal.SIGTERM, "data", False),
        (signal.SIGUSR1, "data", True),
        (signal.SIGUSR1, "model", False),
        (signal.SIGTERM, "optimizer", True),
        (signal.SIGINT, "first validation", False),
        (signal.SIGUSR1, "first validation", False),
    ],
)
def test_a_run_that_is_stopped_before_it_trains_ends_in_one_line(
    number: int,
    place: str,
    resumed: bool,
    whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    folder, more = tmp_path / "run", list[str]()
    if resumed:
        stopped(monkeypatch, signal.SIGTERM, "training_step", 5, lambda: fit(folder, *FLAGS))
        more = [f"--ckpt_path={folder}/resume/last.ckpt"]
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".owner"}
    kind, name = EARLY[place]
    plain, before = getattr(kind, name), signal.getsignal(number)

    def struck(*arguments: Any, **options: Any) -> Any:
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("the code that was interrupted can swallow it")
        return plain(*arguments, **options)

    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(kind, name, struck)
        fit(folder, *FLAGS, *more)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    line = f"zoo: stopped by {signal.Signals(number).name}; nothing was written, so the same command starts it again"
    assert [each for each in capsys.readouterr().err.splitlines() if "stopped" in each] == [line]
    assert all(path.read_bytes() == content for path, content in files.items())
    fit(folder, *FLAGS, *more)
    found = weights(folder)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_the_warning_of_slurm_before_training_queues_the_job_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    scontrol(tmp_path / "bin", 0)
    for name, value in ({"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | JOB).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lightning.fabric.plugins.environments.slurm._is_srun_used", lambda: True)
    monkeypatch.setattr(Images, "find", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", *FLAGS)
    assert stop.value.code == 128 + signal.SIGUSR1
    assert "zoo: stopped by SIGUSR1; SLURM job 71 is queued again" in capsys.readouterr().err
    assert (tmp_path / "bin/calls").read_text() == "requeue 71\n"


def test_a_signal_after_training_does_not_spoil_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Classify, "on_fit_end", lambda _: os.kill(os.getpid(), signal.SIGTERM), raising=False)
    fit(tmp_path, *FLAGS)
    assert state(tmp_path / "resume/last.ckpt")["global_step"] == 12
