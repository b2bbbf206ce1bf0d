"""`zoo transcribe stream`: transcribes audio while it arrives, word by word."""

import os
import sys
from collections.abc import Iterable

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count


def parser() -> Parser:
    made = Parser(
        "zoo transcribe stream",
        "Transcribes speech while it arrives, with a model whose config has a chunk.",
        "arecord -q -t raw -f S16_LE -r 16000 | zoo transcribe stream NAME -",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    raw = "an audio file, or - for raw audio from standard input: 16-bit samples, little-endian"
    made.add_argument("file", metavar="FILE|-", help=raw)
    made.add_argument("--times", action="store_true", help="one line per word, with its start in seconds")
    made.add_argument("--rate", type=count, metavar="HZ", help="sample rate of raw audio in Hz (default: the model's)")
    made.add_argument("--channels", type=count, metavar="N", help="channels of raw audio, averaged (default: 1)")
    files.add_device(made)
    ahead = "tokens to wait for, for a model trained with several chunks (default: its chunk minus 1)"
    made.add_rare("--look-ahead", type=int, metavar="N", help=ahead)
    return made


def main(arguments: list[str]) -> None:
    """Transcribes a file or standard input, printing each word as soon as it is known."""
    given = parser().parse_args(arguments)
    live, path = given.file == "-", os.path.expanduser(given.file)
    for option in ("rate", "channels"):
        if not live and getattr(given, option) is not None:
            raise ValueError(f"--{option} is for raw audio; a file has its own")
    if live and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("standard input is not a pipe; pipe raw audio into it, as --help shows")
    if given.look_ahead is not None and given.look_ahead < 0:
        raise ValueError(f"--look-ahead must be >= 0, got {given.look_ahead}")
    from zoo.tasks.transcribe import listener as sound

    device = files.device_for(given.device)
    model, preprocess, tokenizer = files.load_recogniser(given.name)
    rate = (given.rate or preprocess.rate) if live else sound.rate_of(path)
    options = {"rate": rate, "look_ahead": given.look_ahead, "times": given.times}
    try:
        listener = sound.Listener(model.to(device), preprocess, tokenizer, **options)
    except ValueError as error:
        raise ValueError(f"{given.name} cannot stream: {error}") from None
    _show(sound.transcribed(listener, sound.raw(rate, given.channels or 1) if live else sound.recorded(path)))


def _show(pieces: Iterable[str]) -> None:
    """Prints a text as it grows, then a newline, even if interrupted or if the reader closes the pipe."""
    begun = False
    try:
        try:
            for piece in pieces:
                if piece:
                    _print(piece)
                    begun = True
        except KeyboardInterrupt:
            pass
        except ValueError:
            _print("\n" * begun)
            raise
        _print("\n")
    except BrokenPipeError:
        files.silence(sys.stdout)


def _print(text: str) -> None:
    if sys.stdout is not None:
        sys.stdout.write("\n".join(files.printable(line, sys.stdout) for line in text.split("\n")))
        sys.stdout.flush()
