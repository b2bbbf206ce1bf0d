"""Layers on their own: mixers against the number of tokens, in time and in memory, and norms in front of a linear."""

import argparse
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

import zoo
from benchmarks.measure import (
    DTYPES,
    Call,
    Row,
    agree,
    crossed,
    interleaved,
    markdown,
    milliseconds,
    quick_enough,
    randomise,
    ratio_cell,
    timed,
)
from benchmarks.peak import check_peaks, said_alone
from zoo.fusion import fold_in
from zoo.layer import Context, Place
from zoo.norms import NORMS, PRepBN
from zoo.spec import make

DIM, HEADS = 192, 3  # of a mixer
ON_IMAGES = [name for name, row in zoo.MIXERS.items() if 2 in row.dimensions]
NORM_SHAPES = ((3136, 64), (3136, 96), (784, 192), (196, 384))  # tokens, channels
MEMORY_SIDES = (28, 56, 112)


def mixers(options: argparse.Namespace) -> Iterator[Row]:
    """Every mixer as one layer against the number of tokens, one image at a time; forward.

    A mixer that took longer than the limit at one size is left out of it and of all larger ones.
    """
    dtype = DTYPES[options.dtype]
    layers = {name: randomise(make(zoo.MIXERS, name, DIM, HEADS, Place(axes=2))).to(dtype).eval() for name in ON_IMAGES}
    layers["again"] = copy.deepcopy(layers["softmax"])
    sides: list[int] = sorted({*options.sizes} | ({112} if options.large else set()))
    with tqdm(total=len(sides), desc="mixers") as bar, torch.inference_mode():
        for side in sides:
            bar.set_postfix_str(f"{side}x{side}")
            torch.compiler.reset()
            tokens, context = torch.randn(1, side * side, DIM, dtype=dtype), Context(grid=(side, side))
            calls: dict[str, Call] = {}
            for name, layer in layers.items():
                run = torch.compile(layer, dynamic=False) if options.compile else layer
                calls[name] = functools.partial(run, tokens, context)
            calls = quick_enough(calls, options, f"{side}x{side}", keep=("softmax", "again"))
            layers = {name: layers[name] for name in calls}
            taken = interleaved(calls, calls.pop("again"), options)
            soft = taken["softmax"]
            noise = timed("noise", taken.pop("again"), soft)
            for name, times in taken.items():
                row: Row = {"mixer": name, "side": side, "tokens": side**2, "ms": milliseconds(times)}
                yield row | {"pairs": len(times)} | timed("ratio", times, soft) | noise
            bar.update()


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """The peak of resident memory while each mixer runs, in a process of its own."""
    check_peaks()
    sizes = [str(side) for side in options.memory_sides]
    for name in tqdm(options.memory_mixers, desc="memory"):
        lines = said_alone("benchmarks.peak", name, str(DIM), str(HEADS), options.dtype, str(options.threads), *sizes)
        before: tuple[int, float] | None = None
        for side, line in zip(options.memory_sides, lines, strict=True):
            tokens, above = side**2, float(line)
            slope = "" if before is None else 1000 * (above - before[1]) / (tokens - before[0])
            row: Row = {"mixer": name, "side": side, "tokens": tokens, "mib": above}
            yield row | {"mib_per_1000_tokens": slope, "pairs": 1}
            before = tokens, above


class TransposedBatchNorm(nn.BatchNorm1d):
    """PyTorch's own, on tokens [B, N, C]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Normed(nn.Module):
    """A norm in front of a linear."""

    def __init__(self, norm: nn.Module | None, linear: nn.Linear, context: Context | None) -> None:
        super().__init__()
        self.norm, self.linear, self.context = norm, linear, context

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x) if self.context is None else self.norm(x, self.context)
        return self.linear(x)


def normed(channels: int, context: Context) -> dict[str, Normed]:
    """Each norm in front of a copy of the same linear, all with the same statistics and weights."""
    linear = nn.Linear(channels, 3 * channels)
    finished = PRepBN(channels)
    finished.advance(1.0)
    state = randomise(finished).state_dict()
    parts = {name: NORMS[name](channels) for name in ("layernorm", "batchnorm", "repbn")}
    for part in parts.values():
        part.load_state_dict({name: state[name] for name in part.state_dict()})
    parts |= {"prepbn, finished": finished}
    forms = {name: Normed(part, copy.deepcopy(linear), context) for name, part in parts.items()}
    scale, shift = parts["repbn"].affine() or (torch.ones(()), torch.zeros(()))
    folded = copy.deepcopy(linear)
    fold_in(folded, scale, shift)
    theirs = TransposedBatchNorm(channels)
    theirs.load_state_dict({name: state[name] for name in parts["batchnorm"].state_dict()}, strict=False)
    forms |= {"folded": Normed(None, folded, None), "torch's BatchNorm1d": Normed(theirs, linear, None)}
    return forms


def norm_step(form: Normed, tokens: Tensor, mode: str, compiled: bool) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the result, or the gradients of the input and of all parameters."""
    form.train(mode == "forward+backward")
    run = torch.compile(form, dynamic=False) if compiled else form
    if mode == "forward":

        @torch.inference_mode()
        def forward() -> tuple[Tensor, ...]:
            return (run(tokens),)

        return forward
    inputs = [tokens.clone().requires_grad_(), *form.parameters()]
    gradient = torch.randn(*tokens.shape[:-1], form.linear.out_features, generator=torch.Generator().manual_seed(0))
    gradient = gradient.to(tokens.dtype)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(inputs[0]), inputs, gradient)

    return both


def norms(options: argparse.Namespace) -> Iterator[Row]:
    """Each norm with the linear after it, one image at a time, against layernorm and torch's BatchNorm1d."""
    modes = ("forward", "forward+backward")
    same = (("batchnorm", "torch's BatchNorm1d"), ("prepbn, finished", "repbn"), ("folded", "repbn"))
    with tqdm(total=len(options.norm_shapes) * len(modes), desc="norms") as bar:
        for tokens, channels in options.norm_shapes:
            for mode in modes:
                bar.set_postfix_str(f"{tokens}x{channels}, {mode}")
                torch.compiler.reset()
                x = torch.randn(1, tokens, channels)
                forms = normed(channels, Context(grid=(tokens,)))
                if mode != "forward":
                    del forms["folded"]  # for inference
                got = {name: norm_step(form, x, mode, False)()[0] for name, form in forms.items()}
                for name, base in same:
                    if name in got:
                        agree(name, got[name], base, got[base])
                x = x.to(DTYPES[options.dtype])
                forms["again"] = copy.deepcopy(forms["layernorm"])
                calls: dict[str, Call] = {}
                for name, form in forms.items():
                    calls[name] = norm_step(form.to(x), x, mode, options.compile)
                taken = interleaved(calls, calls.pop("again"), options)
                layernorm, theirs = taken["layernorm"], taken["torch's BatchNorm1d"]
                noise = timed("noise", taken.pop("again"), layernorm)
                for name, times in taken.items():
                    row: Row = {"norm": name, "tokens": tokens, "channels": channels, "batch": 1, "mode": mode}
                    row |= {"ms": milliseconds(times), "pairs": len(times)}
                    yield row | timed("ratio", times, layernorm) | timed("ratio_torch", times, theirs) | noise
                bar.update()


def mixer_table(rows: Sequence[Row]) -> str:
    """A row for each mixer, a column for each number of tokens: milliseconds and the ratio to softmax."""
    header, lines = crossed(
        "mixer: ms (ratio to softmax)",
        rows,
        lambda row: str(row["mixer"]),
        lambda row: f"{row['tokens']} tokens",
        lambda row: f"{row['ms']:.3f} ({row['ratio']:.2f})",
    )
    noise = {row["tokens"]: ratio_cell(row, "noise") for row in rows}
    return markdown(header, [*lines, ["noise of the ratio", *noise.values()]])


def memory_table(rows: Sequence[Row]) -> str:
    """A row for each mixer, a column for each number of tokens: MiB, and MiB per 1000 tokens since the size before."""

    def cell(row: Row) -> str:
        slope = row["mib_per_1000_tokens"]
        return f"{row['mib']:.1f}" + ("" if slope == "" else f" ({slope:.1f})")

    return markdown(
        *crossed(
            "mixer: MiB (per 1000 tokens more)",
            rows,
            lambda row: str(row["mixer"]),
            lambda row: f"{row['tokens']} tokens",
            cell,
        )
    )


def norm_table(rows: Sequence[Row]) -> str:
    """A row for each norm, a column for each shape; a table for each mode."""
    tables = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        header, lines = crossed(
            f"{mode}: ms (ratio to layernorm, to torch's BatchNorm1d)",
            chosen,
            lambda row: str(row["norm"]),
            lambda row: f"{row['tokens']}x{row['channels']}",
            lambda row: f"{row['ms']:.3f} ({row['ratio']:.2f}, {row['ratio_torch']:.2f})",
        )
        noise = {(row["tokens"], row["channels"]): ratio_cell(row, "noise") for row in chosen}
        tables.append(markdown(header, [*lines, ["noise of the ratio to layernorm", *noise.values()]]))
    return "\n\n".join(tables)
