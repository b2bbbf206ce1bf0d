"""Synthetic speech of tones, a model that transcribes it, and the command."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.inputs.audio import AudioPreprocess
from zoo.outputs.tokens import Characters
from zoo.tasks.transcribe import predict as command
from zoo.weights import Checkpoint

RATE, STRIDE, TONE, PAUSE = 16000, 4, 0.1, 0.3
PREPROCESS = AudioPreprocess(normalize="none")
TOKENIZER = Characters(" abc")
PITCHES = {" ": 500.0, "a": 1000.0, "b": 2000.0, "c": 4000.0}


def spoken(text: str) -> Tensor:
    """Synthetic speech: a letter is a pitch, a word begins with the pitch of a space and ends with a pause."""
    time = torch.arange(int(TONE * RATE)) / RATE
    parts = [torch.zeros(int(PAUSE * RATE))]
    for word in text.split():
        parts += [0.5 * torch.sin(2 * math.pi * PITCHES[letter] * time) for letter in f" {word}"]
        parts.append(torch.zeros(int(PAUSE * RATE)))
    return torch.cat(parts)


class Ear(nn.Module):
    """Hears that language: the logit of a letter is the loudness of its mel band, that of the blank a threshold."""

    def __init__(self, head: str = "ctc") -> None:
        super().__init__()
        tones = [
            spoken(letter)[int((PAUSE + TONE) * RATE) :][: int(TONE * RATE)] for letter in PITCHES if letter != " "
        ]
        tones.insert(0, spoken("a")[int(PAUSE * RATE) :][: int(TONE * RATE)])
        bands = torch.stack([PREPROCESS(tone)[3] for tone in tones]).argmax(1)
        assert len(set(bands.tolist())) == 4
        self.weight = nn.Parameter(F.one_hot(bands, 80).float())
        self.config = SimpleNamespace(
            headed=True, task="transcribe", labelled=5, vocabulary=5, stride=STRIDE, transducer=head == "transducer"
        )
        self.head: Any = Joint() if head == "transducer" else nn.Identity()
        self.batches: list[tuple[int, int]] = []

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append((len(features), features.shape[1]))
        last = torch.arange(0, features.shape[1], STRIDE)
        logits = F.linear(features[:, last], self.weight)
        if self.config.transducer:  # it may ask twice for what one frame holds
            logits = logits.where(logits == logits.amax(-1, keepdim=True), -99.0)
        return F.pad(logits, (0, 1), value=-2.0), (lengths + STRIDE - 1) // STRIDE


class Joint:
    """The encoder's logits without the token that was put out last."""

    def start(self, batch: int) -> Any:
        return torch.zeros(batch, 5), ()

    def predict(self, tokens: Tensor, state: Any) -> Any:
        return 99.0 * F.one_hot(tokens, 5), ()

    def joint(self, encoded: Tensor, g: Tensor) -> Tensor:
        return encoded - g


class Checkpoints:
    """What `load_checkpoint` gives here."""

    def __init__(self) -> None:
        parts: Any = PREPROCESS, TOKENIZER, {}
        self.made: dict[str, Checkpoint] = {
            "ear": Checkpoint(Ear(), *parts),  # pyright: ignore
            "transducer": Checkpoint(Ear("transducer"), *parts),  # pyright: ignore
            "vision": Checkpoint(Ear(), *parts),  # pyright: ignore
            "encoder": Checkpoint(Ear(), *parts),  # pyright: ignore
        }
        self.made["encoder"].model.config.headed = False
        self.made["vision"].model.config.task = "classify"

    def __call__(self, name: str) -> Checkpoint:
        return self.made[name]


TEXTS = {"b.flac": "ab c", "deep/a.wav": "ba cab abc ca", "deep/c.WAV": "a", "z.wav": "cab ba"}


def record(path: Path, text: str, rate: int = RATE) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, spoken(text).numpy(), rate)
    return str(path)


def predict(*arguments: object) -> list[dict[str, Any]]:
    command.main([*map(str, arguments)])
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else "runs/predict"
    return json.loads(Path(str(output), "transcripts.json").read_text(encoding="utf-8"))
