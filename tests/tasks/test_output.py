"""What a run prints."""

import copy
import functools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zoo
from training import classifier, fit
from zoo.tasks.output import Output, duration, multiply_adds, readable_count


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(0, "0:00"), (6.6, "0:07"), (59.6, "1:00"), (754, "12:34"), (3599.7, "1:00:00"), (3723, "1:02:03")],
)
def test_duration(seconds: float, wanted: str):
    assert duration(seconds) == wanted


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (0, "0"),
        (213, "213"),
        (999.6, "1 k"),
        (213_400, "213 k"),
        (4_624_000, "4.62 M"),
        (1.26e9, "1.26 G"),
        (3e12, "3 T"),
    ],
)
def test_readable_count(number: float, wanted: str):
    assert readable_count(number) == wanted


def test_multiply_adds_are_those_of_products_and_convolutions():
    """By hand, for one block of softmax attention and a feed-forward of the width 4 D."""
    fields = {"dim": 16, "depth": 1, "heads": 2, "patch": 4, "image": 16, "classes": 4}
    model, tokens, dim = zoo.create_model("vit_micro", **fields).train(), 16, 16
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stem, attention = tokens * 3 * 4 * 4 * dim, tokens * 4 * dim * dim + 2 * tokens * tokens * dim
    hidden = model.blocks[0].state_dict()
    ffn = tokens * sum(value.numel() for name, value in hidden.items() if value.ndim == 2) - tokens * 4 * dim * dim
    assert multiply_adds(model, (torch.zeros(1, 3, 16, 16),)) == stem + attention + ffn + dim * 4
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_multiply_adds_do_not_depend_on_the_dtype():
    model, inputs = classifier().model, (torch.zeros(1, 3, 16, 16),)
    wanted = multiply_adds(model, inputs)
    assert multiply_adds(model.bfloat16(), inputs) == wanted and model.head.weight.dtype == torch.bfloat16


def test_a_model_with_the_hooks_of_a_profiler_is_copied(tmp_path: Path):
    model, inputs = classifier().model, (torch.zeros(1, 3, 16, 16),)
    wanted = multiply_adds(model, inputs)
    hook = functools.partial(lambda lock, *_: None, threading.Lock())  # a lock cannot be copied
    model.register_forward_pre_hook(hook)
    model.head.register_forward_hook(hook)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.deepcopy(model)
    assert multiply_adds(model, inputs) == wanted
    zoo.save_model(model, tmp_path / "kept")
    assert len(model._forward_pre_hooks) == len(model.head._forward_hooks) == 1


def line_of(epoch: int, epochs: int, seconds: float, left: float, best: bool = True) -> str:
    """The line of an epoch that took that many seconds, with so many left."""
    task, lines = classifier(), list[str]()
    task.total, task.loss_sum, task.loss_number = 1000 * epochs, torch.tensor(3 * 1.38424), 3
    found = SimpleNamespace(value=0.25, step=1000 * epoch)
    keep: Any = SimpleNamespace(name="val/accuracy", latest=found, best=found if best else None)
    output = Output(keep, "runs/x", "classify", bar=False)
    output.say = lines.append
    done, now = 1000 * epoch, time.monotonic()
    output.began, output.start = now - seconds, now - left * done / max(1, task.total - done)
    trainer: Any = SimpleNamespace(global_step=done, max_epochs=epochs, max_steps=-1, current_epoch=epoch - 1)
    output.on_train_epoch_end(trainer, task)
    (line,) = lines
    return line


def test_the_line_of_an_epoch():
    assert line_of(2, 9, 7, 49) == "epoch 2/9  loss 1.3842  accuracy 0.2500  best 0.2500  0:07, 0:49 left"
    assert line_of(2, 300, 7, 3723, best=False) == (
        "epoch   2/300  loss 1.3842  accuracy 0.2500  best -  0:07, 1:02:03 left"
    )


@pytest.mark.parametrize(
    ("epochs", "seconds", "left"), [(1000, 360, 359_000), (300, 3723, 359_000), (9, 86400, 700000)]
)
def test_the_line_of_an_epoch_fits_80_columns(epochs: int, seconds: float, left: float):
    assert len(line_of(1, epochs, seconds, left)) <= 80


@pytest.mark.parametrize("batch", [512, 32])
def test_an_epoch_of_few_batches_is_remarked(batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever trainer.limit_train_batches makes of it; the synthetic set has 512 images."""
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
    fit(tmp_path, *limits, "--trainer.max_epochs=1", f"--data.batch={batch}")
    shown = capsys.readouterr().err.splitlines()
    assert any(line.startswith("training  1 epoch of 1 batch; ") for line in shown)
    remarks = [line for line in shown if line.startswith("warning: an epoch has ")]
    assert remarks == (["warning: an epoch has 1 batch; lower data.batch"] if batch == 512 else [])
