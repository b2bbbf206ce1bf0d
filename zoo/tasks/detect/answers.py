"""Detects objects image by image, and draws a figure of the results."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from zoo.inputs.boxes import on_canvas
from zoo.outputs.answers import class_names
from zoo.outputs.boxes import Found, best
from zoo.outputs.label_map import LabelMap
from zoo.tasks.predicting import CARD, GREY, INK, fail, say, short
from zoo.text import plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from zoo.weights import Checkpoint

SHOWN, SIDE = 16, 640  # images in the figure, and the longest side of each that is kept
COLOURS = ("#2f6fb5", "#d1495b", "#2a9d5c", "#e09f3e", "#7b5ea7", "#008b8b", "#b5651d", "#c2185b")


@dataclass
class Detector:
    """A model with its pre- and postprocessing; called with prepared images, it gives the objects of each, or its
    error."""

    model: nn.Module
    preprocess: Any
    labels: LabelMap
    threshold: float
    top: int
    precision: str

    def __call__(self, parts: list[Any]) -> list[list[dict[str, Any]] | Exception]:
        if not parts:
            return []
        try:
            found = self._found(parts)
        except Exception as error:  # one image is faulty, or the batch is too large for the memory
            return [error] if len(parts) == 1 else [answer for part in parts for answer in self([part])]
        return [self._objects(*(each[index] for each in found)) for index in range(len(parts))]

    @torch.inference_mode()
    def _found(self, parts: list[Any]) -> Found:
        device = next(self.model.parameters()).device
        batch, mask = on_canvas([part.image for part in parts])
        sizes = torch.tensor([part.size for part in parts])
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(batch.to(device), None if mask is None else mask.to(device))
        logits, boxes = output["logits"].float().cpu(), output["boxes"].float().cpu()
        config: Any = self.model.config
        return best(logits, boxes, sizes, len(self.labels), self.top, config.detection_nms)

    def _objects(self, labels: Tensor, scores: Tensor, boxes: Tensor) -> list[dict[str, Any]]:
        kept = scores >= self.threshold
        columns = (labels[kept].tolist(), scores[kept].tolist(), boxes[kept].tolist())
        return [
            {
                "label": self.labels.names[label],
                "category_id": self.labels.ids[label],
                "score": score,
                "box": [round(edge, 2) for edge in box],  # left, top, right, bottom
            }
            for label, score, box in zip(*columns, strict=True)
        ]


def detector(found: Checkpoint, threshold: float, top: int, precision: str = "32", device: str = "cpu") -> Detector:
    """What `zoo detect predict` asks, of a detector's checkpoint."""
    model: Any = found.model.to(device)
    labels: Any = found.labels or LabelMap.from_names(class_names(None, model.config.labelled))
    return Detector(model, found.preprocess, labels, threshold, top, precision)


def predict(
    paths: Sequence[str], answer: Detector, batch: int
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Image]]]:
    """Detects objects batch by batch and prints a line for each image; errors of single images are reported.

    Returns an entry for each path, with its `objects` or its `error`, and the first ones with small images.
    """
    entries: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Image]] = []
    width = min(60, max((len(plain(path)) for path in paths), default=0))
    with tqdm(total=len(paths), unit="image", disable=None if len(paths) > batch else True) as bar:
        for start in range(0, len(paths), batch):
            waiting: list[tuple[dict[str, Any], Any, Image | None]] = []
            for path in paths[start : start + batch]:
                entries.append({"path": path})
                try:
                    image = answer.preprocess.read(path)
                    (part,) = answer.preprocess.parts(image)
                    keep = len(shown) + len(waiting) < SHOWN
                    entries[-1] |= {"width": image.width, "height": image.height}
                    if keep:
                        image.thumbnail((SIDE, SIDE))
                except Exception as error:
                    fail(entries[-1], error)
                    continue
                waiting.append((entries[-1], part, image if keep else None))
            answers = answer([part for _, part, _ in waiting])
            for (entry, _, image), found in zip(waiting, answers, strict=True):
                if isinstance(found, Exception):
                    fail(entry, found)
                    continue
                entry["objects"] = found
                say(f"{plain(entry['path']).ljust(width)}  {summary(found)}")
                if image is not None:
                    shown.append((entry, image))
            bar.update(min(batch, len(paths) - start))
    return entries, shown


def summary(objects: list[dict[str, Any]]) -> str:
    """How many objects of each category, the most frequent first: "7 fish, 1 shark"."""
    numbers: dict[str, int] = {}
    for each in objects:
        numbers[each["label"]] = numbers.get(each["label"], 0) + 1
    ordered = sorted(numbers.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{number} {plain(label)}" for label, number in ordered) or "no objects"


def answered(entry: dict[str, Any]) -> bool:
    """Whether an image has its objects, or a video at least one frame with them."""
    return "objects" in entry or bool(entry.get("frames"))


def flat(entries: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An entry for each image and each frame of a video; and one for the error of a video."""
    for entry in entries:
        yield from ({"path": entry["path"]} | frame for frame in entry.get("frames", ()))
        if "frames" not in entry or "error" in entry:
            yield {key: value for key, value in entry.items() if key != "frames"}


def to_coco(entries: Sequence[dict[str, Any]], labels: LabelMap) -> dict[str, Any]:
    """The entries in COCO's format, with a score for each annotation; boxes are (left, top, width, height). A frame of
    a video is an image with its number, from 0, and its time in seconds."""
    images, annotations = [], []
    for number, entry in enumerate(flat(entries), 1):
        images.append({"id": number, "file_name": entry["path"], "width": entry.get("width")})
        more = ("frame", "time", "error")
        images[-1] |= {"height": entry.get("height")} | {key: entry[key] for key in more if key in entry}
        for each in entry.get("objects", ()):
            left, top, right, bottom = each["box"]
            box = [left, top, round(right - left, 2), round(bottom - top, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": each["category_id"],
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": each["score"],
                }
            )
    return {"images": images, "categories": labels.to_dict()["categories"], "annotations": annotations}


def table(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each object, and one for each image or frame without any or with an error."""
    rows = []
    for entry in flat(entries):
        edges = ("left", "top", "right", "bottom")
        place = {key: entry.get(key) for key in ("path", "frame", "time")}
        rows += [
            place
            | {key: each[key] for key in ("label", "category_id", "score")}
            | dict(zip(edges, each["box"], strict=True))
            for each in entry.get("objects", ())
        ] or [place | {"error": entry.get("error")}]
    return rows


def colours_of(labels: LabelMap) -> dict[str, str]:
    """A colour for each name of a category."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(labels.names)}


def draw(entries: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Image]], labels: LabelMap) -> Figure:
    """The images in a grid, each with its boxes, labels and scores, and its file name below."""
    columns = min(4, math.ceil(math.sqrt(len(shown))))
    side, gap, between = (3.6 if columns > 1 else 6.4), 0.24, 0.3  # inches; `between` holds the file name
    failed = sum("error" in entry for entry in entries)
    more = sum(map(answered, entries)) - len(shown)
    notes = [f"and {more} more in detections.json"] * bool(more) + [f"{failed} had an error"] * bool(failed)
    width = gap + columns * (side + gap)
    height = gap + math.ceil(len(shown) / columns) * (side + between) + 0.3 * bool(notes)
    figure = Figure((width, height), dpi=120, facecolor="white")
    colours = colours_of(labels)
    for number, (entry, image) in enumerate(shown):
        left = gap + number % columns * (side + gap)
        bottom = height - gap - side - number // columns * (side + between)
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        axes.set(xticks=[], yticks=[], facecolor=CARD)
        axes.spines[:].set_visible(False)
        axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
        (x, y), half = image.size, max(image.size)
        axes.set(xlim=((x - half - 1) / 2, (x + half - 1) / 2), ylim=((y + half - 1) / 2, (y - half - 1) / 2))
        scale = x / entry["width"]
        for each in reversed(entry["objects"]):  # the best last, on top
            start, top, end, low = (edge * scale for edge in each["box"])
            colour = colours[each["label"]]
            axes.add_patch(Rectangle((start, top), end - start, low - top, fill=False, color=colour, lw=1.2))
            style: dict[str, Any] = {"fontsize": 5.5, "color": "white", "va": "bottom", "parse_math": False}
            around = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            text = f"{short(each['label'], 18)} {each['score']:.0%}"
            axes.text(start, top, text, bbox=around, clip_on=True, **style)
        style = {"va": "top", "fontsize": 7, "color": GREY, "parse_math": False}
        axes.text(0, -0.02, short(os.path.basename(entry["path"]), 40, 8), transform=axes.transAxes, **style)
        axes.text(1, -0.02, short(summary(entry["objects"]), 44), transform=axes.transAxes, ha="right", **style)
    figure.text(0.5, 0.1 / height, "; ".join(notes), ha="center", fontsize=9, color=INK)
    return figure
