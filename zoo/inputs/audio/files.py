"""From a sound file to a waveform, whole or piece by piece."""

from __future__ import annotations

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
"""What is read, by libsndfile's name, and the endings that a search of a folder takes."""
EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

LOUDEST = 1e6  # full scale is 1; the power of what is far beyond overflows
BLOCK = 2**20  # samples of all channels that are read at once
LEAST = 4096  # frames of a block
UNKNOWN = 2**36 - 1  # frames; FLAC's largest number


class UnreadableAudio(ValueError):
    """A file that holds no whole sound; the message names the file and says why."""


def read_audio(
    path: str | os.PathLike[str], rate: int = 16000, start: float = 0.0, seconds: float | None = None
) -> Tensor:
    """Reads a sound file of one of `FORMATS`, or a part of one; channels are averaged.

    A length in the file's header is a hint: where it is missing or a little too large, what is there is read.

    Args:
        path: the file.
        rate: samples per second of the result; sound of another rate is resampled (band-limited sinc interpolation).
        start: where to begin, in seconds.
        seconds: how much to read; None for all. Where the file ends earlier, the result is shorter.

    Returns:
        float32 [S] with S of at least 1, full scale being -1..1.

    Raises:
        UnreadableAudio: the file is missing, empty, truncated or no sound, ends before `start`, or has samples that
            are not numbers between -1e6 and 1e6.
    """
    return torch.cat(list(stream_audio(path, rate, start, seconds)))


def stream_audio(
    path: str | os.PathLike[str], rate: int = 16000, start: float = 0.0, seconds: float | None = None
) -> Iterator[Tensor]:
    """`read_audio` in pieces, for files of any length. Where a file is broken or truncated, all before comes first."""
    with opened(path) as sound:
        resampler = Resampler(sound.rate, rate)
        for block in sound.blocks(start, seconds):
            yield resampler.push(block)
        yield resampler.finish()


def audio_seconds(path: str | os.PathLike[str]) -> float:
    """Duration of a sound file in seconds, from its header; where that does not say it, the file is read.

    Raises:
        UnreadableAudio: the file is missing, empty or no sound.
    """
    with opened(path) as sound:
        frames = sound.file.frames
        return (sum(map(len, sound.blocks())) if frames >= UNKNOWN else frames) / sound.rate


@dataclass
class Sound:
    """An open file. `promised` is how many frames its header says, or at least its stream."""

    name: str
    file: SoundFile
    promised: float
    ended: bool  # False where an ogg stream has no end
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
            hint = max(LEAST, self.file.frames - at)  # what is asked for is filled with zeros, which takes time
            samples = self.file.read(int(min(size, left, hint)), dtype="float32", always_2d=True)
            if not len(samples):
                break
            at, left = at + len(samples), left - len(samples)
            yield mixed(samples, self.name)
        if not left:
            return
        lasts, missing = at / self.rate, self.promised - at
        if missing > min(0.02 * self.promised, 0.1 * self.rate) or not self.ended:
            raise UnreadableAudio(f"{self.name}: it is truncated, after {lasts:.2f} s")
        if at <= first:
            why = f"it ends at {lasts:.2f} s, before {start:.2f} s, where to start" if at else "it has no samples"
            raise UnreadableAudio(f"{self.name}: {why}")

    def _skip(self, first: int) -> int:
        """Goes to a frame, or to the end where the file is shorter; returns where it is then."""
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
    """The mean [n] of the channels of [n, channels]; UnreadableAudio where one is NaN, infinite or no sound."""
    if not (np.abs(samples) < LOUDEST).all():
        raise UnreadableAudio(f"{name}: it has samples that are not finite numbers below {LOUDEST:g}")
    return torch.from_numpy(samples).mean(1)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Sound]:
    """The file, open; UnreadableAudio where it, or what is read of it meanwhile, is no sound."""
    import soundfile

    name = os.fspath(path)
    try:
        check_regular(name)
        if os.path.isdir(name):
            raise UnreadableAudio(f"{name}: it is a folder")
        with open(name, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            if size == 0:
                raise UnreadableAudio(f"{name}: the file is empty")
            ended = ogg_ends(raw, size)
            with _corrected(name, raw, size) as (source, share), soundfile.SoundFile(source) as file:
                yield _checked(name, file, share, file.format != "OGG" or ended)
    except OSError as error:
        raise UnreadableAudio(f"{name}: {reason(error)}") from error
    except soundfile.SoundFileError as error:
        said = str(error).partition(": ")[2] if str(error).startswith("Error opening") else str(error)
        raise UnreadableAudio(f"{name}: no readable sound ({one_line(said)})") from error


def _checked(name: str, file: Any, share: float, ended: bool) -> Sound:
    if file.format not in FORMATS:
        raise UnreadableAudio(f"{name}: {file.format} is not read; allowed: {', '.join(FORMATS)}")
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
    """Lets a broken header send a reader beyond the end, as a file does."""

    def seek(self, pos: int, whence: int = os.SEEK_SET) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: len(self)}[whence]
        super().seek(min(max(0, start + pos), len(self)))


@contextmanager
def _corrected(name: str, raw: BinaryIO, size: int) -> Iterator[tuple[Any, float]]:
    """The file with the true length in its header, and how many times that the header promises."""
    length = length_of(raw, size)
    if length is None or not length.wrong or not length.found:
        yield name, 1.0
        return
    with _Copy(raw.fileno(), 0, access=mmap.ACCESS_COPY) as copy:  # in memory alone
        copy[length.place : length.place + len(length.corrected)] = length.corrected
        yield copy, 1.0 if length.promised is None else length.promised / length.found
