"""Which rows of a table behave alike towards others, by what they declare; and designs in which choices meet.

The tests of pairs take one row of each class, so they do not grow with the square of the rows; ZOO_TEST_SEED says
which.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

from zoo.layer import Layer
from zoo.spec import check

SEED = int(os.environ.get("ZOO_TEST_SEED", 0))
DIM, HEADS = 32, 2


def signature(row: type[Layer], **options: Any) -> tuple[Any, ...]:
    """What a row declares: rows of one signature meet others in one way."""
    sites = row.sites_of(DIM, HEADS, **options)
    declared = [row.reads_of(**options), row.dimensions, row.mixes, row.bare]
    declared += [frozenset((site, size.heads > 0) for site, size in sites.items())]
    declared += [getattr(row, name, None) for name in ("writes", "streams", "sized", "batch_statistics")]
    return tuple(declared)


def classes(table: Mapping[str, type[Layer]], axes: int | None = None) -> list[list[str]]:
    """The names of a table that works on so many axes, those of one signature together."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, row in table.items():
        if axes is None or axes in row.dimensions:
            found.setdefault(signature(row, **check(table, name)), []).append(name)
    return list(found.values())


def representatives(table: Mapping[str, type[Layer]], axes: int | None = None) -> list[str]:
    """One name of each class, another one for another seed."""
    return [names[SEED % len(names)] for names in classes(table, axes)]


def is_turn(test: str, number: int, days: int, seed: int = SEED) -> bool:
    """Whether a case of a test is quick on the day of the seed: on one of every `days` days, another one each time."""
    return (crc32(test.encode()) + number - seed - seed // days) % days == 0


def pairs(choices: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every two choices of two kinds."""
    return [
        {first: one, second: other}
        for first, second in itertools.combinations(choices, 2)
        for one, other in itertools.product(choices[first], choices[second])
    ]


def pairwise(
    choices: Mapping[str, list[Any]], allowed: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Rows of one choice of each kind, all of them allowed, in which every two choices meet that are allowed together.

    The first choice of each kind has to be allowed beside every pair that is.
    """
    order = {kind: range(len(values)) for kind, values in choices.items()}

    def spelled(row: Mapping[str, int]) -> dict[str, Any]:
        return {kind: choices[kind][i] for kind, i in row.items()}

    def fits(row: Mapping[str, int]) -> bool:
        return allowed(spelled({kind: row.get(kind, 0) for kind in order}))

    left = {
        frozenset({(one, i), (other, j)})
        for one, other in itertools.combinations(order, 2)
        for i, j in itertools.product(order[one], order[other])
        if fits({one: i, other: j})
    }
    rows = []
    for pair in sorted(left, key=sorted):
        if pair not in left:
            continue
        row = dict(pair)
        for number, kind in enumerate(order):
            if kind in row:
                continue
            new = {i: sum(frozenset({(kind, i), met}) in left for met in row.items()) for i in order[kind]}
            best = sorted(order[kind], key=lambda i: (-new[i], (i + len(rows) + number) % len(new)))  # noqa: B023
            row[kind] = next(i for i in [*best, 0] if fits(row | {kind: i}))
        left -= {frozenset(each) for each in itertools.combinations(row.items(), 2)}
        rows.append(spelled(row))
    return rows
