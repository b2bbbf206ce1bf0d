"""Predicts images batch by batch, and draws a figure of the results."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from zoo.inputs.images import read_image
from zoo.outputs.answers import checked, class_names
from zoo.tasks.predicting import BAR, CARD, GREY, INK, TRACK, fail, say, short
from zoo.text import plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from zoo.weights import Checkpoint

SHOWN, SIDE = 36, 320  # images in predictions.png, and the pixels of each that are kept
SURE = 0.6  # below this probability, predictions.png shows the next two classes too


@dataclass
class Classifier:
    """A model with its pre- and postprocessing; called with images [C, H, W], it gives the most probable classes of
    each, or its error."""

    model: nn.Module
    preprocess: Any
    labels: Sequence[str]
    top: int
    precision: str

    def __call__(self, images: list[Tensor]) -> list[list[dict[str, Any]] | Exception]:
        if not images:
            return []
        try:
            logits = self.logits(images)
        except Exception as error:  # one image is faulty, or the batch is too large for the memory
            return [error] if len(images) == 1 else [answer for image in images for answer in self([image])]
        return [self._best(row) for row in logits]

    @torch.inference_mode()
    def logits(self, images: Sequence[Tensor]) -> Tensor:
        """The logits [B, classes] of images [C, H, W], on the CPU."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(torch.stack([*images]).to(device)).float().cpu()

    def _best(self, logits: Tensor) -> list[dict[str, Any]] | Exception:
        try:
            found = checked(logits).softmax(-1).topk(min(self.top, len(self.labels)))
        except ValueError as error:
            return error
        pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        return [{"label": self.labels[index], "index": index, "probability": each} for each, index in pairs]


def classifier(found: Checkpoint, top: int, precision: str = "32", device: str = "cpu") -> Classifier:
    """What `zoo classify predict` asks, of a classifier's checkpoint."""
    model: Any = found.model.to(device)
    names: Any = found.labels
    return Classifier(model, found.preprocess, class_names(names, model.config.labelled), top, precision)


def predict(
    paths: Sequence[str], answer: Classifier, batch: int
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Image]]]:
    """Predicts the images batch by batch and prints each prediction; errors of single images are reported.

    Returns an entry of predictions.json for each path, and the first predicted ones with small images.
    """
    entries: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Image]] = []
    width = min(60, max(len(plain(path)) for path in paths))
    wide = min(30, max(map(len, answer.labels)))
    with tqdm(total=len(paths), unit="image", disable=None if len(paths) > batch else True) as bar:
        for start in range(0, len(paths), batch):
            waiting: list[tuple[dict[str, Any], Image | None]] = []
            inputs: list[Tensor] = []
            for path in paths[start : start + batch]:
                entries.append({"path": path})
                try:
                    image = read_image(path, answer.preprocess.channels)
                    prepared = answer.preprocess(image)
                    keep = len(shown) + len(waiting) < SHOWN
                    if keep:
                        image.thumbnail((SIDE, SIDE))
                except Exception as error:
                    fail(entries[-1], error)
                    continue
                inputs.append(prepared)
                waiting.append((entries[-1], image if keep else None))
            for (entry, image), best in zip(waiting, answer(inputs), strict=True):
                if isinstance(best, Exception):
                    fail(entry, best)
                    continue
                entry |= best[0] | {"top": best}
                path, label = plain(entry["path"]).ljust(width), plain(entry["label"]).ljust(wide)
                say(f"{path}  {label}  {entry['probability']:6.1%}")
                if image is not None:
                    shown.append((entry, image))
            bar.update(min(batch, len(paths) - start))
    return entries, shown


def draw(
    entries: list[dict[str, Any]],
    shown: list[tuple[dict[str, Any], Image]],
    wide: float = 1.0,
    under: Sequence[str] = (),
    about: str = "",
) -> Figure:
    """The images in a grid, each with its label and probability above, and its file name and other guesses below.

    Args:
        entries: those of predictions.json.
        shown: the entries and images that are drawn.
        wide: the width of a place for an image over its height.
        under: a text for each image, in place of the other guesses.
        about: a text below all.
    """
    columns = min(int(6 / wide), math.ceil(math.sqrt(len(shown) / wide)))
    side, gap, between = (2.1 if columns > 1 else 3.6), 0.28, 0.7  # inches; `between` holds the texts
    failed = sum("error" in entry for entry in entries)
    more = len(entries) - failed - len(shown)
    notes = [f"and {more} more in predictions.json"] * bool(more) + [f"{failed} had an error"] * bool(failed)

    width = gap + columns * (wide * side + gap)
    last = [*textwrap.wrap(about, int(13 * width)), *["; ".join(notes)] * bool(notes)]
    height = gap + math.ceil(len(shown) / columns) * (side + between) + 0.3 * bool(last) + 0.17 * len(last[1:])
    figure = Figure((width, height), dpi=120, facecolor="white")
    for number, (entry, image) in enumerate(shown):
        left = gap + number % columns * (wide * side + gap)
        bottom = height - gap / 2 - 0.3 - side - number // columns * (side + between)
        axes = figure.add_axes((left / width, bottom / height, wide * side / width, side / height))
        axes.set(xticks=[], yticks=[], facecolor=CARD)
        axes.spines[:].set_visible(False)
        axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
        x, y = image.size
        tall = max(x / wide, y)
        axes.add_patch(Rectangle((-0.5, -0.5), x, y, fill=False, edgecolor=GREY, lw=0.5, clip_on=False))
        axes.set(xlim=((x - wide * tall - 1) / 2, (x + wide * tall - 1) / 2))
        axes.set(ylim=((y + tall - 1) / 2, (y - tall - 1) / 2))
        for share, colour in ((1.0, TRACK), (entry["probability"], BAR)):
            axes.add_patch(
                Rectangle((0, -0.03), share, 0.03, transform=axes.transAxes, clip_on=False, color=colour, lw=0)
            )
        style: dict[str, Any] = {"pad": 5, "fontsize": 9, "color": INK, "parse_math": False}
        axes.set_title(short(entry["label"], int(9 * wide * side)), loc="left", fontweight="bold", **style)
        axes.set_title(f"{entry['probability']:.1%}", loc="right", **style)
        style = {"va": "top", "fontsize": 7, "color": GREY, "parse_math": False}
        lines = [short(os.path.basename(entry["path"]), 32, 8)]
        if under:
            lines.append(under[number])
        elif entry["probability"] < SURE and (others := entry["top"][1:3]):
            guesses = (f"{short(other['label'], 11)} ({other['probability']:.1%})" for other in others)
            lines.append(f"or {', '.join(guesses)}")
        axes.text(0, -0.06, "\n".join(lines), transform=axes.transAxes, **style)
    figure.text(0.5, 0.1 / height, "\n".join(last), ha="center", va="bottom", fontsize=9, color=GREY)
    return figure
