"""Fixed tables: computed once, bounded in bytes, one longest copy of those that grow with length."""

import pytest
import torch

import zoo
from helpers import relative
from zoo import cache
from zoo.mixers.relative import waves_of
from zoo.positions import _sincos

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_kept", type(cache._kept)())


def held() -> int:
    return sum(entry.size for entry in cache._kept.values())


def counted(calls: list, size: int = 1):
    def make(start: int, stop: int, width: int, device: torch.device) -> torch.Tensor:
        calls.append((start, stop))
        return torch.arange(start, stop, device=device, dtype=torch.float32)[:, None].expand(-1, width).contiguous()

    return make


def test_rows_of_any_range_come_from_one_copy():
    calls: list = []
    make = counted(calls)
    for start, stop in ((0, 50), (0, 20), (10, 30), (-5, 40), (0, 51), (0, 52), (-6, 53), (7, 7)):
        got = cache.rows(make, start, stop, 3, device=CPU)
        assert torch.equal(got, torch.arange(start, stop, dtype=torch.float32)[:, None].expand(-1, 3))
    assert len(cache._kept) == 1 and len(calls) == 3, "lengths that rise one by one are computed now and then"
    assert cache.rows(make, 0, 9, 4, device=CPU).shape == (9, 4) and len(cache._kept) == 2


def test_a_shape_is_computed_once(monkeypatch):
    calls = []

    def make(size: int, device: torch.device) -> torch.Tensor:
        calls.append(size)
        return torch.ones(size, device=device)

    first = cache.table(make, 4, device=CPU)
    assert cache.table(make, 4, device=CPU) is first and cache.table(make, 5, device=CPU).shape == (5,)
    assert calls == [4, 5]


def test_the_bound_is_kept_and_the_unused_go_first(monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 4000)
    calls: list = []
    make = counted(calls)
    for width in range(1, 9):
        cache.rows(make, 0, 50, width, device=CPU)
        cache.rows(make, 0, 50, 1, device=CPU)
        assert held() <= 4000
    assert [key[2] for key in cache._kept][-2:] == [8, 1]
    assert calls.count((0, 50)) == 8, "what is used again and again stays"
    big = cache.rows(make, 0, 600, 1, device=CPU)
    assert len(big) == 600 and held() <= 4000
    assert [key[2] for key in cache._kept][-1] == 1 and len(cache._kept[(make, CPU, 1)].tensor) == 50


def test_a_table_too_long_to_be_kept_is_not_made_longer_still(monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 4000)
    calls: list = []
    make = counted(calls)
    cache.rows(make, 0, 400, 1, device=CPU)
    cache.rows(make, 0, 900, 1, device=CPU)
    assert calls == [(0, 400), (0, 900)]


def test_memory_does_not_grow_with_the_lengths_that_a_model_has_seen():
    model = zoo.create_model(
        "conformer_ctc_s", dim=32, depth=1, heads=2, mels=20, subsampling="conv4(channels=4)"
    ).eval()
    with torch.no_grad():
        for frames in (400, *range(40, 400, 12)):
            model(torch.randn(1, frames, 20))
    assert len(cache._kept) == 1, "one table of offsets"
    longest = held()
    with torch.no_grad():
        model(torch.randn(1, 300, 20))
    assert held() == longest


@pytest.mark.parametrize(("first", "number"), [(7, 15), (0, 8), (-3, 5), (40, 81)])
def test_offsets_sliced_from_a_longer_table_are_those_computed(first, number):
    like = torch.zeros(1)
    waves_of(90, 181, 12, like)
    rates = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    angles = (first - torch.arange(number, dtype=torch.float64))[:, None] * rates
    wanted = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    assert relative(waves_of(first, number, 12, like).double(), wanted) < 1e-7


@pytest.mark.parametrize("position", ["sincos", "rope"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_positions_along_time_do_not_hang_on_what_was_asked_before(position, prefix):
    from helpers import position as position_of
    from zoo.layer import Context

    layer = position_of(position, 16, 8, (9,), prefix)

    def outcome(length: int) -> torch.Tensor:
        context = layer.place(Context(grid=(length,), prefix=prefix))
        return layer(torch.zeros(1, prefix + length, 16), context) if position == "sincos" else context.rotary

    wanted = outcome(9).clone()
    outcome(40)
    assert torch.equal(outcome(9), wanted)
    rows = _sincos(0, 9, 16, CPU)
    if position == "sincos":
        assert torch.equal(wanted[0, prefix:], rows) and not wanted[0, :prefix].any()
    else:
        assert torch.equal(wanted[:, :prefix], torch.stack([torch.ones(prefix, 4), torch.zeros(prefix, 4)]))
