"""What `export` commands share: an ONNX file with free sizes and metadata inside, compared with PyTorch."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.aside import aside
from zoo.text import plain, reason

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from zoo.models.base import Model

    Arrays = dict[str, np.ndarray]  # a model's inputs or outputs by name

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST, NEWEST = 18, 22  # PyTorch writes no older opset; onnxruntime cannot run its attention of opset 23
TOLERANCE = 1e-3  # largest difference, as a share of an output's largest value
TRIES = 3  # inputs; a near tie between two tokens may turn their ranking
LARGEST = 2_000_000_000  # bytes of weights that an ONNX file can hold


def opset(text: str) -> int:
    """A version of ONNX's operators, as an argument's type."""
    if not text.isdecimal() or len(text) > 3 or not OLDEST <= int(text) <= NEWEST:
        raise argparse.ArgumentTypeError(f"must be an integer from {OLDEST} to {NEWEST}, got '{text}'")
    return int(text)


def check_target(path: Path) -> None:
    """ValueError if a new file cannot be made at this path, OSError if its folder cannot be written."""
    if os.path.isdir(path):
        raise ValueError(f"--output must be a file; {path} is a folder")
    if not os.path.isdir(path.parent):
        raise ValueError(f"--output {path}: folder not found: {path.parent}")
    write(path, None)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; delete it, or give another --output")


def metadata(model: Model, preprocess: Any, labels: Any) -> dict[str, str]:
    """What is written inside the file, by key: `labels` and `preprocess` in JSON as in config.json, the others as plain
    text in one line."""
    import zoo
    from zoo.models import family_of
    from zoo.outputs import LABELS

    config = model.config
    assert config.labels is not None
    return {
        "zoo": zoo.__version__,
        "task": config.task,
        "family": str(family_of(model)),
        "preset": model.preset or "",
        "labels": json.dumps(LABELS[config.labels].write(labels)),
        "preprocess": json.dumps(preprocess.to_dict()),
        "source": plain(model.about.get("source", "")),
        "license": plain(model.about.get("license", "unknown")),
    }


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings and logs of exporters, which concern their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def to_onnx(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    free: Mapping[str, Mapping[int, Any]],
    outputs: Sequence[str],
    opset: int,
    notes: Mapping[str, str],
) -> bytes:
    """An ONNX file's contents.

    Args:
        model: in eval mode; its forward takes the inputs in their order, and gives the outputs by name.
        inputs: an example.
        free: the axes of each input whose size is free, as `torch.export.Dim`.
        outputs: the names of the outputs in their order.
        opset: version of ONNX's operators.
        notes: metadata by key.

    Raises:
        ValueError: the model cannot be exported, or not with this opset.
    """
    import torch

    if sum(each.numel() * each.element_size() for each in model.parameters()) > LARGEST:
        raise ValueError(f"the weights take more than {LARGEST / 1e9:.0f} GB, which one ONNX file cannot hold")
    try:
        with torch.no_grad(), _silent():
            program: Any = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes={name: dict(free[name]) for name in inputs},
                input_names=[*inputs],
                output_names=[*outputs],
                opset_version=opset,
                verbose=False,
            )
            proto = program.model_proto
    except Exception as error:  # a part that the exporter cannot trace or translate may raise anything
        raise ValueError(f"PyTorch cannot export this model: {reason(error.__cause__ or error)}") from error
    if (written := next(each.version for each in proto.opset_import if not each.domain)) != opset:
        raise ValueError(f"PyTorch cannot export this model with opset {opset}; use --opset {written}")
    drop_traces(proto.graph)
    for key, value in notes.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return proto.SerializeToString()


def drop_traces(graph: Any) -> None:
    """Removes from the parts of a graph the lines of source code they came from, with the folders of this machine."""
    for part in (graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for node in graph.node:
        for each in node.attribute:
            for inner in ([each.g] if each.HasField("g") else []) + [*each.graphs]:
                drop_traces(inner)


def largest_difference(
    model: Callable[..., Mapping[str, Tensor]],
    contents: bytes,
    draws: Sequence[Callable[[Any], dict[str, Tensor]]],
    arranged: Callable[[Arrays, Arrays], Arrays],
    tolerance: float = TOLERANCE,
) -> float:
    """How far the outputs of onnxruntime are from those of PyTorch, as a share of the largest value of each output.

    Args:
        model: in eval mode, on the CPU; or a function of the inputs by name that gives the outputs by name.
        contents: of the ONNX file.
        draws: each draws inputs of one shape from a `torch.Generator`.
        arranged: puts the first outputs in the order of the second ones, where a model may give another.
        tolerance: the largest difference that is allowed.

    Raises:
        ValueError: it is more than `tolerance`, or onnxruntime cannot run the file.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session: Any = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime cannot load the exported model: {reason(error)}") from error

    def tried(inputs: dict[str, Tensor]) -> float:
        with torch.no_grad():
            wanted = {name: each.numpy() for name, each in model(**inputs).items()}
        try:
            got = session.run([*wanted], {name: each.numpy() for name, each in inputs.items()})
        except Exception as error:
            shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in inputs.items())
            raise ValueError(f"onnxruntime cannot run the exported model on {shapes}: {reason(error)}") from error
        return _difference(dict(zip(wanted, got, strict=True)), wanted, arranged)

    worst = 0.0
    for number, draw in enumerate(draws):
        found = math.inf
        for attempt in range(TRIES):
            found = min(found, tried(draw(torch.Generator().manual_seed(number * TRIES + attempt))))
            if found <= tolerance:
                break
        worst = max(worst, found)
    if worst > tolerance:
        off = f"by {worst:.2g} of the largest value, and {tolerance:g} is allowed"
        raise ValueError(f"onnxruntime and PyTorch differ {off}; nothing was written")
    return worst


def _difference(got: Arrays, wanted: Arrays, arranged: Callable[[Arrays, Arrays], Arrays]) -> float:
    import numpy as np

    if any(got[name].shape != wanted[name].shape for name in wanted):
        return math.inf
    if not all(np.isfinite(each).all() for each in wanted.values()):
        raise ValueError("the model's output is NaN or infinite")
    if not all(np.isfinite(each).all() for each in got.values()):
        return math.inf
    got = arranged(got, wanted)
    return max(float(np.abs(got[name] - wanted[name]).max() / max(np.abs(wanted[name]).max(), 1e-30)) for name in got)


def write(path: Path, contents: bytes | None) -> None:
    """Writes a file aside and renames it into place; without contents, only tries whether that is possible.

    Raises:
        OSError: it cannot be written; no partial file is left.
    """
    try:
        with aside(path.parent) as folder:
            made = folder / path.name
            with open(made, "wb") as file:
                file.write(contents or b"")
                file.flush()
                os.fsync(file.fileno())
            if contents is not None:
                os.replace(made, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {reason(error)}") from error
