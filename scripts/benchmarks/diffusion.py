"""Diffusion transformers: DiT against diffusers' with the same weights, and mixers at many tokens."""

import argparse
import copy
import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

import zoo
from benchmarks.measure import (
    DTYPES,
    Call,
    NotMeasured,
    Row,
    agree,
    interleaved,
    markdown,
    milliseconds,
    randomise,
    ratio_cell,
    timed,
)
from zoo.convert import from_diffusers

DEPTH, HEADS = 12, 6  # of DiT-S
BATCHES = (1, 8)
SIDE = 32  # of the latents, which have 4 channels and patches of 2
LARGE_SIDE = 64
MIXERS = [name for name in ("softmax", "sla", "dcnv4", "dico") if name in zoo.MIXERS]


def diffusers_model(depth: int, side: int) -> Any:
    """diffusers' DiT-S/2 with random weights; its blocks hold the same embeddings, as in published files."""
    try:
        from diffusers import DiTTransformer2DModel
        from diffusers.utils import logging
    except ImportError:
        raise NotMeasured("diffusers is not installed") from None
    logging.set_verbosity_error()
    given: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": 64, "num_layers": depth}
    given |= {"in_channels": 4, "out_channels": 8, "sample_size": side, "patch_size": 2}
    model: Any = randomise(DiTTransformer2DModel(**given)).eval()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def calls(batch: int, options: argparse.Namespace) -> dict[str, Call]:
    """diffusers' model, the same again, and ours with its weights. ValueError where they differ."""
    torch.compiler.reset()
    theirs = diffusers_model(options.dit_depth, options.dit_side)
    ours = from_diffusers(theirs.state_dict(), heads=HEADS, image=options.dit_side, shift=1.0)
    x = torch.randn(batch, 4, options.dit_side, options.dit_side)
    steps, labels = torch.full((batch,), 417), torch.arange(batch)
    with torch.no_grad():
        wanted = theirs(x, timestep=steps, class_labels=labels).sample
        agree("zoo's DiT", ours(x, (steps + 1) / 1000, labels), "diffusers'", wanted)
    dtype = DTYPES[options.dtype]
    x = x.to(dtype)
    models = {"theirs": theirs, "again": copy.deepcopy(theirs), "ours": ours}
    runs: dict[str, Any] = {}
    for name, model in models.items():
        model.to(dtype)
        runs[name] = torch.compile(model, dynamic=False, fullgraph=True) if options.compile else model

    @torch.inference_mode()
    def zoos() -> object:
        return runs["ours"](x, (steps + 1) / 1000, labels)

    @torch.inference_mode()
    def diffusers(name: str) -> object:
        return runs[name](x, timestep=steps, class_labels=labels)

    return {name: functools.partial(diffusers, name) for name in ("theirs", "again")} | {"ours": zoos}


def against_diffusers(options: argparse.Namespace) -> Iterator[Row]:
    """Time of ours as a share of diffusers'."""
    for batch in tqdm(options.dit_batches, desc="diffusion"):
        compared = calls(batch, options)
        taken = interleaved(compared, compared.pop("again"), options)
        row: Row = {"model": "dit_s_2", "base": f"diffusers {version('diffusers')}", "batch": batch}
        row |= {"side": options.dit_side, "ms": milliseconds(taken["ours"]), "base_ms": milliseconds(taken["theirs"])}
        row |= {"pairs": len(taken["ours"])}
        yield row | timed("ratio", taken["ours"], taken["theirs"]) | timed("noise", taken["again"], taken["theirs"])


def by_mixer(options: argparse.Namespace) -> Iterator[Row]:
    """dit_s_2 with each mixer at many tokens, one image at a time, in bfloat16; time as a share of softmax's."""
    side = options.dit_large_side
    inputs = (torch.randn(1, 4, side, side, dtype=torch.bfloat16), torch.tensor([0.5]), torch.tensor([3]))
    models = {}
    for name in MIXERS:
        model: Any = zoo.create_model("dit_s_2", mixer=name, image=side, depth=options.dit_depth)
        models[name] = randomise(model).eval().to(torch.bfloat16)
    models["again"] = copy.deepcopy(models["softmax"])
    torch.compiler.reset()

    @torch.inference_mode()
    def run(model: Any) -> object:
        return model(*inputs)

    forms = {
        name: torch.compile(model, dynamic=False, fullgraph=True) if options.compile else model
        for name, model in models.items()
    }
    compared: dict[str, Call] = {name: functools.partial(run, form) for name, form in forms.items()}
    taken = interleaved(compared, compared.pop("again"), options)
    noise = timed("noise", taken.pop("again"), taken["softmax"])
    for name, times in taken.items():
        row: Row = {"model": "dit_s_2", "mixer": name, "side": side, "tokens": (side // 2) ** 2, "batch": 1}
        row |= {"ms": milliseconds(times), "pairs": len(times)}
        yield row | timed("ratio", times, taken["softmax"]) | noise


def table(rows: Sequence[Row]) -> str:
    """A row for each batch."""
    header = ("model", "latents", "batch", "ms", "ms against", "ratio (quartiles)", "noise (quartiles)")
    lines = []
    for row in rows:
        named = [str(row["model"]), f"{row['side']}x{row['side']}", str(row["batch"])]
        times = [f"{row['ms']:.1f}", f"{row['base_ms']:.1f}"]
        lines.append([*named, *times, ratio_cell(row, "ratio"), ratio_cell(row, "noise")])
    return f"{markdown(header, lines)}\n\nAgainst {rows[0]['base']}, with the same weights."


def mixer_table(rows: Sequence[Row]) -> str:
    """A row for each mixer."""
    header = ("mixer", "tokens", "ms", "ratio to softmax (quartiles)", "noise (quartiles)")
    return markdown(
        header,
        [
            [
                str(row["mixer"]),
                str(row["tokens"]),
                f"{row['ms']:.1f}",
                ratio_cell(row, "ratio"),
                ratio_cell(row, "noise"),
            ]
            for row in rows
        ],
    )
