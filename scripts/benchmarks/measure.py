"""How scripts/benchmark measures, calls in turn, in alternating order, by CPU time; and how it shows what it finds."""

import argparse
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

Call = Callable[[], object]
Row = dict[str, str | int | float]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORTEST = 0.002  # seconds; a shorter call is repeated within its turn
FEWEST = 3  # rounds that are counted, however long they take


class NotMeasured(Exception):
    """This machine lacks something that a table needs; the message names it."""


def cpu_time(call: Call, repeats: int = 1) -> float:
    """Seconds of CPU time that one call takes, all threads of the process together."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def rounds(calls: Sequence[Call], count: int, warm: int = 3, seconds: float = math.inf) -> list[list[float]]:
    """The times of all calls in each of at most `count` rounds, after at most `warm` that are not counted.

    Who goes first rotates; every other cycle runs backwards. Rounds that would take more than `seconds` together are
    left out but for FEWEST of them.
    """
    start = time.perf_counter()
    once = [cpu_time(call) for call in calls]
    taken = max(time.perf_counter() - start, 1e-9)
    for _ in range(min(warm - 1, int(min(seconds / taken / 4, warm)))):
        once = [cpu_time(call) for call in calls]
    repeats = [max(1, math.ceil(SHORTEST / max(each, 1e-7))) for each in once]
    expected = max(sum(each * times for each, times in zip(once, repeats, strict=True)), 1e-9)
    count = min(count, max(FEWEST, int(min(seconds / expected, count))))
    results = []
    gc.collect()
    gc.disable()
    try:
        for number in range(count):
            order = [(number + place) % len(calls) for place in range(len(calls))]
            if number // len(calls) % 2:
                order.reverse()
            times = [0.0] * len(calls)
            for which in order:
                times[which] = cpu_time(calls[which], repeats[which])
            results.append(times)
    finally:
        gc.enable()
    return results


def interleaved(calls: Mapping[str, Call], again: Call, options: argparse.Namespace) -> dict[str, list[float]]:
    """The times of each call by its name, a time a round. `again`, the copy of one of them that shows the noise, stands
    in the middle: next to each other, the second would find in the cache what the first has just read."""
    names = list(calls)
    names.insert(len(names) // 2 + 1, "again")
    ordered = [again if name == "again" else calls[name] for name in names]
    if options.compile:
        for call in ordered:
            call()
    taken = rounds(ordered, options.pairs, options.warm, options.seconds)
    return {name: [times[at] for times in taken] for at, name in enumerate(names)}


def timed(name: str, above: Sequence[float], below: Sequence[float]) -> Row:
    """The median over rounds of the ratio of two times, with its quartiles, as columns of a row."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = (float(value) for value in numpy.percentile(ratios, (25, 50, 75)))
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def milliseconds(times: Sequence[float]) -> float:
    return 1e3 * median(times)


def quick_enough(
    calls: Mapping[str, Call], options: argparse.Namespace, where: str, keep: Collection[str] = ()
) -> dict[str, Call]:
    """The calls that take at most --limit seconds, and those to keep; reports which are omitted."""
    left = {}
    for name, call in calls.items():
        first = cpu_time(call)
        if name not in keep and first > options.limit and not (options.compile and cpu_time(call) <= options.limit):
            tqdm.write(f"{name} takes over {options.limit:g} s on {where}; left out", file=sys.stderr)
        else:
            left[name] = call
    return left


def agree(name: str, got: Tensor, base: str, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """ValueError where the largest difference is more than this part of the largest value."""
    if got.shape != wanted.shape:
        raise ValueError(f"{name} gives {tuple(got.shape)} and {base} {tuple(wanted.shape)}; neither was timed")
    apart = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
    if not apart <= tolerance:
        raise ValueError(f"{name} differs from {base} by {apart:.1e} of the largest value; neither was timed")


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Moves all that starts constant off its start: a deformable mixer does not sample between pixels before."""
    for parameter in module.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return module


def processor() -> str:
    """What the machine calls its processor."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(options: argparse.Namespace) -> Row:
    """The conditions of a measurement; in every row of every CSV, unless a row sets its own."""
    return {
        "torch": torch.__version__,
        "timm": version("timm"),
        "cpu": processor(),
        "cores": os.cpu_count() or 1,
        "threads": options.threads,
        "dtype": options.dtype,
        "form": "compiled" if options.compile else "eager",
        "pairs": options.pairs,
        "load": os.getloadavg()[0],  # how many processes wanted a core over the last minute
    }


def headline(at: Row, clock: str) -> str:
    """The conditions in one line."""
    threads = f"{at['threads']} thread{'s' if at['threads'] != 1 else ''}"
    return (
        f"torch {at['torch']}, timm {at['timm']}, {at['cpu']}, {at['cores']} cores, {threads}, {at['dtype']}, "
        f"{at['form']}, {clock}, load average {at['load']:.2f}"
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(row(line) for line in [header, rule, *lines])


def crossed(
    corner: str,
    rows: Sequence[Row],
    line: Callable[[Row], str],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table with a cell for each row of the CSV, "-" if it is missing."""
    cells = {(line(row), column(row)): cell(row) for row in rows}
    columns = list(dict.fromkeys(column(row) for row in rows))
    lines = [[name, *(cells.get((name, top), "-") for top in columns)] for name in dict.fromkeys(map(line, rows))]
    return [corner, *columns], lines


def ratio_cell(row: Row, name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f}-{row[f'{name}_high']:.3f})"
