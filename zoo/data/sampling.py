"""Order and randomness of data as functions of seed, epoch and index, on any number of ranks."""

import contextlib
import hashlib
import itertools
import math
import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restores the state of the CPU generators of `random`, NumPy and PyTorch at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def reseed(*numbers: int) -> None:
    """Seeds the CPU generators of `random`, NumPy and PyTorch with a function of `numbers`."""
    seed = hashed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within this context the CPU generators of `random`, NumPy and PyTorch depend only on `numbers`.

    Their previous states are restored at the end; generators of accelerators are not touched.
    """
    with kept_generators():
        reseed(*numbers)
        yield


WINDOW = 16
"""Groups among which an order is random: many enough for a mixture, few enough to stay in a computer's memory."""


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for this rank's share of a set.

    Every image comes exactly once in an epoch over all ranks, whose shares may differ by one. In training the order is
    a function of seed and epoch. With groups, such as the shards that images are in, it is that of the groups, in
    windows of `WINDOW` groups within which it is random. In evaluation it is that of the set.

    Args:
        count: images in the set.
        training: shuffle.
        seed: seed of the order, together with the epoch.
        groups: where each group begins, and the end of the last; None for one group.
    """

    def __init__(self, count: int, *, training: bool, seed: int = 0, groups: np.ndarray | None = None):
        self.count, self.training, self.seed, self.groups = count, training, seed, groups
        self.epoch = 0

    @property
    def plan(self) -> tuple[int, ...]:
        """What the orders of all ranks depend on besides the epoch."""
        groups = 0 if self.groups is None else zlib.crc32(self.groups.astype(np.int64).tobytes())
        return self.count, self.training, self.seed, groups

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iterations. Lightning calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world = rank_and_world()
        order = self._shuffled() if self.training else range(self.count)
        for position in range(rank, self.count, world):
            yield self.epoch, order[position]

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(hashed(self.seed, self.epoch))
        if self.groups is None:
            return torch.randperm(self.count, generator=generator).tolist()
        groups = torch.randperm(len(self.groups) - 1, generator=generator).tolist()
        order: list[int] = []
        for start in range(0, len(groups), WINDOW):
            ranges = [range(*self.groups[group : group + 2].tolist()) for group in groups[start : start + WINDOW]]
            window = [*itertools.chain(*ranges)]
            order += [window[place] for place in torch.randperm(len(window), generator=generator).tolist()]
        return order

    def __len__(self) -> int:
        rank, world = rank_and_world()
        return len(range(rank, self.count, world))


class WholeBatches(Sampler[list[tuple[int, int]]]):
    """Batches of a training epoch, which leave no sample out: all are full but the last two, which share the rest.
    Every rank has equally many; its last one may be empty if `batch` is 1 or there are fewer samples than ranks.

    Args:
        sampler: an `EpochSampler` for training.
        batch: samples in a full batch.
    """

    def __init__(self, sampler: EpochSampler, batch: int):
        self.sampler, self.batch = sampler, batch

    @property
    def plan(self) -> tuple[int, ...]:
        return self.batch, *self.sampler.plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        pairs, full = iter(self.sampler), max(0, len(self) - 2)
        rest = len(self.sampler) - full * self.batch
        ends = [rest] if len(self) == 1 else [rest - rest // 2, rest // 2]
        for size in itertools.chain(itertools.repeat(self.batch, full), ends):
            yield [*itertools.islice(pairs, size)]

    def __len__(self) -> int:
        return most_batches(self.sampler, self.batch)


class EvenBatches(Sampler[list[tuple[int, int]]]):
    """Batches of an evaluation, equally many on every rank and of nearly equal size.

    A rank with a batch less than the others would leave them waiting wherever a forward
    communicates (sharded parameters, broadcast buffers). Where a rank has fewer images than
    batches, some are empty.

    Args:
        sampler: an `EpochSampler` for evaluation.
        batch: most images in a batch.
    """

    def __init__(self, sampler: EpochSampler, batch: int):
        self.sampler, self.batch = sampler, batch

    @property
    def plan(self) -> tuple[int, ...]:
        return self.batch, *self.sampler.plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        pairs, batches = list(self.sampler), len(self)
        for part in range(batches):
            yield pairs[part * len(pairs) // batches : (part + 1) * len(pairs) // batches]

    def __len__(self) -> int:
        return most_batches(self.sampler, self.batch)


def most_batches(sampler: EpochSampler, batch: int) -> int:
    """The batches that the rank with most images needs."""
    _, world = rank_and_world()
    return math.ceil(math.ceil(sampler.count / world) / batch)


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def hashed(*numbers: int) -> int:
    """A number below 2**63 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1


def global_seed() -> int:
    """The seed that `seed_everything` has set, 0 where it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
