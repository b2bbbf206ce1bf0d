"""Evaluates a checkpoint on data prepared with the checkpoint's own preprocessing."""

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_info

from zoo.tasks.quiet import quiet
from zoo.weights import load_checkpoint

Tasks = Mapping[str, tuple[type[Any], type[Any]]]


def evaluate(
    tasks: Tasks, name: str, split: str | None = None, precision: str = "32-true", **given: Any
) -> dict[str, Any]:
    """The metrics of a checkpoint by name, with the size of the data and the score's 95 % interval, after its probe has
    passed.

    Args:
        tasks: by command, the task and the data module, whose `measuring` makes the data of a preprocessing.
        name: a folder, a name in checkpoints/, or owner/name on the Hub.
        split: `val` or `test`.
        precision: that of Lightning's Trainer.
        given: further arguments of the data module's `measuring`.

    Raises:
        ValueError: no task can evaluate the model, it has no preprocess, or an argument is invalid.
    """
    found = load_checkpoint(name, check=True)
    command = found.model.config.task
    if command is None or command not in tasks:
        raise ValueError(f"no task can evaluate {name}; the tasks are: {', '.join(tasks)}")
    if found.preprocess is None:
        raise ValueError(f"{name} has no preprocess in its config.json")
    task, data = tasks[command]
    module = data.measuring(split=split, **given)
    with quiet():
        trainer = lightning.Trainer(
            logger=False,
            precision=precision,  # pyright: ignore[reportArgumentType]
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        measure, measured = (trainer.test if split == "test" else trainer.validate), task(weights=name)
        figures = dict(measure(measured, datamodule=module, verbose=False)[0])
        rank_zero_info(measured.said)
    return figures | measured.sample
