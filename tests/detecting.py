"""What the tests of detection share: a tiny detector, and the command that trains it."""

from pathlib import Path
from typing import Any

from training import QUIET
from zoo.__main__ import main

TRUNK = "flash_internimage_t(dim=(8, 8, 16, 16), depth=(1, 1, 1, 1), heads=(1, 1, 2, 2))"
TINY: dict[str, Any] = {"name": "rtdetr_micro", "trunk": TRUNK, "dim": 16, "depth": 2, "heads": 2, "queries": 12}
TINY |= {"image": 64}


def command(verb: str, *flags: Any) -> None:
    """`zoo detect VERB FLAGS...` in this process."""
    main(["detect", verb, *(f"--trainer.{flag}" for flag in QUIET), *map(str, flags)])


def fit(root: Path, *flags: Any, logs: bool = False) -> None:
    """Trains the tiny detector on shapes for one epoch of two batches; later flags win."""
    backbone = [f"--model.backbone.{field}={value}" for field, value in TINY.items()]
    base = ["--data.dataset=shapes", "--data.size=64", "--data.batch=4", "--model.warmup=1"]
    base += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2"]
    base += [] if logs else ["--trainer.logger=false"]
    command("fit", *backbone, *base, f"--trainer.default_root_dir={root}", *flags)
