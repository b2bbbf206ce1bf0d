"""Faults of samples in training and validation: each is warned of once, and all are counted."""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn


class Faults(lightning.LightningModule):
    """A module that counts faults of samples. `faulty` lists their kinds."""

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

    def report(self, stage: str) -> None:
        """Prints how many faults of each kind a stage had, over all ranks."""
        place = f"{stage} of epoch {self.current_epoch}"
        if self.trainer.state.fn != TrainerFn.FITTING:
            place = "test" if self.trainer.testing else "validation"
        for kind in self.faulty:
            total = self.all_gather(torch.tensor(self.faults.pop((stage, kind), 0), device=self.device))
            if number := int(torch.as_tensor(total).sum()):
                rank_zero_warn(f"{kind} {self.fate(kind, stage)} the {place}: {number}")

    def fate(self, kind: str, stage: str) -> str:
        """What was done with faulty samples, as printed by `report`."""
        return "skipped in"
