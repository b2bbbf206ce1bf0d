"""Transcribes audio files in batches of parts of similar duration, and draws a figure of the results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from zoo.inputs.audio import AudioPreprocess, pad_features, read_audio
from zoo.outputs import KenLM, beam, flashlight, greedy, transducer_greedy, words
from zoo.outputs.answers import checked
from zoo.outputs.tokens import Tokenizer
from zoo.tasks.predicting import BAR, CARD, GREY, INK, fail, report, say, short
from zoo.text import plain

AHEAD = 4  # batches of audio that are read before they are sorted by duration
MANY = 20  # a progress bar is shown from this many files
SHOWN, VIEW = 12, 10.0  # files in transcripts.png, and the drawn seconds of each
COLOURS = LinearSegmentedColormap.from_list("sound", [CARD, "#cfdeee", "#7ba6d3", BAR, INK])

Decode = Callable[[Tensor], list[int]]


@dataclass
class Part:
    """A segment of a file that is transcribed at once: its start in seconds and its features [T, mels]."""

    start: float
    seconds: float
    features: Tensor | None  # None for silence, and once they are computed
    silent: bool = False
    text: str = ""
    words: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None


@dataclass
class File:
    """A file that is being transcribed, and its entry of transcripts.json."""

    entry: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    error: Exception | None = None


def decoder(given: argparse.Namespace, model: nn.Module, tokenizer: Tokenizer) -> Decode | None:
    """From logits [T, V] to tokens; None for a transducer, which has its own search."""
    config: Any = model.config
    if config.transducer:
        if given.decode != "greedy":
            raise ValueError(f"--decode {given.decode}: {given.name} is a transducer, which supports only greedy")
        return None
    if given.decode == "greedy":
        return lambda logits: greedy(logits[None], torch.tensor([len(logits)]))[0]
    options: dict[str, Any] = {"size": given.beam or 16}
    if given.lm is not None:
        options["lm"] = KenLM(os.path.expanduser(given.lm), tokenizer, given.unit or "word")
        options["alpha"] = 0.5 if given.alpha is None else given.alpha
        options["beta"] = 1.5 if given.beta is None else given.beta
    search = partial(beam if given.decode == "beam" else flashlight, **options)
    search(torch.zeros(1, tokenizer.vocabulary))  # reports missing packages before the work
    return lambda logits: search(logits)[0].tokens


@dataclass
class Transcriber:
    """A model with its pre- and postprocessing; called with parts of similar duration, it fills in their text and
    words, or the error."""

    model: nn.Module
    preprocess: AudioPreprocess
    tokenizer: Tokenizer
    decode: Decode | None
    precision: str

    def __call__(self, parts: Sequence[Part]) -> None:
        try:
            rows, tokens = self._run(parts)
        except Exception as error:  # one part is faulty, or the batch is too large for the memory
            if len(parts) == 1:
                parts[0].error, parts[0].features = error, None
            for part in parts if len(parts) > 1 else ():
                self([part])
            return
        for part, row, found in zip(parts, rows, tokens, strict=True):
            part.features = None
            try:
                self._read(part, checked(row), found)
            except Exception as error:
                part.error = error

    @torch.inference_mode()
    def _run(self, parts: Sequence[Part]) -> tuple[list[Tensor], Sequence[list[int] | None]]:
        """The output of each part, and its tokens for a transducer."""
        model: Any = self.model
        device = next(model.parameters()).device
        features, lengths = pad_features([part.features for part in parts if part.features is not None])
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            made, lengths = model(features.to(device), lengths.to(device))
        made = made.float()
        tokens = [None] * len(parts) if self.decode else transducer_greedy(model.head, made, lengths)
        return [row[:length].cpu() for row, length in zip(made, lengths.tolist(), strict=True)], tokens

    def _read(self, part: Part, logits: Tensor, tokens: list[int] | None) -> None:
        if self.decode is None or tokens is not None:
            part.text = self._spell(tokens or [])
            return
        tokens = self.decode(logits)
        part.text = self._spell(tokens)
        config: Any = self.model.config
        step = self.preprocess.seconds_per_frame * config.stride
        for word in words(logits, tokens, self.tokenizer, step):
            start, end = (round(part.start + min(time, part.seconds), 3) for time in (word.start, word.end))
            part.words.append({"text": word.text, "start": start, "end": end, "probability": word.probability})

    def _spell(self, tokens: list[int]) -> str:
        return " ".join(self.tokenizer.decode(tokens).split())


def parts_of(path: str, transcribe: Transcriber, longest: float) -> Iterator[Part]:
    """The parts of a file, as they are read; of at most `longest` seconds, if they can be cut."""
    for start, lasts, features in transcribe.preprocess.parts(path, longest):
        yield Part(start, lasts, features, features is None)


def together(parts: Sequence[Part], timed: bool) -> dict[str, Any]:
    """Text, duration in seconds and words (None if the search has no times) of transcribed parts; the parts with an
    error have neither text nor words."""
    good = [part for part in parts if part.error is None]
    return {
        "text": " ".join(part.text for part in good if part.text),
        "seconds": round(parts[-1].start + parts[-1].seconds, 6),
        "words": [word for part in good for word in part.words] if timed else None,
    }


def predict(paths: Sequence[str], transcribe: Transcriber, longest: float, seconds: float) -> list[dict[str, Any]]:
    """Transcribes the files, `seconds` of padded audio at once, and prints each text in the order of the paths.

    Files are read part by part, so that one of any length takes little memory. Errors of single files are
    reported; the part read before an error is transcribed.

    Returns an entry of transcripts.json for each path.
    """
    entries: list[dict[str, Any]] = []
    waiting: list[File] = []
    held = 0.0  # seconds of the parts that wait
    width = min(60, max(len(plain(path)) for path in paths))
    with tqdm(total=len(paths), unit="file", disable=None if len(paths) > MANY else True) as bar:
        for path in paths:
            entries.append({"path": path})
            waiting.append(file := File(entries[-1]))
            try:
                for part in parts_of(path, transcribe, longest):
                    file.parts.append(part)
                    held += part.seconds
                    if held >= AHEAD * seconds:
                        _compute(waiting, transcribe, seconds)
                        held = 0.0
                        _tell(waiting[:-1], transcribe.decode is not None, width, bar)
                        del waiting[:-1]
            except Exception as error:
                file.error = error
            if not held:
                _tell(waiting, transcribe.decode is not None, width, bar)
                waiting.clear()
        _compute(waiting, transcribe, seconds)
        _tell(waiting, transcribe.decode is not None, width, bar)
    return entries


def _compute(files: Sequence[File], transcribe: Transcriber, seconds: float) -> None:
    parts = [part for file in files for part in file.parts if part.features is not None]
    for batch in _batches(parts, seconds):
        transcribe(batch)


def _tell(files: Sequence[File], timed: bool, width: int, bar: Any) -> None:
    """Puts text and words of the parts into the entries of whole files, and prints them."""
    for file in files:
        entry, bad = file.entry, file.error or next((part.error for part in file.parts if part.error), None)
        if any(part.error is None for part in file.parts):
            entry |= together(file.parts, timed)
            say(f"{plain(entry['path']).ljust(width)}  {entry['text']}".rstrip())
        if bad is not None:
            fail(entry, bad)
        elif all(part.silent for part in file.parts):
            report(f"{entry['path']}: silence")
        bar.update()


def _batches(parts: Sequence[Part], most: float) -> Iterator[list[Part]]:
    """The parts by duration, in batches of at most this many padded seconds, or of one part."""
    batch: list[Part] = []
    for part in sorted(parts, key=lambda part: part.seconds):
        if batch and (len(batch) + 1) * part.seconds > most:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def shown(
    entries: Sequence[dict[str, Any]], preprocess: AudioPreprocess, most: int = SHOWN
) -> list[tuple[dict[str, Any], Tensor]]:
    """The first entries without an error, at most so many, and the features [T, mels] of their first seconds."""
    found = [entry for entry in entries if "error" not in entry][:most]
    return [(entry, preprocess(read_audio(entry["path"], preprocess.rate, seconds=VIEW))) for entry in found]


def draw(entries: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Tensor]]) -> Figure:
    """The first files, each at full width: log-mel features of its first seconds, and above them the words."""
    failed = sum("error" in entry for entry in entries)
    more = len(entries) - failed - len(shown)
    notes = [f"and {more} more in transcripts.json"] * bool(more) + [f"{failed} had an error"] * bool(failed)

    width, edge, sound, between, line = 11.0, 0.3, 0.9, 0.75, 0.17  # inches; `between` holds name and seconds
    spans = [span_of(entry) for entry, _ in shown]
    labels = [_labels(entry, span, (width - 2 * edge) / span) for (entry, _), span in zip(shown, spans, strict=True)]
    lanes = [1 + max(lane for *_, lane in placed) for placed in labels]
    height = edge * bool(notes) + sum(between + sound + line * number for number in lanes)
    figure, top = Figure((width, height), dpi=120, facecolor="white"), height - edge / 2
    for (entry, features), span, placed, number in zip(shown, spans, labels, lanes, strict=True):
        bottom = top - between + 0.35 - line * number - sound
        axes = figure.add_axes((edge / width, bottom / height, 1 - 2 * edge / width, sound / height))
        top -= between + sound + line * number
        _draw_sound(axes, features.numpy().T, span)
        over: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        for text, x, word, lane in placed:
            y = 1.08 + (lane + 0.1) * line / sound  # in heights of the features
            colour = INK if entry["text"] and (word or entry["words"] is None) else GREY
            axes.text(x, y, text, color=colour, fontsize=8, va="bottom", parse_math=False, **over)
            if word is not None:
                start, end = word["start"], min(word["end"], span)
                axes.plot([start, start], [0, y], color=INK, lw=0.5, alpha=0.4, **over)
                axes.plot([start, end], [1.03, 1.03], color=BAR, lw=3, solid_capstyle="butt", **over)
        style: dict[str, Any] = {"fontsize": 8, "parse_math": False, "color": GREY, "va": "bottom"}
        y = (bottom + sound + line * number + 0.12) / height
        figure.text(edge / width, y, short(os.path.basename(entry["path"]), 80, 12), **style)
        figure.text(1 - edge / width, y, lasts(entry), ha="right", **style)
    figure.text(0.5, 0.12 / height, "; ".join(notes), ha="center", fontsize=9, color=GREY)
    return figure


def span_of(entry: dict[str, Any]) -> float:
    """The seconds of a file that are drawn."""
    return min(VIEW, max(0.05, entry["seconds"]))


def lasts(entry: dict[str, Any]) -> str:
    """How long a file is, and how much of it is drawn."""
    return f"the first {VIEW:g} s of " * (entry["seconds"] > VIEW) + f"{entry['seconds']:.1f} s"


def ticks_of(span: float, most: int) -> list[float]:
    """At most so many steps of round numbers of seconds from 0 to the span."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if span <= most * step)
    return [step * tick for tick in range(int(span / step + 1e-6) + 1)]


def _draw_sound(axes: Axes, bands: np.ndarray, seconds: float) -> None:
    low, high = np.quantile(bands, (0.2, 0.998))
    extent = (0.0, seconds, 0.0, 1.0)
    axes.imshow(bands, cmap=COLOURS, vmin=low, vmax=max(high, low + 1e-6), extent=extent, origin="lower", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.set(yticks=[], ylim=(0, 1), xlim=(0, seconds))
    ticks = ticks_of(seconds, 10)
    axes.set_xticks(ticks, [f"{tick:g} s" for tick in ticks])
    axes.tick_params(labelsize=7, labelcolor=GREY, color=GREY, length=2, pad=2)


def _labels(entry: dict[str, Any], span: float, inches: float) -> list[tuple[str, float, dict[str, Any] | None, int]]:
    """The texts above the features: text, place in seconds, its word, and the lowest free lane."""
    if not entry["words"]:
        return [(short(entry["text"], 130) or "no words", 0.0, None, 0)]
    free: list[float] = []  # the end of the used part of each lane
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
