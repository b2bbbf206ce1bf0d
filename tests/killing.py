"""What the tests of kills and full disks share: processes that are struck at a moment or at a file operation."""

import errno
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

STATE = "resume/last.ckpt"
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
ALL = bool(os.environ.get("ZOO_TEST_KILLS"))
TIMES = 50 if ALL else 4
Run = Callable[..., None]
"""Trains in a folder, with further flags."""


def in_child(action: Callable[[], None], most: float | None = None) -> int:
    """Runs action in a forked process, killed after `most` seconds; its exit status, negative for a signal,
    3 for an error with a traceback."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(null, stream)
            action()
            status = 0
        except SystemExit as stop:
            status = 1 if isinstance(stop.code, str) else int(stop.code or 0)
            print(f"the child ends with {stop.code}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if most is not None:
        time.sleep(most)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_operation(
    folder: Path, number: int, strike: Callable[[], None], counted: Path | None = None, writes: bool = False
) -> None:
    """From here on `strike` is called in front of the file operation of that number in the folder, or of that which
    takes space on the disk; `counted` becomes as many bytes long as there were operations."""
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in WATCHED and isinstance(arguments[0], (str, os.PathLike)) and str(folder) in str(arguments[0]):
            flags = arguments[2] if event == "open" else os.O_CREAT if event in ("os.mkdir", "os.rename") else 0
            if writes and not int(str(flags)) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
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


def operations(action: Callable[[Path], None], folder: Path, counted: Path, writes: bool = False) -> int:
    """How many file operations an action in a folder makes."""
    counted.touch()

    def counting() -> None:
        at_operation(folder, 0, kill, counted, writes)
        action(folder)

    assert in_child(counting) == 0
    return counted.stat().st_size


def some(number: int, step: int) -> range:
    """The numbers from 1 to `number`: all with ZOO_TEST_KILLS=1; else some, which differ from day to day."""
    step = 1 if ALL else step
    return range(1 + date.today().toordinal() % step, number + 1, step)


# Training


class Whole(NamedTuple):
    """The weights of a run that nothing disturbs, and how many file operations it makes."""

    weights: list[dict[str, torch.Tensor]]
    operations: int


def whole_of(run: Run, home: Path) -> Whole:
    number = operations(run, home / "run", home / "counted")
    return Whole(weights(home / "run"), number)


def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / "model.safetensors") for name in ("last", "best")]


def check_same(folder: Path, wanted: list[dict[str, torch.Tensor]], where: object) -> None:
    for one, other in zip(weights(folder), wanted, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other), where


def resume(run: Run, folder: Path) -> int:
    flags = [f"--ckpt_path={folder}/{STATE}"] if (folder / STATE).exists() else []
    return in_child(lambda: run(folder, *flags))


def check_operations(run: Run, strike: Callable[[], None], whole: Whole, home: Path, step: int) -> None:
    """A run that is struck at a file operation, and then resumed, ends as the whole one."""
    assert whole.operations > 40
    for number in some(whole.operations, step):
        folder = home / f"{number}"

        def struck(folder: Path = folder, number: int = number) -> None:
            at_operation(folder, number, strike)
            run(folder)

        ended = in_child(struck)
        assert ended == (-signal.SIGKILL if strike is kill else 1) or strike is full and ended == 0, number
        if ended:
            # A whole run may stand there already, where the last file operations were clean-up.
            assert resume(run, folder) == 0, number
        check_same(folder, whole.weights, number)


def check_moments(run: Run, home: Path) -> None:
    """A run that is killed at random moments, and then resumed, ends as the whole one."""
    start = time.monotonic()
    assert in_child(lambda: run(home / "whole")) == 0
    wanted, length = weights(home / "whole"), time.monotonic() - start
    killed = 0
    for number, most in enumerate(moments(length, TIMES)):
        folder = home / f"{number}"
        killed += in_child(lambda folder=folder: run(folder), most) == -signal.SIGKILL
        assert resume(run, folder) == 0, most
        check_same(folder, wanted, most)
    assert killed >= TIMES / 4


def moments(length: float, number: int) -> list[float]:
    """One random moment in each equal part of a time, so that some fall inside a run that is faster than the first."""
    seed = time.time_ns()
    print("seed", seed)
    draw = random.Random(seed)
    return [(each + draw.random()) / number * length for each in range(number)]
