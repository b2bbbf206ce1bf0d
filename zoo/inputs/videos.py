"""From a video file to its frames, by PyAV (the extra `video`)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.inputs.folders import check_regular
from zoo.text import counted, reason

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
MISSING = 'videos need av; run: pip install "zoo[video]"'
# Only these kinds of files are tried: others, such as playlists, make FFmpeg open further files and addresses.
OPTIONS = {"format_whitelist": "mov,matroska,avi,gif", "protocol_whitelist": "file"}
USUAL_RATE = Fraction(25)  # frames per second of a file that does not state it
LARGEST = 8192 * 8192  # pixels of a frame


class UnreadableVideo(ValueError):
    """A file that is not a complete video; the message has the file and the reason."""


class Frame(NamedTuple):
    """A frame of a video, upright, in mode RGB, and its time in seconds since the first one."""

    image: Image
    time: float


def is_video(path: str) -> bool:
    """Whether a file is a video by its name, or a GIF of several frames."""
    if not path.lower().endswith(".gif"):
        return path.lower().endswith(EXTENSIONS)
    from PIL import Image

    with suppress(Exception):  # a broken one is read as an image
        check_regular(path)
        with Image.open(path, formats=["GIF"]) as image:
            return getattr(image, "is_animated", False)
    return False


def is_readable() -> bool:
    """Whether the package that reads videos is installed."""
    return find_spec("av") is not None


class Video:
    """The frames of a video file, one after the other; a context manager.

    `number` is how many frames its header states, or None. Parts that cannot be decoded are skipped; after the last
    frame, `fault` says in one line what is missing, None if nothing is.

    Raises:
        UnreadableVideo: the file is missing, not a video, or has no video stream.
    """

    def __init__(self, path: str) -> None:
        if not is_readable():
            raise UnreadableVideo(f"{path}: {MISSING}")
        import av
        from av.error import FFmpegError

        self.path = path
        try:
            check_regular(path)
            if os.path.getsize(path) == 0:
                raise ValueError("the file is empty")
            self._container: Any = av.open(f"file:{path}", options=OPTIONS)
        except Exception as error:
            kinds = "not a video (MP4, MOV, AVI, MKV, WebM, GIF), or cut off"
            unknown = isinstance(error, FFmpegError) and isinstance(error, ValueError)  # not of the operating system
            raise self._error(kinds if unknown else reason(error)) from error
        streams = [each for each in self._container.streams.video if not _is_cover(each)]
        if not streams:
            self._container.close()
            raise self._error("the file has no video stream")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        self.number: int | None = self._stream.frames or None
        self.fault: str | None = None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        step = 1 / float(self._stream.average_rate or USUAL_RATE)
        first, last, end, number, faults = None, -step, 0.0, 0, []
        for image, time, duration in self._decoded(faults):
            if first is None and time is not None:
                first = time - number * step
            # Where a time is missing or runs backwards, the usual step is taken.
            time = last + step if time is None or first is None or time - first <= last else time - first
            last, end, number = time, time + max(step, duration), number + 1
            yield Frame(image, time)
        length = self._length()
        if faults:
            self.fault = f"{counted(len(faults), 'part')} cannot be decoded ({faults[0]})"
        elif not number:
            self.fault = "the video has no frame"
        elif number < (self.number or math.inf) and length is not None and length - end > max(0.5, 0.05 * length):
            self.fault = f"the file is cut off: it ends at {end:.2f} s of {length:.2f} s"

    def _decoded(self, faults: list[str]) -> Iterator[tuple[Image, float | None, float]]:
        """The frames as they are decoded, with their times and durations in seconds; what is wrong with those that
        cannot be is added to `faults`."""
        from av.error import FFmpegError

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
            except FFmpegError as error:
                faults.append(reason(error))
                return
            try:
                for each in packet.decode():
                    if each.width * each.height > LARGEST:
                        faults.append(f"a frame of {each.width} x {each.height} pixels is too large")
                        return
                    yield _upright(each), each.time, float((each.duration or 0) * (each.time_base or 0))
            except FFmpegError as error:
                faults.append(reason(error))

    def _length(self) -> float | None:
        """The length in seconds that the header states for the video stream."""
        if self._stream.duration:
            return float(self._stream.duration * self._stream.time_base)
        alone = len(self._container.streams) == 1
        return self._container.duration / 1e6 if alone and self._container.duration else None

    def _error(self, text: str) -> UnreadableVideo:
        return UnreadableVideo(f"{self.path}: {text}")


def _is_cover(stream: Any) -> bool:
    """Whether a stream is an image of the cover, as music files have it."""
    return bool(getattr(stream.disposition, "value", 0) & 0x400)


def _upright(frame: Any) -> Image:
    """The frame as an image, turned by its rotation to the nearest quarter."""
    from PIL import Image

    image = frame.to_image()
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    if not turns:
        return image
    how = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(how[turns - 1])
