"""`zoo transcribe predict`: transcribes audio files to lines, JSON, CSV and an image."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("transcripts.json", "transcripts.csv", "transcripts.png")
COLUMNS = ("path", "text", "seconds", "error")


def parser() -> Parser:
    made = Parser(
        "zoo transcribe predict",
        "Transcribes speech: prints path and text of each audio file, and writes\n"
        f"{', '.join(FILES)}. A file that cannot be read\n"
        "completely is reported, and the exit status is then 1.",
        "zoo transcribe predict squeezeformer_micro.spoken_digits recordings/",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("paths", metavar="PATH", nargs="+", help="an audio file, or a folder to search for audio files")
    files.add_options(made)
    files.add_maps(made)
    searches = ("greedy", "beam", "flashlight")
    decode = "greedy (default), beam or flashlight"
    made.add_argument("--decode", metavar="SEARCH", choices=searches, default="greedy", help=decode)
    made.add_argument("--lm", metavar="FILE", help="an n-gram language model for the beam, ARPA or KenLM binary")
    made.add_rare("--beam", type=count, metavar="N", help="size of the beam (default: 16)")
    made.add_rare("--unit", metavar="U", choices=("word", "token"), help="unit of the n-gram: word (default) or token")
    made.add_rare("--alpha", type=float, metavar="X", help="weight of the n-gram (default: 0.5)")
    made.add_rare("--beta", type=float, metavar="X", help="bonus per unit of the n-gram (default: 1.5)")
    longest = "longer files are cut at silence into parts of at most this many seconds (default: %(default)g)"
    made.add_rare("--longest", type=_seconds, default=30.0, metavar="SECONDS", help=longest)
    batch = "seconds of audio per batch, with padding (default: %(default)g)"
    made.add_rare("--seconds", type=_seconds, default=120.0, metavar="SECONDS", help=batch)
    return made


def main(arguments: list[str]) -> None:
    """Transcribes audio files as given by the arguments. ValueError at the end if one had an error."""
    given = parser().parse_intermixed_args(arguments)
    _check_options(given)
    from zoo.inputs.audio import EXTENSIONS
    from zoo.tasks.maps import check_weights
    from zoo.tasks.transcribe import maps, transcripts

    output, device = Path(given.output).expanduser(), files.device_for(given.device)
    paths = files.find_files(given.paths, EXTENSIONS, "audio file")
    model, preprocess, tokenizer = files.load_recogniser(given.name)
    if given.maps:
        check_weights(model, given.name)
    decode = transcripts.decoder(given, model, tokenizer)
    files.make_output(output)  # before the work, so that a bad name fails early

    transcribe = transcripts.Transcriber(model.to(device), preprocess, tokenizer, decode, given.precision)
    entries = transcripts.predict(paths, transcribe, given.longest, given.seconds)
    if not any("text" in entry for entry in entries):
        raise files.nothing_done(output, entries, "file")

    draws: dict[str, Callable[[], Figure]] = {}
    if any("error" not in entry for entry in entries):
        draws[FILES[2]] = lambda: transcripts.draw(entries, transcripts.shown(entries, preprocess))
        if given.maps:
            draws[files.MAPS] = lambda: maps.draw(entries, transcribe)
    files.finish(output, files.write(output, FILES[:2], COLUMNS, entries, draws), entries, "file")


def _check_options(given: argparse.Namespace) -> None:
    for option, needed in (("beam", "decode"), ("lm", "decode"), ("unit", "lm"), ("alpha", "lm"), ("beta", "lm")):
        missing = given.decode == "greedy" if needed == "decode" else given.lm is None
        if missing and getattr(given, option) is not None:
            needs = "--decode beam or flashlight" if needed == "decode" else "--lm FILE"
            raise ValueError(f"--{option} needs {needs}")
    for option in ("alpha", "beta"):
        value = getattr(given, option)
        if value is not None and (not math.isfinite(value) or option == "alpha" and value < 0):
            raise ValueError(f"--{option} must be a finite number{' >= 0' * (option == 'alpha')}, got {value}")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0.1, got '{text}'")
    return value
