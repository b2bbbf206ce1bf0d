"""From a sound file to the log-mel features that a model takes, whole or piece by piece."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from zoo.inputs.base import Preprocess
from zoo.tensors import mask_of
from zoo.text import one_line, reason

if TYPE_CHECKING:
    from soundfile import SoundFile

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LOUDEST = 1e6  # full scale is 1; the power of what is far beyond overflows
OGG_PAGE = 65536  # bytes that hold at least the last page


class UnreadableAudio(ValueError):
    """A file that holds no whole sound; the message names the file and says why."""


def read_audio(
    path: str | os.PathLike[str], rate: int = 16000, start: float = 0.0, seconds: float | None = None
) -> Tensor:
    """Reads a wav, flac, ogg or mp3 file, or a part of one; channels are averaged.

    Args:
        path: the file.
        rate: samples per second of the result; sound of another rate is resampled (band-limited sinc interpolation).
        start: where to begin, in seconds.
        seconds: how much to read; null for all. Where the file ends earlier, the result is shorter.

    Returns:
        float32 [S] with S of at least 1, full scale being -1..1.

    Raises:
        UnreadableAudio: the file is missing, empty, truncated or no sound, ends before `start`, or has samples that
            are not numbers between -1e6 and 1e6.
    """
    from torchaudio.functional import resample

    with opened(path) as file:
        if file.frames < 1:
            raise UnreadableAudio(f"{os.fspath(path)}: {'it is truncated' if cut_off(file) else 'it has no samples'}")
        first = round(start * file.samplerate)
        if first >= file.frames:
            ends = file.frames / file.samplerate
            raise UnreadableAudio(f"{os.fspath(path)}: it ends at {ends:.2f} s, before {start:.2f} s, where to start")
        wanted = file.frames - first
        if seconds is not None:
            wanted = min(wanted, max(1, round(seconds * file.samplerate)))
        if first:
            file.seek(first)
        samples = file.read(wanted, dtype="float32", always_2d=True)
        if len(samples) < wanted or cut_off(file):
            raise UnreadableAudio(f"{os.fspath(path)}: it is truncated")
        found = file.samplerate
    return resample(mixed(samples, path), found, rate)


def mixed(samples: np.ndarray, path: str | os.PathLike[str]) -> Tensor:
    """The mean [n] of the channels of [n, channels]; UnreadableAudio where one is no number or no sound."""
    if not (np.abs(samples) < LOUDEST).all():
        raise UnreadableAudio(f"{os.fspath(path)}: it has samples that are not finite numbers below {LOUDEST:g}")
    return torch.from_numpy(samples).mean(1)


def audio_seconds(path: str | os.PathLike[str]) -> float:
    """Duration of a sound file in seconds, from its header alone.

    Raises:
        UnreadableAudio: the file is missing, empty or no sound.
    """
    with opened(path) as file:
        return file.frames / file.samplerate


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[SoundFile]:
    """The file, open; UnreadableAudio where it, or what is read of it meanwhile, is no sound."""
    import soundfile

    name = os.fspath(path)
    try:
        if os.path.getsize(name) == 0:
            raise UnreadableAudio(f"{name}: the file is empty")
        if os.path.isdir(name):
            raise UnreadableAudio(f"{name}: it is a folder")
        with soundfile.SoundFile(name) as file:
            yield file
    except OSError as error:
        raise UnreadableAudio(f"{name}: {reason(error)}") from error
    except soundfile.SoundFileError as error:
        said = str(error).removeprefix(f"Error opening {name!r}: ")
        raise UnreadableAudio(f"{name}: no readable sound ({one_line(said)})") from error


def cut_off(file: SoundFile) -> bool:
    """Whether a wav file promises more than it has (programs that write into a pipe promise the largest number), or an
    ogg file's last page does not say that it is the last."""
    if file.format == "OGG":
        with open(file.name, "rb") as ogg:
            ogg.seek(max(0, os.path.getsize(file.name) - OGG_PAGE))
            end = ogg.read()
        last = end.rfind(b"OggS")
        return last < 0 or len(end) < last + 6 or not end[last + 5] & 4
    sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    return sizes is not None and int(sizes[2]) < int(sizes[1]) < 0x7FFF0000


@dataclass(frozen=True, kw_only=True)
class AudioPreprocess(Preprocess):
    """Log-mel features of a waveform; stored in a checkpoint's `config.json`. Named ones are in `RECIPES`.

    Frame t is centred on sample t * hop; what lies outside the waveform is zero. A clip of S samples has
    S // hop frames, and one where S is smaller than that.

    Args:
        rate: samples per second that are expected.
        mels: mel bands.
        window: length of the Hann window, in samples.
        hop: samples from one frame to the next, at most `window`.
        fft: points of the Fourier transform, at least `window`.
        periodic: a periodic window; otherwise a symmetric one.
        peak: divide the waveform by its largest magnitude first.
        preemphasis: a of y[s] = x[s] - a * x[s - 1].
        lowest: lower edge of the mel bands, in Hz.
        highest: their upper edge; null for half the rate.
        scale: `slaney` (linear to 1 kHz, bands of unit area) or `htk` (bands of unit height).
        log: `ln` for ln(x + floor), `db` for 10 * log10(max(x, floor)).
        floor: what keeps the logarithm finite, in units of power.
        top_db: with `db`, values below the utterance's largest by more than this are raised; null for none.
        normalize: `bin` (zero mean and unit variance of each mel band over the utterance), `utterance` (one mean and
            one variance for all bands) or `none`.

    Raises:
        ValueError: a value is out of its range.
    """

    shared = ("mels",)
    raw = "waveform"

    rate: int = 16000
    mels: int = 80
    window: int = 400
    hop: int = 160
    fft: int = 512
    periodic: bool = False
    peak: bool = False
    preemphasis: float = 0.97
    lowest: float = 0.0
    highest: float | None = None
    scale: str = "slaney"
    log: str = "ln"
    floor: float = 2.0**-24
    top_db: float | None = None
    normalize: str = "bin"

    def __post_init__(self) -> None:
        for name in ("rate", "mels", "window", "hop", "fft"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        if not self.hop <= self.window <= self.fft:
            found = f"hop={self.hop}, window={self.window}, fft={self.fft}"
            raise ValueError(f"hop must be at most window, and window at most fft, not {found}")
        for name in ("periodic", "peak"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name, least in (("preemphasis", 0.0), ("lowest", 0.0), ("floor", 0.0), ("highest", 0.0), ("top_db", 0.0)):
            value = getattr(self, name)
            if value is None and name in ("highest", "top_db"):
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        if self.preemphasis >= 1:
            raise ValueError(f"preemphasis must be below 1, not {self.preemphasis!r}")
        if self.floor == 0:
            raise ValueError("floor must be above 0")
        highest = self.rate / 2 if self.highest is None else self.highest
        if not self.lowest < highest <= self.rate / 2:
            found = f"lowest={self.lowest}, highest={self.highest}"
            raise ValueError(f"lowest must be below highest, and highest at most {self.rate / 2}, not {found}")
        for name, allowed in (("scale", SCALES), ("log", LOGARITHMS), ("normalize", NORMALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.top_db is not None and self.log != "db":
            raise ValueError(f"top_db needs log='db', not {self.log!r}")

    def sample(self, generator: torch.Generator) -> Tensor:
        """1.3 s of noise that swells and fades, [S]."""
        noise = torch.randn(self.rate * 13 // 10, generator=generator, device="cpu")
        return 0.1 * noise * torch.linspace(0, 20, len(noise)).sin()

    @property
    def seconds_per_frame(self) -> float:
        """Time from one frame to the next."""
        return self.hop / self.rate

    @property
    def centres(self) -> Tensor:
        """The centre of each mel band in Hz, float64 [mels]."""
        highest = self.rate / 2 if self.highest is None else self.highest
        edges = _mels_of(torch.tensor([self.lowest, highest], dtype=torch.float64), self.scale)
        mels = torch.linspace(float(edges[0]), float(edges[1]), self.mels + 2, dtype=torch.float64)[1:-1]
        if self.scale == "htk":
            return 700 * (10 ** (mels / 2595) - 1)
        return torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))

    def frames(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        return min(max(1, samples // self.hop), samples)

    @overload
    def __call__(self, waveforms: Tensor, lengths: None = None, *, dither: float = 0.0) -> Tensor: ...

    @overload
    def __call__(self, waveforms: Tensor, lengths: Tensor, *, dither: float = 0.0) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, waveforms: Tensor, lengths: Tensor | None = None, *, dither: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features of one waveform, or of a padded batch of them.

        A clip's features are the same whatever shares its batch; frames beyond its length are zero.

        Args:
            waveforms: [S], or with `lengths` [B, S], in floating point.
            lengths: [B], real samples of each waveform; what lies beyond is ignored.
            dither: standard deviation of white noise that is added to the waveform, for training.

        Returns:
            float32 [T, mels]; or with `lengths` float32 [B, T, mels] and int64 [B], the real frames of each.

        Raises:
            ValueError: another shape, whole numbers, or a length that exceeds S.
        """
        if not waveforms.is_floating_point():
            found = str(waveforms.dtype).removeprefix("torch.")
            raise ValueError(f"a waveform must be in floating point, from -1 to 1, not {found}")
        if waveforms.ndim != (1 if lengths is None else 2):
            wanted = "[S], or [B, S] with lengths" if lengths is None else "[B, S]"
            raise ValueError(f"waveforms must be {wanted}, not {list(waveforms.shape)}")
        if lengths is None:
            whole = torch.tensor([len(waveforms)], device=waveforms.device)
            return self._features(waveforms[None], whole, dither)[0][0]
        if (lengths > waveforms.shape[1]).any():
            raise ValueError(f"a length of {int(lengths.max())} exceeds the waveforms' {waveforms.shape[1]} samples")
        return self._features(waveforms, lengths, dither)

    def _features(self, waveforms: Tensor, lengths: Tensor, dither: float) -> tuple[Tensor, Tensor]:
        from torchaudio.functional import preemphasis

        count = self.frames(waveforms.shape[1])
        frames = (lengths // self.hop).clamp(min=1).minimum(lengths)
        if waveforms.numel() == 0:
            return torch.zeros(len(waveforms), count, self.mels, device=waveforms.device), frames
        real = mask_of(lengths, waveforms.shape[1])
        waveforms = waveforms.float().masked_fill(~real, 0)
        if self.peak:
            waveforms = waveforms / (waveforms.abs().amax(1, keepdim=True) + 1e-9)
        if dither:
            waveforms = waveforms + dither * torch.randn_like(waveforms)
        waveforms = preemphasis(waveforms, self.preemphasis).masked_fill(~real, 0)
        features = self.log_mels(waveforms, center=True)[:, :count]
        padding = ~mask_of(frames, count)[..., None]
        if self.top_db is not None:
            loudest = features.masked_fill(padding, -math.inf).amax((1, 2), keepdim=True)
            features = features.maximum(loudest - self.top_db)
        return self._normalized(features, frames, padding).masked_fill(padding, 0), frames

    def _normalized(self, features: Tensor, frames: Tensor, padding: Tensor) -> Tensor:
        if self.normalize == "none":
            return features
        over = (1,) if self.normalize == "bin" else (1, 2)
        count = frames.clamp(min=1)[:, None, None] * (1 if self.normalize == "bin" else self.mels)
        # Statistics of the differences from the first value: those of a constant are then exactly 0.
        features = features - (features[:, :1] if self.normalize == "bin" else features[:, :1, :1])
        mean = features.masked_fill(padding, 0).sum(over, keepdim=True) / count
        squares = (features - mean).square().masked_fill(padding, 0).sum(over, keepdim=True)
        if self.normalize == "bin":
            return (features - mean) / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-5)
        return (features - mean) / (squares / count + 1e-9).sqrt()

    def log_mels(self, waveforms: Tensor, *, center: bool) -> Tensor:
        """[B, S], already pre-emphasised, to [B, T, mels], not normalised; without `center` frame 0 starts at 0."""
        from torchaudio.functional import amplitude_to_DB, spectrogram

        window, filters = _window_and_filters(self, waveforms.device)
        sizes = (self.fft, self.hop, self.window)
        with torch.autocast(waveforms.device.type, enabled=False):
            power = spectrogram(waveforms, 0, window, *sizes, 2.0, False, center=center, pad_mode="constant")
            mels = power.transpose(1, 2) @ filters
        if self.log == "ln":
            return (mels + self.floor).log()
        return amplitude_to_DB(mels, 10.0, self.floor, 0.0)


def _mels_of(hertz: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 2595 * torch.log10(1 + hertz / 700)
    beyond = 15 + 27 * torch.log(hertz.clamp(min=1000) / 1000) / math.log(6.4)
    return torch.where(hertz < 1000, hertz * 3 / 200, beyond)


class StreamingFeatures:
    """The features of a waveform that arrives in pieces, in memory that does not grow with it.

    What `push` and `finish` return, one after the other, is what `preprocess` makes of the whole. A frame
    comes out as soon as its window is full.

    Args:
        preprocess: one that looks at no more than a window: normalize "none", neither peak nor top_db.

    Raises:
        ValueError: `preprocess` needs the whole utterance.
    """

    def __init__(self, preprocess: AudioPreprocess):
        whole = {"normalize": preprocess.normalize != "none", "peak": preprocess.peak, "top_db": preprocess.top_db}
        for name, needed in whole.items():
            if needed not in (False, None):
                found = f"{name}={getattr(preprocess, name)!r}"
                raise ValueError(f"{found} needs the whole utterance, which a stream has not; use recipe 'streaming'")
        self.preprocess = preprocess
        self._restart()

    def _restart(self) -> None:
        """`waiting` begins where the next frame's transform does, `last` is the newest sample."""
        self.waiting, self.last = torch.zeros(self.preprocess.fft // 2), torch.zeros(0)
        self.samples = self.frames = 0

    def push(self, samples: Tensor) -> Tensor:
        """Takes the next samples [n], any number of them; returns the features [m, mels] that are complete now."""
        from torchaudio.functional import preemphasis

        if samples.ndim != 1 or not samples.is_floating_point():
            raise ValueError(f"samples must be [n] in floating point, not {samples.dtype} {list(samples.shape)}")
        made = self.preprocess
        joined = torch.cat([self.last, samples.float()])
        fresh = preemphasis(joined, made.preemphasis)[len(self.last) :]
        self.waiting, self.last = torch.cat([self.waiting, fresh]), joined[-1:].clone()
        self.samples += len(samples)
        before = (made.fft - made.window) // 2  # the transform is longer than the window, which lies in its middle
        return self._take(max(0, (len(self.waiting) - before - made.window) // made.hop + 1))

    def finish(self) -> Tensor:
        """The features [m, mels] of what is left; the next `push` begins another waveform."""
        features = self._take(self.preprocess.frames(self.samples) - self.frames)
        self._restart()
        return features

    def _take(self, count: int) -> Tensor:
        made = self.preprocess
        count = min(count, made.frames(self.samples) - self.frames)
        if count < 1:
            return torch.zeros(0, made.mels)
        length = (count - 1) * made.hop + made.fft
        missing = max(0, length - len(self.waiting))
        piece = torch.nn.functional.pad(self.waiting, (0, missing))[:length]
        self.waiting = self.waiting[count * made.hop :].clone()
        self.frames += count
        return made.log_mels(piece[None], center=False)[0]


def split_at_silence(waveform: Tensor, rate: int, longest: float) -> list[tuple[int, int]]:
    """Cuts a waveform [S] into parts of at most `longest` seconds.

    Each cut is in the middle of the quietest 20 ms of the last third of its part.

    Returns:
        Start and end of each part in samples; together they cover the waveform, without overlap.

    Raises:
        ValueError: `longest` is below 0.1 seconds.
    """
    if longest < 0.1:
        raise ValueError(f"longest must be at least 0.1 seconds, not {longest!r}")
    most, step = int(longest * rate), max(1, rate // 50)
    parts, start = [], 0
    while len(waveform) - start > most:
        zone = waveform[start + most - most // 3 : start + most]
        energies = zone[: len(zone) // step * step].view(-1, step).square().sum(1)
        end = start + most - most // 3 + int(energies.argmin()) * step + step // 2
        parts.append((start, end))
        start = end
    return [*parts, (start, len(waveform))]


def pad_features(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks features [T, mels] of several lengths: zero-padded [B, T, mels] and their lengths, int64 [B]."""
    lengths = torch.tensor([len(one) for one in features], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True), lengths


@functools.lru_cache(maxsize=16)
def _window_and_filters(preprocess: AudioPreprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    from torchaudio.functional import melscale_fbanks

    made = preprocess
    highest = made.rate / 2 if made.highest is None else made.highest
    norm = "slaney" if made.scale == "slaney" else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            bins = made.fft // 2 + 1
            filters = melscale_fbanks(bins, made.lowest, highest, made.mels, made.rate, norm, made.scale)
        except UserWarning:
            raise ValueError(f"mels={made.mels} are too many for fft={made.fft}: some would see nothing") from None
    return torch.hann_window(made.window, periodic=made.periodic, device=device), filters.to(device)


SCALES = ("slaney", "htk")
LOGARITHMS = ("ln", "db")
NORMALIZATIONS = ("bin", "utterance", "none")
RECIPES = {
    "nemo": AudioPreprocess(),
    "squeezeformer": AudioPreprocess(
        periodic=True, peak=True, scale="htk", log="db", floor=1e-10, top_db=80.0, normalize="utterance"
    ),
    "streaming": AudioPreprocess(normalize="none"),
}
"""`nemo`: NVIDIA's for Conformer, Parakeet and others. `squeezeformer`: that of Kim et al. (2022, arXiv:2206.00888),
except that edges are padded with zeros, not mirrored, and mel bands are triangles in Hz, not in mel. `streaming`:
`nemo` without normalisation, so that no frame depends on what comes later."""
