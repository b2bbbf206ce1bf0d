"""From an audio file to a waveform, whole or piece by piece."""

from __future__ import annotations

import io
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from zoo.inputs.audio.containers import length_of, ogg_ends
from zoo.inputs.audio.resampling import Resampler, check_rate
from zoo.inputs.folders import check_regular
from zoo.text import one_line, reason

if TYPE_CHECKING:
    from soundfile import SoundFile

FORMATS = {
    "WAV": (".wav", ".wave"),
    "WAVEX": (),
    "RF64": (".rf64",),
    "W64": (".w64",),
    "FLAC": (".flac",),
    "OGG": (".ogg", ".oga", ".opus"),
    "MP3": (".mp3",),
    "AIFF": (".aif", ".aiff", ".aifc"),
    "AU": (".au", ".snd"),
    "CAF": (".caf",),
    "NIST": (".sph",),
}
"""The formats that are read, by libsndfile's name, and the suffixes that a search of a folder accepts."""
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

LOUDEST = 1e6  # full scale is 1; the power of much larger values overflows
BLOCK = 2**20  # samples of all channels read at once
LEAST = 4096  # frames of a block
UNKNOWN = 2**36 - 1  # frames; FLAC's largest number


class UnreadableAudio(ValueError):
    """A file that is not complete audio; the message has the file and the reason."""


def read_audio(
    path: str | os.PathLike[str],
    rate: int = 16000,
    start: float = 0.0,
    seconds: float | None = None,
    content: bytes | None = None,
) -> Tensor:
    """Reads an audio file of one of `FORMATS`, or a part of it; channels are averaged.

    The length in the file's header is a hint: if it is missing or a little too large, all existing samples are read.

    Args:
        path: the file.
        rate: sample rate of the result in Hz; audio of another rate is resampled (band-limited sinc interpolation).
        start: where to begin, in seconds.
        seconds: how much to read; None for all. If the file ends earlier, the result is shorter.
        content: the bytes of the file, if they are in memory; `path` is then only its name in messages.

    Returns:
        float32 [S] with S of at least 1, full scale being -1..1.

    Raises:
        UnreadableAudio: the file is missing, empty, truncated or not audio, ends before `start`, or has samples that
            are NaN or not between -1e6 and 1e6.
    """
    return torch.cat(list(stream_audio(path, rate, start, seconds, content)))


def stream_audio(
    path: str | os.PathLike[str],
    rate: int = 16000,
    start: float = 0.0,
    seconds: float | None = None,
    content: bytes | None = None,
) -> Iterator[Tensor]:
    """`read_audio` in pieces, for files of any length; all samples before a fault come first."""
    with opened(path, content) as sound:
        resampler = Resampler(sound.rate, rate)
        for block in sound.blocks(start, seconds):
            yield resampler.push(block)
        yield resampler.finish()


def audio_seconds(path: str | os.PathLike[str]) -> float:
    """Duration of an audio file in seconds, from its header; if it is missing there, the file is read.

    Raises:
        UnreadableAudio: the file is missing, empty or not audio.
    """
    with opened(path) as sound:
        frames = sound.file.frames
        return (sum(map(len, sound.blocks())) if frames >= UNKNOWN else frames) / sound.rate


@dataclass
class Sound:
    """An open file. `promised` is the number of frames in its header, or at least in its stream."""

    name: str
    file: SoundFile
    promised: float
    ended: bool  # False if an ogg stream has no end
    seekable: bool

    @property
    def rate(self) -> int:
        return self.file.samplerate

    def blocks(self, start: float = 0.0, seconds: float | None = None, size: int | None = None) -> Iterator[Tensor]:
        """The mean of the channels, float32 [n], block by block from `start` on; `size` is the frames of a block."""
        first, size = round(start * self.rate), size or max(1, BLOCK // self.file.channels)
        left = math.inf if seconds is None else max(1, round(seconds * self.rate))
        at = self._skip(first)
        while left and at >= first:
            hint = max(LEAST, self.file.frames - at)  # the requested frames are filled with zeros, which takes time
            samples = self.file.read(int(min(size, left, hint)), dtype="float32", always_2d=True)
            if not len(samples):
                break
            at, left = at + len(samples), left - len(samples)
            yield mixed(samples, self.name)
        if not left:
            return
        lasts, missing = at / self.rate, self.promised - at
        if missing > min(0.02 * self.promised, 0.1 * self.rate) or not self.ended:
            raise UnreadableAudio(f"{self.name}: truncated after {lasts:.2f} s")
        if at <= first:
            why = f"it ends at {lasts:.2f} s, before the start at {start:.2f} s" if at else "it has no samples"
            raise UnreadableAudio(f"{self.name}: {why}")

    def _skip(self, first: int) -> int:
        """Seeks a frame, or the end if the file is shorter; returns the position."""
        if self.seekable and 0 < first < self.file.frames < UNKNOWN:
            return self.file.seek(first)
        at = 0
        while at < first:
            skipped = len(self.file.read(min(first - at, BLOCK), dtype="float32", always_2d=True))
            if not skipped:
                break
            at += skipped
        return at


def mixed(samples: np.ndarray, name: str) -> Tensor:
    """The mean [n] of the channels of [n, channels]; UnreadableAudio if one is NaN, infinite or too large."""
    if not (np.abs(samples) < LOUDEST).all():
        raise UnreadableAudio(f"{name}: it has samples that are NaN, infinite or above {LOUDEST:g}")
    return torch.from_numpy(samples).mean(1)


@contextmanager
def opened(path: str | os.PathLike[str], content: bytes | None = None) -> Iterator[Sound]:
    """The open file; UnreadableAudio if it, or what is read from it meanwhile, is not audio."""
    import soundfile

    name = os.fspath(path)
    try:
        if content is None:
            check_regular(name)
            if os.path.isdir(name):
                raise UnreadableAudio(f"{name}: it is a folder")
        with open(name, "rb") if content is None else io.BytesIO(content) as raw:
            size = raw.seek(0, os.SEEK_END)
            if size == 0:
                raise UnreadableAudio(f"{name}: the file is empty")
            ended = ogg_ends(raw, size)
            with _corrected(name, raw, size) as (source, share), soundfile.SoundFile(source) as file:
                yield _checked(name, file, share, file.format != "OGG" or ended)
    except OSError as error:
        raise UnreadableAudio(f"{name}: {reason(error)}") from error
    except soundfile.SoundFileError as error:
        said = str(error).partition(": ")[2] if str(error).startswith("Error opening") else str(error)
        raise UnreadableAudio(f"{name}: cannot be read as audio ({one_line(said)})") from error


def _checked(name: str, file: Any, share: float, ended: bool) -> Sound:
    if file.format not in FORMATS:
        raise UnreadableAudio(f"{name}: {file.format} is not supported; allowed: {', '.join(FORMATS)}")
    try:
        check_rate(file.samplerate)
    except ValueError as error:
        raise UnreadableAudio(f"{name}: {error}") from error
    seekable = file.seekable()
    # Otherwise soundfile seeks after each block, which fails at the end of a file whose header is wrong.
    file.seekable = lambda: False
    promised = 0.0 if file.frames >= UNKNOWN else file.frames * share
    return Sound(name, file, promised, ended, seekable)


class _Copy(mmap.mmap):
    """Lets a reader seek beyond the end, as a file does, for broken headers."""

    def seek(self, pos: int, whence: int = os.SEEK_SET) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: len(self)}[whence]
        super().seek(min(max(0, start + pos), len(self)))


@contextmanager
def _corrected(name: str, raw: BinaryIO, size: int) -> Iterator[tuple[Any, float]]:
    """The file with the true length in its header, and the ratio of the claimed length to it."""
    length = length_of(raw, size)
    if length is None or not length.wrong or not length.found:
        raw.seek(0)
        yield raw if isinstance(raw, io.BytesIO) else name, 1.0
        return
    file = -1 if isinstance(raw, io.BytesIO) else raw.fileno()
    with _Copy(file, size, access=mmap.ACCESS_COPY) as copy:  # in memory only
        if isinstance(raw, io.BytesIO):
            copy[:] = raw.getvalue()
        copy[length.place : length.place + len(length.corrected)] = length.corrected
        yield copy, 1.0 if length.promised is None else length.promised / length.found
