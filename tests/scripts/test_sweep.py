"""scripts/sweep: its queue, which kills and several workers do not disturb, and its statistics."""

import csv
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from threading import Timer
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from zoo.mixers import MIXERS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CONFIG = SCRIPTS.parent / "configs/classify/vit_micro_digits.yaml"
SMALL = ["model.backbone.dim=24", "model.backbone.depth=1", "model.warmup=0", "data.batch=256", "data.workers=0"]
SMALL += ["trainer.max_epochs=2", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def sweeps() -> dict[str, ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return {name: import_module(f"sweeps.{name}") for name in ("cells", "table", "command")}
    finally:
        sys.path.remove(str(SCRIPTS))


def test_grids(sweeps: dict[str, ModuleType]):
    cells = sweeps["cells"]
    grid = cells.grid_of(["mixer=softmax,dcnv4(kernel=5, bias=False)", "data.size=32,48"])
    assert grid == {"mixer": ["softmax", "dcnv4(kernel=5, bias=False)"], "data.size": ["32", "48"]}
    assert [cells.option(field) for field in grid] == ["--model.backbone.mixer", "--data.size"]
    found = cells.cells_of(grid, 2)
    assert len(found) == 8 and len({cell.name for cell in found}) == 8
    assert found[0].choices == (("mixer", "softmax"), ("data.size", "32")) and found[4].seed == 1
    for wrong in ("mixer", "=a", "mixer=a,,b", "mixer=a,a"):
        with pytest.raises(ValueError, match="--grid"):
            cells.grid_of([wrong])
    for twice in (["mixer=a", "mixer=b"], ["mixer=a", "model.backbone.mixer=b"]):
        with pytest.raises(ValueError, match="once"):
            cells.grid_of(twice)
    for own in ("trainer.max_epochs=1,2", "seed_everything=1,2"):
        with pytest.raises(ValueError, match="set by the sweep itself"):
            cells.grid_of([own])
    nested = ["softmax(kv_heads=1, qk_norm='rmsnorm(eps=1e-5, affine=False)')", "[softmax,sla]", "'a,b'"]
    assert cells.grid_of([f"mixer={','.join(nested)}"]) == {"mixer": nested}


def test_choices_are_the_rows_that_the_model_accepts(sweeps: dict[str, ModuleType]):
    choices_of, mixers = sweeps["cells"].choices_of, {*MIXERS}
    values = {"model": {"backbone": {"name": "vit_micro", "mixer": "sla(kernel=3)"}}}
    grid, refused = choices_of(["mixer"], values, [])
    assert grid["mixer"][0] == "sla(kernel=3)" and {*grid["mixer"][1:]} >= {"softmax", "dcnv4", "window"}
    assert len(grid["mixer"]) + len(refused) == len(mixers) and "sla" not in grid["mixer"]
    assert any(line.startswith("mixer relative: ") and "along time only" in line for line in refused)
    grid, refused = choices_of(["mixer"], values, ["--model.backbone.class_token=true", "--model.backbone.pool=token"])
    assert "window" not in grid["mixer"] and any(line.startswith("mixer window: ") for line in refused)
    _, refused = choices_of(["mixer"], values, ["--model.backbone.heads=1"])
    assert any(line.startswith("mixer moh: ") and "at least 2 heads" in line for line in refused)
    for words, message in (
        (["--model.backbone.mixer={"], "cannot read the value"),
        (["--model.backbone.name="], "needs a config with model.backbone.name"),
        (["--model.backbone=5"], "one by one"),
        (["--model.backbone", "{name: vit_micro}"], "one by one"),
    ):
        with pytest.raises(ValueError, match=message):
            choices_of(["mixer"], values, words)
    with pytest.raises(ValueError, match="each field can be given once"):
        choices_of(["mixer", "mixer"], values, [])
    assert choices_of([], values, []) == ({}, [])
    with pytest.raises(ValueError, match="unknown field 'mixr'"):
        choices_of(["mixr"], values, [])
    with pytest.raises(ValueError, match="needs a config with model.backbone.name"):
        choices_of(["mixer"], {}, [])
    with pytest.raises(ValueError, match="once"):
        sweeps["cells"].grid_of(["mixer=softmax,sla"], {"mixer": ["softmax"]})


def test_each_cell_has_its_own_folder(sweeps: dict[str, ModuleType]):
    cell = sweeps["cells"].Cell
    names = [cell((("data.root", root),), 0).name for root in ("a_b", "a/b", "a b", "../a b", "ü" * 400, "ü" * 401)]
    assert len({*names}) == len(names) and all(len(name.encode()) < 256 and "/" not in name for name in names)
    assert names[0] == "data.root=a_b,seed=0,steps"


def test_a_damaged_result_is_named(sweeps: dict[str, ModuleType], tmp_path: Path):
    cells = sweeps["cells"]
    good = cells.Result("top-1 accuracy", 0.5, 360, 1000, 5_000_000, 10)._asdict()
    for text in ("", "[]", "null", json.dumps(good | {"value": "x"}), json.dumps(good | {"n": None}), "{}"):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result.json is damaged \(.*\); delete it"):
            cells.result_of(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(good))
    assert cells.result_of(tmp_path)._asdict() == good


def test_the_first_choices_stay_the_first_row(sweeps: dict[str, ModuleType], tmp_path: Path):
    """Even if their first seed failed."""
    cells, command, table = (sweeps[name] for name in ("cells", "command", "table"))
    every = cells.cells_of({"norm": ["a", "b"]}, 2)
    for index, cell in enumerate(every[1:]):
        folder = tmp_path / "cells" / cell.name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(cells.Result("accuracy", index / 8, 9, 1, 1, 1)._asdict()))
    first, second = table.rows_of(command.results(every, tmp_path), "steps")
    assert first.choices == (("norm", "a"),) and first.difference is None and second.difference.mean == 1 / 8


def test_the_training_of_a_sweep_is_fixed(sweeps: dict[str, ModuleType], tmp_path: Path):
    command = sweeps["command"]
    command.check_command(tmp_path, ["a", "--b=1", "--b=2"])
    command.check_command(tmp_path, ["a", "--b=1", "--b=2"])
    assert [path.name for path in tmp_path.iterdir()] == ["training.txt"]
    with pytest.raises(ValueError, match="another training"):
        command.check_command(tmp_path, ["a", "--b=2", "--b=1"])


@pytest.mark.parametrize("text", ["", "a: [b", "[1, 2]", "words", "trainer: 5", "trainer: {max_epochs: yes}", "\0"])
def test_other_files_are_no_configs(sweeps: dict[str, ModuleType], tmp_path: Path, text: str):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml (is not a config: |has no trainer\.max_epochs)"):
        sweeps["command"].epochs_of("a.yaml", sweeps["command"].values_of(tmp_path / "a.yaml"), [])


def test_a_signal_waits_for_the_state_of_the_training(sweeps: dict[str, ModuleType]):
    slow = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(143)));"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{slow} print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline()
    before = signal.getsignal(signal.SIGTERM)
    Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with child, pytest.raises(KeyboardInterrupt):
        sweeps["cells"].status_of(child)
    assert child.returncode == 143 and signal.getsignal(signal.SIGTERM) == before


def test_intervals_are_those_of_student_and_differences_are_paired(sweeps: dict[str, ModuleType]):
    cells, table = sweeps["cells"], sweeps["table"]
    values = {"softmax": [0.90, 0.94, 0.95], "sla": [0.92, 0.95, 0.97]}
    found = {}
    for cell in cells.cells_of({"mixer": [*values]}, 3):
        value = values[cell.choices[0][1]][cell.seed]
        found[cell] = cells.Result("top-1 accuracy", value, 360, 1000, 5_000_000, 10)
    first, second = table.rows_of(found, "steps")
    for row, mixer in ((first, "softmax"), (second, "sla")):
        low, high = stats.t.interval(0.95, 2, np.mean(values[mixer]), stats.sem(values[mixer]))
        assert row.value.mean == pytest.approx((low + high) / 2) and row.value.half == pytest.approx((high - low) / 2)
    paired = np.subtract(values["sla"], values["softmax"])
    low, high = stats.t.interval(0.95, 2, paired.mean(), stats.sem(paired))
    assert first.difference is None
    assert second.difference.mean == pytest.approx(paired.mean())
    assert second.difference.half == pytest.approx((high - low) / 2)
    text = table.markdown(found, "mixers", "scripts/sweep ...")
    assert f"| `sla` | 1,000 | 5,000,000 | 10 | 3 | {second.value} | +{second.difference} |" in text
    rows = list(csv.DictReader(io.StringIO(table.table(found))))
    assert [float(row["value"]) for row in rows if row["mixer"] == "sla"] == values["sla"]


def test_a_missing_seed_is_left_out_of_the_pairs(sweeps: dict[str, ModuleType]):
    cells, table = sweeps["cells"], sweeps["table"]
    every = cells.cells_of({"norm": ["a", "b"]}, 2)
    found = {cell: cells.Result("accuracy", 0.1 * index, 9, 1, 1, 1) for index, cell in enumerate(every[:3])}
    first, second = table.rows_of(found, "steps")
    assert (first.seeds, second.seeds) == (2, 1) and second.difference.mean == pytest.approx(0.1)
    assert math.isnan(second.difference.half) and "±" not in str(second.difference)


def test_cells_of_another_config_are_not_mixed(sweeps: dict[str, ModuleType], tmp_path: Path):
    config, done = tmp_path / "classify/x.yaml", tmp_path / "out/cells/depth=1,seed=0,steps"
    config.parent.mkdir()
    done.mkdir(parents=True)
    result = sweeps["cells"].Result("accuracy", 0.5, 9, 1, 1, 2)
    (done / "result.json").write_text(json.dumps(result._asdict()))
    given = (
        sweeps["command"]
        .parser()
        .parse_args([str(config), "--grid", "depth=1", "--seeds=1", f"--output={tmp_path / 'out'}"])
    )
    config.write_text("trainer: {max_epochs: 2}")
    assert sweeps["command"].sweep(given, []) == 0
    config.write_text("# a comment\ntrainer:\n  max_epochs: 2")
    assert sweeps["command"].sweep(given, []) == 0
    reordered = (
        sweeps["command"].parser().parse_args([str(config), "--grid", "depth=2,1", f"--output={tmp_path / 'out'}"])
    )
    with pytest.raises(ValueError, match="another training"):  # the reference would be another one
        sweeps["command"].sweep(reordered, [])
    config.write_text("trainer: {max_epochs: 2}\nmodel: {rate: 0.1}")
    with pytest.raises(ValueError, match="another training"):
        sweeps["command"].sweep(given, [])


def test_a_cell_has_one_worker(sweeps: dict[str, ModuleType], tmp_path: Path):
    taken = sweeps["cells"].taken
    with taken(tmp_path) as lock, taken(tmp_path) as again:
        assert lock is not None and again is None
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    with taken(tmp_path) as other:
        assert other is None  # the child of a worker that is gone still has it
    child.kill()
    child.wait()
    with taken(tmp_path) as free:
        assert free is not None


def sweep(output: Path, *words: str, more: list[str] = SMALL, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPTS / "sweep"), str(CONFIG), f"--output={output}", *words, "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *(f"--{word}" for word in more)], env=environment, **pipes | options)


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        ([], SMALL, "give --grid FIELD=A,B or --choices FIELD"),
        (["--grid", "mixer"], SMALL, "--grid mixer: write FIELD=VALUE"),
        (["--grid", "mixer=a,b", "--seeds=0"], SMALL, "--seeds must be from 1 to 1000"),
        (["--grid", "mixer=a,b"], ["model.backbone.mixer=sla"], "is set by the sweep itself"),
        (["--grid", "mixer=a,b"], ["trainer.default_root_dir=x"], "is set by the sweep itself"),
        (["--grid", "mixer=a,b"], ["trainer.max_epochs=x"], "no trainer.max_epochs"),
        (["--grid", "mixer=a,b"], ["trainer.max_epochs", "3"], "write --trainer.max_epochs=N in one word"),
    ],
)
def test_wrong_arguments(words: list[str], more: list[str], message: str, tmp_path: Path):
    run = sweep(tmp_path / "out", *words, more=more)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1 and said.startswith("scripts/sweep: error: ") and message in said
    assert said.count("\n") == 1 and not (tmp_path / "out/results.csv").exists()


def table_of(output: Path) -> list[str]:
    return sorted((output / "results.csv").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four cells that nothing disturbed."""
    output = tmp_path_factory.mktemp("sweep") / "whole"
    run = sweep(output, "--grid", "mixer=softmax,sla", "--seeds=2")
    said, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    assert said.startswith("# vit_micro_digits") and (output / "results.png").stat().st_size > 5000
    return output


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_table(whole: Path, tmp_path: Path):
    """Killed at random moments, alone or with the training it waits for; each training is resumed, not doubled."""
    draw = random.Random(0)
    for number in range(6):
        run = sweep(tmp_path / "out", "--grid", "mixer=softmax,sla", "--seeds=2", start_new_session=True)
        time.sleep(draw.uniform(2, 12))
        if number % 2:
            os.killpg(run.pid, signal.SIGKILL)
        else:
            run.kill()
        run.communicate()
    run = sweep(tmp_path / "out", "--grid", "mixer=softmax,sla", "--seeds=2")
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    assert table_of(tmp_path / "out") == table_of(whole)


@pytest.mark.slow
def test_two_workers_share_the_cells(whole: Path, tmp_path: Path):
    runs = [sweep(tmp_path / "out", "--grid", "mixer=softmax,sla", "--seeds=2") for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, errors
    assert table_of(tmp_path / "out") == table_of(whole)
    logs = [path.read_text() for path in (tmp_path / "out/cells").glob("*/log.txt")]
    assert len(logs) == 4 and all(log.count("training  2 epochs") == 1 for log in logs)


@pytest.mark.slow
def test_a_cell_that_fails_does_not_stop_the_others(whole: Path, tmp_path: Path):
    run = sweep(tmp_path / "out", "--grid", "mixer=softmax,nothing", "--seeds=1")
    _, errors = run.communicate(timeout=600)
    last = errors.strip().splitlines()[-1]
    assert run.returncode == 1 and "mixer=nothing,seed=0,steps" in last and "unknown mixer 'nothing'" in last
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/results.csv").read_text())))
    assert [row["mixer"] for row in rows] == ["softmax"]
    assert f"softmax,0,steps,{rows[0]['metric']},{rows[0]['value']}" in "\n".join(table_of(whole))
    again = sweep(tmp_path / "out", "--grid", "mixer=softmax,sla", more=[*SMALL, "model.rate=1e-4"])
    assert "holds a sweep of another training" in again.communicate(timeout=120)[1]


@pytest.mark.slow
def test_equal_multiply_adds(tmp_path: Path):
    """A model of twice the cost is trained for half of the epochs; the same training is not run twice."""
    run = sweep(tmp_path / "out", "--grid", "depth=1,2", "--seeds=1", "--equal=both", more=SMALL[:1] + SMALL[2:])
    said, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    assert "## At equal steps" in said and "## At equal multiply-adds" in said
    cells = {path.name: json.loads((path / "result.json").read_text()) for path in (tmp_path / "out/cells").iterdir()}
    assert {name: each["epochs"] for name, each in cells.items()} == {
        "depth=1,seed=0,steps": 2,
        "depth=2,seed=0,steps": 2,
        "depth=2,seed=0,multiply-adds": 1,
    }
