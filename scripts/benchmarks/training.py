"""The training loop: what `zoo classify fit` costs in a step, against a bare loop of PyTorch that does the same."""

import argparse
import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import Dataset

import zoo
from benchmarks.measure import Row, markdown, ratio_cell, timed
from zoo.__main__ import main as command
from zoo.data.images import Batch, Images
from zoo.data.loading import DataModule, make_loader
from zoo.data.sampling import EpochSampler, EvenBatches
from zoo.inputs.images import ImagePreprocess
from zoo.tasks import cli
from zoo.tasks.classify.train import Classify

DEMO: dict[str, Any] = {"dim": 64, "depth": 4, "heads": 4, "patch": 8, "classes": 10}
DIGITS: dict[str, Any] = {"randaugment": None, "flip": 0.0, "scale": (1.0, 1.0), "erasing": 0.0, "crop": 1.0}
EPOCHS = 8  # of the demo's model
STEPS, BATCH = 60, 8  # of deit_tiny


class Beside(Callback):
    """Takes turns with bare loops, step by step, within one run: what each costs, in seconds of CPU time by unit.

    A turn of the run reaches from one batch to the next, with its validation and files at the end of an epoch.

    Args:
        loops: the bare loops, each of which does one step, or one validation, a turn.
        unit: from the epoch and the step to the number of the unit that a turn belongs to.
    """

    def __init__(self, loops: Sequence[Iterator[None]], unit: Callable[[int, int], int]):
        self.loops, self.unit = loops, unit
        self.taken: dict[int, list[float]] = {}
        self.mark, self.turns = 0.0, 0

    def turn(self, trainer: Any) -> None:
        unit = self.unit(trainer.current_epoch, trainer.global_step)
        row = self.taken.setdefault(unit, [0.0] * (1 + len(self.loops)))
        if self.mark:
            self.taken[self.last][0] += time.process_time() - self.mark
        self.last, self.turns = unit, self.turns + 1
        for place in range(len(self.loops)):
            which = (place + self.turns) % len(self.loops)
            start = time.process_time()
            with torch.enable_grad(), torch.inference_mode(False):
                next(self.loops[which], None)
            row[1 + which] += time.process_time() - start
        self.mark = time.process_time()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.turn(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.turn(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.taken[self.last][0] += time.process_time() - self.mark


def bare(model: nn.Module, data: Any, epochs: int, validated: bool) -> Iterator[None]:
    """A plain loop: forward, loss, backward, clipping, AdamW and a schedule; one step, or one validation, a turn."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    loader, measured = data.train_dataloader(), data.val_dataloader()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        loader.batch_sampler.sampler.set_epoch(epoch)
        model.train()
        batches = iter(loader)
        while (batch := next(batches, None)) is not None:
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield
        if validated:
            model.eval()
            with torch.no_grad():
                sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in measured)
            yield


def ours(beside: Beside, model: dict[str, Any], data: list[str] | DataModule, epochs: int) -> list[list[float]]:
    """The turns of `zoo classify fit`, or of its task in a Trainer, and of the loops beside it: rows of a unit each."""
    quiet = io.StringIO()
    backbone = [f"--model.backbone.{name}={value}" for name, value in model.items()]
    trained = ["--model.mixup=0", "--model.cutmix=0", "--trainer.gradient_clip_val=1.0", "--trainer.accelerator=cpu"]
    trained += ["--model.average=0.99"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        if isinstance(data, list):
            with added(beside):
                flags = [f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={folder}/run"]
                command(["classify", "fit", *backbone, *trained, *data, *flags])
        else:
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=epochs, limit_val_batches=0, gradient_clip_val=1.0,
                use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, callbacks=[beside], default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(Classify(model, mixup=0, cutmix=0), datamodule=data)
    return [beside.taken[unit] for unit in sorted(beside.taken)]


@contextlib.contextmanager
def added(callback: Callback) -> Iterator[None]:
    """Within it every run of the command has this callback, too."""
    plain = cli.Command.instantiate_trainer

    def more(self: Any, **kwargs: Any) -> Any:
        trainer = plain(self, **kwargs)
        trainer.callbacks.insert(0, callback)
        return trainer

    cli.Command.instantiate_trainer = more
    try:
        yield
    finally:
        cli.Command.instantiate_trainer = plain


class Repeated(Dataset[Batch]):
    """One batch under every key."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.batch


def first(batches: list[Batch]) -> Batch:
    return batches[0]


class Ready(DataModule):
    """The same ready-made batch again and again."""

    dataset, workers, given, labelled, classes, batch = "ready", 0, {}, 1000, [str(n) for n in range(1000)], BATCH

    def __init__(self, side: int):
        super().__init__()
        self.preprocess = ImagePreprocess(size=side)
        self.ready = Batch(torch.randn(BATCH, 3, side, side), torch.arange(BATCH), ())

    def prepared(self, base: Any) -> Any:
        return self.preprocess

    def find(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> Any:
        batches = EvenBatches(EpochSampler(STEPS * BATCH, training=True), BATCH)
        return make_loader(Repeated(self.ready), batches, first, 0)

    val_dataloader = train_dataloader


def steps(options: argparse.Namespace) -> Iterator[Row]:
    """A step of training against a step of the bare loop. A unit is an epoch of the demo or five steps of deit_tiny."""
    for name in ("rank_zero", "litlogger"):
        logging.getLogger(f"lightning.pytorch.utilities.{name}").setLevel(logging.ERROR)
    plain = Images(dataset="digits", size=32, **DIGITS)
    flags = ["--data.dataset=digits", "--data.size=32", "--data.crop=1.0", "--data.randaugment=null", "--data.flip=0"]
    flags += ["--data.scale=[1.0,1.0]", "--data.erasing=0"]
    ready = Ready(options.side)
    demo, deit = {"name": "vit_micro", **DEMO}, {"name": "deit_tiny"}
    per_epoch = len(plain.train_dataloader())
    points: list[tuple[str, dict[str, Any], Any, Any, int, int, Callable[[int, int], int]]] = [
        ("demo: 32 px digits, batch 64, data, validation and files", demo, flags, plain, options.epochs, per_epoch,
         lambda epoch, step: epoch),
        (f"deit_tiny, {options.side} px, batch {BATCH}, ready-made", deit, ready, ready, 1, 5,
         lambda epoch, step: step // 5),
    ]  # fmt: skip
    for name, model, given, data, epochs, size, unit in points:
        loops = [bare(zoo.create_model(**model), data, epochs, data is plain) for _ in range(2)]
        taken = ours(Beside(loops, unit), model, given, epochs)[1:]  # the first unit warms up
        above, below, again = (list(each) for each in zip(*taken, strict=True))
        times = {"ms": 1e3 * median(above) / size, "base_ms": 1e3 * median(below) / size, "pairs": len(above)}
        yield {"training": name} | times | timed("ratio", above, below) | timed("noise", again, below)


def step_table(rows: Sequence[Row]) -> str:
    header = ["a step of", "zoo classify fit, ms", "bare loop, ms", "ratio", "noise"]
    lines = [
        [
            str(row["training"]),
            f"{row['ms']:.1f}",
            f"{row['base_ms']:.1f}",
            ratio_cell(row, "ratio"),
            ratio_cell(row, "noise"),
        ]
        for row in rows
    ]
    return markdown(header, lines)
