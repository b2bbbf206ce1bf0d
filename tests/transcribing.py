"""What the tests of training speech models share: tiny models, the command, and recordings of generated tones."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import nn

import training
import zoo
from training import QUIET
from training import refused as refused_by
from zoo.data.speech_sources import Tones
from zoo.outputs.tokens import Characters
from zoo.tasks.transcribe.train import Transcribe

LETTERS = Characters(" ABCDEFGH")
TINY: dict[str, Any] = {"name": "squeezeformer_xs", "dim": 16, "depth": 2, "heads": 2, "conv": "swish(kernel=5)"}
TINY |= {"vocabulary": LETTERS.vocabulary}
STREAMS = {"name": "conformer_ctc_s", "conv": "glu(kernel=5)", "subsampling": "conv4(padding='causal', channels=8)"}
STREAMS |= {"chunk": 8, "left": 16}
RNNT = {"name": "conformer_s", "conv": "glu(kernel=5)", "head": "transducer(hidden=16)"}
STAGES = {
    "name": "efficient_conformer_s",
    "conv": "glu(kernel=5)",
    "depth": 4,
    "strided": (0, 2),
    "widths": (16, 16, 32),
    "mixers": (),
}
SHORT = ["--data.tokenizer=characters", "--data.limit=16", "--data.batch=8", "--trainer.max_epochs=1"]


def flags_of(backbone: dict[str, Any]) -> list[str]:
    return [f"--model.backbone.{field}={value}" for field, value in (TINY | backbone).items()]


command = partial(training.command, task="transcribe")


def fit(root: Path, *flags: Any, backbone: dict[str, Any] | None = None) -> None:
    """Trains a tiny model on generated tones, without logs; later flags win."""
    base = [*SHORT, "--model.warmup=1", "--trainer.logger=false", f"--trainer.default_root_dir={root}"]
    command("fit", *flags_of(backbone or {}), *base, *flags)


def refused(verb: str, *flags: Any) -> str:
    return refused_by("transcribe", verb, *(f"--trainer.{flag}" for flag in QUIET), "--trainer.logger=false", *flags)


def recogniser(backbone: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    task = Transcribe(TINY | (backbone or {}), **options)
    task.tokenizer = LETTERS
    return task


def rows_of(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / "csv/version_0/metrics.csv").read_text().splitlines()))


def logged(root: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows_of(root) if row.get(name)]


def speak(folder: Path, split: str, indices: range, texts: dict[int, str]) -> list[Path]:
    """Generated tones as LibriSpeech lays out its recordings; texts replaces some of the transcripts."""
    tones, place = Tones("train", indices), folder / split / "1" / "2"
    place.mkdir(parents=True)
    lines, paths = [], []
    for index in range(len(tones)):
        paths.append(place / f"1-2-{index:04}.flac")
        soundfile.write(paths[-1], tones.waveform(index, 16000).numpy(), 16000)
        lines.append(f"1-2-{index:04} {texts.get(index, tones.text(index))}\n")
    (place / "1-2.trans.txt").write_text("".join(lines))
    return paths


def folder_flags(root: Path) -> list[str]:
    return [
        "--data.dataset=librispeech",
        f"--data.root={root}",
        "--data.train=[train]",
        "--data.val=[dev]",
        "--data.workers=0",
    ]


def made(**choices: Any) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(**(TINY | choices)).eval()
