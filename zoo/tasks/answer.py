"""`zoo classify predict`: what a checkpoint sees in pictures, as lines, as JSON and CSV, and as a picture."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm

from zoo.preprocess import ImagePreprocess, UnreadableImage, read_image
from zoo.weights import load_checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FILES = ("predictions.json", "predictions.csv", "predictions.png")
COLUMNS = ("path", "label", "probability", "index", "error")
SHOWN, SIDE = 36, 320  # pictures in predictions.png, and the pixels of each that are kept
INK, GREY, CARD, TRACK, BAR = "#1f2933", "#7b8794", "#f1f3f5", "#d9dee3", "#2f6fb5"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="zoo classify predict",
        description="Answers what is in pictures: prints path, answer and probability of each, and writes "
        f"{', '.join(FILES)}. A picture that cannot be read is reported and the others are answered; the exit status "
        "is then 1.",
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", help="a checkpoint: a folder, a name in checkpoints/, OWNER/NAME (Hub)")
    searched = "a picture, or a folder to search, with all below it, for pictures that are not hidden"
    made.add_argument("paths", metavar="PATH", nargs="+", help=searched)
    made.add_argument("--output", default="runs/predict", help="folder for the files (default: %(default)s)")
    made.add_argument("--top", type=_count, default=5, help="answers per picture in the JSON (default: %(default)s)")
    made.add_argument("--batch", type=_count, default=32, help="pictures computed at once (default: %(default)s)")
    made.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: %(default)s")
    made.add_argument("--precision", choices=("32", "bf16"), default="32", help="default: %(default)s")
    return made


def main(arguments: list[str]) -> None:
    """Answers pictures as the arguments say. ValueError at the end where a picture could not be read."""
    given = parser().parse_intermixed_args(arguments)
    output, cuda = Path(given.output), torch.cuda.is_available()
    if given.device == "cuda" and not cuda:
        raise ValueError("--device cuda: there is no CUDA device here; use cpu or auto")
    paths = find_pictures(given.paths, output / FILES[2])
    model, preprocess, labels, _ = load_checkpoint(given.name)
    classes: int = getattr(model.config, "classes", 0)
    if preprocess is None:
        raise ValueError(f"{given.name} does not say how to prepare a picture: its config.json has no preprocess")
    if not classes:
        raise ValueError(f"{given.name} is a backbone without classes, so it has no answer")
    labels = labels or [f"class {index}" for index in range(classes)]
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: this is a file, and a folder is needed")
    output.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad name costs none

    model = model.to("cuda" if cuda and given.device != "cpu" else "cpu")
    entries, shown = predict(paths, model, preprocess, labels, given.top, given.batch, given.precision)
    failed = sum("error" in entry for entry in entries)
    if failed == len(entries):
        raise ValueError(f"none of the {failed} pictures could be read; nothing was written to {output}")
    write(output, entries, shown)
    _say(f"wrote {', '.join(FILES)} to {output}", sys.stderr)
    if failed:
        raise ValueError(f"{failed} of {len(entries)} pictures could not be read")


def find_pictures(given: Sequence[str], drawn: Path) -> list[str]:
    """The files among the given paths, and the pictures below the folders among them, sorted; each once.

    `drawn`, the picture of an earlier run, is left out of folders. ValueError where a path does not exist, or a folder
    has no picture.
    """
    found: list[str] = []
    for path in given:
        if not os.path.exists(path):
            raise ValueError(f"there is no file or folder '{path}'")
        pictures = sorted(_below(path, os.path.realpath(drawn))) if os.path.isdir(path) else [path]
        if not pictures:
            raise ValueError(f"there is no picture in the folder '{path}'")
        found += pictures
    return list(dict.fromkeys(found))


def _below(top: str, drawn: str) -> Iterator[str]:
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
            if is_image_file(name) and not name.startswith(".") and os.path.join(real, name) != drawn:
                yield os.path.join(folder, name)


def predict(
    paths: Sequence[str],
    model: nn.Module,
    preprocess: ImagePreprocess,
    labels: Sequence[str],
    top: int,
    batch: int,
    precision: str,
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Picture]]]:
    """Answers the pictures batch by batch and prints each answer.

    Returns an entry of predictions.json for each path, and the first entries with their pictures, small, to be shown.
    """
    entries: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Picture]] = []
    widths = [min(most, max(map(len, texts))) for most, texts in ((60, paths), (30, labels))]
    with tqdm(total=len(paths), unit="picture", disable=None if len(paths) > batch else True) as bar:
        for start in range(0, len(paths), batch):
            waiting: list[dict[str, Any]] = []
            images: list[Tensor] = []
            for path in paths[start : start + batch]:
                entries.append({"path": path})
                try:
                    picture = read_image(path, preprocess.channels)
                except UnreadableImage as error:
                    entries[-1]["error"] = str(error).removeprefix(f"{path}: ")
                    _say(f"zoo: {error}", sys.stderr)
                    continue
                waiting.append(entries[-1])
                images.append(preprocess(picture))
                if len(shown) < SHOWN:
                    picture.thumbnail((SIDE, SIDE))
                    shown.append((entries[-1], picture))
            for entry, best in zip(waiting, _best(model, images, labels, top, precision), strict=True):
                if not math.isfinite(best[0]["probability"]):
                    raise ValueError(f"the model's answer to {entry['path']} is not a number")
                entry |= best[0] | {"top": best}
                path, label = (_plain(entry[key]).ljust(width) for key, width in zip(COLUMNS, widths, strict=False))
                _say(f"{path}  {label}  {entry['probability']:6.1%}", sys.stdout)
            bar.update(min(batch, len(paths) - start))
    return entries, shown


@torch.inference_mode()
def _best(
    model: nn.Module, images: list[Tensor], labels: Sequence[str], top: int, precision: str
) -> list[list[dict[str, Any]]]:
    """For each image the most probable classes, the best first."""
    if not images:
        return []
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(torch.stack(images).to(device))
    found = logits.float().softmax(-1).topk(min(top, len(labels)))
    return [
        [{"label": labels[i], "index": i, "probability": p} for p, i in zip(*row, strict=True)]
        for row in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]


def write(output: Path, entries: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Picture]]) -> None:
    """Writes all files aside and renames them into place; OSError where that fails, with no half file left."""
    try:
        with tempfile.TemporaryDirectory(prefix=".predictions-", dir=output) as folder:
            aside = [Path(folder, name) for name in FILES]
            # What is no Unicode in a file's name is written as \udcff, which is JSON's own form of it.
            with open(aside[0], "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(entries, file, indent=2, ensure_ascii=False, allow_nan=False)
            with open(aside[1], "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerows([COLUMNS, *([entry.get(column) for column in COLUMNS] for entry in entries)])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # a label in a script that the font lacks
                draw(entries, shown).savefig(aside[2])
            for path in aside:
                os.replace(path, output / path.name)
    except OSError as error:
        raise OSError(f"cannot write to {output}: {error.strerror or error}") from error


def draw(entries: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Picture]]) -> Figure:
    """The pictures in a grid, each with its answer and probability above and its file name below."""
    columns = min(6, math.ceil(math.sqrt(len(shown))))
    side, gap, between = (2.1 if columns > 1 else 3.6), 0.28, 0.62  # inches; `between` holds the texts
    failed = sum("error" in entry for entry in entries)
    more = len(entries) - failed - len(shown)
    notes = [f"and {more} more in {FILES[0]}"] * bool(more) + [f"{failed} could not be read"] * bool(failed)

    width = gap + columns * (side + gap)
    height = gap + math.ceil(len(shown) / columns) * (side + between) + 0.3 * bool(notes)
    figure = Figure((width, height), dpi=120, facecolor="white")
    for number, (entry, picture) in enumerate(shown):
        left = gap + number % columns * (side + gap)
        bottom = height - gap / 2 - 0.3 - side - number // columns * (side + between)
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        axes.set(xticks=[], yticks=[], facecolor=CARD)
        axes.spines[:].set_visible(False)
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
        (x, y), half = picture.size, max(picture.size)
        axes.set(xlim=((x - half - 1) / 2, (x + half - 1) / 2), ylim=((y + half - 1) / 2, (y - half - 1) / 2))
        for share, colour in ((1.0, TRACK), (entry["probability"], BAR)):
            axes.add_patch(
                Rectangle((0, -0.03), share, 0.03, transform=axes.transAxes, clip_on=False, color=colour, lw=0)
            )
        style: dict[str, Any] = {"pad": 5, "fontsize": 9, "color": INK, "parse_math": False}
        axes.set_title(_short(entry["label"], int(9 * side)), loc="left", fontweight="bold", **style)
        axes.set_title(f"{entry['probability']:.1%}", loc="right", **style)
        style = {"va": "top", "fontsize": 7, "color": GREY, "parse_math": False}
        axes.text(0, -0.06, _short(os.path.basename(entry["path"]), 32, 8), transform=axes.transAxes, **style)
    figure.text(0.5, 0.14 / height, "; ".join(notes), ha="center", fontsize=9, color=GREY)
    return figure


def _short(text: str, most: int, tail: int = 0) -> str:
    """At most so many characters in one line, the last `tail` of them kept."""
    text = _plain(text)
    return text if len(text) <= most else text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def _plain(text: str) -> str:
    """Escapes what is not printable: a file's name may hold line breaks or a terminal's commands."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _say(line: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    tqdm.write(_plain(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{text}'")
    return int(text)
