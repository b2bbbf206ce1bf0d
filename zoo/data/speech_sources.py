"""Sources of utterances: LibriSpeech's folders, NeMo's manifests, generated tones."""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zoo.data.fingerprint import fingerprint
from zoo.data.headers import measured
from zoo.data.shards import Shards
from zoo.data.strings import Strings
from zoo.inputs.audio import EXTENSIONS, UnreadableAudio, audio_seconds, read_audio
from zoo.inputs.folders import files_below
from zoo.text import from_json, plain, reason


class Corpus(Protocol):
    """Utterances in a fixed order."""

    def __len__(self) -> int: ...

    @property
    def durations(self) -> np.ndarray:
        """Seconds of each, float64; NaN where the file's header cannot be read."""
        ...

    def text(self, index: int) -> str: ...

    def name(self, index: int) -> str: ...

    def identity(self, index: int) -> str:
        """A key that is unique to this audio, and changes when its file does; raises UnreadableAudio."""
        ...

    def waveform(self, index: int, rate: int) -> Tensor:
        """float32 [S]; raises UnreadableAudio."""
        ...

    def take(self, indices: Sequence[int] | np.ndarray) -> "Corpus":
        """The corpus of only these utterances, in this order."""
        ...


class Utterance(NamedTuple):
    """A line of a transcript: `seconds` are read from `start`, null for the rest of the file."""

    name: str
    path: str
    text: str
    start: float = 0.0
    seconds: float | None = None
    duration: float | None = None


class Files:
    """Utterances in audio files; durations that are not given are read from the files at first use."""

    def __init__(self, utterances: Sequence[Utterance]):
        # A few arrays of bytes and numbers: worker processes share them, where lists of strings would be copied.
        columns = list(zip(*utterances, strict=True)) or [()] * len(Utterance._fields)
        self.names, self.paths, self.texts = map(Strings, columns[:3])
        self.starts, self.seconds, self.given = (np.array(column, dtype=np.float64) for column in columns[3:])
        self._durations: np.ndarray | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        names = (self.names[index].encode(errors="surrogatepass") for index in range(len(self)))
        return fingerprint(names, self.starts, self.seconds, self.texts.bytes, self.texts.ends)

    def __len__(self) -> int:
        return len(self.given)

    @property
    def durations(self) -> np.ndarray:
        if self._durations is None:
            unknown = np.flatnonzero(np.isnan(self.given)).tolist()
            self._durations = self.given.copy()
            self._durations[unknown] = measured([self.paths[index] for index in unknown], _seconds, "durations")
        return self._durations

    def text(self, index: int) -> str:
        return self.texts[index]

    def name(self, index: int) -> str:
        return self.names[index]

    def identity(self, index: int) -> str:
        path = self.paths[index]
        try:
            found = os.stat(path)
        except OSError as error:
            raise UnreadableAudio(f"{path}: {reason(error)}") from error
        place = os.path.abspath(path), found.st_size, found.st_mtime_ns
        return repr((*place, float(self.starts[index]), float(self.seconds[index])))

    def waveform(self, index: int, rate: int) -> Tensor:
        seconds = self.seconds[index]
        return read_audio(self.paths[index], rate, self.starts[index], None if math.isnan(seconds) else seconds)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Files":
        return Files(
            [
                Utterance(self.names[i], self.paths[i], self.texts[i], self.starts[i], self.seconds[i], duration)
                for i, duration in zip(indices, self.durations[np.asarray(indices, dtype=np.int64)], strict=True)
            ]
        )


class Packed:
    """Utterances in splits of shards; `rows` has the number of the split and that of the utterance in it, [N, 2]."""

    def __init__(self, splits: Sequence[Shards], rows: np.ndarray):
        self.splits, self.rows = splits, rows
        self.texts, self.names = (
            [Strings.of(split.arrays[name], split.arrays[f"{name}_ends"]) for split in splits]
            for name in ("text", "utterance")
        )
        self.fingerprint = ", ".join(f"{split.split}: {split.fingerprint}" for split in splits)
        known = [split.arrays["duration"] for split in splits]
        self.durations = np.concatenate(known)[rows[:, 1] + np.cumsum([0, *map(len, known)])[rows[:, 0]]]

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, index: int) -> str:
        split, row = self.rows[index]
        return self.texts[split][row]

    def name(self, index: int) -> str:
        split, row = self.rows[index]
        return self.names[split][row]

    def identity(self, index: int) -> str:
        split, row = self.rows[index].tolist()
        return repr((self.splits[split].split, self.splits[split].fingerprint, row))

    def waveform(self, index: int, rate: int) -> Tensor:
        split, row = self.rows[index]
        shards = self.splits[split]
        file, start, seconds = (shards.arrays[name][row].item() for name in ("file", "start", "seconds"))
        part = (start, None if math.isnan(seconds) else seconds)
        return read_audio(shards.name(file), rate, *part, shards.read(file))

    def take(self, indices: Sequence[int] | np.ndarray) -> "Packed":
        return Packed(self.splits, self.rows[np.asarray(indices, dtype=np.int64)])


def _packed(split: str, names: list[str], root: str | None, training: bool, limit: int | None) -> Corpus:
    splits = [Shards(root or "", name, "speech", UnreadableAudio) for name in names]
    found = []
    for number, shards in enumerate(splits):
        rows = np.flatnonzero(np.isin(shards.arrays["file"], shards.kept))
        blank = np.diff(shards.arrays["text_ends"])[rows] == 0
        if training and blank.any():
            rank_zero_warn(plain(f"{root}, {shards.split}: omitted {blank.sum()} utterances with an empty transcript"))
            rows = rows[~blank]
        found.append(np.stack([np.full(len(rows), number), rows], axis=1))
    rows = np.concatenate(found)
    if not len(rows):
        raise ValueError(f"{root} has no utterances with a transcript in {', '.join(names)}")
    return Packed(splits, np.array(_spread(rows, limit)))  # pyright: ignore[reportArgumentType] (an array is a sequence)


def _seconds(path: str) -> float:
    """Seconds of a file, NaN if it is unreadable."""
    try:
        return audio_seconds(path) or math.nan
    except UnreadableAudio:
        return math.nan


def _librispeech(split: str, names: list[str], root: str | None, training: bool, limit: int | None) -> Corpus:
    base = Path(root or "").expanduser()
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder")
    if (base / "LibriSpeech").is_dir() and not all((base / name).is_dir() for name in names):
        base = base / "LibriSpeech"
    utterances = []
    for name in names:
        if not (base / name).is_dir():
            there = sorted(entry.name for entry in base.iterdir() if entry.is_dir() and entry.name[0] != ".")
            raise ValueError(f"folder {name!r} not found in {base}; found: {', '.join(there) or 'none'}")
        utterances += _transcribed(base / name, training)
    return Files(_spread(utterances, limit))


def _transcribed(folder: Path, training: bool) -> list[Utterance]:
    found: list[Utterance] = []
    faults = _Faults()
    listed, faults.links = files_below(folder, lambda name: name.lower().endswith((*EXTENSIONS, ".trans.txt")))
    for place, files in listed.items():
        sounds: dict[str, str] = {}
        texts: dict[str, str] = {}
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension.lower() in EXTENSIONS:
                sounds.setdefault(stem, os.path.join(place, file))
            else:
                _read_transcript(Path(place, file), texts, faults)
        faults.without_text += [sounds[stem] for stem in sounds if stem not in texts]
        faults.without_sound += [name for name in texts if name not in sounds]
        faults.empty += [name for name, text in texts.items() if name in sounds and not text]
        found += [
            Utterance(name, sounds[name], text)
            for name, text in sorted(texts.items())
            if name in sounds and (text or not training)
        ]
    faults.report(str(folder), training)
    if not found:
        if faults.malformed:
            raise ValueError(f"{folder} has no transcribed utterances; {faults.malformed[0]}")
        layout = "speaker/chapter/speaker-chapter-utterance.flac and speaker/chapter/speaker-chapter.trans.txt"
        raise ValueError(f"{folder} has no transcribed utterances; the layout is {layout}")
    return found


def _read_transcript(path: Path, texts: dict[str, str], faults: "_Faults") -> None:
    for number, line in _lines(path):
        name, _, text = line.partition(" ")
        if not name or "\t" in name:
            faults.malformed.append(f"{path}, line {number}: must begin with an utterance's name and a space")
        elif name in texts:
            faults.malformed.append(f"{path}, line {number}: {name} has a transcript already, which is kept")
        else:
            texts[name] = " ".join(text.split())


def _manifest(split: str, names: list[str], root: str | None, training: bool, limit: int | None) -> Corpus:
    utterances = []
    for name in names:
        path = Path(root or "").expanduser() / Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"{path} is not a file; a manifest has one JSON object per line")
        utterances += _listed(path, training)
    return Files(_spread(utterances, limit))


def _listed(path: Path, training: bool) -> list[Utterance]:
    found: list[Utterance] = []
    faults = _Faults()
    for number, line in _lines(path):
        try:
            values = from_json(line)
            one = _entry(values, path.parent)
        except (ValueError, OverflowError, RecursionError) as error:
            why = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.malformed.append(f"{path}, line {number}: {why}")
            continue
        if values.get("text") is None:
            faults.without_text.append(one.name)
        elif not os.path.exists(one.path):
            faults.without_sound.append(one.path)
        else:
            blank = not one.text.strip()
            faults.empty += [one.name] * blank
            found += [one] * (not (blank and training))
    faults.report(str(path), training)
    if not found:
        why = f"; {faults.malformed[0]}" if faults.malformed else ""
        raise ValueError(f"{path} lists no transcribed utterances{why}")
    return found


def _entry(values: Any, folder: Path) -> Utterance:
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, got {type(values).__name__}")
    path, text = values.get("audio_filepath"), values.get("text")
    if not isinstance(path, str) or not path:
        raise ValueError(f"audio_filepath must be a path, got {path!r}")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text must be a string, got {text!r}")
    text = " ".join((text or "").split())
    numbers = {}
    for name, wanted in (("duration", "> 0"), ("offset", ">= 0")):
        value = numbers[name] = values.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number of seconds, got {value!r}")
        if value < 0 or (value == 0 and name == "duration"):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    duration, offset = numbers["duration"], numbers["offset"]
    if offset is None:
        return Utterance(path, str(folder / path), text, duration=duration)
    if duration is None:
        raise ValueError("offset needs a duration")
    return Utterance(f"{path} from {offset:g} s", str(folder / path), text, offset, duration, duration)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: {reason(error)}") from error
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


class _Faults:
    def __init__(self):
        self.without_text: list[str] = []
        self.without_sound: list[str] = []
        self.empty: list[str] = []
        self.malformed: list[str] = []
        self.links: list[str] = []

    def report(self, place: str, training: bool) -> None:
        """Warns in one line about omitted items."""
        kinds = {
            "links to files already used": self.links,
            "malformed lines": self.malformed,
            "utterances without a transcript": self.without_text,
            "utterances without an audio file": self.without_sound,
        }
        if training:
            kinds["utterances with an empty transcript"] = self.empty
        counts = [f"{len(names)} {kind} (such as {names[0]})" for kind, names in kinds.items() if names]
        if counts:
            rank_zero_warn(plain(f"{place}: omitted {', '.join(counts)}"))


class Tones:
    """Generated utterances: each letter is a tone of its own pitch, a space is silence, and noise is added to both."""

    letters = "ABCDEFGH"
    counts = {"train": 512, "val": 64, "test": 64}

    def __init__(self, split: str, indices: Sequence[int] | np.ndarray):
        self.split, self.indices = split, np.asarray(indices, dtype=np.int64)
        scripts = [self._script(int(index)) for index in self.indices]
        self.texts = ["".join(letter for letter, _ in script if letter != ".") for script in scripts]
        self.durations = np.array([sum(seconds for _, seconds in script) for script in scripts])

    def __len__(self) -> int:
        return len(self.indices)

    def _script(self, index: int) -> list[tuple[str, float]]:
        """Letters, spaces, and pauses written as dots, each with its seconds; no letter follows itself in a word."""
        generator = np.random.default_rng([list(self.counts).index(self.split), index])
        words = []
        for length in generator.integers(1, 5, generator.integers(1, 4)):
            steps = generator.integers(1, len(self.letters), length).cumsum() % len(self.letters)
            words.append(".".join(self.letters[step] for step in steps))
        lasting = {".": (0.02, 0.05), " ": (0.12, 0.2)}
        return [(mark, generator.uniform(*lasting.get(mark, (0.08, 0.16)))) for mark in f".{' '.join(words)}."]

    def text(self, index: int) -> str:
        return self.texts[index]

    def name(self, index: int) -> str:
        return f"synthetic/{self.split}/{self.indices[index]}"

    def identity(self, index: int) -> str:
        return self.name(index)

    def waveform(self, index: int, rate: int) -> Tensor:
        script = self._script(int(self.indices[index]))
        ends = np.rint(np.cumsum([seconds for _, seconds in script]) * rate).astype(np.int64)
        generator = np.random.default_rng([list(self.counts).index(self.split), int(self.indices[index]), 1])
        samples = generator.normal(0, 0.01, ends[-1])
        for (mark, _), start, end in zip(script, [0, *ends], ends, strict=False):
            if mark in self.letters:
                pitch = 300.0 * 1.4 ** self.letters.index(mark)
                turns = pitch * np.arange(end - start) / rate + generator.uniform()
                samples[start:end] += generator.uniform(0.1, 0.3) * np.sin(2 * np.pi * turns)
        return torch.from_numpy(samples.astype(np.float32))

    def take(self, indices: Sequence[int] | np.ndarray) -> "Tones":
        return Tones(self.split, self.indices[np.asarray(indices, dtype=np.int64)])


def _synthetic(split: str, names: list[str], root: str | None, training: bool, limit: int | None) -> Corpus:
    return Tones(split, _spread(range(Tones.counts[split]), limit))


def _spread(values: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of the values, evenly spaced."""
    if limit is None or len(values) <= limit:
        return values
    return [values[index * len(values) // limit] for index in range(limit)]


CORPORA: dict[str, Callable[[str, list[str], str | None, bool, int | None], Corpus]] = {
    "librispeech": _librispeech,
    "manifest": _manifest,
    "shards": _packed,
    "synthetic": _synthetic,
}
