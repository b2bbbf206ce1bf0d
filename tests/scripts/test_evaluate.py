"""scripts/evaluate, from outside, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from generating import classifier

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts/evaluate"


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


def test_only_json_is_on_standard_output(tmp_path: Path):
    name = classifier(tmp_path / "model")
    done = evaluate(name, "--output", str(tmp_path / "results.csv"))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["name"] == name and found["figures"][0]["n"] == 360
    (line,) = done.stderr.splitlines()
    assert line.startswith("accuracy 0.") and "n = 360" in line
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 8


def test_what_is_wrong_is_one_line(tmp_path: Path):
    done = evaluate(classifier(tmp_path / "model"), "--root", "/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["zoo: error: /nowhere is not a folder"]
