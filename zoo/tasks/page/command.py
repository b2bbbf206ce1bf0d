"""`zoo page`: writes one HTML file that runs a checkpoint in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from zoo.tasks import exporting
from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count

TOP = 5  # labels that are shown
WEBGPU = "run on a GPU where the browser has WebGPU, else as usual; 9 MB more (17 instead of 8 MB for vit_micro.digits)"


def parser() -> Parser:
    made = Parser(
        "zoo page",
        "Writes one HTML file that runs a checkpoint in a browser, opened from disk and\nwithout a network. "
        "It takes an image by drop, paste or camera, or speech by file\nor microphone; nothing leaves the machine. "
        "Models: classifiers,\ndetectors and CTC recognisers.",
        "zoo page vit_micro.digits --output page.html",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("-o", "--output", metavar="FILE", default="page.html", help="new file (default: %(default)s)")
    runtime = "an unpacked onnxruntime-web (default: downloaded from npm once, and checked)"
    made.add_argument("--runtime", metavar="DIR", help=runtime)
    made.add_argument(
        "--top", metavar="N", type=count, default=TOP, help="labels that are shown (default: %(default)s)"
    )
    made.add_argument("--webgpu", action="store_true", help=WEBGPU)
    return made


class Options(NamedTuple):
    """What a page can differ in: the folder of onnxruntime-web, None for the pinned one; the labels shown; whether it
    holds the form for WebGPU, too."""

    runtime: str | None = None
    top: int = TOP
    webgpu: bool = False


def main(arguments: list[str]) -> None:
    """Writes a page as given by the arguments. ValueError or OSError, and no file, if that is not possible."""
    given = parser().parse_args(arguments)
    output = Path(given.output).expanduser()
    exporting.check_target(output)
    contents = page_of(given.name, title(given.name), Options(given.runtime, given.top, given.webgpu))
    exporting.write(output, contents)
    files.report(f"wrote {output} ({len(contents) / 1e6:.1f} MB)")


def page_of(name: str, shown: str, options: Options) -> bytes:
    """The contents of a page, the same ones in each call.

    Args:
        name: of a checkpoint.
        shown: the title.
        options: of the page.

    Raises:
        ValueError: the model cannot have a page, a package is missing, or the page would be too large.
        OSError: onnxruntime-web cannot be read or downloaded.
    """
    files.check_packages("zoo page", exporting.PACKAGES, "export")
    from zoo.tasks.page.document import document
    from zoo.tasks.page.runtime import WEBGPU_NAMES, read_runtime

    checkpoint = files.load(name)
    task = str(checkpoint.model.config.task)
    if task not in TASKS:
        allowed = ", ".join(TASKS)
        raise ValueError(f"zoo page: {name} is for `zoo {task}`, which is not yet supported, only {allowed}")
    files.check_complete(checkpoint, name)
    check, make = TASKS[task]
    check(checkpoint, name)
    runtime = read_runtime(options.runtime)
    webgpu = read_runtime(options.runtime, WEBGPU_NAMES) if options.webgpu else None
    files.report("exporting; this takes a minute or less")
    graph, given = make(checkpoint)
    return document(task, shown, checkpoint.config, given | {"top": options.top}, graph, runtime, webgpu)


def title(name: str) -> str:
    """The name of a checkpoint without its place."""
    return Path(name.partition("@")[0].rpartition(":")[2]).expanduser().absolute().name


def check_images(checkpoint: Any, name: str) -> None:
    """ValueError if a page cannot prepare this classifier's images."""
    from zoo.inputs.images import ImagePreprocess

    preprocess = checkpoint.preprocess
    if not isinstance(preprocess, ImagePreprocess):
        raise ValueError(f"zoo page: {type(preprocess).__name__} is not yet supported, only ImagePreprocess")
    if preprocess.interpolation == "nearest":
        raise ValueError("zoo page: interpolation 'nearest' is not yet supported")


def classify(checkpoint: Any) -> tuple[bytes, dict[str, Any]]:
    """The graph of a classifier, compared with its own answers, and what the script needs."""
    from zoo.outputs.answers import class_names
    from zoo.tasks.page import graph

    model, preprocess = checkpoint.model, checkpoint.preprocess
    labels = class_names(checkpoint.labels, model.config.labelled)
    notes = exporting.metadata(model, preprocess, labels)
    contents = graph.classify_graph(files.fused(model), preprocess, notes)
    files.report("comparing with PyTorch")
    same, resized = graph.compare_classify(model, preprocess, contents)
    files.report(f"largest difference: {same:.1e} of the largest logit, {resized:.1e} where images are resized")
    return contents, {"labels": labels}


def check_boxes(checkpoint: Any, name: str) -> None:
    """ValueError if a page cannot prepare this detector's images, or choose among its boxes."""
    fit, config = checkpoint.preprocess.fit, checkpoint.model.config
    if fit != "stretch":
        raise ValueError(f"zoo page: detection with fit '{fit}' is not yet supported, only 'stretch'")
    if checkpoint.preprocess.interpolation == "nearest":
        raise ValueError("zoo page: interpolation 'nearest' is not yet supported")
    if min(config.detection_nms, getattr(config, "proposal_nms", 1.0)) < 1:
        raise ValueError(f"zoo page: {name} has non-maximum suppression, which is not yet supported")


def detect(checkpoint: Any) -> tuple[bytes, dict[str, Any]]:
    """The graph of a detector, compared with its own answers, and what the script needs."""
    from zoo.outputs.answers import class_names
    from zoo.outputs.label_map import LabelMap
    from zoo.tasks.page import graph

    model, preprocess = checkpoint.model, checkpoint.preprocess
    labels = checkpoint.labels or LabelMap.from_names(class_names(None, model.config.labelled))
    contents = graph.detect_graph(files.fused(model), preprocess, exporting.metadata(model, preprocess, labels))
    files.report("comparing with PyTorch")
    same, resized = graph.compare_detect(model, preprocess, contents)
    files.report(f"largest difference: {same:.1e} of the largest output, {resized:.1e} where images are resized")
    return contents, {"labels": list(labels.names)}


def check_speech(checkpoint: Any, name: str) -> None:
    """ValueError if a page cannot spell this recogniser's output."""
    if checkpoint.labels is None:
        raise ValueError(f"{name} has no tokenizer, so its output cannot be turned into text")
    if checkpoint.model.config.transducer:
        raise ValueError(f"zoo page: {name} is a transducer, which is not yet supported, only CTC")
    if any(re.fullmatch("<0x[0-9A-F]{2}>", piece) for piece in checkpoint.labels.pieces):
        raise ValueError(f"zoo page: the pieces of {name} have bytes among them, which is not yet supported")


def transcribe(checkpoint: Any) -> tuple[bytes, dict[str, Any]]:
    """The graph of a recogniser, compared with its own answers, and what the script needs."""
    from zoo.inputs.audio.features import LONGEST, SILENCE
    from zoo.tasks.page import graph

    model, preprocess, tokenizer = checkpoint.model, checkpoint.preprocess, checkpoint.labels
    contents = graph.transcribe_graph(files.fused(model), preprocess, exporting.metadata(model, preprocess, tokenizer))
    files.report("comparing with PyTorch")
    files.report(
        f"largest difference: {graph.compare_transcribe(model, preprocess, contents):.1e} of the largest logit"
    )
    ids = range(tokenizer.blank)
    pieces = [" " * tokenizer.starts_word(each) + tokenizer.decode([each]) for each in ids]
    step = preprocess.seconds_per_frame * model.config.stride
    return contents, {"pieces": pieces, "rate": preprocess.rate, "step": step, "longest": LONGEST, "silence": SILENCE}


# For each task that a page can do: what refuses a checkpoint early, and what makes its graph.
TASKS = {
    "classify": (check_images, classify),
    "detect": (check_boxes, detect),
    "transcribe": (check_speech, transcribe),
}
