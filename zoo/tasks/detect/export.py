"""`zoo detect export`: writes a detector as an ONNX file; configs/detect/README.md shows how to use the file."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.tasks import exporting
from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OUTPUTS = ("logits", "boxes")
TRACED = (2, 70, 100)  # batch, height and width of the example; other sizes give the same file
MEANING = (
    "logits [batch, queries, classes]: scores are their sigmoids, or with one more class, which means no object, their"
    " softmax; boxes [batch, queries, 4]: (centre x, centre y, width, height) in 0..1 of each image without its padding"
)


def parser() -> Parser:
    made = Parser(
        "zoo detect export",
        "Writes a detector as an ONNX file that takes any number of images of any size.\n"
        "Labels and preprocessing are inside. The file is compared with PyTorch first.",
        "zoo detect export RUN/best --output model.onnx",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("-o", "--output", metavar="FILE", default="model.onnx", help="new file (default: %(default)s)")
    size = "size that images are resized to, written inside (default: the checkpoint's)"
    made.add_argument("--size", metavar="N", type=count, help=size)
    opsets = f"version of ONNX's operators, {exporting.OLDEST} (default) to {exporting.NEWEST}"
    made.add_argument("--opset", metavar="N", type=exporting.opset, default=exporting.OLDEST, help=opsets)
    fuse = "fold norms into the layers beside them (default)"
    made.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True, help=fuse)
    return made


def main(arguments: list[str]) -> None:
    """Exports as given by the arguments. ValueError or OSError, and no file, if that is not possible."""
    given = parser().parse_args(arguments)
    output = Path(given.output).expanduser()
    files.check_packages("export", exporting.PACKAGES, "export")
    exporting.check_target(output)
    from dataclasses import replace

    from zoo.fusion import fuse
    from zoo.inputs.boxes import BoxPreprocess
    from zoo.outputs.answers import class_names
    from zoo.outputs.label_map import LabelMap

    model, preprocess, labels, _ = files.load_for("detect", given.name)
    assert isinstance(preprocess, BoxPreprocess)
    if getattr(model.config, "padding", "hidden") == "published":
        raise ValueError(f"{given.name} has padding 'published', which cannot be exported for free sizes; use 'hidden'")
    preprocess = replace(preprocess, size=given.size or preprocess.size)
    if labels is None:
        labels = LabelMap.from_names(class_names(None, model.config.labelled))
    config: Any = model.config
    if getattr(config, "proposal_nms", 1.0) < 1.0:
        raise ValueError(
            f"a model with proposal_nms={config.proposal_nms} cannot be exported, since ONNX has no non-maximum "
            "suppression of a fixed number of boxes; train one with proposal_nms=1"
        )
    notes = exporting.metadata(model, preprocess, labels) | {"outputs": meaning(config)}
    if given.fuse and model.fusion is None:
        model = fuse(model)
    files.report("exporting; this takes a minute or more")
    contents = to_onnx(model, given.opset, notes)
    files.report("comparing with PyTorch")
    side = preprocess.size
    other = (side * 3 // 4 + 5, side // 2 + 3)
    shapes = [(batch, *size) for size in ((side, side), other) for batch in (1, 3)]
    worst = exporting.largest_difference(model, contents, [partial(inputs, model, *each) for each in shapes], paired)
    exporting.write(output, contents)
    tried = ", ".join(" x ".join(map(str, each)) for each in shapes)
    files.report(f"largest difference: {worst:.1e} of the largest value of an output (batches of {tried} pixels)")
    files.report(f"wrote {output} ({len(contents) / 1e6:.1f} MB)")


def meaning(config: Any) -> str:
    """What the outputs are, in one line."""
    if config.detection_nms == 1.0:
        return MEANING
    overlap = f"an IoU over {config.detection_nms}"
    return f"{MEANING}; of two boxes of a class with {overlap}, the one with the lower score is to be left out"


def to_onnx(model: Any, opset: int, notes: dict[str, str]) -> bytes:
    """A detector as the contents of an ONNX file whose inputs have a free batch, height and width."""
    import torch

    batch, height, width = torch.export.Dim("batch"), torch.export.Dim("height"), torch.export.Dim("width")
    free = {"images": {0: batch, 2: height, 3: width}, "mask": {0: batch, 1: height, 2: width}}
    example = inputs(model, *TRACED, torch.Generator().manual_seed(0))
    return exporting.to_onnx(model, example, free, OUTPUTS, opset, notes)


def inputs(model: Any, batch: int, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random images [batch, channels, height, width], and their mask; in a batch of several, the first is padded."""
    import torch
    import torch.nn.functional as F

    coarse = torch.randn(batch, model.config.channels, -(-height // 8), -(-width // 8), generator=generator)
    images = F.interpolate(coarse, scale_factor=8.0)[:, :, :height, :width]
    images = images + 0.2 * torch.randn(images.shape, generator=generator)
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    if batch > 1:
        mask[0, -(-height * 2 // 3) :], mask[0, :, -(-width * 3 // 4) :] = False, False
    return {"images": images * mask[:, None], "mask": mask}


def paired(got: exporting.Arrays, wanted: exporting.Arrays) -> exporting.Arrays:
    """The queries of `got` in the order of those of `wanted` that they are nearest to: near ties may change it."""
    import numpy as np

    scales = {name: max(float(np.abs(each).max()), 1e-30) for name, each in wanted.items()}
    one, other = (np.concatenate([each[name] / scale for name, scale in scales.items()], -1) for each in (got, wanted))
    order = np.stack([np.abs(b[:, None] - a).max(-1).argmin(1) for a, b in zip(one, other, strict=True)])
    return {name: np.take_along_axis(each, order[..., None], 1) for name, each in got.items()}
