"""Measures a checkpoint on data prepared as the checkpoint itself says."""

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_info

from zoo.weights import load_checkpoint

Tasks = Mapping[str, tuple[type[Any], type[Any]]]


def evaluate(
    tasks: Tasks, name: str, split: str | None = None, precision: str = "32-true", **given: Any
) -> dict[str, float]:
    """The figures of a checkpoint by name, after its probe has passed.

    Args:
        tasks: by command, the task and the data module, whose `measuring` makes the data of a preprocessing.
        name: a folder, a name in checkpoints/, or owner/name on the Hub.
        split: `val` or `test`.
        precision: as Lightning's Trainer takes it.
        given: what the data module's `measuring` takes besides.

    Raises:
        ValueError: nothing measures such a model, it does not say how its input is prepared, or an argument is wrong.
    """
    found = load_checkpoint(name, check=True)
    command = found.model.config.task
    if command is None or command not in tasks:
        raise ValueError(f"{name} is a model that no task measures; the tasks are: {', '.join(tasks)}")
    if found.preprocess is None:
        raise ValueError(f"{name} does not say how its input is prepared")
    task, data = tasks[command]
    module = data.measuring(split=split, **given)
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
    return figures
