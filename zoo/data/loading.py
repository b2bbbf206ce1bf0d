"""What the data modules share: the loader, its workers, and preprocessing that is taken from a checkpoint."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.sampling import rank_and_world
from zoo.inputs import Preprocess

MOST_WORKERS = 16
GRACE = 60  # seconds for which a worker still works after a signal


class Batches(Sampler[list[Any]]):
    """A batch sampler whose next iteration can start in the middle of an epoch.

    Args:
        batches: the batch sampler; its `sampler` has `set_epoch`.

    Attributes:
        skip: how many batches the next iteration skips at its start; 0 again afterwards.
    """

    def __init__(self, batches: Any):
        self.batches, self.skip = batches, 0

    @property
    def sampler(self) -> Any:
        """The sampler whose epoch Lightning sets."""
        return self.batches.sampler

    def __iter__(self) -> Iterator[list[Any]]:
        # A generator, so that only an iteration that is used takes `skip`: a loader with workers makes two iterators.
        skip, self.skip = self.skip, 0
        yield from itertools.islice(self.batches, skip, None)

    def __len__(self) -> int:
        return len(self.batches)


class Loader(DataLoader[Any]):
    """A DataLoader that reads nothing from its sampler until its first batch is requested.

    Lightning makes the iterator before it sets the epoch, and workers that run ahead would see the order of epoch 0.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


def outlive_signals(_: int) -> None:
    """Lets a worker keep working for a while after SIGINT or SIGTERM.

    Ctrl-C and job managers signal all processes of a run, and the main process still needs its workers to stop well.
    A second signal ends a worker at once. SIGUSR1, SLURM's warning, is for the main process alone.
    """

    def wait(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(GRACE)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, wait)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def make_loader(dataset: Dataset[Any], batches: Any, collate: Callable[[Any], Any], workers: int) -> Loader:
    """The loader of a data set whose keys come from a batch sampler."""
    workers = min(workers, len(batches))
    return Loader(
        dataset,
        batch_sampler=Batches(batches),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=outlive_signals,
        # Without its own generator an iterator would draw from the main one.
        generator=torch.Generator().manual_seed(0),
    )


def check_numbers(
    least: Mapping[str, tuple[float | None, float]], probabilities: Mapping[str, float] | None = None
) -> None:
    """ValueError if an option is below its least value, given as (value, least), or a probability is not in 0..1."""
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ValueError(f"{name} must be >= {smallest}, got {value}")
    for name, value in (probabilities or {}).items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a probability from 0 to 1, got {value}")


class DataModule(lightning.LightningDataModule):
    """What the data modules share.

    A task that starts from a checkpoint uses the checkpoint's preprocessing. Fields of the preprocessing
    that the data module was given replace those of the checkpoint in `fit`, and are ignored in `validate` and `test`,
    which evaluate the checkpoint as it is.

    The data that a run is resumed on must be that which it was started on, except with `changed` set to `ok`.

    Attributes:
        preprocess: from a raw input to the model's input.
        given: the fields of the preprocessing that the user set.
        dataset: the name of the kind of data.
    """

    preprocess: Any
    given: dict[str, Any]
    dataset: str
    workers: int | None

    def __init__(self, changed: str = "refuse"):
        super().__init__()
        if changed not in ("refuse", "ok"):
            raise ValueError(f"changed must be refuse or ok, got {changed!r}")
        self.changed = changed
        self._sources: dict[str, Any] = {}  # by split, those that have been read

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed compares: the fingerprint of each split in files or shards."""
        prints = {split: getattr(source, "fingerprint", None) for split, source in self._sources.items()}
        return {split: found for split, found in prints.items() if found is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError if a run is resumed on other data than it was started on."""
        if self.changed == "ok" or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        own = self.state_dict()
        if differ := [split for split in own if state_dict.get(split, own[split]) != own[split]]:
            root, names = getattr(self, "root", None), " and ".join(map(repr, differ))
            raise ValueError(
                f"the data of {names} in {root} is not that which the run was started on; "
                "restore it, or resume on this with --data.changed=ok"
            )

    def groups(self) -> np.ndarray | None:
        """Where each shard of the training samples begins, and their end; None for other data."""
        return getattr(self._sources.get("train"), "groups", None)

    def prepared(self, base: Preprocess | None) -> Preprocess:
        """The preprocessing `base`, or the default, with the fields in `given` replaced."""
        raise TypeError(f"{type(self).__name__} has no prepared")

    def follow(self, start: Any, stage: str) -> list[str]:
        """Takes the preprocessing of the checkpoint `start`, or None; returns lines about what differs from it."""
        kept = None if start is None else start.preprocess
        self.preprocess = self.prepared(kept)
        if kept is None or self.preprocess == kept:
            return []
        ours, theirs = self.preprocess.to_dict(), kept.to_dict()
        differ = [name for name in ours if ours[name] != theirs[name]]
        if stage == "fit":
            changes = ", ".join(f"{name} {ours[name]} (was {theirs[name]})" for name in differ)
            return [f"inputs are preprocessed as in the checkpoint, except for {changes}"]
        self.preprocess = kept
        ignored = ", ".join(f"{name} {theirs[name]} (not {ours[name]})" for name in differ)
        return [f"measured with the preprocessing of the checkpoint: {ignored}"]

    def processes(self, files: bool) -> int:
        """How many workers a rank uses: `workers`, or its share of the cores, at most 16, where data is in files."""
        if self.workers is not None or not files:
            return self.workers or 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = os.environ.get("SLURM_CPUS_PER_TASK", "") if SLURMEnvironment.detect() else ""
        share = min(cores, int(own)) if own.isdecimal() else cores // self.local_ranks()
        return min(MOST_WORKERS, max(1, share))

    def local_ranks(self) -> int:
        """The ranks on this machine."""
        return rank_and_world()[1] if self.trainer is None else max(1, self.trainer.num_devices)

    def setup(self, stage: str) -> None:
        """Takes the preprocessing of the task's checkpoint, then finds the data of a stage and its faults."""
        task = self.trainer.lightning_module if self.trainer is not None else None
        for line in self.follow(getattr(task, "start", None), stage):
            rank_zero_info(line)
        self.find(stage)

    def find(self, stage: str) -> None:
        """Finds the data of a stage, and its faults, before the first step."""
        raise TypeError(f"{type(self).__name__} has no find")

    def named(self, metric: str) -> str | None:
        """What a metric of the task is called on this data; None if it has no meaning there."""
        return metric

    @property
    def labelled(self) -> int:
        """How many labels the data has, which sets the number of the model's outputs."""
        raise TypeError(f"{type(self).__name__} has no labelled")

    def described(self) -> str:
        """The training data of a run, in one line."""
        raise TypeError(f"{type(self).__name__} has no described")

    def example(self) -> tuple[tuple[Tensor, ...], str]:
        """An input of the model, to count its multiply-adds, and the name of such an input."""
        raise TypeError(f"{type(self).__name__} has no example")
