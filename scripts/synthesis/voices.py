"""Voices of speech synthesizers: the programs espeak-ng, flite and festival, and the Python package hibari-tts."""

import functools
import importlib.util
import io
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import soundfile

RATE = 16_000  # samples per second of what is written
LONGEST = 60  # seconds that a synthesizer may take for one text


class Voice(NamedTuple):
    """One speaker: a voice of a synthesizer at a pitch and a speed, both relative to its own."""

    engine: str
    name: str
    pitch: float
    speed: float

    def say(self, text: str) -> np.ndarray:
        """The text spoken, float32 [samples] at RATE; ValueError if the synthesizer fails or is silent."""
        try:
            data = ENGINES[self.engine].say(self, text)
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        except (OSError, subprocess.SubprocessError, soundfile.SoundFileError) as error:
            raise ValueError(f"{self.engine} cannot say '{text}' with the voice {self.name}: {error}") from None
        if samples.ndim != 1 or not len(samples) or float(np.abs(samples).max()) < 1e-3:
            raise ValueError(f"{self.engine} is silent for '{text}' with the voice {self.name}")
        return samples if rate == RATE else _resampled(samples, rate)


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    import torch
    from torchaudio.functional import resample

    return resample(torch.from_numpy(samples), rate, RATE).numpy()


def _run(command: Sequence[str], text: str = "") -> bytes:
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=LONGEST, check=True)
    return done.stdout


def _espeak(voice: Voice, text: str) -> bytes:
    pitch, speed = round(50 * voice.pitch), round(175 * voice.speed)
    return _run(
        ["espeak-ng", "-v", voice.name, "-p", str(min(99, pitch)), "-s", str(speed), "--stdin", "--stdout"], text
    )


def _to_file(voice: Voice, text: str, command: Callable[[str], list[str]]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speech.wav")
        _run(command(str(path)), text)
        return path.read_bytes()


def _flite(voice: Voice, text: str) -> bytes:
    settings = [f"duration_stretch={1 / voice.speed:.3f}", f"f0_shift={voice.pitch:.3f}"]
    flags = [word for each in settings for word in ("--setf", each)]
    return _to_file(voice, text, lambda path: ["flite", "-voice", voice.name, *flags, "-t", text, "-o", path])


def _festival(voice: Voice, text: str) -> bytes:
    mean = round(105 * voice.pitch)
    settings = f"(begin ({voice.name}) (Parameter.set 'Duration_Stretch {1 / voice.speed:.3f})"
    settings += (
        f" (set! int_lr_params '((target_f0_mean {mean}) (target_f0_std 14) (model_f0_mean 170) (model_f0_std 34))))"
    )
    return _to_file(voice, text, lambda path: ["text2wave", "-o", path, "-eval", settings])


_lock = threading.Lock()


@functools.cache
def _hibari_model(name: str) -> Any:
    from hibari import Hibari  # pyright: ignore[reportMissingImports]

    return Hibari(voice=name)


def _hibari(voice: Voice, text: str) -> bytes:
    """Its pitch is changed by the rate at which it is played, which its speed makes up for."""
    parts = text.split()
    spelled = sum(len(word) == 1 for word in parts) > len(parts) / 3  # or else "A" is an article
    words = " ".join(f"{word}," if len(word) == 1 and spelled else word.lower() for word in parts)
    with _lock:
        samples = _hibari_model(voice.name)(
            f"{words.rstrip(',')}.", speed=min(2.0, max(0.5, voice.speed / voice.pitch))
        )
    file = io.BytesIO()
    soundfile.write(file, samples, 100 * round(240 * voice.pitch), format="WAV", subtype="FLOAT")
    return file.getvalue()


class Engine(NamedTuple):
    """A synthesizer: its program or Python package, how to install it, its voices, and how a voice says a text, as the
    bytes of a wav file."""

    name: str
    install: str
    voices: tuple[str, ...]
    say: Callable[[Voice, str], bytes]

    @property
    def installed(self) -> bool:
        return bool(importlib.util.find_spec(self.name) if "pip" in self.install else shutil.which(self.name))


_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
_TIMBRES = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5")
ENGINES = {
    "espeak-ng": Engine(
        "espeak-ng",
        "apt install espeak-ng",
        tuple(accent + timbre for accent in _ACCENTS for timbre in _TIMBRES),
        _espeak,
    ),
    "flite": Engine("flite", "apt install flite", ("kal16", "awb", "rms", "slt"), _flite),
    "festival": Engine("text2wave", "apt install festival", ("voice_kal_diphone",), _festival),
    "hibari": Engine("hibari", "pip install hibari-tts", ("heart",), _hibari),
}


def voices(engines: Sequence[str], number: int, seed: int) -> list[Voice]:
    """So many different voices, the engines in turn; the same for the same seed.

    Raises:
        ValueError: an engine is not installed.
    """
    if missing := [name for name in engines if not ENGINES[name].installed]:
        raise ValueError(f"{missing[0]} is not installed; run: {ENGINES[missing[0]].install}, or choose --engines")
    draw, found = Random(seed), list[Voice]()
    for index in range(number):
        engine = engines[index % len(engines)]
        name = draw.choice(ENGINES[engine].voices)
        found.append(Voice(engine, name, round(draw.uniform(0.75, 1.3), 3), round(draw.uniform(0.8, 1.3), 3)))
    return found
