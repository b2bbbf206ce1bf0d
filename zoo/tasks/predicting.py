"""What the `predict` commands share: which files are meant, what a terminal is told, what is written."""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from tqdm import tqdm

from zoo.inputs.audio import AudioPreprocess
from zoo.models.base import Model
from zoo.outputs.tokens import Tokenizer
from zoo.text import reason
from zoo.weights import Checkpoint, load_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, CARD, TRACK, BAR = "#1f2933", "#7b8794", "#f1f3f5", "#d9dee3", "#2f6fb5"  # colours of what is drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --output, --device and --precision."""
    parser.add_argument("--output", default="runs/predict", help="folder for the files (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: %(default)s")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="default: %(default)s")


def device_for(wanted: str) -> str:
    """The device that --device asks for; ValueError where there is none."""
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise ValueError("--device cuda: there is no CUDA device here; use cpu or auto")
    return "cuda" if cuda and wanted != "cpu" else "cpu"


def load_for(command: str, name: str) -> Checkpoint:
    """A checkpoint that `zoo COMMAND predict` can use; ValueError where it is of another task, or gives no answer."""
    found = load_checkpoint(name)
    config = found.model.config
    if config.task != command:
        other = f"use `zoo {config.task} predict`" if config.task else "no command predicts with it"
        raise ValueError(f"{name} is not a model for `zoo {command}`; {other}")
    if found.preprocess is None:
        raise ValueError(f"{name} does not say how to prepare its input: its config.json has no preprocess")
    if not config.labelled:
        raise ValueError(f"{name} is a backbone without a head, so it has no answer")
    return found


def load_recogniser(name: str) -> tuple[Model, AudioPreprocess, Tokenizer]:
    """A speech checkpoint's model, features and tokenizer; ValueError where it is none."""
    model, preprocess, tokenizer, _ = load_for("transcribe", name)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so its answer is not text")
    return model, preprocess, tokenizer  # pyright: ignore[reportReturnType]


def make_output(folder: Path) -> None:
    """Makes the folder of --output where it is missing; ValueError where a file has its name."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: this is a file, and a folder is needed")
    folder.mkdir(parents=True, exist_ok=True)


def find_files(given: Sequence[str], fits: Callable[[str], bool], kind: str, drawn: Path | None = None) -> list[str]:
    """The files among the given paths, and those below the folders among them whose name fits, sorted; each once.

    Args:
        given: files and folders; a file that is named is taken whatever its name.
        fits: says of a file's name whether it is wanted.
        kind: what such a file is called in an error.
        drawn: a file that is left out of folders, such as the picture of an earlier run.

    Raises:
        ValueError: a path does not exist, or a folder has no such file.
    """
    found: list[str] = []
    for path in given:
        if not os.path.exists(path):
            raise ValueError(f"there is no file or folder '{path}'")
        left_out = None if drawn is None else os.path.realpath(drawn)
        files = sorted(_below(path, fits, left_out)) if os.path.isdir(path) else [path]
        if not files:
            raise ValueError(f"there is no {kind} in the folder '{path}'")
        found += files
    return list(dict.fromkeys(found))


def _below(top: str, fits: Callable[[str], bool], left_out: str | None) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()  # links to folders are followed, but never in circles
    for folder, folders, names in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if fits(name) and not name.startswith(".") and os.path.join(real, name) != left_out:
                yield os.path.join(folder, name)


def write(
    output: Path,
    names: Sequence[str],
    columns: Sequence[str],
    entries: list[dict[str, Any]],
    draw: Callable[[], Figure],
) -> None:
    """Writes the entries as JSON and, these columns of them, as CSV, and a picture; `names` are those of the three.

    All are written aside and renamed into place. OSError where that fails, with no half file left.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".predictions-", dir=output) as folder:
            aside = [Path(folder, name) for name in names]
            # What is no Unicode in a file's name is written as \udcff, which is JSON's own form of it.
            with open(aside[0], "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(entries, file, indent=2, ensure_ascii=False, allow_nan=False)
            with open(aside[1], "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerows([columns, *([entry.get(column) for column in columns] for entry in entries)])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # a text in a script that the font lacks
                draw().savefig(aside[2])
            for path in aside:
                os.replace(path, output / path.name)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {reason(error)}") from error


def short(text: str, most: int, tail: int = 0) -> str:
    """At most so many characters in one line, the last `tail` of them kept."""
    text = plain(text)
    return text if len(text) <= most else text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def plain(text: str) -> str:
    """Escapes what is not printable: a file's name may hold line breaks or a terminal's commands."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(line: str, stream: TextIO) -> None:
    """Prints a line beside a progress bar, with escapes for what the stream cannot show."""
    encoding = stream.encoding or "utf-8"
    tqdm.write(plain(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def count(text: str) -> int:
    """A whole number above 0, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{text}'")
    return int(text)
