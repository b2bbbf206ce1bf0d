"""Evaluates a checkpoint on data prepared with the checkpoint's own preprocessing."""

import inspect
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from zoo.tasks.quiet import quiet
from zoo.weights import load_checkpoint

Tasks = Mapping[str, tuple[Any, Any]]
REPRODUCED = ("root", "split", "splits", "labels", "names", "skip_unknown", "samples", "features", "classifier")
REPRODUCED += ("guidance", "steps")  # options that change a figure, so its command has them


class Bar(Callback):
    """A bar on standard error, if that is a terminal."""

    drawn: Any = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        batches: Any = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self.drawn = tqdm(total=sum(batches), unit="batch", ncols=79, leave=False, disable=None, file=sys.stderr)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.drawn.update()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.drawn.close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.drawn is not None:
            self.drawn.close()

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end


def evaluate(
    tasks: Tasks,
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str = "32-true",
    data: str | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Measures a checkpoint by the task that trains it, after its probe has passed.

    In fp32 the figures are the same for every size of batch and for a fused model, unless two outputs are so nearly
    equal that rounding decides between them. On another processor a loss or an average precision may differ by
    rounding, the latter by up to 2e-6.

    Args:
        tasks: by command, the task and the data module, whose `measuring` makes the data by split.
        name: a folder, a name in checkpoints/, or owner/name on the Hub.
        device: cpu, cuda or auto.
        precision: that of Lightning's Trainer.
        data: the name of the data in the result; None for that of the folder.
        given: further arguments of the data module's `measuring`, or of the task.

    Returns:
        `name`, `task`, `figures`, `seconds`, `device` and `precision`. A figure has `data`, `split`, `metric`, `value`,
        as the task logs it, `n`, how many images, words or samples it counts, `interval`, the ends of the 95 %
        interval or None, and `command`.

    Raises:
        ValueError: no task can evaluate the model, it has no preprocess, or an argument is invalid.
    """
    found, name = load_checkpoint(name, check=True), str(name)
    command = found.model.config.task
    if command is None or command not in tasks:
        raise ValueError(f"no task can evaluate {name}; the tasks are: {', '.join(tasks)}")
    if found.preprocess is None:
        raise ValueError(f"{name} has no preprocess in its config.json")
    task, module = tasks[command]
    of_data, of_task = shared(command, given, module.measuring, task.__init__)
    modules = module.measuring(found.labels, **of_data)
    title = data or (Path(given["root"]).expanduser().resolve().name if given.get("root") else None)
    written = " ".join([f"zoo evaluate {shlex.quote(name)}", *options(given)])
    figures, started = [], time.perf_counter()
    with quiet(), redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        if "output" in inspect.signature(task.__init__).parameters:  # of images and records that are not kept here
            of_task["output"] = folder
        trainer = lightning.Trainer(
            logger=False,
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            precision=precision,  # pyright: ignore[reportArgumentType]
            callbacks=[Bar()],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        measured = task(weights=found, **of_task)
        part, run = ("test", trainer.test) if given.get("split") == "test" else ("val", trainer.validate)
        for split, each in modules.items():
            logged = run(measured, datamodule=each, verbose=False)[0]
            rank_zero_info(f"{name}, {split}:\n{measured.said}" if len(modules) > 1 else measured.said)
            for figure in measured.figures:
                if (metric := each.named(figure.metric)) is not None:
                    figures.append(
                        {
                            "data": title or each.dataset,
                            "split": split,
                            "metric": metric,
                            "value": float(logged[f"{part}/{figure.key}"]) if figure.value is None else figure.value,
                            "n": figure.n,
                            "interval": figure.interval and list(figure.interval),
                            "command": written,
                        }
                    )
    used = trainer.strategy.root_device
    return {
        "name": name,
        "task": command,
        "figures": figures,
        "seconds": round(time.perf_counter() - started, 2),
        "device": torch.cuda.get_device_name(used) if used.type == "cuda" else used.type,
        "precision": precision,
    }


def shared(command: str, given: Mapping[str, Any], data: Any, task: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the data and of the task among those given; ValueError if one is of neither."""
    of_data, of_task = ({*inspect.signature(each).parameters} for each in (data, task))
    if wrong := [name for name in given if name not in of_data | of_task]:
        flags = ", ".join(map(flag, (name for name in REPRODUCED if name in of_data | of_task)))
        raise ValueError(f"{flag(wrong[0])} is not for a checkpoint of `zoo {command}`, which takes: {flags}")
    return (
        {name: value for name, value in given.items() if name in of_data},
        {name: value for name, value in given.items() if name not in of_data},
    )


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def options(given: Mapping[str, Any]) -> list[str]:
    """The options of a command that change a figure."""
    parts = []
    for name in REPRODUCED:
        if (value := given.get(name)) is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            parts.append(" ".join([flag(name), *(shlex.quote(str(each)) for each in values)]))
    return parts
