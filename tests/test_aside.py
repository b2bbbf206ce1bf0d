"""Folders in which files are written aside: gone at the end, whoever is killed, and never another process's."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.aside import aside


def child(action: Callable[[], None]) -> int:
    """Runs action in a forked process, which then ends at once; its number."""
    if (number := os.fork()) == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return number


def status(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.mark.parametrize("fails", [False, True])
def test_gone_at_the_end(fails: bool, tmp_path: Path):
    try:
        with aside(tmp_path) as folder:
            assert os.listdir(folder) == [] and os.listdir(tmp_path)[0].startswith(".")
            (folder / "part").write_text("part")
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert os.listdir(tmp_path) == []


def test_what_a_kill_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path):
    (waiting, told), (stay, leave) = os.pipe(), os.pipe()

    def hold(mark: str) -> None:
        os.close(leave)
        with aside(tmp_path) as folder:
            (folder / mark).touch()
            os.write(told, b".")
            os.read(stay, 1)

    living, dead = child(lambda: hold("living")), child(lambda: hold("dead"))
    assert len(os.read(waiting, 1) + os.read(waiting, 1)) == 2
    os.kill(dead, signal.SIGKILL)
    assert status(dead) == -signal.SIGKILL and len(list(tmp_path.glob(".*/files/*"))) == 2
    (tmp_path / ".zoo-link.new").symlink_to(tmp_path.parent)
    (tmp_path / ".zoo-0.new").mkdir()  # of one that was killed before it locked it
    with aside(tmp_path) as folder:
        (kept,) = tmp_path.glob(".*/files/*")
        assert kept.name == "living"
        assert {*os.listdir(tmp_path)} == {".zoo-link.new", folder.parent.name, kept.parents[1].name}
    assert "lock" not in os.listdir(tmp_path.parent)
    os.close(leave)
    assert status(living) == 0 and os.listdir(tmp_path) == [".zoo-link.new"]


@pytest.mark.daily(2)
def test_many_processes_at_once(tmp_path: Path):
    """None of them takes the folder of another one, between any two lines of either."""

    def work(number: int) -> None:
        sys.setswitchinterval(1e-6)
        for turn in range(200):
            with aside(tmp_path) as folder:
                (folder / "part").write_text(f"{number}")
                os.replace(folder / "part", folder / "whole")
                os.sched_yield()
                assert (folder / "whole").read_text() == f"{number}", turn
                os.replace(folder / "whole", tmp_path / f"{number}")

    children = [child(lambda number=number: work(number)) for number in range(6)]
    assert [status(each) for each in children] == [0] * 6
    with aside(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [f"{number}" for number in range(6)]


def test_no_place(tmp_path: Path):
    with pytest.raises(OSError), aside(tmp_path / "missing"):
        pass
