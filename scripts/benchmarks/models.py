"""Whole models: against timm's, before and after folding, and with other cores of deformable aggregation."""

import argparse
import contextlib
import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import zoo
from benchmarks.measure import (
    DTYPES,
    Call,
    Row,
    agree,
    interleaved,
    markdown,
    milliseconds,
    randomise,
    ratio_cell,
    timed,
)
from zoo.convert import from_timm

# The measured models, as called by create_model, and the timm model for comparison.
RIVALS = {f"deit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
RIVALS |= {"vit_tiny mixer=sla": "vit_tiny_patch16_224"}
RIVALS |= {name: name for name in ("poolformer_s12", "poolformer_s24", "convformer_s18", "caformer_s18", "davit_tiny")}
SIDE = 224  # of the images; models that differ in how cost grows with the tokens are measured at --sides
DEFORMABLE = "flash_internimage_t"
KERNEL: Any = importlib.import_module("zoo.kernels.deformable")  # the package has a function of this name


def step(model: nn.Module, images: Tensor, mode: str, compiled: bool) -> Call:
    """A call of the model: forward in eval and inference mode, or forward and backward in training mode."""
    model.train(mode == "forward+backward")
    run = torch.compile(model, dynamic=False) if compiled else model
    parameters = list(model.parameters())

    @torch.inference_mode()
    def forward() -> None:
        run(images)

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        run(images).sum().backward()

    return both if mode == "forward+backward" else forward


def compare(model: nn.Module, base: nn.Module, images: Tensor, mode: str, options: argparse.Namespace) -> Row:
    """The time of both, the ratio over rounds, and that of the base against its own copy."""
    torch.compiler.reset()
    images = images.to(DTYPES[options.dtype])
    named = {"ours": model, "base": base, "again": copy.deepcopy(base)}
    calls = {name: step(each.to(images.dtype), images, mode, options.compile) for name, each in named.items()}
    taken = interleaved(calls, calls.pop("again"), options)
    times = {"ms": milliseconds(taken["ours"]), "base_ms": milliseconds(taken["base"]), "pairs": len(taken["base"])}
    return times | timed("ratio", taken["ours"], taken["base"]) | timed("noise", taken["again"], taken["base"])


@torch.inference_mode()
def same(name: str, model: nn.Module, base: str, other: nn.Module, images: Tensor) -> None:
    """ValueError where two models do not compute the same."""
    agree(name, model.eval()(images), base, other.eval()(images))


def against_timm(options: argparse.Namespace) -> Iterator[Row]:
    """zoo's models against timm's: with the same weights where both are the same model."""
    points = [(name, side) for name in options.models for side in (options.sides if " " in name else [options.side])]
    with tqdm(total=len(points) * len(options.modes) * len(options.batch), desc="models") as bar:
        for name, side in points:
            preset, *choices = name.split()
            images = torch.randn(max(options.batch), 3, side, side)
            if choices:
                chosen = dict(choice.split("=") for choice in choices)
                theirs = timm.create_model(RIVALS[name], img_size=side)
                ours = zoo.create_model(preset, image=side, **chosen)
            else:
                theirs = timm.create_model(RIVALS[name])
                ours = from_timm(theirs.eval())
                same(name, ours, f"timm's {RIVALS[name]}", theirs, images[:1])
            for mode in options.modes:
                for batch in options.batch:
                    bar.set_postfix_str(f"{name}, {side} px, {mode}, batch {batch}")
                    row = compare(ours, theirs, images[:batch], mode, options)
                    what: Row = {"model": name, "base": f"timm {RIVALS[name]}", "mode": mode}
                    yield what | {"side": side, "batch": batch} | row
                    bar.update()


def folding(options: argparse.Namespace) -> Iterator[Row]:
    """vit_tiny with prepbn whose blend is over, folded into its neighbours and not, and with layernorm; forward."""
    unfused = randomise(zoo.create_model("vit_tiny", norm="prepbn"))
    zoo.advance(unfused, 1.0)
    fused, plain = zoo.fuse(unfused), zoo.create_model("vit_tiny", norm="layernorm")
    named = {"prepbn": unfused, "prepbn, fused": fused, "layernorm": plain}
    pairs = [("prepbn, fused", "prepbn"), ("prepbn, fused", "layernorm"), ("prepbn", "layernorm")]
    images = torch.randn(max(options.batch), 3, options.side, options.side)
    same("prepbn, fused", fused, "prepbn", unfused, images[:1])
    with tqdm(total=len(pairs) * len(options.batch), desc="fuse") as bar:
        for batch in options.batch:
            for name, base in pairs:
                bar.set_postfix_str(f"{name} against {base}, batch {batch}")
                row = compare(named[name], named[base], images[:batch], "forward", options)
                yield {"model": name, "base": base, "mode": "forward", "side": options.side, "batch": batch} | row
                bar.update()


@contextlib.contextmanager
def core(form: Callable[..., Tensor]) -> Iterator[None]:
    """Within it zoo.kernels.deformable sums by `form`."""
    kept, KERNEL.aggregate = KERNEL.aggregate, form
    try:
        yield
    finally:
        KERNEL.aggregate = kept


def by_grid_sample(value: Tensor, offsets: Tensor, weights: Tensor, base: Tensor, taps: Tensor, scale: float) -> Tensor:
    """What `aggregate` gives, in plain PyTorch."""
    return KERNEL.reference(value, KERNEL.positions(offsets, base, taps, scale), weights)


def free(value: Tensor, *others: object) -> Tensor:
    """A core that costs nothing: each point keeps its value."""
    return value.flatten(1, -2)


def deformable(options: argparse.Namespace) -> Iterator[Row]:
    """One whole model with the operator, with grid_sample, and with a core that costs nothing; eager, forward."""
    model = randomise(zoo.create_model(DEFORMABLE)).eval()
    images = torch.randn(1, 3, options.side, options.side)
    operator = KERNEL.aggregate
    forms = {"operator": operator, "grid_sample": by_grid_sample, "free core": free}

    @torch.inference_mode()
    def run(form: Callable[..., Tensor]) -> Tensor:
        with core(form):
            return model(images)

    agree("operator", run(operator), "grid_sample", run(by_grid_sample))
    images = images.to(DTYPES[options.dtype])
    model = model.to(images.dtype)
    calls: dict[str, Call] = {name: functools.partial(run, form) for name, form in forms.items()}
    taken = interleaved(calls, calls["operator"], options)
    noise = timed("noise", taken.pop("again"), taken["operator"])
    for name, times in taken.items():
        rest = [1e3 * (time - least) for time, least in zip(times, taken["free core"], strict=True)]
        row: Row = {"model": DEFORMABLE, "side": options.side, "batch": 1, "mode": "forward", "variant": name}
        row |= {"ms": milliseconds(times), "core_ms": median(rest), "pairs": len(times)}
        yield row | timed("ratio", times, taken["operator"]) | noise


def pair_table(rows: Sequence[Row]) -> str:
    header = ("model", "against", "mode", "px", "batch", "ms", "ms against", "ratio (quartiles)", "noise (quartiles)")
    lines = []
    for row in rows:
        names = [str(row[column]) for column in ("model", "base", "mode", "side", "batch")]
        times = [f"{row['ms']:.2f}", f"{row['base_ms']:.2f}"]
        lines.append([*names, *times, ratio_cell(row, "ratio"), ratio_cell(row, "noise")])
    return markdown(header, lines)


def deformable_table(rows: Sequence[Row]) -> str:
    header = ("core", "ms", "the core alone", "all but the core", "ratio to the operator", "noise (quartiles)")
    lines = []
    for row in rows:
        rest = float(row["ms"]) - float(row["core_ms"])
        times = [f"{value:.2f}" for value in (row["ms"], row["core_ms"], rest)]
        lines.append([str(row["variant"]), *times, ratio_cell(row, "ratio"), ratio_cell(row, "noise")])
    return markdown(header, lines)
