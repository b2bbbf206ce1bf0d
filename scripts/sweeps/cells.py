"""The cells of a sweep: each has a folder, is trained by one worker at a time, and can be resumed after a kill."""

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from zoo.text import one_line

STEPS, COST = "steps", "multiply-adds"  # what is equal for all choices
LONGEST = 200  # bytes of the name of a cell, of the 255 that a file system allows
OWN = ("--seed_everything", "--trainer.max_epochs", "--trainer.default_root_dir", "--ckpt_path")  # set for each cell


class Cell(NamedTuple):
    """One training: the choices by field, the seed, and what it has in common with those of the first choices."""

    choices: tuple[tuple[str, str], ...]
    seed: int
    equal: str = STEPS

    @property
    def name(self) -> str:
        parts = [*(f"{field}={value}" for field, value in self.choices), f"seed={self.seed}", self.equal]
        text = ",".join(parts)
        plain = re.sub(r"[^\w=.,()+-]+", "_", text)
        if plain == text and len(text.encode()) <= LONGEST:
            return text
        return f"{plain.encode()[:LONGEST].decode(errors='ignore')},{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Result(NamedTuple):
    """What a training gave: the score of its last validation, on n samples, and what it took."""

    metric: str
    value: float
    n: int
    parameters: int
    multiply_adds: int  # of the model, for one input
    epochs: int


def choices_of(
    fields: Sequence[str], values: Mapping[str, Any], more: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Every row of the tables of some fields that the model of a config accepts, the config's own first; and a line for
    each row that it refuses. `more` are options that replace values of the config."""
    if not fields:
        return {}, []
    from zoo.choices import TABLES
    from zoo.models import configure
    from zoo.spec import parse
    from zoo.tensors import shapes_alone
    from zoo.text import unknown

    model = values.get("model")
    backbone = dict(model.get("backbone") or {}) if isinstance(model, dict) else {}
    for word in more:
        name, equals, text = word.partition("=")
        if name == "--model.backbone" or name.startswith("--model.backbone.") and not equals:
            raise ValueError(f"{word}: write the fields of the model one by one, as --model.backbone.FIELD=VALUE")
        if name.startswith("--model.backbone."):
            try:
                backbone[name.removeprefix("--model.backbone.")] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise ValueError(f"{word}: cannot read the value") from None
    if not isinstance(backbone.get("name"), str):
        raise ValueError("--choices needs a config with model.backbone.name")
    if len({*fields}) < len(fields):
        raise ValueError(f"--choices {' '.join(fields)}: each field can be given once")
    name, grid, refused = backbone.pop("name"), dict[str, list[str]](), list[str]()
    for field in fields:
        if field not in TABLES:
            raise ValueError(f"--choices: {unknown('field', field, TABLES)}")
        own = getattr(configure(name, **backbone), field)
        if not isinstance(own, str):
            raise ValueError(f"--choices {field}: the blocks of {name} take {own} in turn; give --grid {field}=A,B")
        rows = [own, *(row for row in TABLES[field] if row != parse(own)[0])]
        grid[field] = []
        for row in rows:
            try:
                with shapes_alone():  # some rows refuse a model only when it is built
                    configure(name, **backbone | {field: row}).build()
                grid[field].append(row)
            except ValueError as error:
                refused.append(one_line(f"{field} {row}: {error}"))
    return grid, refused


def grid_of(given: Sequence[str], before: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """The values of each field in words such as "mixer=softmax,sla"; commas in brackets or quotes do not separate.
    ValueError for a field that is in `before` too."""
    grid: dict[str, list[str]] = {}
    for word in given:
        field, equals, text = word.partition("=")
        values = [each.strip() for each in parts_of(text)]
        if not equals or not field or not all(values):
            raise ValueError(f"--grid {word}: write FIELD=VALUE,VALUE as in mixer=softmax,sla")
        if option(field) in OWN:
            raise ValueError(f"--grid {word}: {field} is set by the sweep itself")
        if option(field) in map(option, [*grid, *(before or {})]) or len({*values}) < len(values):
            raise ValueError(f"--grid {word}: each field and each value can be given once")
        grid[field] = values
    return grid


def parts_of(text: str) -> list[str]:
    """The parts between the commas that are outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def cells_of(grid: Mapping[str, Sequence[str]], seeds: int, equal: str = STEPS) -> list[Cell]:
    """Every combination of values, seed by seed; the first values are the reference."""
    combined = [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Cell(choices, seed, equal) for seed in range(seeds) for choices in combined]


def option(field: str) -> str:
    """The option of `zoo TASK fit` for a field; one without a dot is a field of the model."""
    whole = "." in field or f"--{field}" in OWN
    return f"--{field if whole else f'model.backbone.{field}'}"


@contextmanager
def taken(folder: Path) -> Iterator[int | None]:
    """Takes the cell of a folder for this process and its children; None if another worker has it. The lock ends with
    the last process that holds it, even if that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        yield None
        return
    try:
        yield lock
    finally:
        os.close(lock)  # a child that still runs keeps the lock


def result_of(folder: Path) -> Result | None:
    """The result of a finished cell."""
    try:
        result = Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
        for field, kind in get_type_hints(Result).items():
            if type(value := getattr(result, field)) is not kind:
                raise TypeError(f"{field} is {value!r}")
        return result
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'result.json'} is damaged ({error}); delete it to train the cell again") from None


def train(cell: Cell, folder: Path, lock: int, task: str, config: Path, epochs: int, more: Sequence[str]) -> Result:
    """Trains a cell, or resumes its training, and writes its result.

    Raises:
        ValueError: the training failed; one line with the end of its output.
        KeyboardInterrupt: it was stopped.
    """
    run = folder / "run"
    arguments = [f"--config={config}", *more, *(f"{option(field)}={value}" for field, value in cell.choices)]
    arguments += [f"--seed_everything={cell.seed}", f"--trainer.max_epochs={epochs}"]
    arguments += [f"--trainer.default_root_dir={run}"]
    if (run / "resume/last.ckpt").exists():
        arguments.append(f"--ckpt_path={run}")
    else:
        shutil.rmtree(run, ignore_errors=True)  # killed before its first state
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "zoo", task, "fit", *arguments]
        code = status_of(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,)))
    if code in (130, 143, -2, -15):
        raise KeyboardInterrupt
    if code:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"{cell.name}: {lines[-1] if lines else f'exit status {code}'} (see {folder / 'log.txt'})")
    written: dict[str, Any] = json.loads((run / "last/config.json").read_text(encoding="utf-8"))
    if not written["figures"]:
        raise ValueError(f"{cell.name}: the training ended without a validation")
    figure, cost = written["figures"][0], written["cost"]["multiply_adds"]
    result = Result(figure["metric"], figure["value"], figure["n"], written["parameters"], cost, epochs)
    aside = folder / ".result.json.new"
    aside.write_text(json.dumps(result._asdict(), indent=1), encoding="utf-8")
    os.replace(aside, folder / "result.json")
    return result


def status_of(training: "subprocess.Popen[bytes]") -> int:
    """The exit status of a training; a signal that stops the sweep first lets the training write its state."""

    def stop(number: int, frame: object) -> None:
        training.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return training.wait()
    except KeyboardInterrupt:  # a terminal sends it to the training, too
        training.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
