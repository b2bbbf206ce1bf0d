"""`zoo transcribe stream`: what is said in a sound that is still going on, word for word as it is known."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.inputs import audio
from zoo.inputs.audio import AudioPreprocess, StreamingFeatures, UnreadableAudio
from zoo.layer import Chunks
from zoo.outputs.tokens import Tokenizer
from zoo.outputs.transducer import transducer_search
from zoo.tasks.predicting import count, device_for, load_recogniser, plain

BLOCK = 0.1  # seconds of sound that are computed at once
HEADERS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3"}
CUT = "\N{REPLACEMENT CHARACTER}"  # how a part of a character is decoded, where a token is one of its bytes


class Listener:
    """Sound that comes in pieces to text, in memory that does not grow with it.

    What `push` and `finish` return, one after the other, is the text that greedy search finds in the sound as a whole.

    Args:
        model: a speech model whose config has a chunk, in eval mode.
        preprocess: how sound becomes its features; they may not wait for the end, so normalize is "none".
        tokenizer: its tokens.
        rate: samples per second of the sound; None for those that `preprocess` expects.
        look_ahead: tokens, of model.config.stride frames each, that a chunk's first token sees of what comes later;
            None for the chunk of the config less one. Others are for a model that was trained with several chunks.
        times: each word on a line of its own, behind the second at which it begins.

    Raises:
        ValueError: the model does not stream, or one does not fit the other.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: AudioPreprocess,
        tokenizer: Tokenizer,
        *,
        rate: int | None = None,
        look_ahead: int | None = None,
        times: bool = False,
    ) -> None:
        self.model: Any = model
        config = self.model.config
        if config.chunk is None:
            raise ValueError(
                "its config has no chunk, so it hears a sound only as a whole; use `zoo transcribe predict`, "
                "or train one with model.backbone.chunk"
            )
        if (found := (tokenizer.vocabulary, preprocess.mels)) != (wanted := (config.vocabulary, config.mels)):
            raise ValueError(f"tokens with the blank, and mel bands, are {found}, and the model has {wanted}")
        if look_ahead is not None and look_ahead < 0:
            raise ValueError(f"look_ahead is at least 0, not {look_ahead}")
        chunk = config.chunk if look_ahead is None else look_ahead + 1
        self.features = StreamingFeatures(preprocess)
        self.resample = Resample(rate or preprocess.rate, preprocess.rate)
        self.stream = self.model.stream(1, Chunks(chunk, config.left // chunk * chunk))
        self.tokenizer, self.times = tokenizer, times
        self.step = preprocess.seconds_per_frame * config.stride
        self.transducer = config.transducer
        self.state: Any = self.model.head.start(1) if self.transducer else tokenizer.blank
        self.frame = 0
        self.pending: list[tuple[int, int]] = []
        self.between, self.begun = True, False

    def push(self, samples: Tensor) -> str:
        """Takes the next samples [n], any number of them, full scale being -1..1; returns the text that they add."""
        return self._hear(self.features.push(self.resample.push(samples)))

    def finish(self) -> str:
        """The rest of the text; the listener has done its work then."""
        said = self._hear(self.features.push(self.resample.finish()))
        said += self._hear(self.features.finish())
        return said + self._read(self.stream.finish()) + self._spell()

    def _hear(self, features: Tensor) -> str:
        device = next(self.model.parameters()).device
        return self._read(self.stream.push(features[None].to(device)))

    def _read(self, made: Tensor) -> str:
        """The text of the next frames: CTC logits, or tokens of an encoder with a transducer, [1, n, any]."""
        if not bool(made.isfinite().all()):
            raise ValueError("the model's answer is not a number")
        if self.transducer:
            lengths = torch.tensor([made.shape[1]])
            (found,), self.state = transducer_search(self.model.head, made, lengths, self.state)
        else:
            path = made[0].argmax(-1).tolist()
            before, self.state = [self.state, *path], [self.state, *path][-1]
            changes = enumerate(zip(before, path, strict=False))
            found = [(new, at) for at, (old, new) in changes if new not in (old, self.tokenizer.blank)]
        said = "".join(self._add(token, self.frame + at) for token, at in found)
        self.frame += made.shape[1]
        return said

    def _add(self, token: int, frame: int) -> str:
        said = self._spell() if self.tokenizer.starts_word(token) else ""
        self.pending.append((token, frame))
        text = self.tokenizer.decode([each for each, _ in self.pending])
        waits = text.endswith(CUT) and len(self.pending) < 4  # no character has more bytes
        return said if waits else said + self._spell()

    def _spell(self) -> str:
        """The text of the pending tokens: white space becomes what stands between words, none at either end."""
        if not self.pending:
            return ""
        token, frame = self.pending[0]
        text = self.tokenizer.decode([each for each, _ in self.pending])
        self.pending = []
        self.between |= self.tokenizer.starts_word(token) or text[:1].isspace()
        said = ""
        for word in text.split():
            if self.between:
                mark = "\n" if self.times else " "
                said += mark * self.begun + f"{frame * self.step:8.2f}  " * self.times
            said += word
            self.between = self.begun = True
        if said:
            self.between = text[-1].isspace()
        return said


class Resample:
    """`torchaudio.transforms.Resample` of a waveform that comes in pieces."""

    def __init__(self, rate: int, wanted: int) -> None:
        from torchaudio.transforms import Resample

        shared = math.gcd(rate, wanted)
        self.old, self.new = rate // shared, wanted // shared  # so many samples become so many
        if self.old > 1000 or self.new > 1000:
            raise ValueError(f"{rate} samples a second have no simple ratio to the model's {wanted}; convert the sound")
        # The filter reaches over 6 zeros of the sinc, at 0.99 of the lower rate, rounded up.
        reach = 0 if rate == wanted else math.ceil(6 * self.old / (0.99 * min(self.old, self.new)))
        self.margin = math.ceil(reach / self.old)
        self.resample = Resample(self.old, self.new)
        self.waiting = torch.zeros(self.margin * self.old)

    def push(self, samples: Tensor) -> Tensor:
        self.waiting = torch.cat([self.waiting, samples])
        groups = max(0, len(self.waiting) // self.old - 2 * self.margin)
        made = self.resample(self.waiting[: (groups + 2 * self.margin) * self.old]) if groups else self.waiting
        self.waiting = self.waiting[groups * self.old :].clone()
        return made[self.margin * self.new :][: groups * self.new]

    def finish(self) -> Tensor:
        made = self.resample(self.waiting) if len(self.waiting) else self.waiting
        return made[self.margin * self.new :]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="zoo transcribe stream",
        description="Writes down what is said while it is said, with a model whose config has a chunk. A microphone: "
        "arecord -q -t raw -f S16_LE -r 16000 | zoo transcribe stream NAME -",
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", help="a checkpoint: a folder, a name in checkpoints/, OWNER/NAME (Hub)")
    raw = "a sound file, or - for raw sound from standard input, 16 bits a sample, little-endian"
    made.add_argument("file", metavar="FILE|-", help=raw)
    made.add_argument("--rate", type=count, help="samples per second of raw sound (default: as the model expects)")
    made.add_argument("--channels", type=count, help="interleaved channels of raw sound, averaged (default: 1)")
    ahead = "tokens that are waited for, for a model that was trained with several chunks (default: its chunk less 1)"
    made.add_argument("--look-ahead", type=int, metavar="N", help=ahead)
    made.add_argument("--times", action="store_true", help="one line a word, with the second at which it begins")
    made.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: %(default)s")
    return made


def main(arguments: list[str]) -> None:
    """Transcribes a file or standard input as the arguments say, printing each word as soon as it is known."""
    given = parser().parse_args(arguments)
    device, live = device_for(given.device), given.file == "-"
    for option in ("rate", "channels"):
        if not live and getattr(given, option) is not None:
            raise ValueError(f"--{option} would be ignored: it is for raw sound, and a file says its own")
    if live and sys.stdin.isatty():
        raise ValueError("standard input is a terminal; pipe raw sound into it, as --help shows")
    if given.look_ahead is not None and given.look_ahead < 0:
        raise ValueError(f"--look-ahead is at least 0, not {given.look_ahead}")
    model, preprocess, tokenizer = load_recogniser(given.name)
    rate = given.rate or preprocess.rate
    if not live:
        with audio.opened(given.file) as file:
            rate = file.samplerate
    options = {"rate": rate, "look_ahead": given.look_ahead, "times": given.times}
    try:
        listener = Listener(model.to(device), preprocess, tokenizer, **options)
    except ValueError as error:
        raise ValueError(f"{given.name} cannot stream: {error}") from None
    _show(_heard(listener, _raw(rate, given.channels or 1) if live else _recorded(given.file)))


def _heard(listener: Listener, blocks: Iterable[Tensor]) -> Iterator[str]:
    for block in blocks:
        yield listener.push(block)
    yield listener.finish()


def _show(pieces: Iterable[str]) -> None:
    """Prints a text as it grows, and a newline behind it, also where it is interrupted or nobody reads on."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end


def _print(text: str) -> None:
    shown = "\n".join(map(plain, text.split("\n")))
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _recorded(path: str) -> Iterator[Tensor]:
    """A file's samples [n], block by block."""
    with audio.opened(path) as file:
        if file.frames < 1:
            raise UnreadableAudio(f"{path}: it has no samples")
        read, size = 0, max(1, round(BLOCK * file.samplerate))
        while len(samples := file.read(size, dtype="float32", always_2d=True)):
            read += len(samples)
            yield audio.mixed(samples, path)
        if read < file.frames or audio.cut_off(file):
            raise UnreadableAudio(f"{path}: it is truncated")


def _raw(rate: int, channels: int) -> Iterator[Tensor]:
    """The samples [n] of standard input as they come; Ctrl-C is the end, and a sample that is cut off is left out."""
    source: Any = sys.stdin.buffer
    size, left, empty = 2 * channels, b"", True
    while True:
        try:
            piece = source.read1(max(1, round(BLOCK * rate)) * size)
        except KeyboardInterrupt:
            break
        if not piece:
            break
        left += piece
        whole = len(left) // size * size
        if not whole:
            continue
        if empty and (kind := next((HEADERS[mark] for mark in HEADERS if left.startswith(mark)), None)):
            raise ValueError(f"standard input is a {kind} file; - takes raw samples, so give the file's name instead")
        samples = np.frombuffer(left[:whole], dtype="<i2").astype(np.float32) / 32768
        left, empty = left[whole:], False
        yield torch.from_numpy(samples).view(-1, channels).mean(1)
    if empty:
        raise ValueError("standard input has ended without a sample")
