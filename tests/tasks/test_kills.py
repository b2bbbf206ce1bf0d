"""Runs that are killed at any moment, or whose disk is full: the same or the printed command ends the same."""

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import PLAIN_FLAGS, fit

pytestmark = pytest.mark.slow

FLAGS = [*PLAIN_FLAGS, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=2"]
FLAGS += ["--model.backbone.depth=1", "--model.average=0.9"]
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
STATE = "resume/last.ckpt"


def in_child(action: Callable[[], None], most: float | None = None) -> int:
    """Runs action in a forked process, killed after `most` seconds; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            action()
            status = 0
        except SystemExit as stop:
            status = 1 if isinstance(stop.code, str) else int(stop.code or 0)
        finally:
            os._exit(status)
    if most is not None:
        time.sleep(most)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_operation(folder: Path, number: int, strike: Callable[[], None], counted: Path | None = None) -> None:
    """From here on `strike` is called in front of the file operation of that number in the folder."""
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in WATCHED and isinstance(arguments[0], (str, os.PathLike)) and str(folder) in str(arguments[0]):
            seen[0] += 1
            if counted is not None:
                os.truncate(counted, seen[0])
            elif seen[0] == number:
                strike()

    sys.addaudithook(hook)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(folder: Path, *flags: str) -> None:
    fit(folder, *FLAGS, *flags)


def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / "model.safetensors") for name in ("last", "best")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, torch.Tensor]], int]:
    """The weights of a run that nothing disturbs, and how many file operations it makes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    counted = folder.parent / "counted"
    counted.touch()

    def counting() -> None:
        at_operation(folder, 0, kill, counted)
        run(folder)

    assert in_child(counting) == 0
    return weights(folder), counted.stat().st_size


# Every file operation takes 7 minutes, with ZOO_TEST_KILLS=1; else a few, which differ from day to day.
STEP = 1 if os.environ.get("ZOO_TEST_KILLS") else 15


@pytest.mark.parametrize("strike", [kill, full])
def test_any_file_operation_may_be_the_last(
    strike: Callable[[], None], whole: tuple[list[dict[str, torch.Tensor]], int], tmp_path: Path
):
    wanted, operations = whole
    assert operations > 40
    for number in range(1 + date.today().toordinal() % STEP, operations + 1, STEP):
        folder = tmp_path / f"{number}"

        def struck(folder: Path = folder, number: int = number) -> None:
            at_operation(folder, number, strike)
            run(folder)

        ended = in_child(struck)
        assert ended == (-signal.SIGKILL if strike is kill else 1) or strike is full and ended == 0, number
        if ended:
            # A whole run may stand there already, where the last file operations were clean-up.
            resume = [f"--ckpt_path={folder}/{STATE}"] if (folder / STATE).exists() else []
            assert in_child(lambda folder=folder, resume=resume: run(folder, *resume)) == 0, number
        found = weights(folder)
        for one, other in zip(found, wanted, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other), number


TIMES = 50 if os.environ.get("ZOO_TEST_KILLS") else 4


@pytest.mark.parametrize("workers", [0, 2])
def test_any_moment_may_be_the_last(workers: int, tmp_path: Path):
    flags = [f"--data.workers={workers}", "--trainer.max_epochs=3"]
    start = time.monotonic()
    assert in_child(lambda: run(tmp_path / "whole", *flags)) == 0
    wanted, length = weights(tmp_path / "whole"), time.monotonic() - start
    seed = time.time_ns()
    print("seed", seed)
    times, killed = random.Random(seed), 0
    for number in range(TIMES):
        # One moment in each equal part of the run, so that some fall inside a run that is faster than the first.
        folder, most = tmp_path / f"{number}", (number + times.random()) / TIMES * length
        killed += in_child(lambda folder=folder: run(folder, *flags), most) == -signal.SIGKILL
        resume = [f"--ckpt_path={folder}/{STATE}"] if (folder / STATE).exists() else []
        assert in_child(lambda folder=folder, resume=resume: run(folder, *flags, *resume)) == 0, most
        for one, other in zip(weights(folder), wanted, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other), most
    assert killed >= TIMES / 4
