"""What the tests of detection share: a tiny detector, and the command that trains it."""

from pathlib import Path
from typing import Any

import torch

import zoo
from helpers import randomise
from training import QUIET
from zoo.__main__ import main
from zoo.inputs.boxes import BoxPreprocess
from zoo.outputs.label_map import LabelMap
from zoo.weights import save_model

TRUNK = "flash_internimage_t(dim=(8, 8, 16, 16), depth=(1, 1, 1, 1), heads=(1, 1, 2, 2))"
TINY: dict[str, Any] = {"name": "rtdetr_micro", "trunk": TRUNK, "dim": 16, "depth": 2, "heads": 2, "queries": 12}
TINY |= {"image": 64}
QUIETLY = [f"--trainer.{flag}" for flag in QUIET]


def command(verb: str, *flags: Any) -> None:
    """`zoo detect VERB FLAGS...` in this process."""
    main(["detect", verb, *QUIETLY, *map(str, flags)])


def flags_of(root: Path, logs: bool = False) -> list[str]:
    """Those of a training of the tiny detector on shapes for one epoch of two batches."""
    backbone = [f"--model.backbone.{field}={value}" for field, value in TINY.items()]
    base = ["--data.dataset=shapes", "--data.size=64", "--data.batch=4", "--model.warmup=1"]
    base += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2"]
    base += [] if logs else ["--trainer.logger=false"]
    return [*QUIETLY, *backbone, *base, f"--trainer.default_root_dir={root}"]


def fit(root: Path, *flags: Any, logs: bool = False) -> None:
    """Trains the tiny detector; later flags win."""
    main(["detect", "fit", *flags_of(root, logs), *map(str, flags)])


def saved(folder: Path, labels: LabelMap, size: int) -> str:
    """A checkpoint of the tiny detector with random weights whose scores differ."""
    torch.manual_seed(0)
    made: Any = randomise(zoo.create_model(**TINY, classes=len(labels)))
    for head in made.scores:
        torch.nn.init.normal_(head.weight)
    preprocess = BoxPreprocess(size=size, fit="pad")
    return str(save_model(made, folder, preset="rtdetr_micro", preprocess=preprocess, labels=labels))
