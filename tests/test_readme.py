"""README says what is true."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

import zoo
from zoo.__main__ import TASKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints and a recording, as the README supposes."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    wave = 0.1 * np.sin(np.arange(8000) * 0.2)
    soundfile.write(tmp_path / "digit.wav", wave, 8000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tour_runs_as_written(folder: Path, capsys: pytest.CaptureFixture[str]):
    fences = re.findall(r"^\s*```(.+)$", README, flags=re.MULTILINE)
    tour = blocks("python")
    assert set(fences) == {"python", "bash"} and len(tour) == fences.count("python") >= 8
    before, names = dict(zoo.MIXERS), {"__name__": "readme"}
    try:
        for block in tour:
            exec(compile(block, "README.md", "exec"), names)
    finally:
        zoo.MIXERS.clear()
        zoo.MIXERS.update(before)
    assert capsys.readouterr().out.startswith("3 ")
    assert [list(each.shape) for each in names["maps"]] == [[2, 96, 13, 10]] * 2


def test_the_readme_is_short_and_its_commands_exist():
    assert len(README.split()) <= 1500
    commands = re.findall(r"^(?:zoo|scripts/\w+) .*$", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert len(commands) >= 12
    for line in commands:
        words = line.split("#")[0].split()
        if words[0] == "zoo" and words[1] in TASKS:
            assert words[2] in ("fit", "validate", "test", *TASKS[words[1]][2]), line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name: str):
    paths = re.findall(r"\b(?:checkpoints|configs|scripts|tests|zoo)/[\w/.]*\w", (ROOT / name).read_text())
    assert {path.partition("/")[0] for path in paths} >= {"checkpoints", "configs", "scripts", "zoo"}
    for path in paths:
        assert re.search(r"/[A-Z]+$", path) or (ROOT / path).exists(), path
