"""`zoo evaluate`: what it prints and writes, for several checkpoints, and what it refuses."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from generating import classifier
from zoo.__main__ import main
from zoo.tasks.evaluate.results import COLUMNS, add_rows, check_table

SCRIPT = Path(__file__).parents[3] / "scripts/evaluate"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [classifier(root / name) for name in ("one", "two")]


def refused(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    text = str(stop.value.code)
    assert text.startswith("zoo: error: ") and "\n" not in text
    return text.removeprefix("zoo: error: ")


def test_several_checkpoints(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only JSON on standard output; a row for each figure, also in a second run."""
    table = tmp_path / "results.csv"
    main(["evaluate", *names, "--device=cpu", "--output", str(table)])
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == names
    main(["evaluate", names[0], "--device=cpu", f"--output={table}"])
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == [names[0]] * 7 + [names[1]] * 7 + [names[0]] * 7
    for row, figure in zip(rows, [each for one in found for each in one["figures"]], strict=False):
        assert (row["metric"], float(row["value"]), int(row["n"])) == (figure["metric"], figure["value"], figure["n"])
        low, high = figure["interval"] or ("", "")
        assert (row["low"], row["high"]) == (str(low), str(high))


def test_one_that_fails_does_not_stop_the_others(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = refused(names[0], tmp_path / "none", names[1], "--device=cpu", f"--output={tmp_path / 'x.csv'}")
    assert found.startswith(f"{tmp_path / 'none'}: checkpoint ")
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == names
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "a"], "a is given twice"),
        (["a", "--output=/nowhere/x.csv"], "--output: /nowhere is not a folder"),
        (["a", "--output=."], "cannot write to .: Is a directory"),
    ],
    ids=str,
)
def test_what_is_refused_at_once(arguments: list[str], message: str):
    assert refused(*arguments) == message


def test_bad_options(capsys: pytest.CaptureFixture[str]):
    for arguments in (["a", "--split=train"], ["a", "--batch=0"], ["a", "--precision=8"], ["a", "--roots=x"], []):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *arguments])
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("zoo evaluate: error: ")


def result(name: str) -> dict[str, Any]:
    figure = {"data": "d, e", "split": "val", "metric": "AP", "value": 0.25, "n": 3, "interval": None, "command": "x"}
    return {
        "name": name,
        "task": "detect",
        "figures": [figure],
        "seconds": 1.5,
        "device": "cpu",
        "precision": "32-true",
    }


def test_a_table_is_only_added_to(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.touch()
    for name in ("a", "b\n1"):
        check_table(path)
        add_rows(path, result(name))
    whole = path.read_text()
    assert whole.splitlines()[1] == 'a,detect,"d, e",val,AP,0.25,3,,,1.5,cpu,32-true'
    assert [row["name"] for row in csv.DictReader(io.StringIO(path.read_text()))] == ["a", "b\n1"]
    path.write_text(whole.rstrip("\n"))  # as an editor may leave it
    add_rows(path, result("c"))
    assert path.read_text().startswith(whole) and len(list(csv.DictReader(io.StringIO(path.read_text())))) == 3
    other = tmp_path / "other.csv"
    other.write_text("model,top1\n")
    for call in (lambda: check_table(other), lambda: add_rows(other, result("a"))):
        with pytest.raises(ValueError, match=r"other.csv has other columns \(model,top1\); give a new file"):
            call()
    assert other.read_text() == "model,top1\n"


def test_rows_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill leaves all rows of a checkpoint or none."""
    written: list[bytes] = []
    monkeypatch.setattr("os.write", lambda _, text: written.append(text) or len(text))
    two = result("a")
    two["figures"] *= 2
    add_rows(tmp_path / "x.csv", two)
    (text,) = written
    assert text.count(b"\n") == 3


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, write = tmp_path / "x.csv", os.write
    add_rows(path, result("a"))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda place, text: write(place, text[: len(text) // 2]))
        with pytest.raises(ValueError, match="No space left on device"):
            add_rows(path, result("b"))
    assert path.read_bytes() == before
    add_rows(path, result("b"))
    assert path.read_bytes().startswith(before) and path.read_bytes() != before


def test_help_needs_no_pytorch_and_fits_a_screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    code = "import os, runpy, sys\nsys.argv = sys.argv[1:]\nsys.path[0] = os.path.dirname(sys.argv[0])\n"
    code += "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, "--help"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "example:" in lines and len(lines) <= 32 and max(map(len, lines)) <= 80
