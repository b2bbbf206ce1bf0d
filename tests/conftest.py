"""One thread, one seed a test; rows whose file has changed are tested whole; no file may grow slow unseen."""

import datetime
import os
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other
# Autograd starts its threads at the first backward pass. After fake tensors, which pretend to be on a GPU, it would
# start some for that GPU, and forked processes could not train.
torch.ones((), requires_grad=True).backward()

ROOT = Path(__file__).parent.parent
# Failing assertions in what tests share show their values, too.
SHARED = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("test_", "conf")))
pytest.register_assert_rewrite(*SHARED)
BUDGET = 45.0  # seconds of CPU time that the quick tests of one file may take
SHARE = 1 / 15  # or this share of all files' time, where that is more
_used: Counter[str] = Counter()
_quick: Counter[str] = Counter()
_start = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    # Workers inherit the seed; it changes every day, so that in time every row and every case has its turn.
    os.environ.setdefault("ZOO_TEST_SEED", str(datetime.date.today().toordinal()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty stand-in for the Hub, to which the client is pointed, without a token."""
    from hub_server import hub_on_loopback, point_to

    with hub_on_loopback() as server:
        point_to(server.address, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def changed_files() -> set[Path]:
    """The files that git knows to differ from the last commit, or does not know."""
    try:
        lines = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=all"], cwd=ROOT, capture_output=True, text=True
        ).stdout.splitlines()
    except OSError:
        return set()
    return {ROOT / line[3:].rpartition(" -> ")[2] for line in lines}


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str) -> Any:
    """Each case of a test marked daily(days) is quick on one day in `days`, and marked `all` on the others."""
    from signatures import is_turn

    made = yield
    daily = [item for item in made if item.get_closest_marker("daily")] if isinstance(made, list) else []
    quick = [item for item in daily if not (item.get_closest_marker("slow") or item.get_closest_marker("all"))]
    for number, item in enumerate(quick):
        if not is_turn(name, number, *item.get_closest_marker("daily").args):
            item.add_marker("all")
    return made


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of rows whose file has changed lose the marker that leaves them to `scripts/test --all`."""
    from helpers import SOURCES

    changed = changed_files()
    for item in items if changed else []:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        if {SOURCES.get(value) for value in values if isinstance(value, str)} & changed:
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "all"]


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_start] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.when == "teardown" and _start in item.stash:
        quick = not (item.get_closest_marker("slow") or item.get_closest_marker("all"))
        report.user_properties.append(("cpu", (cpu_seconds() - item.stash[_start], quick)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds, quick = dict(report.user_properties).get("cpu", (0.0, False))
    if report.when == "teardown":
        _used[report.nodeid.partition("::")[0]] += seconds
        _quick[report.nodeid.partition("::")[0]] += seconds if quick else 0.0


def over_budget() -> list[str]:
    """The share of the whole does not depend on the speed of the machine; a file run alone has the seconds."""
    limit = max(BUDGET, SHARE * sum(_quick.values()))
    return [
        f"{file}: {seconds:.0f} s of CPU time, more than the {limit:.0f} s that one file's quick tests may take"
        for file, seconds in _quick.items()
        if seconds > limit
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if over_budget():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    if not _used:
        return
    seed = os.environ["ZOO_TEST_SEED"]
    terminalreporter.write_line(f"ZOO_TEST_SEED={seed} chose the representatives of rows and the cases of daily tests")
    slowest = ", ".join(f"{Path(file).stem} {seconds:.0f}" for file, seconds in _used.most_common(6))
    terminalreporter.write_line(f"CPU seconds: {sum(_used.values()):.0f}; the files that took most: {slowest}")
    if os.environ.get("ZOO_TEST_TIMES"):
        for file, seconds in _used.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} s  {file}")
    for line in over_budget():
        terminalreporter.write_line(line, red=True)
