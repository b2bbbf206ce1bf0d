"""What the tests of training share: tiny runs, by the command and by a Trainer."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file

from zoo.__main__ import main
from zoo.data.images import Images
from zoo.tasks.classify.train import Classify

BACKBONE: dict[str, Any] = {
    "name": "vit_micro",
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "patch": 8,
    "image": 16,
    "classes": 4,
}
PLAIN: dict[str, Any] = {"randaugment": None, "flip": 0.0, "scale": (1.0, 1.0), "erasing": 0.0}
UNMIXED: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0}
PLAIN_FLAGS = ["--data.randaugment=null", "--data.flip=0", "--data.scale=[1.0,1.0]", "--data.erasing=0"]
QUIET = ["accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false", "log_every_n_steps=1"]
SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", *PLAIN_FLAGS]
TINY = ["classify", "fit", "--trainer.accelerator=cpu", "--trainer.logger=false", "--data.dataset=synthetic"]
TINY += [
    "--data.size=16",
    "--trainer.max_epochs=1",
    *(f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()),
]


def command(verb: str, *flags: Any, task: str = "classify") -> None:
    """`zoo TASK VERB FLAGS...` in this process, which stays as it was."""
    precision = torch.get_float32_matmul_precision()
    try:
        main([task, verb, *(f"--trainer.{flag}" for flag in QUIET), *map(str, flags)])
    finally:
        torch.set_float32_matmul_precision(precision)


def fit(root: Path, *flags: Any, data: str = "synthetic") -> None:
    """Trains the tiny backbone, without logs; later flags win."""
    backbone = [f"--model.backbone.{field}={value}" for field, value in BACKBONE.items()]
    base = [f"--data.dataset={data}", "--data.size=16", "--data.batch=16", "--trainer.logger=false", "--model.warmup=1"]
    command("fit", *backbone, *base, f"--trainer.default_root_dir={root}", *flags)


def refused(*arguments: Any, start: str = "zoo: error: ") -> str:
    """What the `zoo` command says where it stops because of its input: one line, without a traceback."""
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    torch.set_float32_matmul_precision(precision)
    return said(stop.value, start)


def said(stop: SystemExit, start: str = "zoo: error: ") -> str:
    assert isinstance(stop.code, str), stop.code  # then Python prints it and exits with 1
    assert stop.code.startswith(start) and "\n" not in stop.code
    return stop.code.removeprefix(start)


def state(path: Path) -> dict[str, Any]:
    """The state that a run is resumed from."""
    return torch.load(path, weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint, and of its best as best.NAME."""
    return load_file(folder / "last" / "model.safetensors") | {
        f"best.{name}": value for name, value in load_file(folder / "best" / "model.safetensors").items()
    }


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two nested states differ first, None where they are bitwise the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {one.keys() ^ other.keys()}"
        parts = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        parts = [(a, b, f"{where}.{number}") for number, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else where
    else:
        return None if one == other else where
    return next((found for part in parts if (found := difference(*part))), None)


def trainer(epochs: int, batches: int, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=batches,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **{"limit_val_batches": 0, **quiet, **options},
    )


def images(batch: int = 16, **options: Any) -> Images:
    return Images(**{"dataset": "synthetic", "size": 16, "batch": batch, **PLAIN, **options})


def classifier(kind: type[Classify] = Classify, backbone: dict[str, Any] | None = None, **options: Any) -> Any:
    """A task that starts from the same weights every time."""
    torch.manual_seed(0)
    return kind(**{"backbone": {**BACKBONE, **(backbone or {})}, "warmup": 0.0, **UNMIXED, **options})
