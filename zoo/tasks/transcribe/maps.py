"""What the frames of a speech encoder attend to: the weights of each block over time, and the figure of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from zoo.mixers.relative import Grouped
from zoo.tasks.maps import weights_of
from zoo.tasks.predicting import BAR, GREY, INK, short
from zoo.tasks.transcribe.transcripts import COLOURS, Transcriber, lasts, shown, span_of, ticks_of

MOST, COLUMNS = 4, 6  # files in maps.png, and maps in a row
ABOUT = "Each row is a time, and shows which times it attends to (mean over the heads)"


class Heard(NamedTuple):
    """Weights [N, N] of a layer, the mean over its heads; the seconds per row and column; and the number of its
    block."""

    weights: Tensor
    step: float
    block: int


def heard(transcribe: Transcriber, features: Tensor) -> list[Heard]:
    """The weights of each layer that has explicit ones, for features [T, mels]. Rows and columns are tokens at the
    frame rate of the block, or `size` tokens in a layer of grouped attention.

    Raises:
        ValueError: no layer has explicit weights.
    """
    model: Any = transcribe.model
    found = weights_of(model, features[None], transcribe.precision)
    made = []
    for index, (block, stride) in enumerate(zip(model.blocks, model.strides, strict=True)):
        frames = stride // block.stride  # a block that halves the frame rate attends before it does
        for name, weights in found.items():
            if name.startswith(f"blocks.{index}."):
                layer = model.get_submodule(name)
                size = layer.size if isinstance(layer, Grouped) else 1
                made.append(Heard(weights[0].mean(0), transcribe.preprocess.seconds_per_frame * frames * size, index))
    return made


def draw(entries: Sequence[dict[str, Any]], transcribe: Transcriber) -> Figure:
    """The weights of every block for the first seconds of the first files; words are marked at the top and on the
    left."""
    model: Any = transcribe.model
    files = [(entry, heard(transcribe, bands)) for entry, bands in shown(entries, transcribe.preprocess, MOST)]
    depth = len(model.blocks)
    number = len({each.block for each in files[0][1]})
    whole = sum("error" not in entry for entry in entries)
    about = ABOUT + f"; {number} of {depth} blocks have attention weights" * (number < depth)
    about += f"; the first {len(files)} of {whole} files" * (whole > len(files))

    width, edge, gap, above, under = 11.0, 0.5, 0.2, 1.05, 0.45  # inches; `above` holds the words
    columns = min(COLUMNS, len(files[0][1]))
    side = min(3.0, (width - edge - gap * columns) / columns)
    rows = -(-len(files[0][1]) // columns)
    high = above + rows * (side + under)
    height = len(files) * high + 0.4
    figure, top = Figure((width, height), dpi=120, facecolor="white"), height
    for entry, layers in files:
        style: dict[str, Any] = {"fontsize": 8, "parse_math": False, "color": GREY, "va": "top"}
        figure.text(edge / width, (top - 0.15) / height, short(os.path.basename(entry["path"]), 80, 12), **style)
        figure.text(1 - gap / width, (top - 0.15) / height, lasts(entry), ha="right", **style)
        for place, layer in enumerate(layers):
            row, column = divmod(place, columns)
            left, bottom = edge + column * (side + gap), top - above - side - row * (side + under)
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            _draw_weights(axes, layer, span_of(entry), -0.21 / side)
            if column:
                axes.set_yticklabels([])
            _mark(axes, entry, 0.1 / side if row == 0 else None)
        top -= high
    figure.text(0.5, 0.12 / height, about, ha="center", fontsize=9, color=GREY)
    return figure


def _draw_weights(axes: Axes, layer: Heard, span: float, below: float) -> None:
    last, dark = layer.step * len(layer.weights), float(layer.weights.quantile(0.995))
    axes.imshow(layer.weights.numpy(), cmap=COLOURS, vmin=0, vmax=max(dark, 1e-6), extent=(0, last, last, 0))
    axes.set(xlim=(0, span), ylim=(span, 0))
    axes.spines[:].set_visible(False)
    ticks = ticks_of(span, 5)
    axes.set_xticks(ticks, [f"{tick:g} s" for tick in ticks])
    axes.set_yticks(ticks, [f"{tick:g} s" for tick in ticks])
    axes.tick_params(labelsize=6, labelcolor=GREY, color=GREY, length=2, pad=2)
    axes.tick_params(axis="y", pad=6)
    style: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 7}
    axes.text(0.0, below, f"block {layer.block}", color=INK, **style)
    axes.text(1.0, below, f"darkest from {dark:.2g}", color=GREY, ha="right", **style)


def _mark(axes: Axes, entry: dict[str, Any], apart: float | None) -> None:
    """Marks when the words are heard, along both axes; and writes them, at least `apart` in widths of the map, if it is
    given."""
    span, free = span_of(entry), 0.0
    along = ((axes.get_xaxis_transform(), 1.02), (axes.get_yaxis_transform(), -0.02))
    for word in entry["words"] or ():
        if (start := word["start"]) >= span:
            continue
        times = [start, min(word["end"], span)]
        for number, (transform, beside) in enumerate(along):
            places = ([beside] * 2, times) if number else (times, [beside] * 2)
            axes.plot(*places, color=BAR, lw=2.5, solid_capstyle="butt", transform=transform, clip_on=False)
        if apart is not None and start >= free:
            free = start + apart * span
            style: dict[str, Any] = {"fontsize": 6, "rotation": 90, "color": INK, "parse_math": False}
            axes.text(start, 1.05, short(word["text"], 12), va="bottom", transform=along[0][0], **style)
