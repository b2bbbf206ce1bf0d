"""What the tests of streaming from the command share: models that say much, a sound for them, and a pipe."""

import functools
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from helpers import randomise
from zoo.__main__ import main
from zoo.inputs.audio import RECIPES
from zoo.layer import Chunks
from zoo.outputs import greedy, transducer_greedy
from zoo.outputs.tokens import Tokenizer, train_characters, train_pieces
from zoo.weights import load_checkpoint

RATE, CHUNK, LEFT = 16000, 4, 8
loaded = functools.cache(load_checkpoint)
TINY: dict[str, Any] = {"name": "conformer_ctc_s", "dim": 16, "depth": 2, "heads": 2, "conv": "glu(kernel=5)"}
TINY |= {"subsampling": "conv4(padding='causal', channels=8)", "chunk": CHUNK, "left": LEFT}
PREPROCESS = RECIPES["streaming"]
LETTERS = train_characters(["ABCDEFGH I"])
PIECES = train_pieces(["HELLO WORLD", "ABLE BAKER HELLO", "WORLD WIDE ABLE"] * 5, 17)
HEADS = {"ctc": "ctc", "transducer": "transducer(hidden=16)"}


def sound(seconds: float = 3.0) -> Tensor:
    """Noise that changes its level ten times a second under a rising tone, as 16 bits can say it."""
    generator = torch.Generator().manual_seed(1)
    size = round(seconds * RATE)
    level = torch.rand(1000, generator=generator).repeat_interleave(1600)[:size]
    noise = level * torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, size)).float()
    time = torch.arange(size) / RATE
    return ((noise + 0.3 * torch.sin(2000 * time * (0.1 + time))) * 32768).round() / 32768


def pcm(waveform: Tensor) -> bytes:
    return (waveform.numpy() * 32768).round().astype("<i2").tobytes()


def talkative(tokenizer: Tokenizer, kind: str) -> Any:
    """A model with random weights that says much: all tokens are likely, and what begins a word and the blank more."""
    torch.manual_seed(6)
    model: Any = zoo.create_model(**TINY, head=HEADS[kind], vocabulary=tokenizer.vocabulary).eval()
    randomise(model)
    out, blank = (model.head, 0.3) if kind == "ctc" else (model.head.out, 2.5)
    with torch.no_grad():
        out.weight *= 3
        made = model(PREPROCESS(sound())[None])[0]
        logits = made if kind == "ctc" else model.head.joint(made, model.head.start(1)[0][:, None])
        out.bias -= logits[0].mean(0)
        more = [1.0 * tokenizer.starts_word(id) for id in range(tokenizer.blank)]
        out.bias += torch.tensor([*more, blank]) * logits[0].std(0).mean()
    return model


@torch.no_grad()
def tokens_of(model: Any, waveform: Tensor, visible: Chunks | None = None) -> tuple[list[int], Tensor]:
    """The tokens of the whole, and the frames that they come from."""
    made, lengths = model(PREPROCESS(waveform)[None], None, visible)
    transducer = model.config.head != "ctc"
    return (transducer_greedy(model.head, made, lengths) if transducer else greedy(made, lengths))[0], made[0]


def whole(folder: Path, waveform: Tensor, visible: Chunks | None = None) -> str:
    model, _, tokenizer, _ = loaded(folder)
    assert isinstance(tokenizer, Tokenizer)
    return spelt(tokenizer, tokens_of(model, waveform, visible)[0])


def spelt(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return " ".join(tokenizer.decode(tokens).split())


class Pipe(io.BytesIO):
    """Standard input that gives so many bytes at a time, and calls `seen` in front of each."""

    def __init__(self, content: bytes, size: int, seen: Callable[[int], None] = lambda given: None) -> None:
        super().__init__(content)
        self.size, self.seen = size, seen

    def read1(self, size: int | None = -1, /) -> bytes:
        self.seen(self.tell())
        return self.read(min(self.size, size or self.size))


def hear(monkeypatch: pytest.MonkeyPatch, pipe: io.BytesIO, *arguments: object) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
    main(["transcribe", "stream", *map(str, arguments), "-"])
