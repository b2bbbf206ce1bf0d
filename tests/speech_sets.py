"""Small sets of speech in LibriSpeech's layout, and what is in a corpus or a loader."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from zoo.data.speech import Speech

TRAIN = ["A CAT SAT", "THE DOG RAN FAR AWAY", "NO", "A BIRD SANG THEN FLEW OFF", "YES IT DID", "GO HOME NOW"]
VAL = ["A DOG SANG", "NO CAT"]


def write(path: Path, seconds: float, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)), 16000)


def write_chapter(folder: Path, speaker: int, texts: list[str], extension: str = "flac") -> Path:
    """A chapter as LibriSpeech has it; utterance k lasts 0.5 + 0.1 k seconds. Returns its transcript."""
    place = folder / str(speaker) / "7"
    lines = []
    for number, text in enumerate(texts):
        name = f"{speaker}-7-{number:04}"
        write(place / f"{name}.{extension}", 0.5 + 0.1 * number, 100 * speaker + number)
        lines.append(f"{name} {text}\n")
    transcript = place / f"{speaker}-7.trans.txt"
    transcript.write_text("".join(lines))
    return transcript


def write_sets(place: Path) -> Path:
    write_chapter(place / "train-clean-100", 1, TRAIN[:4])
    write_chapter(place / "train-clean-100", 2, TRAIN[4:], "wav")
    write_chapter(place / "dev-clean", 3, VAL)
    return place


def libri(root: Path, **options: Any) -> Speech:
    given = {"train": ["train-clean-100"], "val": ["dev-clean"], "tokenizer": "characters", "workers": 0}
    return Speech(**({"dataset": "librispeech", "root": str(root)} | given | options))


def texts(corpus: Any) -> list[str]:
    return [corpus.text(index) for index in range(len(corpus))]


def by_name(loader: Any) -> dict[str, tuple[str, Tensor]]:
    found = {}
    for features, lengths, written, names, *_ in loader:
        for row, name in enumerate(names):
            assert name not in found and not features[row, lengths[row] :].any()
            found[name] = written[row], features[row, : lengths[row]]
    return found
