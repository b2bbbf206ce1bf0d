"""The probe of a checkpoint: an input and the model's output for it, to check that it still computes the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.config import Config
from zoo.inputs import Preprocess
from zoo.text import one_line, reason
from zoo.weights.files import CheckpointError, read_tensors

TOLERANCE = 1e-4  # largest error of an output, as a share of its largest value
RAW = "raw"  # the name of an input that the preprocessing prepares for the model's first argument


def inputs_for(config: Config, preprocess: Preprocess | None) -> dict[str, Tensor]:
    """Random inputs by name: the model's arguments, the first of them raw if there is a preprocessing."""
    generator = torch.Generator().manual_seed(0)
    if preprocess is None:
        return config.probe_inputs(generator)
    raw = preprocess.sample(generator)
    rest = {name: each for name, each in config.probe_inputs(generator).items() if name != config.argument}
    return {RAW: raw} | rest


@torch.no_grad()
def outputs_of(model: nn.Module, preprocess: Preprocess | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's outputs for such inputs, by name."""
    config: Config = model.config  # pyright: ignore[reportAssignmentType]
    given = dict(inputs)
    with torch.autocast("cpu", enabled=False):
        if RAW in given:
            if preprocess is None:
                raise ValueError("its input is raw, but it has no preprocess")
            given = {config.argument: preprocess(given.pop(RAW))[None]} | given
        return config.probe_outputs(model, given)


def cost_of(model: nn.Module, preprocess: Preprocess | None, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The multiply-adds of matrix products, convolutions and attention for such inputs, and the shape of the prepared
    one."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs_of(model, preprocess, inputs)
    shape = (preprocess(inputs[RAW])[None] if preprocess and RAW in inputs else next(iter(inputs.values()))).shape
    return {"multiply_adds": counter.get_total_flops() // 2, "input": [*shape]}


def pack(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of probe.safetensors."""
    parts = (("input", inputs), ("output", outputs))
    return {f"{side}.{name}": each.contiguous() for side, part in parts for name, each in part.items()}


def check_probe(
    path: Path, model: nn.Module, preprocess: Preprocess | None, record: dict[str, Any] | None = None
) -> None:
    """CheckpointError if the model's outputs differ from those in the probe, or if that is not the file recorded."""
    config: Config = model.config  # pyright: ignore[reportAssignmentType]
    inputs, wanted = _unpack(read_tensors(path, record), path, config, preprocess)
    expected = inputs_for(config, preprocess).keys()
    if inputs.keys() != expected:
        raise CheckpointError(f"{path} is not a probe of this model: its inputs must be {', '.join(expected)}")
    try:
        got = outputs_of(model, preprocess, inputs)
    except Exception as error:  # an input from elsewhere may raise any error in a model
        raise CheckpointError(f"{path}: the model cannot take the probe's input: {reason(error)}") from error
    if got.keys() != wanted.keys():
        held = one_line(", ".join(wanted))
        raise CheckpointError(f"{path}: the model gives {', '.join(got)}, and the probe holds {held}")
    for name, output in wanted.items():
        if not output.is_floating_point() or got[name].shape != output.shape:
            shape = f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
            raise CheckpointError(f"{path}: {name} has shape {list(got[name].shape)}, expected {shape}")
        largest = output.double().abs().max() if output.numel() else output.new_zeros(())
        error = (got[name].double() - output.double()).abs().max() if output.numel() else output.new_zeros(())
        if not bool(largest.isfinite()) or not error <= TOLERANCE * largest:  # also if one of them is NaN
            share = f"{(error / largest).item():.3g} of its largest value, and {TOLERANCE:g} is allowed"
            raise CheckpointError(f"{path}: {name} is off by {share}; weights, preprocessing or code have changed")


def _unpack(
    found: dict[str, Tensor], path: Path, config: Config, preprocess: Preprocess | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if found.keys() == {"input", "output"}:  # until format 2
        return {config.argument if preprocess is None else RAW: found["input"]}, {"output": found["output"]}
    sides: dict[str, dict[str, Tensor]] = {"input": {}, "output": {}}
    for key, tensor in found.items():
        side, _, name = key.partition(".")
        if side not in sides or not name:
            raise CheckpointError(f"{path} is not a probe: it holds {key!r}, not only input.NAME and output.NAME")
        sides[side][name] = tensor
    if not all(sides.values()):
        raise CheckpointError(f"{path} is not a probe: it must hold inputs and outputs")
    return sides["input"], sides["output"]
