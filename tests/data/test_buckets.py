import math
import pickle
from itertools import chain

import numpy as np
import pytest
import torch

from zoo.data import sampling
from zoo.data.buckets import DurationBatches

DURATIONS = np.random.default_rng(0).gamma(4.0, 3.0, 500).clip(1, 35)


def set_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(sampling, "rank_and_world", lambda: (rank, world))


def over_ranks(monkeypatch: pytest.MonkeyPatch, sampler: DurationBatches, world: int) -> list[list[list[int]]]:
    """The indices of each batch of each rank; checks len on the way."""
    found = []
    for rank in range(world):
        set_rank(monkeypatch, rank, world)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(epoch == sampler.epoch for epoch, _ in chain(*batches))
        found.append([[index for _, index in batch] for batch in batches])
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("seconds", "padding", "batch"), [(100.0, 0.2, None), (60.0, 0.05, 4), (5.0, 0.9, None)])
def test_limits(training: bool, seconds: float, padding: float, batch: int | None):
    sampler = DurationBatches(DURATIONS, seconds=seconds, padding=padding, batch=batch, training=training)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for members in sampler:
            lasting = DURATIONS[[index for _, index in members]]
            padded = len(lasting) * lasting.max()
            assert padded <= seconds or len(members) == 1
            assert 1 - lasting.sum() / padded <= padding + 1e-12
            assert batch is None or len(members) <= batch


def test_batches_are_filled():
    sampler = DurationBatches(DURATIONS, seconds=100, padding=0.2, training=True)
    filled = [sum(DURATIONS[index] for _, index in batch) for batch in sampler]
    assert sum(filled) / len(filled) > 65


def test_padding_zero_and_equal_durations():
    assert [len(batch) for batch in DurationBatches([2.0] * 7, seconds=6, padding=0, training=False)] == [3, 2, 2]
    assert len(DurationBatches([1.0, 2.0, 3.0], seconds=6, padding=0, training=True)) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 17, 500])
def test_training_over_ranks(monkeypatch: pytest.MonkeyPatch, count: int, world: int):
    """The same batches on any number of ranks, dealt in turn; the largest are divided until ranks have as many."""
    set_rank(monkeypatch, 0, 1)
    sampler = DurationBatches(DURATIONS[:count], seconds=40, training=True, seed=3)
    sampler.set_epoch(5)
    alone = [[index for _, index in batch] for batch in sampler]
    assert sorted(chain(*alone)) == list(range(count))
    ranks = over_ranks(monkeypatch, sampler, world)
    assert len({len(batches) for batches in ranks}) == 1
    dealt = list(chain(*zip(*ranks, strict=True)))
    assert sorted(chain(*dealt)) == list(range(count)) and len(dealt) == math.ceil(len(alone) / world) * world
    divided = sum(before != now for before, now in zip(alone, dealt, strict=False))
    assert divided <= len(dealt) - len(alone) and all(dealt) == (count >= len(dealt))
    assert all({*now} <= {*before} for before, now in zip(alone, dealt, strict=False))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 17, 500])
def test_evaluation_over_ranks(monkeypatch: pytest.MonkeyPatch, count: int, world: int):
    sampler = DurationBatches(DURATIONS[:count], seconds=40, training=False)
    ranks = over_ranks(monkeypatch, sampler, world)
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(chain(*chain(*ranks))) == list(range(count))
    assert all(all(batches[:-1]) for batches in ranks)


def test_order_depends_on_seed_and_epoch_alone():
    def batches(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
        torch.manual_seed(seed + 100 * epoch)
        sampler = DurationBatches(DURATIONS, seconds=50, training=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    def together(batches: list[list[tuple[int, int]]]) -> set[frozenset[int]]:
        return {frozenset(index for _, index in batch) for batch in batches}

    first, later = batches(0, 0), batches(0, 1)
    assert first == batches(0, 0) != batches(1, 0)
    # The members meet others, and the number of batches stays, which schedules count on.
    assert len(together(first) & together(later)) < len(first) / 4 and len(first) == len(later)
    sampler = DurationBatches(DURATIONS, seconds=50, training=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        run = list(sampler)
    assert run == batches(0, 2)  # resumed at an epoch's end
    assert list(pickle.loads(pickle.dumps(sampler))) == run


def test_main_generators_are_left_alone():
    before = torch.get_rng_state()
    list(DurationBatches(DURATIONS, seconds=50, training=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_longest_first_and_fixed():
    sampler = DurationBatches(DURATIONS, seconds=50, training=False, seed=1)
    first = [[index for _, index in batch] for batch in sampler]
    flat = DURATIONS[list(chain(*first))]
    assert (np.diff(flat) <= 0).all()
    sampler.set_epoch(4)
    assert [[index for _, index in batch] for batch in sampler] == first


def test_lightning_finds_set_epoch():
    from lightning.fabric.utilities.data import _set_sampler_epoch

    batches = DurationBatches(DURATIONS, seconds=50, training=True)
    loader = torch.utils.data.DataLoader(DURATIONS, batch_sampler=batches)  # pyright: ignore
    _set_sampler_epoch(loader, 7)
    assert batches.epoch == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds must be > 0, got 0"),
        ({"seconds": float("nan")}, "seconds must be > 0"),
        ({"padding": 1.0}, "padding must be >= 0 and < 1, got 1.0"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"durations": [1.0, 0.0]}, "durations must be > 0"),
        ({"durations": [1.0, float("nan")]}, "durations must be > 0"),
    ],
    ids=str,
)
def test_wrong_values(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DurationBatches(**({"durations": [1.0], "seconds": 10.0, "training": True} | options))
