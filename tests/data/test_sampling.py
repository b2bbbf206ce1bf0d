import math
import pickle
import random
from itertools import chain

import numpy as np
import pytest
import torch

from ranks import set_rank
from zoo.data.sampling import EpochSampler, EvenBatches, WholeBatches, seeded


def states() -> list[str]:
    return [repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist())]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeded_depends_on_its_numbers_alone():
    results = []
    for numbers in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 2), (-1, 2, 3)):
        draws()
        with seeded(*numbers):
            results.append(draws())
    assert results[0] == results[1]
    for first, second in zip(results[1:], results[2:], strict=False):
        assert all(a != b for a, b in zip(first, second, strict=True))


def test_seeded_is_the_same_in_every_process():
    with seeded(0, 1, 2):
        assert random.random() == 0.6184225711661776


def test_seeded_puts_states_back():
    before = states()
    with pytest.raises(RuntimeError), seeded(5):
        draws()
        raise RuntimeError
    assert states() == before


def test_training_order_depends_on_seed_and_epoch():
    sampler = EpochSampler(50, training=True, seed=1)
    first = list(sampler)
    assert [epoch for epoch, _ in first] == [0] * 50
    assert sorted(index for _, index in first) == list(range(50))
    assert first == list(sampler) == list(EpochSampler(50, training=True, seed=1))

    sampler.set_epoch(1)
    second = list(sampler)
    assert [epoch for epoch, _ in second] == [1] * 50
    indices = [index for _, index in second]
    assert sorted(indices) == list(range(50)) and indices != [index for _, index in first]
    assert list(EpochSampler(50, training=True, seed=2)) != first


def test_sampler_leaves_the_main_generators_alone():
    before = states()
    list(EpochSampler(50, training=True))
    assert states() == before


def test_evaluation_order_is_that_of_the_set():
    sampler = EpochSampler(5, training=False)
    sampler.set_epoch(3)
    assert list(sampler) == [(3, index) for index in range(5)]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks(monkeypatch: pytest.MonkeyPatch, count: int, world: int):
    training, evaluation = EpochSampler(count, training=True), EpochSampler(count, training=False)
    shares: dict[bool, list[list[int]]] = {True: [], False: []}
    for rank in range(world):
        set_rank(monkeypatch, rank, world)
        for sampler in (training, evaluation):
            share = [index for _, index in sampler]
            assert len(share) == len(sampler)
            shares[sampler.training].append(share)
    for each in shares.values():
        assert sorted(chain(*each)) == list(range(count))
        lengths = [len(share) for share in each]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("count", [1, 4, 5, 9, 64, 65, 129])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4, 64])
def test_a_training_epoch_has_every_sample(monkeypatch: pytest.MonkeyPatch, count: int, world: int, batch: int):
    sampler, seen, sizes = EpochSampler(count, training=True), list[int](), list[list[int]]()
    for rank in range(world):
        set_rank(monkeypatch, rank, world)
        batches = list(WholeBatches(sampler, batch))
        assert len(batches) == len(WholeBatches(sampler, batch)) == math.ceil(math.ceil(count / world) / batch)
        assert all(len(part) == batch for part in batches[:-2])
        assert all(batch >= len(part) >= batch // 2 for part in batches[-2:]) or min(len(batches), batch) == 1
        sizes.append([len(part) for part in batches])
        seen += [index for part in batches for _, index in part]
    assert sorted(seen) == list(range(count))
    assert all(max(step) - min(step) <= 1 for step in zip(*sizes, strict=True))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9, 64, 65, 129])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4, 64])
def test_even_batches(monkeypatch: pytest.MonkeyPatch, count: int, world: int, batch: int):
    sampler = EpochSampler(count, training=False)
    everything, numbers = [], set()
    for rank in range(world):
        set_rank(monkeypatch, rank, world)
        loader = EvenBatches(sampler, batch)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(part) <= batch for part in batches)
        if len(sampler) >= len(batches):
            assert all(batches)
        numbers.add(len(batches))
        everything += [index for part in batches for _, index in part]
    assert sorted(everything) == list(range(count))
    assert numbers == {math.ceil(math.ceil(count / world) / batch)}


def test_samplers_pickle():
    sampler = EpochSampler(9, training=True, seed=4)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
