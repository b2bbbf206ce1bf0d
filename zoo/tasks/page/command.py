"""`zoo page`: writes one HTML file that runs a checkpoint in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.tasks import exporting
from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count


def parser() -> Parser:
    made = Parser(
        "zoo page",
        "Writes one HTML file that runs a checkpoint in a browser, opened from disk and\nwithout a network. "
        "It takes an image by drop, paste or camera; nothing leaves the\nmachine. Models: image classification.",
        "zoo page vit_micro.digits --output page.html",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("-o", "--output", metavar="FILE", default="page.html", help="new file (default: %(default)s)")
    runtime = "an unpacked onnxruntime-web (default: downloaded from npm once, and checked)"
    made.add_argument("--runtime", metavar="DIR", help=runtime)
    made.add_argument("--top", metavar="N", type=count, default=5, help="labels that are shown (default: 5)")
    return made


def main(arguments: list[str]) -> None:
    """Writes a page as given by the arguments. ValueError or OSError, and no file, if that is not possible."""
    given = parser().parse_args(arguments)
    output = Path(given.output).expanduser()
    exporting.check_packages("zoo page")
    exporting.check_target(output)
    from zoo.tasks.page.document import document
    from zoo.tasks.page.runtime import read_runtime

    checkpoint = supported(given.name)
    runtime = read_runtime(given.runtime)
    graph, labels = classify(*checkpoint[:3])
    shown = {"labels": labels, "top": given.top}
    contents = document("classify", title(given.name), checkpoint.config, shown, graph, runtime)
    exporting.write(output, contents)
    files.report(f"wrote {output} ({len(contents) / 1e6:.1f} MB)")


def supported(name: str) -> Any:
    """A checkpoint that a page can run; ValueError for another."""
    from zoo.inputs.images import ImagePreprocess

    found = files.load(name)
    task = found.model.config.task
    if task != "classify":
        raise ValueError(f"zoo page: {name} is for `zoo {task}`, which is not yet supported; choose a classifier")
    files.check_complete(found, name)
    preprocess: Any = found.preprocess
    if not isinstance(preprocess, ImagePreprocess):
        raise ValueError(f"zoo page: {type(preprocess).__name__} is not yet supported, only ImagePreprocess")
    if preprocess.interpolation == "nearest":
        raise ValueError("zoo page: interpolation 'nearest' is not yet supported")
    return found


def title(name: str) -> str:
    return Path(name.partition("@")[0].rpartition(":")[2]).expanduser().absolute().name


def classify(model: Any, preprocess: Any, labels: Any) -> tuple[bytes, list[str]]:
    """The graph of a classifier, compared with its own answers, and the names of its classes."""
    from zoo.fusion import fuse
    from zoo.outputs.answers import class_names
    from zoo.tasks.page import graph

    files.report("exporting; this takes a minute or less")
    notes = exporting.metadata(model, preprocess, class_names(labels, model.config.labelled))
    contents = graph.classify_graph(fuse(model) if model.fusion is None else model, preprocess, notes)
    files.report("comparing with PyTorch")
    same, resized = graph.compare_classify(model, preprocess, contents)
    files.report(f"largest difference: {same:.1e} of the largest logit, {resized:.1e} where images are resized")
    return contents, class_names(labels, model.config.labelled)
