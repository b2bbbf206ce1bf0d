"""`zoo transcribe predict`: what is said in sound files, as lines, as JSON and CSV, and as a picture."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from zoo.inputs.audio import (
    EXTENSIONS,
    AudioPreprocess,
    UnreadableAudio,
    audio_seconds,
    pad_features,
    read_audio,
    split_at_silence,
)
from zoo.outputs import KenLM, beam, flashlight, greedy, transducer_greedy, words
from zoo.outputs.tokens import Tokenizer
from zoo.tasks import predicting as files
from zoo.tasks.predicting import BAR, CARD, GREY, INK, count, plain, say, short

FILES = ("transcripts.json", "transcripts.csv", "transcripts.png")
COLUMNS = ("path", "text", "seconds", "error")
AHEAD = 4  # batches of sound that are read before they are sorted by duration
SHOWN, VIEW = 6, 10.0  # files in transcripts.png, and the seconds of each that are drawn
COLOURS = LinearSegmentedColormap.from_list("sound", [CARD, "#cfdeee", "#7ba6d3", BAR, INK])

Decode = Callable[[Tensor], list[int]]


@dataclass
class Part:
    """A stretch of a file that is transcribed at once: where it starts, in seconds, and its features [T, mels]."""

    entry: dict[str, Any]
    start: float
    seconds: float
    features: Tensor
    text: str = ""
    words: list[dict[str, Any]] | None = None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="zoo transcribe predict",
        description="Writes down what is said: prints path and text of each sound file, and writes "
        f"{', '.join(FILES)}. A file that cannot be read is reported and the others are answered; the exit status "
        "is then 1.",
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", help="a checkpoint: a folder, a name in checkpoints/, OWNER/NAME (Hub)")
    searched = (
        f"a sound file, or a folder to search, with all below it, for {', '.join(EXTENSIONS)} that are not hidden"
    )
    made.add_argument("paths", metavar="PATH", nargs="+", help=searched)
    files.add_options(made)
    made.add_argument("--decode", choices=("greedy", "beam", "flashlight"), default="greedy", help="default: greedy")
    made.add_argument("--beam", type=count, metavar="N", help="hypotheses that a beam keeps (default: 16)")
    made.add_argument("--lm", metavar="FILE", help="an n-gram for the beam, ARPA or KenLM's binary")
    made.add_argument("--unit", choices=("word", "token"), help="what the n-gram is over (default: word)")
    made.add_argument("--alpha", type=float, help="weight of the n-gram (default: 0.5)")
    made.add_argument("--beta", type=float, help="bonus for each of its units (default: 1.5)")
    longest = "longer files are cut at silence into parts of at most so many seconds (default: %(default)g)"
    made.add_argument("--longest", type=_seconds, default=30.0, metavar="SECONDS", help=longest)
    batch = "padded seconds computed at once (default: %(default)g)"
    made.add_argument("--seconds", type=_seconds, default=120.0, help=batch)
    return made


def main(arguments: list[str]) -> None:
    """Transcribes sound files as the arguments say. ValueError at the end where one could not be read."""
    given = parser().parse_intermixed_args(arguments)
    output, device = Path(given.output), files.device_for(given.device)
    _check_options(given)
    paths = files.find_files(given.paths, lambda name: name.lower().endswith(EXTENSIONS), "sound file")
    model, preprocess, tokenizer = files.load_recogniser(given.name)
    decode = _decoder(given, model, tokenizer)
    files.make_output(output)  # before the work, so that a bad name costs none

    transcribe = Transcriber(model.to(device), preprocess, tokenizer, decode, given.precision)
    entries, shown = predict(paths, transcribe, given.longest, given.seconds)
    failed = sum("error" in entry for entry in entries)
    if failed == len(entries):
        raise ValueError(f"none of the {failed} files could be read; nothing was written to {output}")
    files.write(output, FILES, COLUMNS, entries, lambda: draw(entries, shown))
    say(f"wrote {', '.join(FILES)} to {output}", sys.stderr)
    if failed:
        raise ValueError(f"{failed} of {len(entries)} files could not be read")


def _check_options(given: argparse.Namespace) -> None:
    for option, needed in (("beam", "decode"), ("lm", "decode"), ("unit", "lm"), ("alpha", "lm"), ("beta", "lm")):
        missing = given.decode == "greedy" if needed == "decode" else given.lm is None
        if missing and getattr(given, option) is not None:
            needs = "--decode beam or flashlight" if needed == "decode" else "--lm FILE"
            raise ValueError(f"--{option} would be ignored: it needs {needs}")
    for option in ("alpha", "beta"):
        value = getattr(given, option)
        if value is not None and (not math.isfinite(value) or option == "alpha" and value < 0):
            raise ValueError(f"--{option} must be a finite number{' of at least 0' * (option == 'alpha')}, not {value}")


def _decoder(given: argparse.Namespace, model: nn.Module, tokenizer: Tokenizer) -> Decode | None:
    """From logits [T, V] to tokens; None for a transducer, which has a search of its own."""
    config: Any = model.config
    if config.transducer:
        if given.decode != "greedy":
            raise ValueError(f"--decode {given.decode}: {given.name} is a transducer; only greedy is there for it")
        return None
    if given.decode == "greedy":
        return lambda logits: greedy(logits[None], torch.tensor([len(logits)]))[0]
    options: dict[str, Any] = {"size": given.beam or 16}
    if given.lm is not None:
        options["lm"] = KenLM(given.lm, tokenizer, given.unit or "word")
        options["alpha"] = 0.5 if given.alpha is None else given.alpha
        options["beta"] = 1.5 if given.beta is None else given.beta
    search = partial(beam if given.decode == "beam" else flashlight, **options)
    search(torch.zeros(1, tokenizer.vocabulary))  # what is not installed is said before the work
    return lambda logits: search(logits)[0].tokens


def predict(
    paths: Sequence[str], transcribe: Transcriber, longest: float, seconds: float
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Tensor]]]:
    """Transcribes the files, `seconds` of padded sound at once, and prints each text in the order of the paths.

    Returns an entry of transcripts.json for each path, and the first entries with features [T, mels] to be shown.
    """
    entries: list[dict[str, Any]] = []
    shown: list[tuple[dict[str, Any], Tensor]] = []
    preprocess, width = transcribe.preprocess, min(60, max(map(len, paths)))
    durations = [_duration(path) for path in paths]
    total = sum(durations)
    with tqdm(total=round(total), unit="s", disable=None if total > seconds else True) as bar:
        for window in _windows(durations, AHEAD * seconds):
            parts: list[Part] = []
            for path, duration in zip(paths[window], durations[window], strict=True):
                entries.append(entry := {"path": path})
                try:
                    waveform = read_audio(path, preprocess.rate)
                except UnreadableAudio as error:
                    entry["error"] = str(error).removeprefix(f"{path}: ")
                    bar.update(duration)
                    continue
                entry |= {"text": "", "seconds": len(waveform) / preprocess.rate, "words": []}
                for start, end in split_at_silence(waveform, preprocess.rate, longest):
                    at, lasts = start / preprocess.rate, (end - start) / preprocess.rate
                    parts.append(Part(entry, at, lasts, preprocess(waveform[start:end])))
                if len(shown) < SHOWN:
                    shown.append((entry, preprocess(waveform[: int(VIEW * preprocess.rate)])))
            for batch in _batches(parts, seconds):
                transcribe(batch)
                bar.update(sum(part.seconds for part in batch))
            _gather(parts)
            for entry in entries[window]:
                if "error" in entry:
                    say(f"zoo: {entry['path']}: {entry['error']}", sys.stderr)
                else:
                    say(f"{plain(entry['path']).ljust(width)}  {entry['text']}".rstrip(), sys.stdout)
    return entries, shown


@dataclass
class Transcriber:
    """A model with all that is around it; called with parts of about one duration, it fills in their text and words."""

    model: nn.Module
    preprocess: AudioPreprocess
    tokenizer: Tokenizer
    decode: Decode | None
    precision: str

    @torch.inference_mode()
    def __call__(self, parts: Sequence[Part]) -> None:
        model: Any = self.model
        device = next(model.parameters()).device
        features, lengths = pad_features([part.features for part in parts])
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            made, lengths = model(features.to(device), lengths.to(device))
        made, step = made.float(), self.preprocess.seconds_per_frame * model.config.stride
        rows = [row[:length] for row, length in zip(made, lengths.tolist(), strict=True)]
        for part, row in zip(parts, rows, strict=True):
            if not bool(row.isfinite().all()):
                raise ValueError(f"the model's answer to {part.entry['path']} is not a number")
        if self.decode is None:
            for part, tokens in zip(parts, transducer_greedy(model.head, made, lengths), strict=True):
                part.text = self._spell(tokens)
            return
        for part, row in zip(parts, rows, strict=True):
            logits = row.cpu()
            tokens = self.decode(logits)
            part.text, part.words = self._spell(tokens), []
            for word in words(logits, tokens, self.tokenizer, step):
                start, end = (round(part.start + min(time, part.seconds), 3) for time in (word.start, word.end))
                part.words.append({"text": word.text, "start": start, "end": end, "probability": word.probability})

    def _spell(self, tokens: list[int]) -> str:
        return " ".join(self.tokenizer.decode(tokens).split())


def _duration(path: str) -> float:
    try:
        return audio_seconds(path)
    except UnreadableAudio:  # reported when it is read
        return 0.0


def _windows(durations: Sequence[float], most: float) -> Iterator[slice]:
    """Cuts a list into stretches of at most so many seconds each, or of one file."""
    start, total = 0, 0.0
    for index, duration in enumerate(durations):
        if index > start and total + duration > most:
            yield slice(start, index)
            start, total = index, 0.0
        total += duration
    yield slice(start, len(durations))


def _batches(parts: Sequence[Part], most: float) -> Iterator[list[Part]]:
    """The parts by duration, in batches of at most so many padded seconds, or of one part."""
    batch: list[Part] = []
    for part in sorted(parts, key=lambda part: part.seconds):
        if batch and (len(batch) + 1) * part.seconds > most:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _gather(parts: Sequence[Part]) -> None:
    """Puts text and words of the parts, which are in order, into their entries."""
    for part in parts:
        entry = part.entry
        entry["text"] = f"{entry['text']} {part.text}".strip()
        entry["words"] = None if part.words is None else [*entry["words"], *part.words]


def draw(entries: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Tensor]]) -> Figure:
    """The first seconds of the first files: log-mel features, and above them the words where they are heard."""
    failed = sum("error" in entry for entry in entries)
    more = len(entries) - failed - len(shown)
    notes = [f"and {more} more in {FILES[0]}"] * bool(more) + [f"{failed} could not be read"] * bool(failed)

    width, edge, sound, between, line = 11.0, 0.3, 0.9, 0.75, 0.17  # inches; `between` holds name and seconds
    span = max(1.0, *(min(VIEW, entry["seconds"]) for entry, _ in shown))
    inches = (width - 2 * edge) / span  # of a second
    labels = [_labels(entry, span, inches) for entry, _ in shown]
    lanes = [1 + max(lane for *_, lane in placed) for placed in labels]
    height = edge * bool(notes) + sum(between + sound + line * number for number in lanes)
    figure, top = Figure((width, height), dpi=120, facecolor="white"), height - edge / 2
    for (entry, features), placed, number in zip(shown, labels, lanes, strict=True):
        seconds = max(0.05, min(VIEW, entry["seconds"]))
        bottom = top - between + 0.35 - line * number - sound
        axes = figure.add_axes((edge / width, bottom / height, seconds * inches / width, sound / height))
        top -= between + sound + line * number
        _draw_sound(axes, features.numpy().T, seconds, span)
        over: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        for text, x, word, lane in placed:
            y = 1.08 + (lane + 0.1) * line / sound  # in heights of the sound
            colour = INK if entry["text"] and (word or entry["words"] is None) else GREY
            axes.text(x, y, text, color=colour, fontsize=8, va="bottom", parse_math=False, **over)
            if word is not None:
                start, end = word["start"], min(word["end"], seconds)
                axes.plot([start, start], [0, y], color=INK, lw=0.5, alpha=0.4, **over)
                axes.plot([start, end], [1.03, 1.03], color=BAR, lw=3, solid_capstyle="butt", **over)
        style: dict[str, Any] = {"fontsize": 8, "parse_math": False, "color": GREY, "va": "bottom"}
        y = (bottom + sound + line * number + 0.12) / height
        lasts = f"the first {VIEW:g} s of " * (entry["seconds"] > VIEW) + f"{entry['seconds']:.1f} s"
        figure.text(edge / width, y, short(os.path.basename(entry["path"]), 80, 12), **style)
        figure.text(1 - edge / width, y, lasts, ha="right", **style)
    figure.text(0.5, 0.12 / height, "; ".join(notes), ha="center", fontsize=9, color=GREY)
    return figure


def _draw_sound(axes: Axes, bands: np.ndarray, seconds: float, span: float) -> None:
    low, high = np.quantile(bands, (0.2, 0.998))
    extent = (0.0, seconds, 0.0, 1.0)
    axes.imshow(bands, cmap=COLOURS, vmin=low, vmax=max(high, low + 1e-6), extent=extent, origin="lower", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.set(yticks=[], ylim=(0, 1), xlim=(0, seconds))
    axes.set_xticks([tick for tick in range(math.ceil(span) + 1) if tick <= seconds])
    axes.tick_params(labelsize=7, labelcolor=GREY, color=GREY, length=2, pad=2)


def _labels(entry: dict[str, Any], span: float, inches: float) -> list[tuple[str, float, dict[str, Any] | None, int]]:
    """What is written above the sound: text, place in seconds, the word it is of, and the lowest lane that is free."""
    if not entry["words"]:
        return [(short(entry["text"], 130) or "no words", 0.0, None, 0)]
    free: list[float] = []  # where each lane is free from
    placed = []
    for word in entry["words"]:
        if word["start"] >= min(VIEW, entry["seconds"]):
            continue
        text = short(word["text"], 30)
        size = (0.085 if text.isupper() else 0.075) * (len(text) + 1) / inches
        x = max(0.0, min(word["start"], span - size))
        lane = next((lane for lane, start in enumerate(free) if start <= x), len(free))
        free[lane : lane + 1] = [x + size]
        placed.append((text, x, word, lane))
    return placed or [(f"no words in the first {VIEW:g} s", 0.0, None, 0)]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds of at least 0.1, not '{text}'")
    return value
