"""The command of scripts/sweep: trains all cells, then writes the tables."""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from sweeps.cells import COST, OWN, Cell, Result, cells_of, choices_of, grid_of, option, result_of, taken, train
from sweeps.table import draw, markdown, table
from zoo.aside import aside
from zoo.text import one_line

PAUSE = 5.0  # seconds between looks at cells that another worker trains


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scripts/sweep",
        description="Trains a config with every combination of some choices and seeds, and compares each with the\n"
        "first. It resumes after a kill, and several can work on one sweep at the same time.",
        epilog="example:\n  scripts/sweep configs/classify/vit_micro_digits.yaml --grid mixer=softmax,sla "
        "norm=layernorm,prepbn \\\n    --seeds 3 -- --trainer.max_epochs=10\n\nWhat follows -- is passed on to "
        "`zoo TASK fit`.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("config", type=Path, metavar="CONFIG", help="a config in a folder named after its task")
    made.add_argument("--grid", nargs="+", default=[], metavar="FIELD=A,B", help="fields of the model, or options")
    made.add_argument(
        "--choices",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of the model, such as mixer, with every row that\n"
        "it accepts, with its default options; that of the config\ncomes first",
    )
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each combination (default: 3)")
    made.add_argument("--equal", choices=("steps", "both"), default="steps", help="both: also at equal multiply-adds")
    made.add_argument(
        "--output", type=Path, metavar="DIR", help="where cells and tables go (default: runs/sweeps/NAME)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else [*arguments]
    end = words.index("--") if "--" in words else len(words)
    given = parser().parse_args(words[:end])
    try:
        code = sweep(given, words[end + 1 :])
    except (ValueError, OSError) as error:
        sys.exit(f"scripts/sweep: error: {one_line(error, most=2000)}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        code = 130
    sys.exit(code)


def sweep(given: argparse.Namespace, more: list[str]) -> int:
    """Runs a sweep; the exit status: 1 if a cell failed."""
    config, task = given.config.resolve(), given.config.resolve().parent.name
    if not config.is_file() or task not in ("classify", "detect", "generate", "transcribe"):
        raise ValueError(f"{given.config} is not a config in a folder named after its task, such as configs/classify")
    values = values_of(config)
    accepted, refused = choices_of(given.choices, values, more)
    grid = accepted | grid_of(given.grid, accepted)
    if not grid:
        raise ValueError("give --grid FIELD=A,B or --choices FIELD")
    for line in refused:
        print(f"left out: {line}", file=sys.stderr)
    if not 1 <= given.seeds <= 1000:
        raise ValueError(f"--seeds must be from 1 to 1000, got {given.seeds}")
    own = {*map(option, grid), *OWN} - {"--trainer.max_epochs"}
    if doubled := [word for word in more if word.split("=")[0] in own]:
        raise ValueError(f"{doubled[0]} is set by the sweep itself")
    epochs = epochs_of(config.name, values, more)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    home = (given.output or Path("runs/sweeps", config.stem)).resolve()
    first = [f"{field}={values[0]}" for field, values in grid.items()]  # the epochs at equal multiply-adds depend on it
    check_command(home, [task, config.name, digest, *more, f"{epochs} epochs", *first])
    cells = cells_of(grid, given.seeds)
    failed = work(dict.fromkeys(cells, epochs), home, task, config, more)
    found = results(cells, home)
    if given.equal == "both" and found:
        costs = {cell.choices: result.multiply_adds for cell, result in found.items()}
        scaled = {
            cell: max(1, round(epochs * costs[cells[0].choices] / costs[cell.choices]))
            for cell in cells_of(grid, given.seeds, COST)
            if {cell.choices, cells[0].choices} <= costs.keys()
        }
        same = {cell: found[each] for cell in scaled if scaled[cell] == epochs and (each := Cell(*cell[:2])) in found}
        failed += work({cell: number for cell, number in scaled.items() if cell not in same}, home, task, config, more)
        found |= same | results([*scaled], home)
    if not found:
        raise ValueError(failed[0] if failed else "no cell has a result")
    words = ["scripts/sweep", str(given.config)]
    words += ["--choices", *given.choices] if given.choices else []
    words += ["--grid", *given.grid] if given.grid else []
    words += ["--seeds", str(given.seeds)]
    words += ["--equal", "both"] if given.equal == "both" else []
    write(home, found, config.stem, shlex.join([*words, *(["--", *more] if more else [])]))
    print((home / "README.md").read_text(encoding="utf-8"))
    for line in failed:
        print(f"scripts/sweep: error: {line}", file=sys.stderr)
    return 1 if failed else 0


def values_of(config: Path) -> dict[str, Any]:
    """What a config sets; ValueError if it is none."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is not a config: {one_line(error)}") from None
    return values if isinstance(values, dict) else {}


def epochs_of(name: str, values: Mapping[str, Any], more: Sequence[str]) -> int:
    """The number of epochs of a config with these values, or of the options that replace it."""
    if "--trainer.max_epochs" in more:
        raise ValueError("write --trainer.max_epochs=N in one word")
    given = next((word.partition("=")[2] for word in reversed(more) if word.startswith("--trainer.max_epochs=")), None)
    trainer = values.get("trainer")
    written = trainer.get("max_epochs") if isinstance(trainer, dict) else None
    if not (text := str(given or written)).isdecimal() or int(text) < 1:
        raise ValueError(f"{name} has no trainer.max_epochs; give -- --trainer.max_epochs=N")
    return int(text)


def check_command(home: Path, words: Sequence[str]) -> None:
    """ValueError if the folder holds cells of another training."""
    home.mkdir(parents=True, exist_ok=True)
    path, text = home / "training.txt", "\n".join(words) + "\n"
    if not path.exists():
        with aside(home) as folder:
            (folder / path.name).write_text(text, encoding="utf-8")
            os.replace(folder / path.name, path)  # another worker never reads a part of it
    if path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{home} holds a sweep of another training (see {path}); choose another --output")


def work(epochs: dict[Cell, int], home: Path, task: str, config: Path, more: Sequence[str]) -> list[str]:
    """Trains all cells that have no result, for their epochs; returns the errors of those that failed."""
    waiting, failed = list(epochs), list[str]()
    with tqdm(total=len(epochs), unit="cell", ncols=79, disable=None) as bar:
        while waiting:
            left = list[Cell]()
            for cell in waiting:
                folder = home / "cells" / cell.name
                with taken(folder) as lock:
                    if lock is None:
                        left.append(cell)
                        continue
                    if result_of(folder) is None:
                        try:
                            train(cell, folder, lock, task, config, epochs[cell], more)
                        except ValueError as error:
                            failed.append(str(error))
                bar.update()
            if left and len(left) == len(waiting):
                time.sleep(PAUSE)
            waiting = left
    return failed


def results(cells: Sequence[Cell], home: Path) -> dict[Cell, Result]:
    """The results that there are, those of the first choices first, even if their first seed has none."""
    order = {choices: place for place, choices in enumerate(dict.fromkeys(cell.choices for cell in cells))}
    found = {
        cell: result_of(home / "cells" / cell.name) for cell in sorted(cells, key=lambda cell: order[cell.choices])
    }
    return {cell: result for cell, result in found.items() if result is not None}


def write(home: Path, found: dict[Cell, Result], title: str, command: str) -> None:
    """Writes results.csv, README.md and results.png, each aside and renamed into place."""
    with aside(home) as folder:
        for name, text in {"results.csv": table(found), "README.md": markdown(found, title, command)}.items():
            (folder / name).write_text(text, encoding="utf-8")
        draw(found, title, folder / "results.png")
        for name in os.listdir(folder):
            os.replace(folder / name, home / name)
