"""Detects objects in the frames of videos, and writes the videos with boxes, names and scores."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from zoo.aside import aside
from zoo.inputs.videos import UnreadableVideo, Video
from zoo.tasks.detect.answers import SIDE, Detector, colours_of, summary
from zoo.tasks.predicting import fail, say, short
from zoo.text import counted, plain, reason

if TYPE_CHECKING:
    from PIL.Image import Image

CODECS = ("libx264", "mpeg4")  # the first that this build of FFmpeg has
TICKS = 60_000  # time steps in a second: usual rates are exact, 30000/1001 too


class Writer:
    """An MP4 file that is written aside and renamed into place when the context is left without an error.

    Frames of another size than the first are resized to it. OSError if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: Any = None
        self._last = -1

    def __enter__(self) -> Writer:
        import av

        with ExitStack() as stack:
            # The name aside is plain: that of the video may not be Unicode.
            self._made = stack.enter_context(aside(self.path.parent)) / "video.mp4"
            self._container: Any = av.open(f"file:{self._made}", "w", format="mp4")
            self._left = stack.pop_all()
        return self

    def add(self, image: Image, time: float) -> None:
        """Adds a frame at this time in seconds."""
        try:
            self._add(image, time)
        except Exception as error:  # of the encoder, or a full disk
            raise self._error(error) from error

    def _add(self, image: Image, time: float) -> None:
        import av

        if self._stream is None:
            codec = next(each for each in CODECS if each in av.codecs_available)
            options = {"preset": "veryfast", "crf": "23"} if codec == "libx264" else {"qmin": "2", "qmax": "5"}
            self._stream = self._container.add_stream(codec, rate=25, options=options)
            # The usual pixel format has one colour for 2 x 2 pixels, so that sides are even.
            self._stream.width, self._stream.height = (side + side % 2 for side in image.size)
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, TICKS)
            self._size = image.size
        if image.size != self._size:
            image = image.resize(self._size)
        if (sides := (self._stream.width, self._stream.height)) != self._size:
            image = image.crop((0, 0, *sides))
        frame = av.VideoFrame.from_image(image)
        self._last = max(self._last + 1, round(time * TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None and self._stream is not None:
                os.replace(self._made, self.path)
        except Exception as error:
            if kind is None:
                raise self._error(error) from error
        finally:
            self._left.close()

    def _error(self, error: Exception) -> OSError:
        return OSError(f"cannot write {self.path}: {reason(error)}")


def targets(paths: Sequence[str], output: Path) -> list[Path]:
    """The file of each annotated video: its name with .mp4, and a number if another one has that name already.

    Raises:
        ValueError: that file is one of the videos, or a folder.
    """
    found: list[Path] = []
    given = {os.path.realpath(path) for path in paths}
    for path in paths:
        stem, number = Path(path).stem, 1
        while (target := output / f"{stem}{f'-{number}' if number > 1 else ''}.mp4") in found:
            number += 1
        if os.path.realpath(target) in given:
            raise ValueError(f"{target} is one of the videos and would be replaced; choose another --output")
        if target.is_dir():
            raise ValueError(f"{target} is a folder; choose another --output")
        found.append(target)
    return found


def predict(
    paths: Sequence[str], written: Sequence[Path], answer: Detector, batch: int
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Image]]]:
    """Detects objects in videos frame by frame, writes each video with its boxes, and prints a line for each.

    Returns an entry for each video, with its `frames` or its `error` or both, and small images: of each video the
    first frame with an object. OSError if a video cannot be written.
    """
    entries: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Image]] = []
    for path, target in zip(paths, written, strict=True):
        entries.append({"path": path})
        try:
            with Video(path) as video:
                shown += _annotated(entries[-1], video, target, answer, batch)
        except UnreadableVideo as error:
            fail(entries[-1], error)
    return entries, shown


def _annotated(
    entry: dict[str, Any], video: Video, target: Path, answer: Detector, batch: int
) -> list[tuple[dict[str, Any], Image]]:
    """Adds the frames to the entry of a video and writes it; the first frame with an object, small."""
    colours = colours_of(answer.labels)
    frames: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Image]] = []
    fault: str | None = None
    remaining = iter(video)
    with tqdm(total=video.number, unit="frame", disable=None) as bar, Writer(target) as writer:
        while fault is None and (several := list(islice(remaining, batch))):
            parts = [next(iter(answer.preprocess.parts(each.image))) for each in several]
            for each, found in zip(several, answer(parts), strict=True):
                if isinstance(found, Exception):
                    fault = f"frame {len(frames)}: {reason(found)}"
                    break
                width, height = each.image.size
                frames.append({"frame": len(frames), "time": round(each.time, 6), "width": width, "height": height})
                frames[-1]["objects"] = found
                if not shown or (found and not shown[0][0]["objects"]):
                    small = each.image.copy()
                    small.thumbnail((SIDE, SIDE))
                    shown = [(entry | frames[-1], small)]
                writer.add(annotated(each.image, found, colours), each.time)
            bar.update(len(several))
    if frames:
        entry["frames"] = frames
        length = f"{counted(len(frames), 'frame')} in {frames[-1]['time']:.1f} s"
        say(f"{plain(entry['path'])}  {length}; in one frame at most {peaks(frames)}")
    if (fault := fault or video.fault) is not None:
        fail(entry, ValueError(fault))
    return shown


def peaks(frames: Sequence[dict[str, Any]]) -> str:
    """How many objects of each category a single frame has at most."""
    most: Counter[str] = Counter()
    for frame in frames:
        most |= Counter(each["label"] for each in frame["objects"])
    return summary([{"label": label} for label in most.elements()])


def annotated(image: Image, objects: Sequence[dict[str, Any]], colours: dict[str, str], lines: int = 60) -> Image:
    """A copy of the image with the boxes, names and scores of objects, the best ones on top. So many lines of text fit
    into the longer side of a large image."""
    from PIL import ImageDraw

    image, side = image.copy(), max(image.size)
    canvas, font = ImageDraw.Draw(image), _font(max(10, side // lines))
    for each in reversed(objects):
        left, top, right, bottom = each["box"]
        colour = colours[each["label"]]
        canvas.rectangle((left, top, right, bottom), outline=colour, width=max(1, side // 400))
        text = f"{short(each['label'], 18)} {each['score']:.0%}"
        around = canvas.textbbox((left, top), text, font, anchor="lb")
        if around[1] < 0:  # no room above the box
            around = canvas.textbbox((left, 0), text, font, anchor="lt")
        canvas.rectangle(around, fill=colour)
        canvas.text(around[:2], text, "white", font, anchor="lt")
    return image


@functools.cache
def _font(size: int) -> Any:
    from matplotlib.font_manager import findfont
    from PIL import ImageFont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)
