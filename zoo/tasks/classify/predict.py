"""`zoo classify predict`: what a checkpoint sees in pictures, as lines, as JSON and CSV, and as a picture."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm

from zoo.inputs.images import ImagePreprocess, UnreadableImage, read_image
from zoo.tasks import predicting as files
from zoo.tasks.predicting import BAR, CARD, GREY, INK, TRACK, count, plain, say, short

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FILES = ("predictions.json", "predictions.csv", "predictions.png")
COLUMNS = ("path", "label", "probability", "index", "error")
SHOWN, SIDE = 36, 320  # pictures in predictions.png, and the pixels of each that are kept


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
    files.add_options(made)
    made.add_argument("--top", type=count, default=5, help="answers per picture in the JSON (default: %(default)s)")
    made.add_argument("--batch", type=count, default=32, help="pictures computed at once (default: %(default)s)")
    return made


def main(arguments: list[str]) -> None:
    """Answers pictures as the arguments say. ValueError at the end where a picture could not be read."""
    given = parser().parse_intermixed_args(arguments)
    output, device = Path(given.output), files.device_for(given.device)
    paths = files.find_files(given.paths, is_image_file, "picture", output / FILES[2])
    model, preprocess, names, _ = files.load_for("classify", given.name)
    assert isinstance(preprocess, ImagePreprocess)
    labels = list(names) if isinstance(names, tuple) else [f"class {index}" for index in range(model.config.labelled)]
    files.make_output(output)  # before the work, so that a bad name costs none

    entries, shown = predict(paths, model.to(device), preprocess, labels, given.top, given.batch, given.precision)
    failed = sum("error" in entry for entry in entries)
    if failed == len(entries):
        raise ValueError(f"none of the {failed} pictures could be read; nothing was written to {output}")
    write(output, entries, shown)
    say(f"wrote {', '.join(FILES)} to {output}", sys.stderr)
    if failed:
        raise ValueError(f"{failed} of {len(entries)} pictures could not be read")


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
                    say(f"zoo: {error}", sys.stderr)
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
                path, label = (plain(entry[key]).ljust(width) for key, width in zip(COLUMNS, widths, strict=False))
                say(f"{path}  {label}  {entry['probability']:6.1%}", sys.stdout)
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
    """Writes all files; OSError where that fails, with no half file left."""
    files.write(output, FILES, COLUMNS, entries, lambda: draw(entries, shown))


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
        axes.set_title(short(entry["label"], int(9 * side)), loc="left", fontweight="bold", **style)
        axes.set_title(f"{entry['probability']:.1%}", loc="right", **style)
        style = {"va": "top", "fontsize": 7, "color": GREY, "parse_math": False}
        axes.text(0, -0.06, short(os.path.basename(entry["path"]), 32, 8), transform=axes.transAxes, **style)
    figure.text(0.5, 0.14 / height, "; ".join(notes), ha="center", fontsize=9, color=GREY)
    return figure
