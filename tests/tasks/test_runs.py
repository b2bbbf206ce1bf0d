"""`zoo runs`: runs in every state, and folders that are none."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from killing import in_child
from training import SHORT, fit, refused
from zoo.__main__ import main
from zoo.tasks import runs
from zoo.tasks.arguments import completed
from zoo.tasks.run import Run
from zoo.tasks.runs import NOTE, STATE, Row, table, wide
from zoo.tasks.task import Task
from zoo.weights import load_checkpoint

CONFIG = {"trainer": {"max_epochs": 10, "max_steps": -1}, "model": {"backbone": {"name": "vit_micro"}}, "data": {}}
NOTED = {"task": "classify", "model": "vit_micro", "epoch": 3, "epochs": 10, "step": 42, "steps": 140}
FIGURE = {"metric": "top-1 accuracy", "value": 0.25}


def zipped() -> bytes:
    return b"PK\x05\x06" + bytes(18)  # an archive without members


def made(root: Path, name: str, note: Any = NOTED, config: Any = CONFIG, state: bytes | None = zipped(), **kept: Any):
    """The folder of a run; `best` and `last` are contents of config.json."""
    folder = root / name
    (folder / "resume").mkdir(parents=True)
    for each in (".lock", ".owner"):
        (folder / each).touch()
    for path, text in (("config.yaml", config and yaml.safe_dump(config)), (NOTE, note and json.dumps(note))):
        if text:
            (folder / path).write_text(text)
    if state is None:
        (folder / "resume/.begun").touch()
    else:
        (folder / STATE).write_bytes(state)
    for each, found in kept.items():
        (folder / each).mkdir()
        (folder / each / "config.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


def kept(epoch: int, step: int, **more: Any) -> dict[str, Any]:
    source = f"trained by zoo on digits, epoch {epoch}, step {step}"
    return {"family": "vit", "preset": "vit_micro", "source": source, **more}


def found(root: Path) -> dict[str, Row]:
    return {row.name: row for row in runs.runs(root)}


def one(root: Path) -> Row:
    (row,) = runs.runs(root)
    return row


# Trained


def killed(task: Task, batch: Any, batch_idx: int, step: int = 5) -> None:
    if task.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_and_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    flags = [*SHORT, "--save.every_n_train_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", killed)
        assert in_child(lambda: fit(tmp_path / "run", *flags)) == -signal.SIGKILL
    shutil.copytree(tmp_path / "run", tmp_path / "old/run")
    (tmp_path / "old/run" / NOTE).unlink()  # as in earlier versions
    row = found(tmp_path)["run"]
    # A step later than the last epoch's end; the write of the state at step 5 may have been cut off.
    assert (row.state, row.task, row.model) == ("stopped", "classify", "vit_micro")
    assert (row.epoch, row.epochs, row.steps) == (2, 2, 6) and row.step in (4, 5)
    assert row.resume == f"zoo classify fit --ckpt_path={tmp_path}/run"
    assert row.metric == "top-1 accuracy" and row.best is not None and time.time() - (row.saved or 0) < 60
    old = found(tmp_path)["old/run"]
    assert (old.state, old.epoch, old.epochs, old.step, old.steps) == ("stopped", 1, 2, 3, None)
    assert (old.task, old.best, old.resume) == (
        "classify",
        row.best,
        f"zoo classify fit --ckpt_path={tmp_path}/old/run",
    )
    assert row.resume is not None
    main(["classify", "fit", row.resume.split()[-1], "--trainer.enable_progress_bar=false"])
    row = one(tmp_path / "run")
    assert (row.state, row.epoch, row.step, row.resume) == ("finished", 2, 6, None)
    (tmp_path / "run" / NOTE).unlink()
    assert one(tmp_path / "run").state == "finished"


@pytest.mark.daily(2)
def test_a_finished_run_that_goes_back_and_is_killed_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("zoo.tasks.run.OVERHEAD", 1e9)  # so that only steps ask for states
    flags = [*SHORT, "--save.every_n_train_steps=2", "--save.keep=3"]
    fit(tmp_path / "run", *flags)
    before = one(tmp_path)
    assert (before.state, before.epoch, before.step) == ("finished", 2, 6) and before.best is not None
    kept = {path: path.read_bytes() for each in ("best", "last") for path in (tmp_path / "run" / each).iterdir()}
    best = f"best-of-step-{load_checkpoint(tmp_path / 'run/best').config['source'].split()[-1]}"
    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", partialmethod(killed, step=2))
        state = f"--ckpt_path={tmp_path}/run/resume/step-000000002.ckpt"
        assert in_child(lambda: fit(tmp_path / "run", *flags, state)) == -signal.SIGKILL
    row = one(tmp_path)
    assert (row.state, row.epoch, row.step, row.steps) == ("stopped", 1, 2, 6)
    assert row.resume == f"zoo classify fit --ckpt_path={tmp_path}/run"
    assert (row.best, row.metric) == (None, None), "it has not been validated before step 3"
    for path, content in kept.items():
        name = best if path.parent.name == "best" else "last"
        assert (tmp_path / "run" / name / path.name).read_bytes() == content, "nothing is lost"
    main(["classify", "fit", f"--ckpt_path={tmp_path}/run", "--trainer.enable_progress_bar=false"])
    row = one(tmp_path)
    assert (row.state, row.step, row.best, row.metric) == ("finished", 6, before.best, before.metric)


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path):
    made(tmp_path, "run")
    assert one(tmp_path).state == "stopped"
    run = Run(tmp_path / "run")
    run.open(resumed=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert one(tmp_path).state == "running" == one(tmp_path).state
    with pytest.raises(ValueError, match="another run is training"):
        Run(tmp_path / "run").open(resumed=True)  # the lock is still held
    run.close()
    with (tmp_path / "run/.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as another `zoo runs` does
        assert one(tmp_path).state == "stopped"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    FileLock(tmp_path / "run/.lock").acquire(blocking=False)  # looking at it has left no lock


def test_a_running_run_has_the_step_of_its_logs(tmp_path: Path):
    folder = made(tmp_path, "run")
    (folder / "csv/version_0").mkdir(parents=True)
    logs = folder / "csv/version_0/metrics.csv"
    for text, place in (
        ("epoch,lr,step\n3,,47\n,0.1,51\n4,,55\n,0.1,", (5, 56)),  # the last line is being written
        ("epoch,lr,step\n1,,7\n", (3, 42)),  # before the last state: of a run that was resumed
        ("", (3, 42)),
        ("nothing\x00,of\n1,use\n", (3, 42)),
    ):
        logs.write_text(text)
        with FileLock(folder / ".lock"):
            assert (one(tmp_path).epoch, one(tmp_path).step) == place
        assert (one(tmp_path).epoch, one(tmp_path).step) == (3, 42), "a stopped run resumes from its state"
    logs.write_text("epoch,lr,step\n4,,55\n")
    os.utime(logs, (1e9, 1e9))  # written before the note: a run that went back has no logs yet
    with FileLock(folder / ".lock"):
        assert (one(tmp_path).epoch, one(tmp_path).step) == (3, 42)
    (folder / NOTE).unlink()
    with FileLock(folder / ".lock"):
        assert (one(tmp_path).epoch, one(tmp_path).step) == (5, 56), "nothing else is known of it"


def test_the_best_score_is_that_of_the_state(tmp_path: Path):
    later = kept(10, 140, figures=[{"metric": "recall", "value": 0.75}])
    for name, best, wanted in (
        ("old", {}, ("recall", 0.75)),  # as in earlier versions
        ("none", {"best": None}, (None, None)),
        ("some", {"best": FIGURE}, ("top-1 accuracy", 0.25)),
        ("wrong", {"best": [3]}, (None, None)),
    ):
        made(tmp_path, name, note=NOTED | best, best=later)
        row = found(tmp_path)[name]
        assert (row.state, row.step, row.metric, row.best) == ("stopped", 42, *wanted)


# States


@pytest.mark.parametrize(
    ("given", "state"),
    [
        ({}, "stopped"),
        ({"note": NOTED | {"step": 140}}, "finished"),
        ({"last": kept(10, 140)}, "stopped"),  # it went back, or was killed before its last state was written
        ({"note": NOTED | {"step": 140}, "last": kept(9, 126)}, "finished"),
        ({"note": None, "last": kept(10, 140)}, "finished"),
        ({"note": None, "last": kept(9, 126)}, "stopped"),
        ({"note": None, "state": None}, "never saved"),
        ({"note": None, "state": None, "config": None}, "never saved"),
        ({"note": NOTED | {"step": 0}, "state": None}, "never saved"),
        ({"note": None, "state": None, "last": kept(1, 14)}, "never saved"),
    ],
    ids=str,
)
def test_the_state_of_a_run(given: dict[str, Any], state: str, tmp_path: Path):
    made(tmp_path, "run", **given)
    row = one(tmp_path)
    assert row.state == state and (row.resume is not None) == (state == "stopped") and row.problem is None


def test_a_finished_run_may_have_lost_its_state(tmp_path: Path):
    for name, last in (("whole", kept(10, 140)), ("part", kept(9, 126))):
        shutil.rmtree(made(tmp_path, name, last=last) / "resume")
    rows = found(tmp_path)
    assert rows["whole"].state == "finished" and rows["part"].problem == f"{STATE} is missing"


def test_a_run_in_steps_has_no_number_of_epochs(tmp_path: Path):
    made(tmp_path, "run", note=NOTED | {"epochs": None})
    assert "  stopped  3      42/140  " in table(runs.runs(tmp_path))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state": b""}, f"{STATE} is truncated or not a state"),
        ({"state": zipped()[:-1]}, f"{STATE} is truncated or not a state"),
        ({"config": None}, "cannot read config.yaml: it is missing"),
        ({"config": {"trainer": {}}}, "cannot read config.yaml: it has no model"),
        ({"config": CONFIG | {"model": 3}, "note": None}, "cannot read config.yaml: not a config"),
        ({"best": "{"}, "cannot read best/config.json: "),
        ({"last": "[]"}, "last/config.json must hold an object"),
        ({"last": "[" * 100_000}, "cannot read last/config.json: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_run_has_a_row_that_says_so(given: dict[str, Any], words: str, tmp_path: Path):
    made(tmp_path, "run", **given)
    row = one(tmp_path)
    assert row.state == "broken" and words in (row.problem or "") and "\n" not in (row.problem or "")
    assert table([row]).splitlines()[-1] == f"  {row.problem}" and row.resume is None


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "a: &a [*a]", "\x00", "trainer: 1\nmodel: 1\ndata: 1", "x" * (1 << 21)]
)
def test_a_config_that_is_none(text: str, tmp_path: Path):
    """In its own process, which a loader written in C could bring down."""
    (made(tmp_path, "run", note=None) / "config.yaml").write_text(f"{text}\ntrainer:\nmodel:\ndata:\n{text}")
    line = [sys.executable, "-m", "zoo", "runs", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "  broken  " in done.stdout and "  cannot read config.yaml: " in done.stdout


def test_a_config_with_merged_mappings_is_none(tmp_path: Path):
    with (made(tmp_path, "run", note=None) / "config.yaml").open("a") as file:
        file.write("\nmore: {<<: {a: 1}}\n")  # nested ones take endless memory
    assert "cannot read config.yaml: not a config" in (one(tmp_path).problem or "")


@pytest.mark.parametrize(
    "note", ["", "{", "[]", "[" * 100_000, '{"step": 1}', '{"epoch": 1, "step": "1", "steps": true}', '{"steps": -1}']
)
def test_a_note_of_no_use_is_none(note: str, tmp_path: Path):
    (made(tmp_path, "run", last=kept(4, 56)) / NOTE).write_text(note)
    row = one(tmp_path)
    assert (row.state, row.epoch, row.epochs, row.step, row.steps) == ("stopped", 4, 10, 56, None)


@pytest.mark.parametrize("figures", [None, [], {}, [3], [{"value": "high"}], [{"metric": 3}], [{"value": 10**309}]])
def test_a_best_without_a_score(figures: Any, tmp_path: Path):
    made(tmp_path, "run", best=kept(2, 28, figures=figures))
    assert one(tmp_path).best is None and one(tmp_path).state == "stopped"


# Folders


def test_runs_are_found_at_any_depth_but_not_in_parts_of_runs(tmp_path: Path):
    for name in ("a", "a/inner", "b/c/d", "a/best/none", "a/tensorboard/none", ".hidden/none"):
        made(tmp_path, name)
    deep = tmp_path.joinpath(*["e"] * 300)
    deep.mkdir(parents=True)
    made(deep, "run")
    for name in ("foreign/resume", "foreign/best", "foreign2/last"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "foreign2/config.yaml").write_text("x: 1")
    (tmp_path / "file").touch()
    assert {*found(tmp_path)} == {"a", "a/inner", "b/c/d", f"{'e/' * 300}run"}
    assert [row.name for row in runs.runs(tmp_path / "b/c/d")] == ["d"]


def test_links_are_followed_once(tmp_path: Path):
    elsewhere = made(tmp_path / "elsewhere", "run")
    made(tmp_path / "elsewhere/deeper", "run")
    root = tmp_path / "runs"
    made(root, "own")
    for name, target in (
        ("loop", root),
        ("self", root / "self"),
        ("twin", root / "own"),
        ("linked", elsewhere),
        ("broken", tmp_path / "nowhere"),
        ("above", tmp_path / "elsewhere"),
    ):
        (root / name).symlink_to(target)
    assert {*found(root)} == {"own", "linked"}
    (tmp_path / "way").symlink_to(root)
    assert {*found(tmp_path / "way")} == {"own", "linked"}


def test_files_of_other_kinds_in_the_place_of_a_run_s(tmp_path: Path):
    """A pipe would be waited for, and a link to itself cannot be opened."""
    piped, loops, folders = (made(tmp_path, name) for name in ("piped", "loops", "folders"))
    for name in (".lock", ".owner", "config.yaml", NOTE, STATE):
        for folder in (piped, loops, folders):
            (folder / name).unlink()
        os.mkfifo(piped / name)
        (loops / name).symlink_to(loops / name)
        (folders / name).mkdir()
    for name in ("best", "last"):
        os.mkfifo(piped / name)
        (loops / name).symlink_to(loops / name)
        (folders / name).touch()
    rows = found(tmp_path)
    assert {name: row.state for name, row in rows.items()} == dict.fromkeys(("piped", "loops", "folders"), "broken")
    assert all(row.problem and STATE in row.problem and "config.yaml" in row.problem for row in rows.values())


@pytest.mark.parametrize("what", ["scandir", "open", "stat"])
def test_what_cannot_be_read_has_a_row(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("good", "locked"):
        made(tmp_path, name, best=kept(2, 28))
    home, name = (Path, what) if what in ("open", "stat") else (os, what)
    plain = getattr(home, name)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if "locked" in str(path).removeprefix(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, refuse)
        rows = found(tmp_path)
    assert rows["good"].state == "stopped"

    assert rows["locked"].state == "broken" and "Permission denied" in (rows["locked"].problem or "")


NAMES = ["a b", "last", "~x", "null", "1e3", "a: b", "[1]", "-x", "it's", "naïve 日本", "two\nlines", "\x1b[31mred\\'"]
NAMES += [os.fsdecode(b"not\xffutf8"), "\x85next", "$HOME `ls`", "x" * 200]


def test_the_command_of_any_folder_resumes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in NAMES:
        made(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    rows = found(Path("."))
    assert {*rows} == {*NAMES}
    printed = table([*rows.values()], 80)
    assert all(line.isprintable() for line in printed.splitlines()) and len(printed.splitlines()) == 1 + 2 * len(NAMES)
    for name, row in rows.items():
        assert row.resume is not None and row.resume in printed
        shell = ["bash", "-c", f"printf '%s\\0' {row.resume}"]
        words = os.fsdecode(subprocess.run(shell, capture_output=True, check=True).stdout).split("\0")[:-1]
        assert words[:3] == ["zoo", "classify", "fit"]
        state = next(
            each for each in completed("classify", words[2:]) if each.startswith("--ckpt_path=") and STATE in each
        )
        assert Path(state.partition("=")[2]).samefile(tmp_path / name / STATE)


# The table


def test_the_last_saved_run_is_the_first(tmp_path: Path):
    for name, age in (("b", 100), ("a", 7500), ("c", 3)):
        os.utime(made(tmp_path, name) / STATE, (1000, 10_000 - age))
    made(tmp_path, "none", state=None)
    rows = runs.runs(tmp_path)
    lines = [line for line in table(rows, now=10_000).splitlines() if not line.startswith("  ")]
    assert [line.split()[0] for line in lines] == ["RUN", "c", "b", "a", "none"]
    assert [line.rpartition("  ")[2] for line in lines] == ["SAVED", "3 s ago", "1 min ago", "2 h ago", "-"]


def test_a_table(tmp_path: Path):
    folder = made(tmp_path, "digits", best=kept(2, 28, figures=[FIGURE]))
    os.utime(folder / STATE, (0, 0))
    assert table(runs.runs(tmp_path), now=86400 * 3).splitlines() == [
        "RUN     MODEL               STATE    EPOCH  STEP    BEST                   SAVED",
        "digits  classify vit_micro  stopped  3/10   42/140  0.2500 top-1 accuracy  3 d ago",
        f"  zoo classify fit --ckpt_path={folder}",
    ]


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_a_table_fits_its_terminal(width: int, tmp_path: Path):
    for name in (*NAMES, "日本" * 30, "e\u0301" * 60):
        made(tmp_path, name, note=NOTED | {"model": "w" * 90}, best=kept(2, 28, figures=[FIGURE]))
    lines = [line for line in table(runs.runs(tmp_path), width).splitlines() if not line.startswith("  ")]
    assert max(map(wide, lines)) <= width and len(lines) == 1 + len(NAMES) + 2
    assert width == 60 or all("  stopped  3/10   42/140  0.25" in line for line in lines[1:])
    assert width < 400 or any("x" * 200 in line for line in lines)


def test_wide_letters_take_two_columns():
    assert [wide(each) for each in ("ab", "日本", "e\u0301")] == [2, 4, 1]


# The command


def test_it_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made(tmp_path, "runs/digits", best=kept(2, 28, figures=[FIGURE]))
    monkeypatch.chdir(tmp_path)
    main(["runs"])
    assert capsys.readouterr().out.endswith("\n  zoo classify fit --ckpt_path=runs/digits\n")
    main(["runs", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    wanted = {"name": "digits", "folder": "runs/digits", "state": "stopped", **NOTED, "problem": None}
    wanted |= {"metric": "top-1 accuracy", "best": 0.25, "resume": "zoo classify fit --ckpt_path=runs/digits"}
    assert row.pop("saved") > 1e9 and row == wanted


def test_folders_without_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert refused("runs", tmp_path / "none\nat all").startswith(f"{tmp_path}/none\\nat all is not a folder; ")
    assert refused("runs", tmp_path) == f"no runs below {tmp_path}"
    (tmp_path / "file").touch()
    assert "is not a folder" in refused("runs", tmp_path / "file", "--json")
    main(["runs", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == []


def test_thousands_of_runs_take_seconds(tmp_path: Path):
    """A run takes about 0.5 ms; as its state were read, it would be 100 times that."""
    one, number = made(tmp_path, "0", best=kept(2, 28, figures=[FIGURE]), last=kept(3, 42)), 2000
    for index in range(1, number):
        shutil.copytree(one, tmp_path / str(index))
    start = time.process_time()
    assert len(runs.runs(tmp_path)) == number
    assert time.process_time() - start < 0.005 * number
