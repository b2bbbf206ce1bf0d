"""The training loop: what `zoo classify fit` costs in a step, against a bare loop of PyTorch that does the same."""

import argparse
import contextlib
import io
import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

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
EPOCHS = 5  # of the demo's model in a round
STEPS, BATCH = 12, 8  # of deit_tiny in a round


class Clock(Callback):
    """CPU time from the first training batch to the end of the last epoch, its validation and files included."""

    start = seconds = 0.0
    steps = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.start:
            self.start = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds, self.steps = time.process_time() - self.start, trainer.global_step


def bare(model: nn.Module, data: Any, epochs: int, steps: int | None, validated: bool) -> float:
    """CPU seconds a step of a plain loop: forward, loss, backward, clipping, AdamW, a schedule, and validation."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    loader, measured = data.train_dataloader(), data.val_dataloader()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    start, count = time.process_time(), 0
    for epoch in range(epochs):
        loader.batch_sampler.sampler.set_epoch(epoch)
        model.train()
        for batch in itertools.islice(loader, steps):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            count += 1
        if validated:
            model.eval()
            with torch.inference_mode():
                right = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in measured)
            assert right >= 0
    return (time.process_time() - start) / count


def ours(model: dict[str, Any], data: list[str] | DataModule, epochs: int, steps: int | None) -> float:
    """CPU seconds a step of `zoo classify fit`, or of its Trainer on a data module, with all that a run writes."""
    clock, quiet = Clock(), io.StringIO()
    backbone = [f"--model.backbone.{name}={value}" for name, value in model.items()]
    trained = ["--model.mixup=0", "--model.cutmix=0", "--trainer.gradient_clip_val=1.0", "--trainer.accelerator=cpu"]
    trained += ["--model.average=0.99"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        if isinstance(data, list):
            with added(clock):
                flags = [f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={folder}/run"]
                command(["classify", "fit", *backbone, *trained, *data, *flags])
        else:
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=epochs, limit_train_batches=steps or 1.0, limit_val_batches=0,
                gradient_clip_val=1.0, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, callbacks=[clock], default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(Classify(model, mixup=0, cutmix=0), datamodule=data)
    return clock.seconds / clock.steps


@contextlib.contextmanager
def added(clock: Callback) -> Iterator[None]:
    """Within it every run of the command has this callback, too."""
    plain = cli.Command.instantiate_trainer

    def more(self: Any, **kwargs: Any) -> Any:
        trainer = plain(self, **kwargs)
        trainer.callbacks.insert(0, clock)
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
    """A step of each training against a step of the bare loop, in turn."""
    for name in ("rank_zero", "litlogger"):
        logging.getLogger(f"lightning.pytorch.utilities.{name}").setLevel(logging.ERROR)
    plain = Images(dataset="digits", size=32, **DIGITS)
    flags = ["--data.dataset=digits", "--data.size=32", "--data.crop=1.0", "--data.randaugment=null", "--data.flip=0"]
    flags += ["--data.scale=[1.0,1.0]", "--data.erasing=0"]
    ready = Ready(options.side)
    points = {
        "demo: 32 px digits, batch 64, data, validation and files": (
            lambda: ours({"name": "vit_micro", **DEMO}, flags, options.epochs, None),
            lambda: bare(zoo.create_model("vit_micro", **DEMO), plain, options.epochs, None, True),
        ),
        f"deit_tiny, {options.side} px, batch {BATCH}, ready-made": (
            lambda: ours({"name": "deit_tiny"}, ready, 1, STEPS),
            lambda: bare(zoo.create_model("deit_tiny"), ready, 1, STEPS, False),
        ),
    }
    for name, (fit, loop) in points.items():
        taken: list[tuple[float, float, float]] = []
        for number in tqdm(range(max(2, options.pairs // 5)), desc=name[:20]):
            calls = [(0, fit), (1, loop), (2, loop)] if number % 2 else [(2, loop), (1, loop), (0, fit)]
            found = {place: call() for place, call in calls}
            taken.append((found[0], found[1], found[2]))
        above, below, again = (list(each) for each in zip(*taken[1:], strict=True))  # the first round warms up
        times = {"ms": 1e3 * median(above), "base_ms": 1e3 * median(below), "pairs": len(above)}
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
