"""Faults of samples in training and validation: each is warned of once, and all are counted."""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from zoo.tasks.resuming import require


class Faults(lightning.LightningModule):
    """A module that counts faults of samples. `faulty` lists their kinds.

    A state has how many the running epoch had in training, over all ranks, so that those before a resume count, too.
    """

    faulty: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.faults, self.warned = Counter[tuple[str, str]](), set[str]()

    def note(self, faults: Iterable[str], kind: str, stage: str) -> None:
        """Warns about each fault once, and counts them all; kind is one of `faulty`."""
        faults = list(faults)
        if faults:
            self.faults[stage, kind] += len(faults)
        for fault in sorted(set(faults) - self.warned):
            warnings.warn(fault, stacklevel=2)
        self.warned |= set(faults)

    def faults_of(self, stage: str) -> dict[str, int]:
        """How many faults of each kind a stage had so far, over all ranks, which all call this."""
        own = torch.tensor([self.faults[stage, kind] for kind in self.faulty], dtype=torch.int64, device=self.device)
        summed = torch.as_tensor(self.trainer.strategy.reduce(own, reduce_op="sum"))
        return dict(zip(self.faulty, summed.tolist(), strict=True))

    def forget(self, stage: str) -> None:
        """Counts the faults of a stage from 0."""
        self.faults = Counter({key: number for key, number in self.faults.items() if key[0] != stage})

    def on_train_epoch_start(self) -> None:
        self.forget("training")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["faults"] = self.faults_of("training")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.forget("training")
        if "faults" in checkpoint:  # earlier versions had none
            require(checkpoint["faults"], dict.fromkeys(self.faulty, 0), "faults")
            if self.trainer.is_global_zero:  # the sum over ranks counts once
                self.faults.update({("training", kind): number for kind, number in checkpoint["faults"].items()})

    def report(self, stage: str) -> None:
        """Prints how many faults of each kind a stage had, over all ranks."""
        place = f"{stage} of epoch {self.current_epoch}"
        if self.trainer.state.fn != TrainerFn.FITTING:
            place = "test" if self.trainer.testing else "validation"
        for kind, number in self.faults_of(stage).items():
            if number:
                rank_zero_warn(f"{kind} {self.fate(kind, stage)} the {place}: {number}")
        if stage != "training":  # whose faults count until the next epoch: this one may go on in a resumed run
            self.forget(stage)

    def fate(self, kind: str, stage: str) -> str:
        """What was done with faulty samples, as printed by `report`."""
        return "skipped in"
