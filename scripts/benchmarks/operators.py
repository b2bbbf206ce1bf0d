"""The operators behind the mixers on their own, against other ways to compute the same: the core of DCNv4, and of
linear attention."""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import (
    DTYPES,
    Call,
    NotMeasured,
    Row,
    agree,
    crossed,
    interleaved,
    markdown,
    milliseconds,
    quick_enough,
    ratio_cell,
    timed,
)
from benchmarks.models import KERNEL, by_grid_sample, core
from zoo.kernels import deformable, linear_attention

MAPS = ((56, 56, 64, 4), (56, 56, 128, 4), (28, 28, 128, 8), (14, 14, 256, 16))  # height, width, channels, groups
SIDES = (14, 28, 56, 112)  # of the grids of linear attention
TAPS, HEADS, HEAD_DIM = 3, 3, 64  # taps of a side
LARGE = (64, 56, 56, 128, 4)  # batch and map of what is measured on CUDA
MODES = ("forward", "forward+backward")

Form = Callable[..., Tensor]
Case = tuple[Form, list[Tensor]]  # what is called, with what


def dcnv4_inputs(
    batch: int,
    height: int,
    width: int,
    channels: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """What zoo.kernels.deformable hands to its core: value, offsets, weights, base, taps.

    Offsets and weights are drawn from N(0, 1) and lie side by side, as one linear gives them to the mixer. No offset is
    within a thousandth of a whole pixel, where gradients jump and rounding would decide to which side.
    """
    taps = TAPS**2
    sample = torch.randn(batch, height, width, groups, 3 * taps, dtype=dtype, device=device)
    offsets, weights = sample.split([2 * taps, taps], -1)
    below = offsets.floor()
    offsets.copy_(below + (offsets - below).clamp(0.001, 0.999))
    value = torch.randn(batch, height, width, channels, dtype=dtype, device=device)
    given: list[Tensor] = []

    def note(value: Tensor, *others: Tensor) -> Tensor:
        given.extend([value, *others[:-1]])
        return value.flatten(1, -2)

    with core(note):
        deformable(value, offsets.unflatten(-1, (taps, 2)), weights, kernel=TAPS)
    return given


def dcnv4_forms(given: Sequence[Tensor], options: argparse.Namespace) -> dict[str, Case]:
    """The forms of the core that know the dtype of what is given."""
    value, offsets, weights, base, taps = given

    def operator(value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return KERNEL.aggregate(value, offsets, weights, base, taps, 1.0)

    def grid_sample(value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return by_grid_sample(value, offsets, weights, base, taps, 1.0)

    def gathered(value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return KERNEL.gathered(value, KERNEL.positions(offsets, base, taps, 1.0), weights)

    forms = {"operator": operator, "grid_sample": grid_sample}
    compiled = {f"{name}, compiled": torch.compile(form, dynamic=False) for name, form in forms.items()}
    forms |= {"gathered": gathered} | (compiled if options.compile else {})
    cases: dict[str, Case] = {name: (form, [value, offsets, weights]) for name, form in forms.items()}
    if value.dtype in (torch.float32, torch.float64):
        channels = value.shape[-1]
        ones = value.new_ones(channels, 1, TAPS, TAPS)

        def deform_conv2d(value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
            return torchvision.ops.deform_conv2d(value, offsets, ones, padding=(TAPS // 2, TAPS // 2), mask=weights)

        maps = [each.flatten(2).transpose(1, 2).unflatten(2, value.shape[1:3]) for each in (offsets, weights)]
        theirs = [value.permute(0, 3, 1, 2), *maps]
        cases["torchvision"] = (deform_conv2d, [each.contiguous() for each in theirs])
    return cases


def attention_forms(given: Sequence[Tensor], options: argparse.Namespace) -> dict[str, Case]:
    """Linear and softmax attention of query, key, value [B, N, H, d]."""

    def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    forms: dict[str, Form] = {"operator": linear_attention, "softmax": softmax}
    if options.compile:
        forms |= {f"{name}, compiled": torch.compile(form, dynamic=False) for name, form in forms.items()}
    return {name: (form, list(given)) for name, form in forms.items()}


def results(case: Case, mode: str, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
    """What a form gives; with the backward pass the gradients of what it was called with."""
    form, inputs = case
    if mode == "forward":
        with torch.inference_mode():
            return (form(*inputs),)
    result = form(*inputs)
    return torch.autograd.grad(result, inputs, torch.ones_like(result) if gradient is None else gradient)


def leaves(case: Case) -> Case:
    """The same on tensors, lying as they do, that gradients end at."""
    return case[0], [each.detach().requires_grad_() for each in case[1]]


def as_given(name: str, result: Tensor, like: Tensor) -> Tensor:
    """torchvision's maps [B, C, H, W] in the shape of what the other forms give."""
    if not name.startswith("torchvision") or result.shape == like.shape:
        return result
    return result.flatten(2).transpose(1, 2).reshape(like.shape)


def check_dcnv4(cases: dict[str, Case], mode: str) -> None:
    """ValueError where two forms, or their gradients, are not the same."""
    upstream = torch.randn_like(results(cases["operator"], "forward")[0])
    wanted = None
    for name, case in cases.items():
        gradient = upstream
        if name == "torchvision":
            gradient = upstream.transpose(1, 2).unflatten(2, case[1][0].shape[2:])
        got = results(leaves(case) if mode != "forward" else case, mode, gradient)
        wanted = got if wanted is None else wanted
        for one, other in zip(got, wanted, strict=True):
            agree(name, as_given(name, one, other), "operator", other)


def check_attention(cases: dict[str, Case]) -> None:
    """ValueError where a form does not give what its formula says; the first queries stand for all."""
    query, key, value = (each.transpose(1, 2) for each in cases["operator"][1])
    scores = query[:, :, :64] @ key.transpose(-1, -2)
    shares = {"operator": scores / scores.sum(-1, keepdim=True), "softmax": (scores * HEAD_DIM**-0.5).softmax(-1)}
    for name, case in cases.items():
        kind = name.partition(",")[0]
        wanted = (shares[kind] @ value).transpose(1, 2)
        agree(name, results(case, "forward")[0][:, :64], "its formula", wanted)


def point(cases: dict[str, Case], mode: str, where: str, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each form that --limit leaves: its time, and how many times as fast the operator is."""

    def call(case: Case) -> Call:
        if mode == "forward":
            return lambda: results(case, mode)
        case = leaves(case)
        gradient = torch.randn_like(results((case[0], [each.detach() for each in case[1]]), "forward")[0])
        return lambda: results(case, mode, gradient)

    calls = quick_enough({name: call(case) for name, case in cases.items()}, options, where, keep=["operator"])
    taken = interleaved(calls, call(cases["operator"]), options)
    noise = timed("noise", taken.pop("again"), taken["operator"])
    for name, times in taken.items():
        row: Row = {"mode": mode, "variant": name, "ms": milliseconds(times), "pairs": len(times)}
        row["form"] = "compiled" if name.endswith(", compiled") else "eager"
        yield row | timed("times_as_fast", times, taken["operator"]) | noise


def operators(options: argparse.Namespace) -> Iterator[Row]:
    """The cores of DCNv4 and of linear attention, forward and with the backward pass."""
    dtype, modes, batches = DTYPES[options.dtype], MODES, options.batch
    total = (len(options.maps) + len(options.attention_sides)) * len(modes) * len(batches)
    with tqdm(total=total, desc="operators") as bar:
        for shape in options.maps:
            height, width, channels, groups = shape
            name = f"{height}x{width}x{channels} G{groups}"
            for batch in batches:
                exact, given = dcnv4_inputs(batch, *shape), dcnv4_inputs(batch, *shape, dtype=dtype)
                for mode in modes:
                    bar.set_postfix_str(f"dcnv4 {name}, batch {batch}, {mode}")
                    torch.compiler.reset()
                    check_dcnv4(dcnv4_forms(exact, options), mode)
                    for row in point(dcnv4_forms(given, options), mode, name, options):
                        yield {"operator": "dcnv4", "shape": name, "batch": batch} | row
                    bar.update()
        for side in options.attention_sides:
            name = f"{side**2} tokens"
            for batch in batches:
                qkv = torch.randn(batch, side**2, 3 * HEADS * HEAD_DIM)
                qkv[..., : 2 * HEADS * HEAD_DIM].relu_()
                torch.compiler.reset()
                exact = [each.unflatten(-1, (HEADS, -1)) for each in qkv.chunk(3, -1)]
                check_attention(attention_forms(exact, options))
                given = [each.unflatten(-1, (HEADS, -1)) for each in qkv.to(dtype).chunk(3, -1)]
                for mode in modes:
                    bar.set_postfix_str(f"linear attention, {name}, batch {batch}, {mode}")
                    for row in point(attention_forms(given, options), mode, name, options):
                        yield {"operator": "linear attention", "shape": name, "batch": batch} | row
                    bar.update()


def event_time(call: Call) -> float:
    """Seconds of a call on the GPU: ten in a row between two CUDA events, so that the launches do not count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e4


def traffic(
    device: str, timer: Callable[[Call], float], shape: tuple[int, ...], copied: int, count: int
) -> Iterator[Row]:
    """The operator in bf16 against the bandwidth of a copy of `copied` bytes on the same device; medians of `count`."""

    def typical(call: Call) -> float:
        for _ in range(3):
            call()
        return median(timer(call) for _ in range(count))

    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    bandwidth = 2 * copied / typical(functools.partial(torch.empty_like(source).copy_, source))
    del source
    batch, height, width, channels, groups = shape
    eager = argparse.Namespace(compile=False)
    exact = dcnv4_forms(dcnv4_inputs(1, height, width, channels, groups, device=device), eager)
    for mode in MODES:
        check_dcnv4({name: exact[name] for name in ("operator", "grid_sample")}, mode)
    given = dcnv4_inputs(batch, height, width, channels, groups, torch.bfloat16, device)
    form, inputs = leaves(dcnv4_forms(given, eager)["operator"])
    result = form(*inputs)
    gradient = torch.randn_like(result)
    once = sum(each.numel() * each.element_size() for each in inputs)
    output = result.numel() * result.element_size()
    calls: dict[str, tuple[Call, int]] = {
        "forward": (lambda: results((form, inputs), "forward"), once + output),
        "backward": (lambda: torch.autograd.grad(result, inputs, gradient, retain_graph=True), 2 * once + output),
    }
    for mode, (call, moved) in calls.items():
        seconds = typical(call)
        row: Row = {"operator": "dcnv4", "shape": f"{height}x{width}x{channels} G{groups}", "batch": batch}
        row |= {"mode": mode, "pairs": count, "ms": 1e3 * seconds}
        row |= {"mb": moved / 1e6, "gb_per_s": moved / seconds / 1e9, "copy_gb_per_s": bandwidth / 1e9}
        yield row | {"share": moved / seconds / bandwidth}


def cuda(options: argparse.Namespace) -> Iterator[Row]:
    """The bandwidth of DCNv4's core on CUDA: bytes of value, offsets, weights and output, each counted once; with the
    gradients of all four for the backward pass."""
    if not torch.cuda.is_available():
        raise NotMeasured("no CUDA device")
    device: Row = {"device": torch.cuda.get_device_name()}
    for row in traffic("cuda", event_time, LARGE, 2**30, max(options.pairs, 3)):
        yield row | device


def operator_table(rows: Sequence[Row]) -> str:
    """A row for each shape and mode, a column for each form: milliseconds and those of the operator among them."""
    tables = []
    for name in dict.fromkeys(row["operator"] for row in rows):
        chosen = [row for row in rows if row["operator"] == name]
        header, lines = crossed(
            f"{name}: ms (times as fast the operator is)",
            chosen,
            lambda row: f"{row['shape']}, batch {row['batch']}, {row['mode']}",
            lambda row: str(row["variant"]),
            lambda row: f"{row['ms']:.3f}" + ("" if row["variant"] == "operator" else f" ({row['times_as_fast']:.2f})"),
        )
        noise = {(row["shape"], row["batch"], row["mode"]): ratio_cell(row, "noise") for row in chosen}
        lines = [[*line, cell] for line, cell in zip(lines, noise.values(), strict=True)]
        tables.append(markdown([*header, "noise (quartiles)"], lines))
    return "\n\n".join(tables)


def cuda_table(rows: Sequence[Row]) -> str:
    header = ("operator", "device", "ms", "MB", "GB/s", "GB/s of a copy", "share of it")
    lines = []
    for row in rows:
        numbers = [f"{row[column]:.1f}" for column in ("mb", "gb_per_s", "copy_gb_per_s")]
        name = f"{row['operator']} {row['batch']}x{row['shape']}, {row['mode']}"
        lines.append([name, str(row["device"]), f"{row['ms']:.3f}", *numbers, f"{row['share']:.2f}"])
    return markdown(header, lines)
