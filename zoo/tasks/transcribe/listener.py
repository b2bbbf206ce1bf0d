"""From audio that comes in pieces to text, word by word."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.inputs.audio import AudioPreprocess, Resampler, StreamingFeatures, opened
from zoo.layer import Chunks
from zoo.outputs.answers import checked
from zoo.outputs.tokens import Tokenizer
from zoo.outputs.transducer import transducer_search

BLOCK = 0.1  # seconds of audio computed at once
HEADERS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3"}
CUT = "\N{REPLACEMENT CHARACTER}"  # a part of a character decodes to this, if a token is one of its bytes


class Listener:
    """From audio that comes in pieces to text, in constant memory.

    The results of `push` and `finish`, concatenated, are the greedy transcript of the whole recording.

    Args:
        model: a speech model whose config has a chunk, in eval mode.
        preprocess: from audio to features; it must not need the whole recording, so normalize is "none".
        tokenizer: its tokens.
        rate: sample rate in Hz; None for that of `preprocess`.
        look_ahead: later tokens, of model.config.stride frames each, that a chunk's first token sees;
            None for the chunk of the config minus one. Others are for a model that was trained with several chunks.
        times: prints each word on its own line, after its start in seconds.

    Raises:
        ValueError: the model does not stream, or the arguments do not fit each other.
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
                "its config has no chunk, so it needs the whole recording; use `zoo transcribe predict`, "
                "or train with model.backbone.chunk and data.recipe=streaming"
            )
        if (found := (tokenizer.vocabulary, preprocess.mels)) != (wanted := (config.vocabulary, config.mels)):
            raise ValueError(f"tokenizer and preprocess have {found} tokens and mel bands, but the model has {wanted}")
        if look_ahead is not None and look_ahead < 0:
            raise ValueError(f"look_ahead must be >= 0, got {look_ahead}")
        chunk = config.chunk if look_ahead is None else look_ahead + 1
        self.features = StreamingFeatures(preprocess)
        self.resample = Resampler(rate or preprocess.rate, preprocess.rate)
        self.stream = self.model.stream(1, Chunks(chunk, config.left // chunk * chunk))
        self.tokenizer, self.times = tokenizer, times
        self.step = preprocess.seconds_per_frame * config.stride
        self.transducer = config.transducer
        self.state: Any = self.model.head.start(1) if self.transducer else tokenizer.blank
        self.frame = 0
        self.pending: list[tuple[int, int]] = []
        self.between, self.begun = True, False

    def push(self, samples: Tensor) -> str:
        """Takes the next samples [n], any number of them, full scale being -1..1; returns the new text."""
        return self._hear(self.features.push(self.resample.push(samples)))

    def finish(self) -> str:
        """The rest of the text; the listener is then finished."""
        said = self._hear(self.features.push(self.resample.finish()))
        said += self._hear(self.features.finish())
        return said + self._read(self.stream.finish()) + self._spell()

    def _hear(self, features: Tensor) -> str:
        device = next(self.model.parameters()).device
        return self._read(self.stream.push(features[None].to(device)))

    def _read(self, made: Tensor) -> str:
        """The text of the next frames: CTC logits, or tokens of an encoder with a transducer, [1, n, any]."""
        made = checked(made)
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
        """The text of the pending tokens: white space becomes the word separator, without any at either end."""
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


def transcribed(listener: Listener, blocks: Iterable[Tensor]) -> Iterator[str]:
    """The text of the blocks of samples, as it comes."""
    for block in blocks:
        yield listener.push(block)
    yield listener.finish()


def recorded(path: str) -> Iterator[Tensor]:
    """A file's samples [n], block by block."""
    with opened(path) as sound:
        yield from sound.blocks(size=max(1, round(BLOCK * sound.rate)))


def rate_of(path: str) -> int:
    """A file's samples per second."""
    with opened(path) as sound:
        return sound.rate


def raw(rate: int, channels: int) -> Iterator[Tensor]:
    """The samples [n] of standard input as they come; Ctrl-C ends them, and an incomplete sample is dropped."""
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
            raise ValueError(f"standard input is a {kind} file; - takes raw samples, so give the file's name")
        samples = np.frombuffer(left[:whole], dtype="<i2").astype(np.float32) / 32768
        left, empty = left[whole:], False
        yield torch.from_numpy(samples).view(-1, channels).mean(1)
    if empty:
        raise ValueError("standard input is empty")
