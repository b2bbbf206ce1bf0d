"""`zoo detect predict`: detects objects in images and videos; writes lines, COCO's JSON, CSV, an image and videos."""

import argparse
import os
from pathlib import Path

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count

FILES = ("detections.json", "detections.csv", "detections.png")
COLUMNS = ("path", "frame", "time", "label", "category_id", "score", "left", "top", "right", "bottom", "error")


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
        "Detects objects in images and videos: prints how many of each category, and\n"
        f"writes {', '.join(FILES)}, and videos\n"
        "with boxes as NAME.mp4. If a file cannot be read, the exit status is 1.",
        "zoo detect predict RUN/best photos/ scan.png clip.mp4",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("paths", metavar="PATH", nargs="+", help="an image, a video, or a folder to search for both")
    files.add_options(made)
    threshold = {"metavar": "S", "type": share, "default": 0.3}
    made.add_argument("--threshold", help="least score of an object (default: 0.3)", **threshold)
    made.add_argument("--top", metavar="N", type=count, default=100, help="most objects in an image (default: 100)")
    made.add_rare("--batch", metavar="N", type=count, default=8, help="images or frames per batch (default: 8)")
    return made


def main(arguments: list[str]) -> None:
    """Detects objects as given by the arguments. ValueError at the end if a file had an error."""
    given = parser().parse_intermixed_args(arguments)
    from zoo.inputs import videos as inputs
    from zoo.tasks.detect import answers, videos

    output, device = Path(given.output).expanduser(), files.device_for(given.device)
    images, clips = find(given.paths, output)
    if clips and not images and not inputs.is_readable():
        raise ValueError(inputs.MISSING)
    targets = videos.targets(clips, output)
    found = files.load_for("detect", given.name)
    files.make_output(output)  # before the work, so that a bad name fails early

    answer = answers.detector(found, given.threshold, given.top, given.precision, device)
    entries, shown = answers.predict(images, answer, given.batch)
    of_videos, frames = videos.predict(clips, targets, answer, given.batch)
    entries, shown, kind = entries + of_videos, (shown + frames)[: answers.SHOWN], "file" if clips else "image"
    if not shown:
        raise files.nothing_done(output, entries, kind)
    coco, rows = answers.to_coco(entries, answer.labels), answers.table(entries)
    draws = {FILES[2]: lambda: answers.draw(entries, shown, answer.labels)}
    written = files.write(output, FILES[:2], COLUMNS, coco, draws, rows)
    done = [path.name for path, entry in zip(targets, of_videos, strict=True) if answers.answered(entry)]
    files.finish(output, written + done, entries, kind)


def find(given: list[str], output: Path) -> tuple[list[str], list[str]]:
    """The images and the videos among the given paths and below the folders among them, without the files that an
    earlier run wrote to `output`."""
    from zoo.inputs.images import EXTENSIONS
    from zoo.inputs.videos import EXTENSIONS as VIDEOS
    from zoo.inputs.videos import is_video

    paths = files.find_files(given, EXTENSIONS + VIDEOS, "image or video", [output / FILES[2]])
    named, home = {os.path.realpath(os.path.expanduser(path)) for path in given}, os.path.realpath(output)
    images, videos = [], []
    for path in paths:
        if not is_video(path):
            images.append(path)
        elif {home, os.path.realpath(path)} & named or os.path.dirname(os.path.realpath(path)) != home:
            videos.append(path)
    if not images and not videos:
        raise ValueError(f"no image or video found, except videos that are already in {output}")
    return images, videos
