"""scripts/benchmark with the smallest of settings: what it writes and what it says beside the numbers."""

import csv
import math
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zoo.mixers import MIXERS

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    module = ModuleType("benchmark")
    SourceFileLoader("benchmark", str(SCRIPT)).exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("benchmark")
    options = ["--pairs", "1", "--warm", "1", "--sizes", "3", "2", "--batch", "1", "--models", "deit_tiny", "--output"]
    done = subprocess.run([sys.executable, SCRIPT, *options, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def rows_of(measured: tuple[str, Path], name: str) -> list[dict[str, str]]:
    with (measured[1] / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_mixer_has_a_row_at_every_size(measured):
    rows = rows_of(measured, "mixers")
    assert [(row["mixer"], row["tokens"]) for row in rows] == [(name, size) for size in ("4", "9") for name in MIXERS]
    assert all(row["ratio"] == "1.0" for row in rows if row["mixer"] == "softmax")


def test_models_and_fuse_have_a_row_for_each_comparison(measured):
    rows = rows_of(measured, "models")
    assert [(row["model"], row["mode"]) for row in rows] == [
        ("deit_tiny", "forward"),
        ("deit_tiny", "forward+backward"),
    ]
    names = [(row["model"], row["base"]) for row in rows_of(measured, "fuse")]
    assert names == [("prepbn, fused", "prepbn"), ("prepbn, fused", "layernorm"), ("prepbn", "layernorm")]


@pytest.mark.parametrize("name", ["models", "mixers", "fuse"])
def test_numbers_are_positive_and_say_how_they_were_taken(measured, name):
    for row in rows_of(measured, name):
        for column in ("ms", "base_ms", "ratio", "ratio_low", "ratio_high", "noise", "noise_low", "noise_high"):
            if column != "base_ms" or name != "mixers":
                assert math.isfinite(float(row[column])) and float(row[column]) > 0, (row, column)
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        taken = {"threads": "1", "dtype": "float32", "form": "eager", "pairs": "1", "torch": torch.__version__}
        assert row.items() >= taken.items()


def test_each_table_is_headed_by_its_conditions(measured):
    lines = [line for line in measured[0].splitlines() if line.startswith(f"torch {torch.__version__}, ")]
    assert len(lines) == 3
    for line in lines:
        assert ", 1 thread, float32, eager, 1 pairs, CPU time, load average " in line
    for name in MIXERS:
        assert f"\n| {name} " in measured[0]
    assert (measured[1] / "mixers.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_alternate_who_goes_first(script, monkeypatch):
    monkeypatch.setattr(script, "SHORTEST", 0.0)  # no call is repeated within its turn
    order: list[str] = []
    times = script.pairs(lambda: order.append("a"), lambda: order.append("b"), 4, warm=2)
    assert len(times) == 4 and all(len(pair) == 2 for pair in times)
    assert "".join(order) == "ab" * 2 + "abbabaab"


def test_a_wrong_option_is_one_clear_error(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
