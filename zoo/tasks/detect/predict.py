"""`zoo detect predict`: detects objects in images; writes lines, COCO's JSON, CSV and an image."""

import argparse
from pathlib import Path

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count

FILES = ("detections.json", "detections.csv", "detections.png")
COLUMNS = ("path", "label", "category_id", "score", "left", "top", "right", "bottom", "error")


def share(text: str) -> float:
    """A number from 0 to 1, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got '{text}'")
    return value


def parser() -> Parser:
    made = Parser(
        "zoo detect predict",
        "Detects objects in images: prints how many of each category, and writes\n"
        f"{', '.join(FILES)}.\nAn image that cannot be read is reported, and the exit status is then 1.",
        "zoo detect predict RUN/best photos/ scan.png",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("paths", metavar="PATH", nargs="+", help="an image, or a folder to search for images")
    files.add_options(made)
    threshold = {"metavar": "S", "type": share, "default": 0.3}
    made.add_argument("--threshold", help="least score of an object (default: 0.3)", **threshold)
    made.add_argument("--top", metavar="N", type=count, default=100, help="most objects in an image (default: 100)")
    made.add_rare("--batch", metavar="N", type=count, default=8, help="images per batch (default: 8)")
    return made


def main(arguments: list[str]) -> None:
    """Detects objects as given by the arguments. ValueError at the end if an image had an error."""
    given = parser().parse_intermixed_args(arguments)
    from zoo.inputs.images import EXTENSIONS
    from zoo.outputs.answers import class_names
    from zoo.outputs.label_map import LabelMap
    from zoo.tasks.detect import answers

    output, device = Path(given.output).expanduser(), files.device_for(given.device)
    paths = files.find_files(given.paths, EXTENSIONS, "image", output / FILES[2])
    model, preprocess, labels, _ = files.load_for("detect", given.name)
    files.make_output(output)  # before the work, so that a bad name fails early

    if labels is None:
        labels = LabelMap.from_names(class_names(None, model.config.labelled))  # pyright: ignore
    assert isinstance(labels, LabelMap)
    answer = answers.Detector(model.to(device), preprocess, labels, given.threshold, given.top, given.precision)
    entries, shown = answers.predict(paths, answer, given.batch)
    if not shown:
        raise files.nothing_done(output, entries, "image")
    coco, rows = answers.to_coco(entries, labels), answers.table(entries)
    written = files.write(output, FILES, COLUMNS, coco, lambda: answers.draw(entries, shown, labels), rows)
    files.finish(output, written, entries, "image")
