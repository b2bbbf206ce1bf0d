"""What the tests of videos share: small films, written by PyAV."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx", ".gif": "gif"}
# The matrix of an MP4's track header for each number of quarter turns clockwise.
TURNS = {0: (1, 0, 0, 1), 1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A frame [height, width, 3] whose brightness grows with its number, white at the top left."""
    values = np.full((height, width, 3), 20 + 3 * number, dtype=np.uint8)
    values[: height // 2, : width // 2] = 250
    return values


def film(
    path: Path,
    frames: int = 30,
    size: tuple[int, int] = (64, 48),
    times: Sequence[float] | None = None,
    last: float | None = None,
) -> Path:
    """Writes a film of 25 frames per second, or with frames at these times in seconds, the last for so long."""
    codec = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv444p" if codec == "libx264" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames if times is None else len(times)):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        packets = stream.encode()
        if last is not None:
            latest = max(packets, key=lambda packet: packet.pts)
            latest.duration = round(last / latest.time_base)
        container.mux(packets)
    return path


def turned(path: Path, quarters: int) -> Path:
    """Writes into an MP4 that it is shown turned clockwise by so many quarters."""
    values = bytearray(path.read_bytes())
    start = values.index(b"tkhd") + 44
    a, b, c, d = (each * 2**16 for each in TURNS[quarters])
    values[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(values)
    return path


def sound(path: Path) -> Path:
    """Writes a file with audio alone."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
