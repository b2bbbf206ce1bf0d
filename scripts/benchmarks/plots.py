"""Plots of the tables."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Row

MARKERS = "osD^vP*X<>"
LEGEND = 30  # entries in one column of a legend


def size_axis(axes: Axes, sizes: Sequence[float], label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)


def brief(number: float) -> str:
    """About three digits of it."""
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def by_tokens(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time against tokens, a line a mixer."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(str(row["mixer"]), []).append((float(row["tokens"]), float(row["ms"])))
    ranked = sorted(lines.items(), key=lambda item: -item[1][-1][1])
    columns = math.ceil(len(ranked) / LEGEND)
    figure = Figure(figsize=(6.5 + 2 * columns, 6.0), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(ranked):
        marker = MARKERS[(number // 10 + number) % 10]
        axes.plot(*zip(*points, strict=True), marker=marker, label=name, color=f"C{number % 10}")
    size_axis(axes, sorted({float(row["tokens"]) for row in rows}), "tokens")
    axes.set_ylabel("CPU time of one layer, ms")
    axes.set_title(title, fontsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, ncols=columns, fontsize=8)
    figure.savefig(path, dpi=130)


def by_seconds(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time and peak memory of one block against seconds of audio, a line a mixer."""
    blocks = [row for row in rows if row["part"] == "block"]
    figure = Figure(figsize=(12.0, 5.0), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column, label in zip(panels, ("ms", "mib"), ("CPU time, ms", "peak memory, MiB"), strict=True):
        for number, name in enumerate(dict.fromkeys(str(row["mixer"]) for row in blocks)):
            points = [(float(row["seconds"]), float(row[column])) for row in blocks if row["mixer"] == name]
            axes.plot(*zip(*points, strict=True), marker=MARKERS[number], label=name, color=f"C{number}")
        size_axis(axes, sorted({float(row["seconds"]) for row in blocks}), "seconds of audio")
        axes.set_ylabel(f"{label}, one block")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130)


def operators(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time of each form: a row of panels for each operator, a column for each mode, a group of bars for each shape."""
    names = list(dict.fromkeys(str(row["operator"]) for row in rows))
    modes = list(dict.fromkeys(str(row["mode"]) for row in rows))
    batches = {row["batch"] for row in rows}
    figure = Figure(figsize=(7.0 * len(modes), 3.8 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(modes), sharey="row", squeeze=False)
    for at, name in enumerate(names):
        variants = list(dict.fromkeys(str(row["variant"]) for row in rows if row["operator"] == name))
        width = 0.85 / len(variants)
        for axes, mode in zip(panels[at], modes, strict=True):
            chosen = [row for row in rows if (row["operator"], row["mode"]) == (name, mode)]
            places = list(dict.fromkeys((str(row["shape"]), row["batch"]) for row in chosen))
            for number, variant in enumerate(variants):
                bars = [row for row in chosen if row["variant"] == variant]
                shift = (number - (len(variants) - 1) / 2) * width
                where = [places.index((str(row["shape"]), row["batch"])) + shift for row in bars]
                drawn = axes.bar(where, [float(row["ms"]) for row in bars], width, label=variant, color=f"C{number}")
                axes.bar_label(drawn, [brief(float(row["ms"])) for row in bars], fontsize=6, padding=1)
            labels = [shape if len(batches) == 1 else f"{shape}\nbatch {batch}" for shape, batch in places]
            axes.set_xticks(range(len(places)), labels, fontsize=8)
            axes.set(yscale="log", title=f"{name}, {mode}", xlim=(-0.5, len(places) - 0.5))
            axes.margins(y=0.15)
            axes.grid(alpha=0.3, axis="y")
            axes.set_axisbelow(True)
        panels[at][0].set_ylabel("CPU time, ms")
        panels[at][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130)
