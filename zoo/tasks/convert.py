"""`zoo convert`: a checkpoint with another norm, shared keys and values, another mixer, fused, or in another dtype."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count
from zoo.text import counted

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from zoo.weights import Checkpoint

    Inputs = Sequence[Mapping[str, Tensor]]  # arguments of a model, by name

CHANGES = ("norm", "kv_heads", "mixer", "fuse", "dtype")
DTYPES = ("float32", "float16", "bfloat16")
COMPARED = 64  # files, at most
LEARNING = {"steps": 500, "rate": 1e-3, "batch": 16}  # how a new mixer learns
RANDOM = 8  # random inputs, if no files are given


def parser() -> Parser:
    made = Parser(
        "zoo convert",
        "Changes a checkpoint and writes the result. Prints how much the outputs differ.\n"
        "rmsnorm and crmsnorm in place of layernorm are exact; a model for which they\nwould not be is refused. "
        "A new mixer learns, on the files of --on, to give what\nthe old one gave.",
        "zoo convert RUN/best converted --norm rmsnorm --dtype bfloat16\n"
        "  zoo convert RUN/best converted --mixer sla --on images/",
    )
    add, rare = made.add_argument, made.add_rare
    add("name", metavar="NAME", help=files.NAME)
    add("folder", metavar="FOLDER", help="where the result is written")
    add("--norm", choices=("rmsnorm", "crmsnorm"), help="norm in place of layernorm")
    add("--kv-heads", metavar="N", type=count, help="number of key and value heads, shared by the heads")
    add("--mixer", metavar="NAME", help="another mixer, as in `zoo list mixers`; needs --on")
    add("--fuse", action="store_true", help="fold norms and scales into linears, for inference")
    add("--dtype", choices=DTYPES, help="dtype of the weights in the file (default: float32)")
    add("--on", metavar="PATH", nargs="+", default=[], help="files and folders to compare on (default: random inputs)")
    files.add_device(made)
    rare("--steps", metavar="N", type=count, help=f"training steps of a new mixer (default: {LEARNING['steps']})")
    rare("--rate", metavar="R", type=float, help=f"peak learning rate of a new mixer (default: {LEARNING['rate']})")
    rare("--batch", metavar="N", type=count, help=f"files in a batch for a new mixer (default: {LEARNING['batch']})")
    return made


def main(arguments: list[str]) -> None:
    """Converts a checkpoint as given by the arguments."""
    made = parser()
    given = made.parse_intermixed_args(arguments)
    changes = {name: getattr(given, name) for name in CHANGES if getattr(given, name) not in (None, False)}
    if not changes:
        made.error(f"give at least one of {', '.join('--' + name.replace('_', '-') for name in CHANGES)}")
    if given.mixer is not None and not given.on:
        made.error("--mixer needs --on PATH: files that the new mixer learns from")
    if given.mixer is None and (unused := [name for name in LEARNING if getattr(given, name) is not None]):
        made.error(f"--{unused[0]} is only for --mixer")
    if given.mixer is not None and given.kv_heads is not None:
        made.error("--kv-heads is for the present mixer; give a new one its own, as in --mixer 'softmax(kv_heads=1)'")
    for name, usual in LEARNING.items():
        setattr(given, name, usual if getattr(given, name) is None else getattr(given, name))
    from zoo.weights import load_checkpoint, save_model
    from zoo.weights.names import public_name

    device = files.device_for(given.device)
    target = Path(given.folder).expanduser().resolve()
    check_place(given, target)  # before the work
    start = load_checkpoint(given.name, device=device)
    inputs = compared(start, given, device)
    model = start.model
    print(f"compared on      {counted(len(inputs), 'file' if given.on else 'random input')}")
    for name, value in changes.items():
        model = change(model, name, value, start, given, inputs)
    words = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
        for name, value in changes.items()
    ]
    source = f"zoo convert {shlex.quote(public_name(given.name))} {' '.join(words)}"
    before, after = (sum(each.numel() for each in part.parameters()) for part in (start.model, model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what the checkpoint lacked before, too
        save_model(model.cpu(), target, source=source)
    print(f"parameters       {before:,}, now {after:,}\nwritten to       {given.folder}")


def check_place(given: Any, target: Path) -> None:
    """ValueError or OSError if the result cannot be written there, or would be part of the checkpoint itself."""
    from zoo.weights.save import check_target

    for own in (Path(given.name).expanduser().resolve(), Path("checkpoints", given.name).resolve()):
        if own in (target, *target.parents) and (own / "config.json").is_file():
            where = "is" if own == target else "is inside"
            raise ValueError(f"{given.folder} {where} the checkpoint itself; choose another folder")
    check_target(target)
    near = next(each for each in target.parents if each.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        why = "is not writable" if near.is_dir() else "is a file"
        raise OSError(f"{given.folder} cannot be written: {near} {why}")


def change(model: Any, name: str, value: Any, start: Checkpoint, given: Any, inputs: Inputs) -> Any:
    """The model after one of CHANGES; prints how its outputs differ from those of the one before."""
    import torch

    import zoo
    from zoo.layer import copied
    from zoo.weights.converting import share_kv_heads, to_rmsnorm

    said = ""
    if name == "norm":
        made = to_rmsnorm(model, compressed=value == "crmsnorm")
    elif name == "kv_heads":
        made = share_kv_heads(model, value)
    elif name == "fuse":
        made, said = fused(model, given)
    elif name == "dtype":
        made = copied(model).to(getattr(torch, value))
    else:
        if given.fuse:  # before the work
            fused(replace(model.config, mixer=value).build().eval(), given)
        made, errors = zoo.graft(model, value, batches(start, given), rate=given.rate)
        worst = max(errors.values())
        said = f", largest relative squared error of a mixer {worst:.2g}"
    label = name.replace("_", " ") + ("" if value is True else f" {value}")
    print(f"{label:<16} {agreement(model, made, inputs)}{said}")
    return made


def fused(model: Any, given: Any) -> tuple[Any, str]:
    """The model with its layers folded, and how many they are; ValueError if there are none."""
    import zoo

    made = zoo.fuse(model)
    report = made.fusion or []
    if not (folded := [each for each in report if each.into is not None]):
        why = f": {report[0].layer}: {report[0].reason}" if report else ""
        raise ValueError(f"--fuse: no layer of {given.name} can be folded{why}")
    return made, f", {len(folded)} of {counted(len(report), 'layer')} folded"


def agreement(model: nn.Module, made: nn.Module, inputs: Inputs) -> str:
    """How much the outputs of a changed model differ from those before, for people; ValueError if they are NaN or
    infinite."""
    import torch

    from zoo.layer import copied

    config: Any = model.config
    worst, largest, same, total = dict[str, float](), dict[str, float](), 0, 0
    pair = [part if next(part.parameters()).dtype == torch.float32 else copied(part).float() for part in (model, made)]
    with torch.no_grad():
        for each in inputs:
            old, new = (config.probe_outputs(part, dict(each)) for part in pair)
            if not all(bool(output.isfinite().all()) for output in new.values()):
                raise ValueError("the changed model's output is NaN or infinite, so it is not saved")
            for name, output in old.items():
                worst[name] = max(worst.get(name, 0.0), float((new[name] - output).abs().max()))
                largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))
            if config.task == "classify" and config.headed:
                same += int((old["output"].argmax(-1) == new["output"].argmax(-1)).sum())
                total += len(old["output"])
    ratio = max(worst[name] / largest[name] if largest[name] else 0.0 for name in worst)
    said = f"outputs differ by {ratio:.1e} of the largest"
    return f"{said}, same class for {same} of {total}" if total else said


def found(start: Checkpoint, given: Any) -> list[str]:
    """The files of --on."""
    from zoo.inputs.audio import EXTENSIONS as AUDIO
    from zoo.inputs.images import EXTENSIONS as IMAGES

    config = start.model.config
    kind = config.input
    if start.preprocess is None or config.task == "generate" or kind not in ("image", "boxes", "audio"):
        raise ValueError(f"--on: {given.name} takes no files, only prepared inputs; use zoo.graft in Python")
    extensions, word = (AUDIO, "audio file") if kind == "audio" else (IMAGES, "image")
    return files.find_files(given.on, extensions, word)


def compared(start: Checkpoint, given: Any, device: str) -> list[dict[str, Tensor]]:
    """The inputs on which outputs are compared, one by one: some files of --on, or random ones."""
    import torch

    config: Any = start.model.config
    if not given.on:
        inputs = [config.probe_inputs(torch.Generator().manual_seed(seed)) for seed in range(RANDOM)]
    else:
        prepare, paths = start.preprocess, found(start, given)
        assert prepare is not None
        some = paths[:: -(-len(paths) // COMPARED)]
        inputs = [{config.argument: prepare(path)[None]} for path in some]
    return [{name: each.to(device) for name, each in given.items()} for given in inputs]


def batches(start: Checkpoint, given: Any) -> DataLoader[Any]:
    """Batches of the files of --on, drawn at random, for the steps of a new mixer."""
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    prepare, paths, device = start.preprocess, found(start, given), next(start.model.parameters()).device
    assert prepare is not None

    def joined(drawn: list[str]) -> Tensor:
        prepared = [prepare(path) for path in drawn]
        if len({each.shape for each in prepared}) > 1:
            raise ValueError("the files of --on have several sizes, so they need --batch 1")
        return torch.stack(prepared).to(device)

    drawn = RandomSampler(paths, replacement=True, num_samples=given.steps * given.batch)
    return DataLoader(paths, given.batch, sampler=drawn, collate_fn=joined)  # pyright: ignore[reportArgumentType]
