"""The turns of the cases of daily tests."""

import pytest

from signatures import is_turn


@pytest.mark.parametrize("days", [1, 2, 3, 8, 20])
def test_every_case_has_one_turn_in_so_many_days(days: int):
    start = 739_950 // days * days
    turns = [[day for day in range(days) if is_turn("test_a", case, days, start + day)] for case in range(30)]
    assert all(len(each) == 1 for each in turns)
    assert {day for (day,) in turns} == set(range(days))


def test_another_round_begins_with_another_case():
    first = [next(case for case in range(7) if is_turn("test_a", case, 7, 7 * week)) for week in range(7)]
    assert sorted(first) == [0, 1, 2, 3, 4, 5, 6]
