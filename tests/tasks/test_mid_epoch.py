"""States within an epoch: a run that is killed loses a few steps and ends as one that was never killed."""

import errno
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from killing import STATE, in_child, weights
from training import BACKBONE, PLAIN_FLAGS, QUIET, difference, fit, refused, said, state
from zoo.__main__ import main
from zoo.data.loading import Batches
from zoo.tasks.states import States, make_last
from zoo.tasks.task import Task

SHORT = [*PLAIN_FLAGS, "--trainer.limit_val_batches=1", "--trainer.max_epochs=2", "--model.average=0.9"]
EVERY = 5
SAVING = f"--save.every_n_train_steps={EVERY}"


def kill_at(step: int) -> Any:
    """A hook of the task that kills the process at the beginning of a step."""
    plain = Task.on_train_batch_start

    def struck(self: Task, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            self.trainer.strategy.checkpoint_io.wait()  # type: ignore
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, batch, batch_idx)

    return struck


@pytest.mark.daily(7)
@pytest.mark.parametrize(
    ("flags", "step", "left"),
    [
        (["--trainer.limit_train_batches=13"], 9, 5),
        (["--trainer.limit_train_batches=13", "--trainer.precision=bf16-true"], 9, 5),
        # The epoch has ended, but its state is not due.
        (["--trainer.limit_train_batches=13"], 13, 10),
        (["--trainer.limit_train_batches=13"], 19, 15),
        (["--trainer.limit_train_batches=13", "--data.workers=2"], 12, 10),
        (["--trainer.limit_train_batches=24", "--trainer.accumulate_grad_batches=2"], 9, 5),
        (["--trainer.limit_train_batches=12", "--trainer.val_check_interval=0.5"], 9, 5),
    ],
)
def test_a_killed_run_resumes_from_the_middle_of_an_epoch(
    flags: list[str], step: int, left: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    flags = [*SHORT, *flags, SAVING]
    monkeypatch.setattr("zoo.tasks.run.OVERHEAD", 1e9)  # so that only steps ask for states
    fit(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", kill_at(step))
        assert in_child(lambda: fit(tmp_path / "run", *flags)) == -signal.SIGKILL
    assert state(tmp_path / "run" / STATE)["global_step"] == left
    fit(tmp_path / "run", *flags, f"--ckpt_path={tmp_path}/run/{STATE}")
    assert difference(weights(tmp_path / "run"), weights(tmp_path / "whole")) is None


def test_the_step_after_a_state_waits_a_moment_for_its_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Killed once that step is done, a run loses no step more than lie between two states."""
    write, ended = States._write, Task.on_train_batch_end

    def slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        write(*arguments)

    def end(self: Task, *arguments: Any) -> None:
        ended(self, *arguments)
        if self.global_step == EVERY + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("zoo.tasks.run.STATE_WAIT", 60.0)  # a busy machine may need more than the usual moment
    monkeypatch.setattr(States, "_write", slowly)
    monkeypatch.setattr(Task, "on_train_batch_end", end)
    assert in_child(lambda: fit(tmp_path, *SHORT, SAVING)) == -signal.SIGKILL
    assert state(tmp_path / STATE)["global_step"] == EVERY


def test_waiting_for_a_write_ends_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    go, write, states = threading.Event(), States._write, States()
    monkeypatch.setattr(States, "_write", lambda *arguments: (go.wait(), write(*arguments)))
    states.save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")
    states.wait(0.01)
    assert not (tmp_path / "last.ckpt").exists()
    go.set()
    states.wait()
    assert state(tmp_path / "last.ckpt") == {"global_step": 1}


def test_the_last_states_are_kept_and_can_be_resumed_from(tmp_path: Path):
    flags = [*SHORT, "--trainer.limit_train_batches=12", "--save.every_n_train_steps=3", "--save.keep=3"]
    fit(tmp_path, *flags)
    names = sorted(path.name for path in (tmp_path / "resume").iterdir())
    assert names == ["last.ckpt", "last.json", "step-000000018.ckpt", "step-000000021.ckpt", "step-000000024.ckpt"]
    wanted = weights(tmp_path)
    assert (tmp_path / STATE).read_bytes() == (tmp_path / "resume" / names[-1]).read_bytes()
    fit(tmp_path, *flags, f"--ckpt_path={tmp_path}/resume/step-000000018.ckpt", "--trainer.max_steps=20")
    # The states of later steps belonged to the run before.
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == [
        *names[:3],
        "step-000000020.ckpt",
    ]
    fit(tmp_path, *flags, f"--ckpt_path={tmp_path}/resume/step-000000018.ckpt", "--trainer.max_steps=-1")
    assert difference(weights(tmp_path), wanted) is None
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == names


@pytest.mark.daily(2)
@pytest.mark.parametrize("links", [True, False])
def test_a_run_resumed_from_an_earlier_state_and_killed_has_it_as_the_last(
    links: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("zoo.tasks.run.OVERHEAD", 1e9)  # so that only steps ask for states
    flags = [*SHORT, "--trainer.limit_train_batches=6", "--save.every_n_train_steps=4", "--save.keep=3"]
    fit(tmp_path, *flags)
    early, later = tmp_path / "resume/step-000000008.ckpt", (tmp_path / STATE).read_bytes()
    wanted = early.read_bytes()
    assert state(tmp_path / STATE)["global_step"] == 12 and not early.samefile(tmp_path / STATE)
    other = [*flags, "--model.rate=0.1"]
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *other, "--data.seed=5", f"--ckpt_path={early}")
    assert said(stop.value).startswith("--ckpt_path was written in the middle of an epoch with other batches")
    # What is refused changes nothing.
    assert (tmp_path / STATE).read_bytes() == later and (tmp_path / "config.yaml").read_text() == config
    assert (tmp_path / "resume/step-000000012.ckpt").read_bytes() == later
    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", kill_at(8))
        if not links:
            patch.setattr("zoo.tasks.states.os.link", no_links)
        assert in_child(lambda: fit(tmp_path, *other, f"--ckpt_path={early}")) == -signal.SIGKILL
    assert (tmp_path / STATE).read_bytes() == early.read_bytes() == wanted
    names = sorted(path.name for path in (tmp_path / "resume").iterdir() if path != tmp_path / STATE)
    assert names == ["last.json", "step-000000004.ckpt", "step-000000008.ckpt"]


def no_links(*_: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_full_disk_at_an_earlier_state_leaves_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    early, last = tmp_path / "step-000000008.ckpt", tmp_path / "last.ckpt"
    early.write_text("early")
    last.write_text("last")
    with monkeypatch.context() as patch:
        patch.setattr("zoo.tasks.states.os.link", no_links)
        patch.setattr("zoo.tasks.states.shutil.copyfile", full)
        with pytest.raises(OSError, match=r"last.ckpt: No space left on device; the previous one is untouched$"):
            make_last(early, last)
    assert last.read_text() == "last" and sorted(tmp_path.iterdir()) == [last, early]
    for _ in range(2):  # the second time it is the same file
        make_last(early, last)
        assert last.samefile(early) and sorted(tmp_path.iterdir()) == [last, early]


def test_minutes_ask_for_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("zoo.tasks.run.OVERHEAD", 1e9)
    flags = [*SHORT, "--trainer.limit_train_batches=6", "--trainer.max_epochs=1"]
    for minutes, found in ((1e-9, True), (0.0, False), (10.0, False)):
        with monkeypatch.context() as patch:
            patch.setattr(Task, "on_train_batch_start", kill_at(5))
            given = f"--save.every_n_minutes={minutes}"
            assert in_child(lambda given=given: fit(tmp_path / given, *flags, given)) == -signal.SIGKILL
        assert (tmp_path / given / STATE).exists() == found


@pytest.mark.parametrize("flag", ["every_n_train_steps=-1", "every_n_minutes=-0.5", "keep=0"])
def test_bad_options(flag: str, tmp_path: Path):
    backbone = [f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()]
    name, value = flag.split("=")
    said = refused("classify", "fit", *backbone, f"--trainer.default_root_dir={tmp_path}", f"--save.{flag}")
    assert said == f"save.{name} must be >= {int(name == 'keep')}, got {value}"


def test_weights_that_are_not_finite_are_in_no_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plain = Task.on_train_batch_end

    def spoil(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        if self.global_step == 2 * EVERY:
            self.model.head.bias.data.fill_(float("nan"))

    monkeypatch.setattr(Task, "on_train_batch_end", spoil)
    with pytest.raises(SystemExit, match="the weights are NaN or infinite after step 9"):
        fit(tmp_path, *SHORT, SAVING)
    assert state(tmp_path / STATE)["global_step"] == EVERY


@pytest.mark.daily(2)
@pytest.mark.parametrize("other", ["--data.batch=95", "--data.seed=5"])
def test_other_batches_are_refused_within_an_epoch(other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Even where an epoch has as many of them, samples would come twice or never."""
    flags = [*SHORT, "--data.batch=100", "--save.every_n_train_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", kill_at(3))
        assert in_child(lambda: fit(tmp_path, *flags)) == -signal.SIGKILL
    again = [*flags, other, f"--ckpt_path={tmp_path}/{STATE}"]
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *again)
    assert said(stop.value).startswith("--ckpt_path was written in the middle of an epoch with other batches; set data")
    fit(tmp_path, *again, "--data.changed=ok")
    assert state(tmp_path / STATE)["global_step"] == 12


def test_other_sums_of_gradients_are_refused_within_an_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    flags = [*SHORT, "--data.batch=100", "--save.every_n_train_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", kill_at(3))
        assert in_child(lambda: fit(tmp_path, *flags)) == -signal.SIGKILL
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *flags, "--trainer.accumulate_grad_batches=2", f"--ckpt_path={tmp_path}/{STATE}")
    wanted = "--ckpt_path was written in the middle of an epoch with trainer.accumulate_grad_batches=1, and it is 2 now"
    assert said(stop.value).startswith(wanted)


# Kills at random moments, in every task

TINY: dict[str, list[str]] = {
    "classify": [
        *(f"--model.backbone.{field}={value}" for field, value in (BACKBONE | {"patch": 4, "image": 8}).items()),
        *["--model.backbone.classes=10", "--data.dataset=digits", "--data.size=8", "--data.batch=64", *PLAIN_FLAGS],
    ],
    "transcribe": [
        *["--model.backbone.name=squeezeformer_xs", "--model.backbone.dim=16", "--model.backbone.depth=2"],
        *[
            "--model.backbone.heads=2",
            "--data.dataset=synthetic",
            "--data.tokenizer=characters",
            "--data.batch=8",
            "--trainer.limit_train_batches=20",
        ],
    ],
    "detect": [
        "--model.backbone.name=rtdetr_micro",
        "--model.backbone.trunk=flash_internimage_t(dim=(8, 8, 16, 16), depth=(1, 1, 1, 1), heads=(1, 1, 2, 2))",
        *["--model.backbone.dim=16", "--model.backbone.depth=2", "--model.backbone.heads=2", "--data.batch=4"],
        *["--model.backbone.queries=12", "--data.dataset=shapes", "--data.size=64", "--trainer.limit_train_batches=20"],
    ],
    "generate": [
        *["--model.backbone.name=dit_micro", "--model.backbone.depth=1", "--model.backbone.dim=16"],
        *["--model.backbone.heads=2", "--data.dataset=digits", "--data.size=8", "--data.channels=1"],
        "--data.batch=64",
    ],
}


OTHERS = ["transcribe", *(pytest.param(task, marks=pytest.mark.slow) for task in ("detect", "generate"))]


@pytest.mark.daily(2)
@pytest.mark.parametrize("task", OTHERS)
def test_a_run_that_is_stopped_in_a_validation_resumes_there(
    task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """As that of a classifier in test_stopping.py."""
    common = [*(f"--trainer.{flag}" for flag in QUIET), "--trainer.logger=false", "--trainer.limit_val_batches=2"]
    common += ["--trainer.max_epochs=2", "--data.workers=0", "--trainer.limit_train_batches=3"]

    def run(folder: Path, *flags: str) -> None:
        main([task, "fit", *TINY[task], *common, f"--trainer.default_root_dir={folder}", *flags])

    def strike(self: Task, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.current_epoch == 0 and batch_idx == 0 and not self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Task, "on_validation_batch_start", strike)
        run(tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM
    run(tmp_path / "run", f"--ckpt_path={tmp_path}/run/{STATE}")
    assert difference(weights(tmp_path / "run"), weights(tmp_path / "whole")) is None


class Log:
    """A file that survives a kill, with the steps that were trained and the batches that were drawn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, *values: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")

    def read(self, kind: str) -> list[Any]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [values[1:] for values in map(json.loads, lines) if values[0] == kind]


def logged(monkeypatch: pytest.MonkeyPatch, path: Path) -> Log:
    log, drawn, ended = Log(path), Batches.__iter__, Task.on_train_batch_end

    def draw(self: Any) -> Any:
        place = self.skip
        for number, keys in enumerate(drawn(self), place):
            if getattr(self.sampler, "training", True):
                log.add("batch", keys[0][0], number, [key[1] for key in keys])
            yield keys

    def end(self: Task, *arguments: Any) -> None:
        log.add("step", self.global_step)
        ended(self, *arguments)

    monkeypatch.setattr(Batches, "__iter__", draw)
    monkeypatch.setattr(Task, "on_train_batch_end", end)
    return log


@pytest.mark.slow
@pytest.mark.parametrize("task", TINY)
def test_kills_at_any_moment(task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """ZOO_TEST_KILLS=1 kills 25 runs of each task; else three."""
    times = 25 if os.environ.get("ZOO_TEST_KILLS") else 3
    common = [*(f"--trainer.{flag}" for flag in QUIET), "--trainer.logger=false", "--trainer.limit_val_batches=1"]
    common += ["--trainer.max_epochs=4", "--model.average=0.9", "--model.warmup=1", "--data.workers=0", SAVING]

    def run(folder: Path, *flags: str) -> None:
        with monkeypatch.context() as patch:
            logged(patch, folder.with_suffix(".log"))
            main([task, "fit", *TINY[task], *common, f"--trainer.default_root_dir={folder}", *flags])

    monkeypatch.setattr("zoo.tasks.run.STATE_WAIT", 60.0)  # a busy machine may need more than the usual moment
    start = time.monotonic()
    assert in_child(lambda: run(tmp_path / "whole")) == 0
    wanted, length = weights(tmp_path / "whole"), time.monotonic() - start
    whole = {(epoch, place): keys for epoch, place, keys in Log(tmp_path / "whole.log").read("batch")}
    seed = time.time_ns()
    print("seed", seed)
    moments, repeated = random.Random(seed), []
    for number in range(times):
        folder, log = tmp_path / f"{number}", Log(tmp_path / f"{number}.log")
        for _ in range(2):  # killed twice, the second time after it was resumed
            done = [step for (step,) in log.read("step")]
            resume = [f"--ckpt_path={folder}/{STATE}"] if (folder / STATE).exists() else []
            most = (number + moments.random()) / times * length
            in_child(lambda folder=folder, resume=resume: run(folder, *resume), most)
            again = [step for (step,) in log.read("step")][len(done) :]
            if done and again:
                repeated.append(done[-1] + 1 - again[0])
        done = [step for (step,) in log.read("step")]
        resume = [f"--ckpt_path={folder}/{STATE}"] if (folder / STATE).exists() else []
        assert in_child(lambda folder=folder, resume=resume: run(folder, *resume)) == 0
        again = [step for (step,) in log.read("step")][len(done) :]
        if done and again:
            repeated.append(done[-1] + 1 - again[0])
        assert difference(weights(folder), wanted) is None, number
        # The batches that made the final weights: the last drawn at each place. Every sample came once in an epoch.
        drawn = {(epoch, place): keys for epoch, place, keys in log.read("batch")}
        assert drawn.items() >= whole.items()
        epochs = defaultdict[int, list[int]](list)
        for (epoch, _), keys in drawn.items():
            epochs[epoch] += keys
        assert all(len(keys) == len({*keys}) for keys in epochs.values())
    print(f"{task}: {len(repeated)} kills that repeated steps: {sorted(repeated)}")
    assert max(itertools.chain([0], repeated)) <= EVERY
