"""`zoo runs`: the training runs below a folder, read without PyTorch."""

import argparse
import csv
import errno
import json
import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoo import quick
from zoo.text import from_json, plain, reason

STATE = "resume/last.ckpt"  # the state that a run is resumed from
NOTE = "resume/last.json"  # what is read here of that state, written behind it
PARTS = {"best", "last", "resume", "csv", "tensorboard", "samples"}  # folders of a run, where no other run is
LARGEST = 1 << 20  # bytes of a config and of a note
SOURCE = re.compile(r"trained by zoo on .*, epoch (\d{1,15}), step (\d{1,15})", re.DOTALL)
HEAD = ("RUN", "MODEL", "STATE", "EPOCH", "STEP", "BEST", "SAVED")
ELASTIC, LEAST = (0, 1, 5), 8  # columns that are cut where a terminal is narrow, and their least width

HELP = """states:
  running      a process trains in the folder
  stopped      killed or interrupted; the line below resumes it
  finished     the last step is done
  never saved  it ended before its first state; the same command starts it again
  broken       the line below says why"""


@dataclass
class Row:
    """A run.

    `epoch` and `step` are those of its last state, or of a running one those of its logs where they are later; `best`
    is the best score of the run up to that state; `saved` is when it was written, in seconds since 1970; `problem` says
    why the run is broken. Without a note of the state, as of runs of earlier versions, the checkpoints say all this.
    """

    name: str
    folder: str
    task: str | None = None
    model: str | None = None
    state: str = "broken"
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    metric: str | None = None
    best: float | None = None
    saved: float | None = None
    resume: str | None = None
    problem: str | None = None


# Reading


def find(root: Path) -> Iterator[tuple[Path, str]]:
    """The runs in a folder and below it, and the folders that cannot be read, with the reason.

    Links to folders are looked at, but what is below them is not, so that no loop is entered.
    """
    waiting, links, seen = [root], list[Path](), set[tuple[int, int]]()
    while waiting or links:
        linked = not waiting
        folder = links.pop() if linked else waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = [*found]
            run = is_run(folder, {entry.name for entry in entries})
            status = folder.stat()
            if run and (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield folder, ""
            for entry in () if linked else entries:
                hidden = entry.name.startswith(".") or (run and entry.name in PARTS)
                if not hidden and os.path.isdir(entry.path):
                    (links if entry.is_symlink() else waiting).append(Path(entry.path))
        except OSError as error:
            yield folder, f"cannot be read: {reason(error)}"


def is_run(folder: Path, names: set[str]) -> bool:
    if {".lock", ".owner"} <= names or ("resume" in names and os.path.lexists(folder / STATE)):
        return True
    kept = (folder / each / "config.json" for each in ("last", "best") if each in names)
    return "config.yaml" in names and any(path.is_file() for path in kept)


def read(folder: Path, name: str) -> Row:
    """What the files in the folder of a run say."""
    row, problems, note = Row(name, str(folder)), list[str](), noted(folder / NOTE)
    kept = dict[str, dict[str, Any]]()
    for each in ("last", "best"):
        if os.path.lexists(folder / each):
            try:
                kept[each] = quick.stored(folder / each)
            except ValueError as error:
                problems.append(str(error).replace(f"{folder}{os.sep}", ""))
    given, wrong = configured(folder, parse=not note)
    for found in kept.values():
        row.task, row.model = quick.task_of(found), text(found.get("preset"))
    row.model = note.get("model") or row.model or given["model"]
    row.task = note.get("task") or row.task or quick.task_of(quick.facts()["models"].get(row.model, {}))
    row.epochs, row.steps = (note.get(key, given[key]) for key in ("epochs", "steps"))
    # Not the checkpoints beside a note: a run that went back to an earlier state has those of later steps, too.
    places = [note] if note else [*filter(None, (place(found.get("source")) for found in kept.values()))]
    row.step, row.epoch = max(((each["step"], each["epoch"]) for each in places), default=(None, None))
    row.metric, row.best = score([note["best"]] if "best" in note else kept.get("best", {}).get("figures"))

    running, state = held(folder / ".lock"), folder / STATE
    if os.path.lexists(state):
        if wrong:
            problems.append(wrong)
        try:
            row.saved = state.stat().st_mtime
            if not is_archive(state):
                problems.append(f"{STATE} is truncated or not a state")
        except OSError as error:
            problems.append(f"cannot read {STATE}: {reason(error)}")
    elif kept and not os.path.lexists(folder / "resume/.begun") and not done(row):
        problems.append(f"{STATE} is missing")
    if running:
        row.state = "running"
        row.step, row.epoch = max([*logged(folder, folder / NOTE), (row.step or 0, row.epoch or 0)])
    elif problems:
        row.problem = plain("; ".join(problems))
    elif done(row):
        row.state = "finished"
    elif row.saved is None:
        row.state = "never saved"
    else:
        row.state, row.resume = "stopped", f"zoo {row.task or 'TASK'} fit --ckpt_path={quoted(folder)}"
    return row


def is_archive(state: Path) -> bool:
    """Whether a state can be one; its contents are not read."""
    if not state.is_file():
        return False
    with state.open("rb") as file:
        return zipfile.is_zipfile(file)


def done(row: Row) -> bool:
    """Whether the last step is done; judged by epochs where the number of steps is not known."""
    if row.steps is not None:
        return (row.step or 0) >= row.steps
    return row.epochs is not None and (row.epoch or 0) >= row.epochs


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def number(value: Any, least: int = 1) -> int | None:
    """The value if it is an integer of at least `least`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None


def content(path: Path) -> str:
    """The text of a small regular file; OSError or ValueError if it is none."""
    if not path.is_file():
        raise ValueError("it is not a file" if os.path.lexists(path) else "it is missing")
    with path.open(encoding="utf-8") as file:
        found = file.read(LARGEST + 1)
    if len(found) > LARGEST:
        raise ValueError("it is too large")
    return found


def noted(path: Path) -> dict[str, Any]:
    """The note of the last state; empty if there is none that can be read, as of runs of earlier versions."""
    try:
        found = from_json(content(path), finite=True)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    numbers = {key: number(found.get(key), 0) for key in ("epoch", "step", "steps")}
    if None in numbers.values():
        return {}
    texts = {key: text(found.get(key)) for key in ("task", "model")}
    best = {"best": found["best"]} if "best" in found else {}
    return numbers | {"epochs": number(found.get("epochs"))} | texts | best


def configured(folder: Path, parse: bool) -> tuple[dict[str, Any], str]:
    """The model, epochs and steps in a run's config.yaml, none without `parse`; and what is wrong with the file."""
    found: dict[str, Any] = dict.fromkeys(("model", "epochs", "steps"))
    try:
        lines = content(folder / "config.yaml")
        if missing := [key for key in ("trainer", "model", "data") if f"\n{key}:" not in f"\n{lines}"]:
            raise ValueError(f"it has no {missing[0]}")
        if parse:
            import yaml

            # Not libyaml's loader, which crashes on a deeply nested file; nor merged mappings, which can be endless.
            loader: Any = type("Unmerged", (yaml.SafeLoader,), {"flatten_mapping": lambda self, node: None})
            try:
                values = yaml.load(lines, loader)
                backbone, trainer = values["model"].get("backbone"), values["trainer"]
                found["model"] = text((backbone or {}).get("name"))
                found |= {"epochs": number(trainer.get("max_epochs")), "steps": number(trainer.get("max_steps"))}
            except (yaml.YAMLError, AttributeError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"not a config: {reason(error)}") from None
    except (OSError, ValueError) as error:
        return found, f"cannot read config.yaml: {reason(error)}"
    return found, ""


def place(source: Any) -> dict[str, int]:
    """The epoch and the step in the source of a checkpoint; empty if it has none."""
    found = SOURCE.fullmatch(source) if isinstance(source, str) else None
    return {"epoch": int(found[1]), "step": int(found[2])} if found else {}


def score(figures: Any) -> tuple[str | None, float | None]:
    """The metric and the value of a checkpoint's first figure."""
    first = figures[0] if isinstance(figures, list) and figures else None
    if not isinstance(first, dict):
        return None, None
    value = first.get("value")
    if not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        return None, None
    return text(first.get("metric")), value


def held(lock: Path) -> bool:
    """Whether a process holds the lock of a run; False where there are no such locks, as on Windows.

    Nothing is changed: a shared lock is asked for and released at once.
    """
    try:
        import fcntl

        descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def logged(folder: Path, note: Path) -> list[tuple[int, int]]:
    """The last step in the logs of a run and its epoch, both counted from 1, as the only entry; none without logs.

    Logs that are older than the note of the last state are not read: a run that went back may have had later steps.
    """
    try:
        path = max((folder / "csv").glob("version_*/metrics.csv"), key=os.path.getmtime)
        if note.exists() and os.path.getmtime(path) < os.path.getmtime(note):
            return []
        with path.open("rb") as file:
            names = file.readline(LARGEST).decode().strip().split(",")
            file.seek(max(file.tell(), os.path.getsize(path) - (1 << 16)))
            lines = file.read().decode(errors="replace").splitlines()
        epoch, step = names.index("epoch"), names.index("step")
        rows = [row for row in csv.reader(lines) if len(row) == len(names)]
        return [(int(row[step]) + 1, int(row[epoch]) + 1) for row in rows if row[epoch].isdecimal()][-1:]
    except (OSError, ValueError, csv.Error):
        return []


def quoted(folder: Path) -> str:
    """A folder as the value of --ckpt_path in a shell."""
    name = str(folder)
    if name == "last" or name.startswith("~"):  # which --ckpt_path takes for something else
        name = os.path.abspath(name)
    if name.isprintable():
        return shlex.quote(name)
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    letters = (
        each if each.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(each)) for each in escaped
    )
    return f"$'{''.join(letters)}'"


def runs(root: Path) -> list[Row]:
    """The runs below a folder, the last one saved first. ValueError if it is no folder."""
    if not root.is_dir():
        raise ValueError(f"{plain(str(root))} is not a folder; `zoo runs FOLDER` lists the runs below FOLDER")
    rows = list[Row]()
    for folder, wrong in find(root):
        name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
        try:
            rows.append(Row(name, str(folder), problem=wrong) if wrong else read(folder, name))
        except OSError as error:
            rows.append(Row(name, str(folder), problem=f"cannot be read: {reason(error)}"))
    return sorted(rows, key=lambda row: (-(row.saved or 0), row.name))


# Printing


def ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds / size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def of(value: int | None, total: int | None) -> str:
    """A number of a total, as 3/10."""
    return "-" if value is None else f"{value}" if total is None else f"{value}/{total}"


def cells(row: Row, now: float) -> list[str]:
    """The entries of a row, as in HEAD."""
    best = "-" if row.best is None else f"{row.best:.4f} {row.metric or ''}"
    model = " ".join(filter(None, (row.task, row.model))) or "-"
    saved = "-" if row.saved is None else ago(now - row.saved)
    entries = (row.name, model, row.state, of(row.epoch, row.epochs), of(row.step, row.steps), best, saved)
    return [plain(entry) for entry in entries]


def wide(letters: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum((unicodedata.east_asian_width(each) in "WF") + (not unicodedata.combining(each)) for each in letters)


def fitted(entry: str, most: int, middle: bool = False) -> str:
    """An entry of exactly `most` columns, cut at its end or in its middle."""
    if wide(entry) <= most:
        return entry + " " * (most - wide(entry))
    head, tail = (entry, "") if not middle else (entry[: len(entry) // 2], entry[len(entry) // 2 :])
    while head and wide(head) + wide(tail) > most - 3:
        head, tail = (head[:-1], tail) if len(head) >= len(tail) else (head, tail[1:])
    return fitted(f"{head}...{tail}", most) if most > 3 else "." * most


def table(rows: Sequence[Row], width: int | None = None, now: float | None = None) -> str:
    """The rows as a table for a terminal of that width, or of any; below a row how to resume it, or what is wrong."""
    lines = [list(HEAD), *(cells(row, time.time() if now is None else now) for row in rows)]
    widths = [max(map(wide, column)) for column in zip(*lines, strict=True)]
    while width is not None and sum(widths) + 2 * len(HEAD) - 2 > width:
        widest = max(ELASTIC, key=widths.__getitem__)
        if widths[widest] <= LEAST:
            break
        widths[widest] -= 1
    printed = list[str]()
    for entries, row in zip(lines, [None, *rows], strict=True):
        columns = enumerate(zip(entries, widths, strict=True))
        line = "  ".join(fitted(entry, most, index == 0) for index, (entry, most) in columns).rstrip()
        printed.append(line if width is None or wide(line) <= width else fitted(line, width))
        if row is not None and (row.resume or row.problem):
            printed.append(f"  {row.resume or row.problem}")
    return "\n".join(printed)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="zoo runs",
        description="Lists the training runs below a folder, the last one saved first.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", default="runs", help="the folder [default: runs]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    found = runs(Path(os.path.expanduser(given.folder)))
    if given.json:
        return print(json.dumps([asdict(row) for row in found], indent=2))
    if not found:
        raise ValueError(f"no runs below {plain(given.folder)}")
    print(table(found, shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else None))
