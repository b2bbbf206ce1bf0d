"""Measures models, speech encoders, mixers, operators and norms against others; writes CSVs and plots.

What is compared runs in one process, in turn and in alternating order. A time is the CPU time of the process (all of
its threads), a ratio the median over rounds with its quartiles beside it, and the noise the ratio that the same thing
shows against a copy of itself. Forms that should compute the same are compared before they are timed.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import data, detectors, diffusion, layers, losses, models, operators, plan, plots, speech, training
from benchmarks.measure import DTYPES, NotMeasured, Row, conditions, headline
from zoo.tasks.predicting import Parser
from zoo.text import one_line


class Table(NamedTuple):
    """A table: how its rows are measured, how they are shown, and what its numbers are."""

    title: str
    rows: Callable[[argparse.Namespace], Iterator[Row]]
    show: Callable[[Sequence[Row]], str]
    plot: Callable[[Sequence[Row], str, Path], None] | None = None
    clock: str = ""  # in place of CPU time
    form: str = ""  # in place of eager or compiled, as --compile says
    dtype: str = ""  # in place of --dtype


# What --only chooses from, and the tables that belong to it, by the names of their CSVs.
CHOICES: dict[str, dict[str, Table]] = {
    "models": {"models": Table("Models against timm's, random weights", models.against_timm, models.pair_table)},
    "mixers": {
        "mixers": Table(
            f"One mixer layer, dim {layers.DIM}, {layers.HEADS} heads, batch 1, forward",
            layers.mixers,
            layers.mixer_table,
            plots.by_tokens,
        )
    },
    "fuse": {"fuse": Table("vit_tiny before and after zoo.fuse, random weights", models.folding, models.pair_table)},
    "operators": {
        "operators": Table(
            f"Operators: DCNv4's core, {operators.TAPS}x{operators.TAPS} taps; attention's core, "
            f"{operators.HEADS} heads of {operators.HEAD_DIM}",
            operators.operators,
            operators.operator_table,
            plots.operators,
            form="eager",  # what is compiled says so
        ),
        "operators_cuda": Table(
            "DCNv4's core on CUDA",
            operators.cuda,
            operators.cuda_table,
            clock="CUDA events",
            form="eager",
            dtype="bfloat16",
        ),
    },
    "deformable": {
        "deformable": Table(
            f"{models.DEFORMABLE} by the core of its mixers, random weights and offsets, batch 1, forward",
            models.deformable,
            models.deformable_table,
            form="eager",
        )
    },
    "norms": {"norms": Table("A norm and the linear behind it, C to 3C, batch 1", layers.norms, layers.norm_table)},
    "training": {
        "training": Table(
            "A step of training against a bare loop of PyTorch, forward, backward, clipping, AdamW",
            training.steps,
            training.step_table,
            clock="CPU time",
            form="eager",
        )
    },
    "data": {
        "data_images": Table(
            f"Images from JPEG files to a batch of {data.FILES}, in one process",
            data.images,
            data.image_table,
            form="eager",
            dtype="float32",
        ),
        "data_reading": Table(
            "Small files, read in random order, in one process, from a warm cache",
            data.reading,
            data.reading_table,
            form="eager",
            dtype="float32",
        ),
        "data_audio": Table(
            "Speech from FLAC files to log-mel features, in one process",
            data.audio,
            data.audio_table,
            form="eager",
            dtype="float32",
        ),
    },
    "plan": {
        "training_memory": Table(
            "Memory of a GPU in training, from what autograd keeps, bfloat16 autocast, AdamW, averaged weights",
            plan.training_memory,
            plan.memory_table,
            clock="bytes that autograd keeps",
            form="eager",
            dtype="bfloat16",
        ),
        "training_time": Table(
            "Time of training on H100s, computed from estimated speeds, not measured",
            plan.training_time,
            plan.time_table,
            clock="computed",
            form="eager",
            dtype="bfloat16",
        ),
    },
    "detectors": {
        "detectors": Table(
            "Detectors against transformers', random weights, batch 1, forward",
            detectors.against_transformers,
            detectors.table,
            form="eager",
            dtype="float32",
        )
    },
    "diffusion": {
        "diffusion": Table(
            "Diffusion transformers against diffusers', random weights, forward",
            diffusion.against_diffusers,
            diffusion.table,
        ),
        "diffusion_mixers": Table(
            "A diffusion transformer by its mixer at many tokens, random weights, batch 1, forward",
            diffusion.by_mixer,
            diffusion.mixer_table,
            dtype="bfloat16",
        ),
    },
    "losses": {
        "losses": Table(
            f"Losses of a detector with {losses.CLASSES} classes, matching included, against transformers'",
            losses.losses,
            losses.loss_table,
            form="eager",
            dtype="float32",
        )
    },
    "memory": {
        "memory": Table(
            f"Peak memory of one mixer layer, its input and output counted, dim {layers.DIM}, {layers.HEADS} heads, "
            "batch 1, forward",
            layers.memory,
            layers.memory_table,
            clock="resident memory above the start",
            form="eager",
        )
    },
    "speech": {
        "speech": Table(
            "Speech encoders with CTC heads, random weights, batch 1, forward", speech.pairs, speech.pair_table
        ),
        "parakeet": Table(
            f"{speech.TWIN} without a head against transformers' Parakeet of the same weights, batch 1, forward",
            speech.parakeet,
            speech.pair_table,
        ),
    },
    "rtf": {
        "rtf": Table(
            "Speech encoders in real time, CTC heads included, random weights, batch 1, forward",
            speech.real_time,
            speech.real_time_table,
        )
    },
    "long": {
        "long": Table(
            f"Long audio: {speech.LONG} with one block (depth=1) by its mixer, time and peak memory above the size "
            "before the call, batch 1, forward",
            speech.long,
            speech.long_table,
            plots.by_seconds,
            form="eager",
        )
    },
}
SHAPES = {
    "maps": operators.MAPS,
    "attention_sides": operators.SIDES,
    "norm_shapes": layers.NORM_SHAPES,
    "memory_sides": layers.MEMORY_SIDES,
    "memory_mixers": layers.ON_IMAGES,
    "side": models.SIDE,
    "epochs": training.EPOCHS,
    "files": data.FILES,
    "small_files": data.SMALL_FILES,
    "clips": data.CLIPS,
    "recipes": list(plan.RECIPES),
    "losses_of": losses.SHAPES,
    "detectors": list(detectors.RIVALS),
    "detector_side": detectors.SIDE,
    "dit_batches": diffusion.BATCHES,
    "dit_depth": diffusion.DEPTH,
    "dit_side": diffusion.SIDE,
    "dit_large_side": diffusion.LARGE_SIDE,
    "speech": speech.RIVALS,
    "depth": speech.DEPTH,
    "encoders": speech.ENCODERS,
    "mixers_of_long": list(speech.MIXERS),
}
QUICK = {
    "pairs": 1,
    "warm": 1,
    "sizes": [3, 2],
    "sides": [32],
    "models": ["vit_tiny mixer=sla", "poolformer_s12"],
    "maps": ((4, 6, 8, 2),),
    "attention_sides": (9,),
    "norm_shapes": ((9, 4),),
    "memory_sides": (14, 56),
    "memory_mixers": ["sla"],
    "side": 32,
    "epochs": 2,
    "files": 2,
    "small_files": 20,
    "clips": 1,
    "recipes": [plan.Recipe("deit_tiny", "an image of 224 px", 2, 1.0, 100)],
    "losses_of": ((2, 2, 9, 3),),
    "detectors": ["RT-DETRv2-R18"],
    "detector_side": 128,
    "dit_batches": (2,),
    "dit_depth": 1,
    "dit_side": 8,
    "dit_large_side": 16,
    "audio": [1],
    "speech": {"squeezeformer_xs": "conformer_ctc_s"},
    "depth": 1,
    "encoders": ["conformer_ctc_s", "efficient_conformer_s"],
    "long": [5],
    "mixers_of_long": ["relative", "sla, rope"],
}


def report(name: str, table: Table, options: argparse.Namespace) -> None:
    """Measures one table, writes its CSV row by row, and prints it."""
    clock = table.clock or f"at most {options.pairs} pairs and {options.seconds:g} s a point, CPU time"
    fixed: Row = {name: given for name in ("form", "dtype") if (given := getattr(table, name))}
    head = headline(conditions(options) | fixed, clock)
    print(f"## {table.title}\n\n{head}\n", flush=True)
    rows: list[Row] = []
    try:
        for row in table.rows(options):
            rows.append(row | conditions(options) | fixed | row)
            with (options.output / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    except NotMeasured as reason:
        print(f"not measured: {reason}\n", flush=True)
        return
    print(table.show(rows))
    busiest, cores = max(float(row["load"]) for row in rows), os.cpu_count() or 1
    busy = busiest > cores and not table.clock
    warning = f"busy machine (load average {busiest:.2f} on {cores} cores): do not publish" if busy else ""
    if table.plot is not None:
        table.plot(rows, f"{table.title}\n{head}\n{warning}".strip(), options.output / f"{name}.png")
    print(f"\n{warning}\n" if warning else "", flush=True)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    doc = "Measures models, speech encoders, mixers, operators and norms against others,\nand writes CSVs and plots."
    parser = Parser("scripts/benchmark", doc, "scripts/benchmark --only models mixers --threads 2 --output runs/mine")
    parser.usage = "scripts/benchmark [--OPTION VALUE ...]"
    add, rare = parser.add_argument, parser.add_rare
    many = {"nargs": "+", "type": positive, "metavar": "N"}
    modes = ("forward", "forward+backward")
    preselected = [name for name in models.RIVALS if name not in ("deit_base", "poolformer_s24")]
    only = {"nargs": "+", "choices": CHOICES, "default": list(CHOICES), "metavar": "T"}
    add("--only", **only, help=f"tables: {', '.join(CHOICES)} (default: all)")
    chosen = {"nargs": "+", "choices": models.RIVALS, "default": preselected, "metavar": "M"}
    add("--models", **chosen, help=f"of the first table: {', '.join(models.RIVALS)}")
    add("--batch", **many, default=[1], help="of models, fuse and operators (default: 1)")
    add("--dtype", choices=DTYPES, default="float32", metavar="D", help=f"{' or '.join(DTYPES)} (default: %(default)s)")
    add("--compile", action="store_true", help="measure under torch.compile; operators both ways")
    add("--threads", type=positive, default=1, metavar="N", help="CPU time counts all of them (default: 1)")
    add("--quick", action="store_true", help="one round of tiny shapes, to see that all works")
    output = Path("runs/benchmark")
    add("--output", type=Path, default=output, metavar="DIR", help="folder of the files (default: %(default)s)")
    rare("--pairs", type=positive, default=30, metavar="N", help="interleaved rounds per point (default: 30)")
    rare("--seconds", type=float, default=8.0, metavar="S", help="most of a point after three rounds (default: 8)")
    rare("--warm", type=positive, default=3, metavar="N", help="rounds before, which do not count (default: 3)")
    rare("--sides", **many, default=[224, 448, 896], help="pixels, of vit_tiny mixer=sla (default: 224 448 896)")
    listed = {"nargs": "+", "choices": modes, "default": modes, "metavar": "M"}
    rare("--modes", **listed, help=f"of models: {' or '.join(modes)} (default: both)")
    rare("--sizes", **many, default=[7, 14, 28, 56], help="sides of the mixers' grids (default: 7 14 28 56)")
    rare("--large", action="store_true", help="mixers on a grid of 112x112, too")
    rare("--audio", **many, default=[10, 60], help="seconds, of speech and rtf (default: 10 60)")
    rare("--long", **many, default=[10, 60, 600], help="seconds, of long (default: 10 60 600)")
    rare("--limit", type=float, default=10.0, metavar="S", help="most for one call of a layer (default: 10)")
    parser.set_defaults(**SHAPES)
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for choice in options.only:
            for name, table in CHOICES[choice].items():
                report(name, table, options)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"scripts/benchmark: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("scripts/benchmark: stopped; the CSVs hold what was measured")
    print(f"written to {options.output}")
