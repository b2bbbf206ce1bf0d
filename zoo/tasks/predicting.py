"""What the `predict` commands share: options, input files, terminal output and written files.

Heavy libraries are imported where they are used, so that help and option errors do not need them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.aside import aside
from zoo.text import counted, one_line, plain, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zoo.inputs.audio import AudioPreprocess
    from zoo.models.base import Model
    from zoo.outputs.tokens import Tokenizer
    from zoo.weights import Checkpoint

INK, GREY, CARD, TRACK, BAR = "#1f2933", "#7b8794", "#f1f3f5", "#d9dee3", "#2f6fb5"  # colours of the figure
MAPS = "maps.png"
NAME = "a checkpoint: a folder, a name in checkpoints/, or OWNER/NAME on the Hub"


class Parser(argparse.ArgumentParser):
    """Help that fits a screen: rare options appear only in --help-all, and an error is one line."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        def shape(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)

        more = {"formatter_class": shape, "allow_abbrev": False, "add_help": False}
        super().__init__(prog, description=description, epilog=f"example:\n  {example}", **more)
        self.rare: list[tuple[argparse.Action, str]] = []
        self.add_argument("-h", "--help", action="help", help="show this help")
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option")

    def add_rare(self, *names: str, help: str, **options: Any) -> None:
        self.rare.append((self.add_argument(*names, help=argparse.SUPPRESS, **options), help))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {plain(message)} (see --help)\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        for action, text in parser.rare:
            action.help = text
        parser.print_help()
        parser.exit()


def add_options(parser: Parser) -> None:
    """Adds --output, --device and --precision."""
    parser.add_argument("--output", metavar="DIR", default="runs/predict", help="where files go (default: %(default)s)")
    add_device(parser)
    parser.add_rare("--precision", metavar="P", choices=("32", "bf16"), default="32", help="32 (default) or bf16")


def add_maps(parser: Parser) -> None:
    """Adds --maps."""
    parser.add_argument("--maps", action="store_true", help=f"also draw what the layers attend to, into {MAPS}")


def add_device(parser: Parser) -> None:
    """Adds --device."""
    devices = ("cpu", "cuda", "auto")
    parser.add_argument("--device", metavar="D", choices=devices, default="auto", help="cpu, cuda or auto (default)")


def count(text: str) -> int:
    """An integer of at least 1, as an argument's type."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 999999999, got '{text}'")
    return int(text)


def device_for(wanted: str) -> str:
    """The device that --device asks for; ValueError if it is missing."""
    import torch

    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise ValueError("--device cuda: no CUDA device found; use cpu or auto")
    return "cuda" if cuda and wanted != "cpu" else "cpu"


def check_packages(command: str, packages: Sequence[str], extra: str) -> None:
    """ValueError if one of the packages of an extra is missing; `command` is what the message says needs them."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f'{command} needs {", ".join(missing)}; run: pip install "zoo[{extra}]"')


def load_for(command: str, name: str) -> Checkpoint:
    """A checkpoint that `zoo COMMAND predict` can use; ValueError if it is of another task or has no head."""
    found = load(name)
    check_task(command, found, name)
    return found


def check_task(command: str, found: Checkpoint, name: str) -> None:
    """ValueError if a checkpoint is of another task or has no head."""
    config = found.model.config
    if config.task != command:
        other = f"use `zoo {config.task} predict`" if config.task else "no command predicts with it"
        raise ValueError(f"`zoo {command}` cannot use {name}; {other}")
    check_complete(found, name)


def load(name: str) -> Checkpoint:
    """A checkpoint; ValueError if it is a run."""
    from zoo.weights import load_checkpoint

    best = Path(name).expanduser() / "best"
    if (best / "config.json").is_file() and not (best.parent / "config.json").is_file():
        raise ValueError(f"{name} is a run, not a checkpoint; did you mean {Path(name) / 'best'}?")
    return load_checkpoint(name)


def check_complete(found: Checkpoint, name: str) -> None:
    """ValueError if a checkpoint has no preprocess or no head."""
    if found.preprocess is None:
        again = "load it, and save it with zoo.save_model(model, folder, preprocess=...)"
        raise ValueError(f"{name} has no preprocess in its config.json, so its input cannot be prepared; {again}")
    if not found.model.config.headed:
        raise ValueError(f"{name} is a backbone without a head, so it predicts nothing")


def load_recogniser(name: str) -> tuple[Model, AudioPreprocess, Tokenizer]:
    """A speech checkpoint's model, features and tokenizer; ValueError if one is missing."""
    return recogniser(load_for("transcribe", name), name)


def recogniser(found: Checkpoint, name: str) -> tuple[Model, AudioPreprocess, Tokenizer]:
    """The parts of a speech checkpoint; ValueError if it has no tokenizer."""
    model, preprocess, tokenizer, _ = found
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so its output cannot be turned into text")
    return model, preprocess, tokenizer  # pyright: ignore[reportReturnType]


def fused(model: Model) -> Model:
    """The model with its norms folded; itself if it was saved so."""
    from zoo.fusion import fuse

    return fuse(model) if model.fusion is None else model


def make_output(folder: Path) -> None:
    """Makes the folder of --output if it is missing; ValueError if a file has its name, OSError if it cannot be made
    or written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder; {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside(folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {reason(error)}") from error


def find_files(given: Sequence[str], extensions: tuple[str, ...], kind: str, drawn: Sequence[Path] = ()) -> list[str]:
    """The files among the given paths, and those below the folders among them; each once.

    Args:
        given: files and folders; a file given directly is used whatever its name.
        extensions: suffixes of files in a folder, in lower case.
        kind: the name of such a file in an error.
        drawn: files that are omitted from folders, such as the images of an earlier run.

    Raises:
        ValueError: a path does not exist, or a folder has no such file.
    """
    from zoo.inputs.folders import files_below

    omitted = {os.path.realpath(path) for path in drawn}
    found: list[str] = []
    for path in given:
        path = os.path.expanduser(path)
        if not os.path.exists(path):
            raise ValueError(f"file or folder not found: '{path}'")
        if not os.path.isdir(path):
            found.append(path)
            continue
        listed, _ = files_below(path, lambda name: name.lower().endswith(extensions))
        inside = [os.path.join(folder, name) for folder, names in listed.items() for name in names]
        inside = sorted(file for file in inside if os.path.realpath(file) not in omitted)
        if not inside:
            raise ValueError(f"no {kind} in folder '{path}' ({' '.join(extensions)})")
        found += inside
    return list(dict.fromkeys(found))


def write(
    output: Path,
    names: Sequence[str],
    columns: Sequence[str],
    entries: Any,
    draws: Mapping[str, Callable[[], Figure]],
    rows: list[dict[str, Any]] | None = None,
) -> list[str]:
    """Writes the entries as JSON, these columns of the rows (by default, of the entries) as CSV, and figures; `names`
    are the file names of the first two, `draws` gives each figure by its file name.

    All are written aside and renamed into place. A figure that cannot be drawn is reported, and the others are written.

    Returns:
        The names of the written files.

    Raises:
        OSError: a file cannot be written; no partial file is left.
    """
    try:
        with aside(output) as folder:
            made = [folder / name for name in names]
            # What is not Unicode in a file's name is written as \udcff, which is JSON's own form of it.
            with open(made[0], "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(entries, file, indent=2, ensure_ascii=False, allow_nan=False)
            with open(made[1], "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerows([columns, *([row.get(column) for column in columns] for row in rows or entries)])
            made += [folder / name for name, draw in draws.items() if _drawn(draw, folder / name)]
            for path in made:
                os.replace(path, output / path.name)
            return [path.name for path in made]
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error


def _drawn(draw: Callable[[], Figure], path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a text in a script that the font lacks
            draw().savefig(path)
    except OSError:
        raise
    except Exception as error:  # odd titles or images may raise any error here, and the predictions are already written
        report(f"{path.name} could not be drawn: {reason(error)}")
        return False
    return True


def fail(entry: dict[str, Any], error: Exception) -> None:
    """Notes in an entry, and reports, why its file has no prediction or only a partial one."""
    entry["error"] = message(error, entry["path"])
    report(f"{entry['path']}: {entry['error']}")


def message(error: Exception, path: str = "") -> str:
    """What an error says of the file `path`, in one line without the file's name."""
    known = isinstance(error, ValueError)  # may contain the file name
    return one_line(str(error).removeprefix(f"{path}: ") if known else f"{type(error).__name__}: {reason(error)}")


def finish(output: Path, written: Sequence[str], entries: Sequence[dict[str, Any]], kind: str) -> None:
    """Reports in one line what was written; ValueError if a file had an error. `kind` is the singular of the files."""
    failed, number = sum("error" in entry for entry in entries), counted(len(entries), kind)
    report(f"{len(entries) - failed} of {number} done; wrote {', '.join(written)} to {output}")
    if failed:
        raise ValueError(f"{failed} of {number} had an error")


def nothing_done(output: Path, entries: Sequence[dict[str, Any]], kind: str) -> ValueError:
    """The error where no file has a prediction."""
    few = f"the {kind}" if len(entries) == 1 else f"any of the {counted(len(entries), kind)}"
    return ValueError(f"no prediction for {few}; nothing was written to {output}")


def short(text: str, most: int, tail: int = 0) -> str:
    """At most so many characters in one line, the last `tail` of them kept."""
    text = plain(text)
    return text if len(text) <= most else text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def say(line: str) -> None:
    """Prints a prediction beside a progress bar, with escapes for what the terminal cannot show.

    If the reader closes the pipe, as `| head -1` does, the work continues silently.
    """
    _print(line, sys.stdout)


def report(line: str) -> None:
    """Prints a message on standard error."""
    _print(f"zoo: {line}", sys.stderr)


def _print(line: str, stream: Any) -> None:
    from tqdm import tqdm

    if stream is None:  # closed before the program began
        return
    try:
        tqdm.write(printable(line, stream), file=stream)
        stream.flush()
    except OSError as error:
        silence(stream)
        if not isinstance(error, BrokenPipeError) and stream is not sys.stderr:
            report(f"standard output: {reason(error)}")


def printable(text: str, stream: Any) -> str:
    """A text in one line, with escapes for what a stream cannot show."""
    encoding = stream.encoding or "utf-8"
    return plain(text).encode(encoding, "backslashreplace").decode(encoding)


def silence(stream: Any) -> None:
    """Discards everything written from now on, including what Python flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
