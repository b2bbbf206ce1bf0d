"""From a waveform to the log-mel features that a model takes, whole or piece by piece."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from zoo.cache import table
from zoo.inputs.audio.files import UnreadableAudio, stream_audio
from zoo.inputs.audio.resampling import check_rate
from zoo.inputs.base import Preprocess, check_integer, is_number
from zoo.tensors import mask_of

SILENCE = 2**-14  # audio that varies by less than this, two steps of 16 bits, is silence
LONGEST = 30.0  # default of the seconds computed at once


class Part(NamedTuple):
    """A segment of audio: its start and length in seconds, and its features [T, mels], None for digital
    silence."""

    start: float
    seconds: float
    features: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AudioPreprocess(Preprocess):
    """Log-mel features of a waveform; stored in a checkpoint's `config.json`. Named ones are in `RECIPES`.

    Frame t is centred on sample t * hop; samples outside the waveform are zero. A clip of S samples has
    S // hop frames, and one where S is smaller than that.

    Args:
        rate: expected sample rate in Hz.
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
        floor: least value under the logarithm, in units of power.
        top_db: with `db`, values below the utterance's largest by more than this are raised; null for none.
        normalize: `bin` (zero mean and unit variance of each mel band over the utterance), `utterance` (one mean and
            one variance for all bands) or `none`.

    Raises:
        ValueError: a value is out of range.
    """

    shared = ("mels",)
    raw = "audio"
    file = "recording.wav"

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
            check_integer(name, getattr(self, name), LARGEST.get(name))
        check_rate(self.rate)
        if not self.hop <= self.window <= self.fft:
            found = f"hop={self.hop}, window={self.window}, fft={self.fft}"
            raise ValueError(f"hop must be <= window and window <= fft, got {found}")
        if self.fft > 64 * self.hop:
            raise ValueError(f"fft must be <= 64 * hop, got fft={self.fft}, hop={self.hop}")
        for name in ("periodic", "peak"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("preemphasis", "lowest", "floor", "highest", "top_db"):
            value = getattr(self, name)
            if value is None and name in ("highest", "top_db"):
                continue
            if not is_number(value) or not 0 <= value <= MOST:
                raise ValueError(f"{name} must be a number from 0 to {MOST:g}, got {value!r}")
        if self.preemphasis >= 1:
            raise ValueError(f"preemphasis must be < 1, got {self.preemphasis!r}")
        if self.floor < torch.finfo(torch.float32).tiny:
            raise ValueError(f"floor must be >= {torch.finfo(torch.float32).tiny:.2g}, got {self.floor!r}")
        highest = self.rate / 2 if self.highest is None else self.highest
        if not self.lowest < highest <= self.rate / 2:
            found = f"lowest={self.lowest}, highest={self.highest}"
            raise ValueError(f"lowest must be < highest, and highest <= {self.rate / 2}, got {found}")
        for name, allowed in (("scale", SCALES), ("log", LOGARITHMS), ("normalize", NORMALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.top_db is not None and self.log != "db":
            raise ValueError(f"top_db needs log='db', got log={self.log!r}")

    def sample(self, generator: torch.Generator) -> Tensor:
        """1.3 s of noise that swells and fades, [S]."""
        noise = torch.randn(self.rate * 13 // 10, generator=generator, device="cpu", dtype=torch.float32)
        return 0.1 * noise * torch.linspace(0, 20, len(noise), dtype=torch.float32, device="cpu").sin()

    @property
    def seconds_per_frame(self) -> float:
        """Time from one frame to the next."""
        return self.hop / self.rate

    @property
    def centres(self) -> Tensor:
        """The centre of each mel band in Hz, float64 [mels]."""
        return self._edges()[1:-1]

    def _edges(self) -> Tensor:
        """Band b rises from edge b to edge b + 1, its centre, and falls to edge b + 2: Hz, float64 [mels + 2]."""
        highest = self.rate / 2 if self.highest is None else self.highest
        ends = _mels_of(torch.tensor([self.lowest, highest], dtype=torch.float64, device="cpu"), self.scale)
        mels = torch.linspace(float(ends[0]), float(ends[1]), self.mels + 2, dtype=torch.float64, device="cpu")
        if self.scale == "htk":
            return 700 * (10 ** (mels / 2595) - 1)
        return torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))

    def frames(self, samples: int) -> int:
        """The number of frames of a clip with this many samples."""
        return min(max(1, samples // self.hop), samples)

    def parts(self, raw: Raw, /, longest: float = LONGEST) -> Iterator[Part]:
        """The features of audio of any length, segment by segment; it is cut at silence, see `split_at_silence`."""
        pieces = stream_audio(raw, self.rate) if isinstance(raw, (str, os.PathLike)) else [_waveform(raw)]
        for start, waveform in split_at_silence(pieces, self.rate, longest):
            silent = bool(waveform.amax() - waveform.amin() <= SILENCE)
            yield Part(start / self.rate, len(waveform) / self.rate, None if silent else self(waveform))

    @overload
    def __call__(self, waveforms: Raw, lengths: None = None, *, dither: float = 0.0) -> Tensor: ...

    @overload
    def __call__(self, waveforms: Tensor, lengths: Tensor, *, dither: float = 0.0) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, waveforms: Raw, lengths: Tensor | None = None, *, dither: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features of one waveform or audio file, or of a padded batch of waveforms.

        A clip's features do not depend on the rest of its batch; frames beyond its length are zero.

        Args:
            waveforms: [S], or with `lengths` [B, S], in floating point, a tensor or an array of NumPy; or the path of a
                audio file.
            lengths: [B], valid samples of each waveform; later samples are ignored.
            dither: standard deviation of white noise that is added to the waveform, for training.

        Returns:
            float32 [T, mels]; or with `lengths` float32 [B, T, mels] and int64 [B], the valid frames of each.

        Raises:
            ValueError: another type or shape, integers, a length that exceeds S, or an unreadable file.
        """
        if lengths is None:
            if isinstance(waveforms, (str, os.PathLike)):
                waveforms = torch.cat(list(stream_audio(waveforms, self.rate)))
            return self._features(_waveform(waveforms)[None], None, dither)[0][0]
        waveforms = _waveform(waveforms, "[B, S]")
        if (lengths > waveforms.shape[1]).any():
            raise ValueError(f"a length of {int(lengths.max())} exceeds the waveforms' {waveforms.shape[1]} samples")
        return self._features(waveforms, lengths, dither)

    def _features(self, waveforms: Tensor, lengths: Tensor | None, dither: float) -> tuple[Tensor, Tensor]:
        """[B, T, mels] and the frames [B]; without lengths nothing is padding, which takes less time."""
        from torchaudio.functional import preemphasis

        count = self.frames(waveforms.shape[1])
        if lengths is None:
            frames = torch.full((len(waveforms),), count, device=waveforms.device)
        else:
            frames = (lengths // self.hop).clamp(min=1).minimum(lengths)
        if waveforms.numel() == 0:
            shape = (len(waveforms), count, self.mels)
            return torch.zeros(shape, device=waveforms.device, dtype=torch.float32), frames
        beyond = None if lengths is None else ~mask_of(lengths, waveforms.shape[1])
        padding = None if lengths is None else ~mask_of(frames, count)[..., None]
        waveforms = _filled(waveforms.float(), beyond)
        if self.peak:
            waveforms = waveforms / (waveforms.abs().amax(1, keepdim=True) + 1e-9)
        if dither:
            waveforms = waveforms + dither * torch.randn_like(waveforms)
        waveforms = _filled(preemphasis(waveforms, self.preemphasis), beyond)
        features = self.log_mels(waveforms, center=True)[:, :count]
        if self.top_db is not None:
            loudest = _filled(features, padding, -math.inf).amax((1, 2), keepdim=True)
            features = features.maximum(loudest - self.top_db)
        return _filled(self.normalized(features, frames, padding), padding), frames

    def normalized(self, features: Tensor, frames: Tensor, padding: Tensor | None) -> Tensor:
        """Features [B, T, mels] normalised as `normalize` says, over the frames [B] that are not padding [B, T, 1]."""
        if self.normalize == "none":
            return features
        over = (1,) if self.normalize == "bin" else (1, 2)
        count = frames.clamp(min=1)[:, None, None] * (1 if self.normalize == "bin" else self.mels)
        # Statistics of the differences from the first value: those of a constant are then exactly 0.
        features = features - (features[:, :1] if self.normalize == "bin" else features[:, :1, :1])
        mean = _filled(features, padding).sum(over, keepdim=True) / count
        squares = _filled((features - mean).square(), padding).sum(over, keepdim=True)
        if self.normalize == "bin":
            return (features - mean) / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-5)
        return (features - mean) / (squares / count + 1e-9).sqrt()

    def log_mels(self, waveforms: Tensor, *, center: bool) -> Tensor:
        """[B, S], already pre-emphasised, to [B, T, mels], not normalised; without `center` frame 0 starts at 0."""
        from torchaudio.functional import amplitude_to_DB, spectrogram

        window = table(hann_window, self, device=waveforms.device)
        filters = table(mel_filters, self, device=waveforms.device)
        sizes = (self.fft, self.hop, self.window)
        with torch.autocast(waveforms.device.type, enabled=False):
            waves = spectrogram(waveforms, 0, window, *sizes, None, False, center=center, pad_mode="constant")
            power = waves.real.square() + waves.imag.square()  # a fifth of the time of the squared magnitude
            mels = power.transpose(1, 2) @ filters
        if self.log == "ln":
            return (mels + self.floor).log()
        return amplitude_to_DB(mels, 10.0, self.floor, 0.0)


def _filled(values: Tensor, where: Tensor | None, value: float = 0.0) -> Tensor:
    return values if where is None else values.masked_fill(where, value)


def _mels_of(hertz: Tensor, scale: str) -> Tensor:
    if scale == "htk":
        return 2595 * torch.log10(1 + hertz / 700)
    beyond = 15 + 27 * torch.log(hertz.clamp(min=1000) / 1000) / math.log(6.4)
    return torch.where(hertz < 1000, hertz * 3 / 200, beyond)


class StreamingFeatures:
    """The features of a waveform that arrives in pieces, in memory that does not grow with it.

    The results of `push` and `finish`, concatenated, equal those of `preprocess` on the whole. A frame
    is returned as soon as its window is full.

    Args:
        preprocess: one that needs only a window at a time: normalize "none", without peak and top_db.

    Raises:
        ValueError: `preprocess` needs the whole utterance.
    """

    def __init__(self, preprocess: AudioPreprocess):
        whole = {"normalize": preprocess.normalize != "none", "peak": preprocess.peak, "top_db": preprocess.top_db}
        for name, needed in whole.items():
            if needed not in (False, None):
                found = f"{name}={getattr(preprocess, name)!r}"
                raise ValueError(f"{found} needs the whole utterance, so it cannot be streamed; use recipe 'streaming'")
        self.preprocess = preprocess
        self._restart()

    def _restart(self) -> None:
        """`waiting` begins where the next frame's transform does, `last` is the newest sample."""
        self.waiting, self.last = (
            torch.zeros(self.preprocess.fft // 2, dtype=torch.float32, device="cpu"),
            torch.zeros(0, dtype=torch.float32, device="cpu"),
        )
        self.samples = self.frames = 0

    def push(self, samples: Tensor) -> Tensor:
        """Takes the next samples [n], any number of them; returns the features [m, mels] that are complete now."""
        from torchaudio.functional import preemphasis

        if samples.ndim != 1 or not samples.is_floating_point():
            raise ValueError(f"samples must be [n] in floating point, got {samples.dtype} {list(samples.shape)}")
        made = self.preprocess
        joined = torch.cat([self.last, samples.float()])
        fresh = preemphasis(joined, made.preemphasis)[len(self.last) :]
        self.waiting, self.last = torch.cat([self.waiting, fresh]), joined[-1:].clone()
        self.samples += len(samples)
        before = (made.fft - made.window) // 2  # the transform is longer than the window, which is in its middle
        return self._take(max(0, (len(self.waiting) - before - made.window) // made.hop + 1))

    def finish(self) -> Tensor:
        """The remaining features [m, mels]; the next `push` begins another waveform."""
        features = self._take(self.preprocess.frames(self.samples) - self.frames)
        self._restart()
        return features

    def _take(self, count: int) -> Tensor:
        made = self.preprocess
        count = min(count, made.frames(self.samples) - self.frames)
        if count < 1:
            return torch.zeros(0, made.mels, dtype=torch.float32, device="cpu")
        length = (count - 1) * made.hop + made.fft
        missing = max(0, length - len(self.waiting))
        piece = torch.nn.functional.pad(self.waiting, (0, missing))[:length]
        self.waiting = self.waiting[count * made.hop :].clone()
        self.frames += count
        return made.log_mels(piece[None], center=False)[0]


def split_at_silence(pieces: Iterable[Tensor], rate: int, longest: float) -> Iterator[tuple[int, Tensor]]:
    """Cuts a waveform that comes in pieces [n] into parts of at most `longest` seconds.

    Each cut is in the middle of the quietest 20 ms of the last third of its part. If reading the pieces fails, all
    earlier parts come first.

    Returns:
        For each part, its start in samples and its waveform; together they are the whole.

    Raises:
        ValueError: `longest` is below 0.1 seconds.
    """
    if longest < 0.1:
        raise ValueError(f"longest must be >= 0.1 seconds, got {longest!r}")
    most, step = int(longest * rate), max(1, rate // 50)
    held, start = torch.zeros(0, dtype=torch.float32, device="cpu"), 0
    try:
        for piece in pieces:
            held = torch.cat([held, piece])
            while len(held) > most:
                zone = held[most - most // 3 : most]
                energies = zone[: len(zone) // step * step].view(-1, step).square().sum(1)
                end = most - most // 3 + int(energies.argmin()) * step + step // 2
                yield start, held[:end].clone()
                start, held = start + end, held[end:]
    except UnreadableAudio:
        if len(held):
            yield start, held
        raise
    if len(held):
        yield start, held


def pad_features(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks features [T, mels] of several lengths: zero-padded [B, T, mels] and their lengths, int64 [B]."""
    lengths = torch.tensor([len(one) for one in features], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True), lengths


def _waveform(raw: object, shape: str = "[S]") -> Tensor:
    """A floating-point tensor of that shape; ValueError if it is not one."""
    found = torch.from_numpy(np.ascontiguousarray(raw)) if isinstance(raw, np.ndarray) else raw
    if not isinstance(found, Tensor):
        raise ValueError(f"audio must be a path or a waveform {shape}, got {type(raw).__name__}")
    if not found.is_floating_point():
        kind = str(found.dtype).removeprefix("torch.")
        scale = (
            f"; divide by {2 ** (8 * found.element_size() - 1)}" if found.dtype in (torch.int16, torch.int32) else ""
        )
        raise ValueError(f"a waveform must be in floating point, from -1 to 1, got {kind}{scale}")
    if found.ndim != shape.count(",") + 1:
        hint = "; average the channels, or give lengths with a batch" if found.ndim == 2 else ""
        raise ValueError(f"a waveform must be {shape}, got {list(found.shape)}{hint}")
    return found


def hann_window(preprocess: AudioPreprocess, device: torch.device) -> Tensor:
    """The window of a frame, float32 [window]."""
    return torch.hann_window(preprocess.window, periodic=preprocess.periodic, device=device, dtype=torch.float32)


def mel_filters(preprocess: AudioPreprocess, device: torch.device) -> Tensor:
    """Triangles over the bins of the Fourier transform, float32 [fft // 2 + 1, mels]."""
    made, edges = preprocess, preprocess._edges()
    hertz = torch.arange(made.fft // 2 + 1, dtype=torch.float64, device="cpu")[:, None] * made.rate / made.fft
    rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    filters = rise.minimum(fall).clamp(min=0)
    if not bool(filters.any(0).all()):
        raise ValueError(f"mels={made.mels} are too many for fft={made.fft}: some would be empty")
    if made.scale == "slaney":
        filters = filters * (2 / (edges[2:] - edges[:-2]))
    return filters.float().to(device)


Raw = Tensor | np.ndarray | str | os.PathLike[str]
LARGEST = {"mels": 1024, "fft": 16384}
MOST = 1e6
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
