"""Batches of utterances of similar duration."""

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from zoo.data import sampling


class DurationBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for this rank, of similar duration and of limited size.

    Utterances are sorted into buckets, each so narrow that no batch from it has more padding than allowed, and each
    bucket is cut into batches of nearly equal size.

    Every utterance comes exactly once in an epoch over all ranks, which have equally many batches. In training, which
    utterances of a bucket meet and the order of the batches are functions of seed and epoch; where the number of ranks
    does not divide that of batches, those with most utterances are divided in two, and a batch is empty only if no
    other has more than one. In evaluation the longest come first, and the last batches may be empty.

    Args:
        durations: seconds of each utterance.
        seconds: most seconds in a batch, padding included; a longer utterance has a batch of its own.
        padding: largest share of a batch that is padding, from 0 to below 1.
        batch: most utterances in a batch; null for no limit.
        training: shuffle.
        seed: seed of the order, together with the epoch.

    Raises:
        ValueError: a value is out of range, or a duration is not a positive number.
    """

    def __init__(
        self,
        durations: Sequence[float] | np.ndarray,
        *,
        seconds: float,
        padding: float = 0.2,
        batch: int | None = None,
        training: bool,
        seed: int = 0,
    ):
        check_limits(seconds, padding, batch)
        lasting = np.asarray(durations, dtype=np.float64)
        if not (np.isfinite(lasting) & (lasting > 0)).all():
            raise ValueError("durations must be > 0")
        self.buckets = _buckets(lasting, seconds, padding, batch)
        self.count = len(lasting)
        self.training, self.seed, self.epoch = training, seed, 0

    @property
    def sampler(self) -> "DurationBatches":
        """The batch sampler itself, because Lightning sets the epoch of a batch sampler's `sampler`."""
        return self

    @property
    def plan(self) -> tuple[int, ...]:
        """What the batches of all ranks depend on besides the epoch."""
        buckets = 0
        for members, parts in self.buckets:
            buckets = zlib.crc32(np.append(members, parts).astype(np.int64).tobytes(), buckets)
        return self.count, self.training, self.seed, buckets

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iterations. Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = sampling.rank_and_world()
        batches, number = self._batches(), len(self) * world
        while self.training and len(batches) < number:
            largest = max(range(len(batches)), key=lambda place: len(batches[place]))
            half = len(batches[largest]) - len(batches[largest]) // 2
            batches[largest], rest = np.split(batches[largest], [half])
            batches.append(rest)
        for position in range(rank, number, world):
            indices = batches[position] if position < len(batches) else []
            yield [(self.epoch, int(index)) for index in indices]

    def __len__(self) -> int:
        _, world = sampling.rank_and_world()
        return math.ceil(sum(parts for _, parts in self.buckets) / world)

    def _batches(self) -> list[np.ndarray]:
        """All batches of the epoch, those of every rank."""
        if not self.training:
            return [part for members, parts in self.buckets for part in np.array_split(members, parts)]
        generator = torch.Generator().manual_seed(sampling.hashed(self.seed, self.epoch))
        batches = []
        for members, parts in self.buckets:
            shuffled = members[torch.randperm(len(members), generator=generator).numpy()]
            batches += np.array_split(shuffled, parts)
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def check_limits(seconds: float, padding: float, batch: int | None) -> None:
    """Raises ValueError if `DurationBatches` does not accept a limit."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be > 0, got {seconds!r}")
    if not 0 <= padding < 1:
        raise ValueError(f"padding must be >= 0 and < 1, got {padding!r}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch!r}")


def _buckets(durations: np.ndarray, seconds: float, padding: float, batch: int | None) -> list[tuple[np.ndarray, int]]:
    """Indices of each bucket from the longest utterance to the shortest, and into how many batches it is cut."""
    order = np.argsort(-durations, kind="stable")
    falling = durations[order]
    buckets, start = [], 0
    while start < len(order):
        longest = falling[start]
        end = int(np.searchsorted(-falling, -longest * (1 - padding), side="right"))
        most = max(1, int(seconds / longest))
        if batch is not None:
            most = min(most, batch)
        buckets.append((order[start:end], math.ceil((end - start) / most)))
        start = end
    return buckets
