"""The plan in configs/cluster/README.md: memory of training, measured with small batches on the CPU; time, computed."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from benchmarks.measure import Row, markdown
from zoo.models import count_parameters

GIB = 2**30


class Recipe(NamedTuple):
    """A model, what one sample is, and the samples of a GPU in a step of its recipe."""

    name: str
    sample: str
    batch: int
    millions: float  # samples of a whole training
    tflops: float  # that one H100 does a second, forward and backward: an estimate
    choices: dict[str, Any] = {}


IMAGENET, LIBRISPEECH, COCO = 1.281167, 960 * 240 / 1e6, 0.118287  # millions of samples; 240 of 15 s an hour
WITHIN, BETWEEN = 300e9, 50e9  # bytes a second and GPU: NVLink in practice, and 400 Gbit/s
RECIPES = (
    Recipe("deit_small", "an image of 224 px", 128, 300 * IMAGENET, 200),
    Recipe("squeezeformer_m", "15 s of audio", 40, 500 * LIBRISPEECH, 40, {"vocabulary": 128}),
    Recipe("rtdetr_r50", "an image of 640 px, without denoising queries", 4, 72 * COCO, 40),
    Recipe("dit_xl_2", "an image of 256 px as 32x32 latents", 32, 0.4 * 256, 200),
)


def inputs(recipe: Recipe, batch: int) -> tuple[Tensor, ...]:
    if recipe.name.startswith("squeezeformer"):
        return torch.randn(batch, 1500, 80), torch.full((batch,), 1500)
    if recipe.name.startswith("dit"):
        return torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.zeros(batch, dtype=torch.int64)
    return (torch.randn(batch, 3, *(2 * [224 if recipe.name.startswith("deit") else 640])),)


class Saved:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, parameters not.

    Attributes:
        live: bytes that are kept now.
        peak: most bytes that were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.known = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
        self.users: Counter[int] = Counter()
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return tensor
        self.users[storage._cdata] += 1
        if self.users[storage._cdata] == 1:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return Held(tensor, self)

    def unpack(self, kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, Held) else kept

    def drop(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.users[storage._cdata] -= 1
        if not self.users[storage._cdata]:
            self.live -= storage.nbytes()


class Held:
    """A tensor that autograd keeps until its node is gone."""

    def __init__(self, tensor: Tensor, saved: Saved) -> None:
        self.tensor, self.saved = tensor, saved

    def __del__(self) -> None:
        self.saved.drop(self.tensor)


def outputs(found: Any) -> list[Tensor]:
    """All tensors of a nested output that have gradients."""
    if isinstance(found, Tensor):
        return [found] if found.requires_grad else []
    if isinstance(found, dict):
        return outputs(list(found.values()))
    if isinstance(found, (tuple, list)):
        return [tensor for each in found for tensor in outputs(each)]
    return outputs(list(vars(found).values())) if hasattr(found, "__dict__") else []


def kept(model: Any, given: tuple[Tensor, ...]) -> int:
    """Most bytes that a forward and backward pass keep under bfloat16 autocast, gradients of parameters not counted."""
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(*given)
        total = torch.stack([each.float().sum() for each in outputs(found)]).sum()
        total.backward()
    model.zero_grad()
    return saved.peak


def training_memory(options: argparse.Namespace) -> Iterator[Row]:
    """Bytes of a step by recipe: what does not depend on the batch, and what a sample takes."""
    for recipe in options.recipes:
        model: Any = zoo.create_model(recipe.name, **recipe.choices).train()
        parameters = count_parameters(model)
        row: Row = {"model": recipe.name, "sample": recipe.sample, "batch": recipe.batch, "parameters": parameters}
        for name, again in (("mib", False), ("mib_checkpointing", True)):
            model.checkpointing = again
            two, three = (kept(model, inputs(recipe, batch)) for batch in (2, 3))
            row[name] = (three - two) / 2**20
            if not again:
                row["copies_gib"] = max(0.0, (3 * two - 2 * three) / GIB)
        yield row | needed(row)


def needed(row: Row) -> Row:
    """GiB of a GPU at the recipe's batch: with DDP, and with FSDP2 on 8 and 64 GPUs; and with checkpointing.

    Of each parameter there are weight, gradient, two moments of AdamW and the average in fp32. FSDP2 divides them, and
    has the weights of two blocks at a time, which count as a tenth of all.
    """
    parameters, batch = float(row["parameters"]), float(row["batch"])
    states = 20 * parameters / GIB
    found: Row = {"states_gib": states}
    for end, column in (("", "mib"), ("_checkpointing", "mib_checkpointing")):
        activations = batch * float(row[column]) / 1024
        found[f"ddp_gib{end}"] = states + float(row["copies_gib"]) + activations
        for ranks in (8, 64):
            found[f"fsdp2_{ranks}_gib{end}"] = states / ranks + 6 * parameters / 10 / GIB + activations
    return found


def memory_table(rows: Sequence[Row]) -> str:
    header = ["model, samples a GPU", "states", "a sample", "DDP", "FSDP2, 8 GPUs", "FSDP2, 64 GPUs"]
    header += ["a sample, checkpointing", "DDP", "FSDP2, 8 GPUs", "FSDP2, 64 GPUs"]
    lines = []
    for row in rows:
        cells = [f"`{row['model']}`, {row['batch']}", f"{row['states_gib']:.2f} GiB"]
        for end, column in (("", "mib"), ("_checkpointing", "mib_checkpointing")):
            cells.append(f"{row[column]:.0f} MiB")
            cells += [f"{row[name + end]:.1f} GiB" for name in ("ddp_gib", "fsdp2_8_gib", "fsdp2_64_gib")]
        lines.append(cells)
    return markdown(header, lines)


def training_time(options: argparse.Namespace) -> Iterator[Row]:
    """Hours of a training on 1, 8 and 64 GPUs from an estimated speed, and what its gradients take on the network."""
    for recipe in options.recipes:
        model: Any = zoo.create_model(recipe.name, **recipe.choices).train()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs(recipe, 2))
        parameters, gflop = count_parameters(model), counter.get_total_flops() / 2e9
        speed = recipe.tflops * 1e3 / (3 * gflop)
        step = recipe.batch / speed
        row: Row = {"model": recipe.name, "batch": recipe.batch, "parameters": parameters, "gflop": gflop}
        row |= {"tflops": recipe.tflops, "samples_per_second": speed, "step_ms": 1e3 * step}
        for ranks, network in ((1, WITHIN), (8, WITHIN), (64, BETWEEN)):
            sent = 2 * (ranks - 1) / ranks * 4 * parameters / network
            # Gradients are sent during the backward pass, two thirds of a step.
            slowed = max(step, step / 3 + sent)
            row |= {f"reduce_{ranks}_ms": 1e3 * sent}
            row |= {f"hours_{ranks}": recipe.millions * 1e6 / speed / ranks / 3600 * slowed / step}
        yield row


def time_table(rows: Sequence[Row]) -> str:
    header = ["model, samples a GPU", "parameters", "GFLOP a sample, forward", "TFLOP/s", "samples/s", "step"]
    header += ["1 GPU", "8 GPUs", "64 GPUs", "all-reduce, 8 GPUs", "64 GPUs"]
    lines = [
        [
            f"`{row['model']}`, {row['batch']}",
            f"{float(row['parameters']) / 1e6:.1f} M",
            f"{row['gflop']:.1f}",
            f"{row['tflops']}",
            f"{row['samples_per_second']:,.0f}",
            f"{row['step_ms']:.0f} ms",
            *(f"{row[f'hours_{ranks}']:.1f} h" for ranks in (1, 8, 64)),
            *(f"{row[f'reduce_{ranks}_ms']:.1f} ms" for ranks in (8, 64)),
        ]
        for row in rows
    ]
    return markdown(header, lines)
