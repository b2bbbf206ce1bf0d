"""What a measurement gives: figures with their 95 % intervals."""

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

DRAWS = 1000
WORST = 3  # classes or words named in a card


class Measured(NamedTuple):
    """One measured value, which the task logs as `key` if it is not given here."""

    key: str
    metric: str  # its name for people, such as "top-1 accuracy"
    n: int  # how many images, words or samples it counts
    interval: tuple[float, float] | None = None  # 95 %
    value: float | None = None


def wilson(correct: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    from scipy.stats import binomtest

    low, high = binomtest(correct, number).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def lowest(
    name: str, labels: Sequence[str], right: Sequence[int], number: Sequence[int], least: int = 1
) -> list[Measured]:
    """The labels for which the proportion right / number is lowest, as figures; of equal ones those with more samples.
    Labels without any error do not count.

    Args:
        name: of the proportion, such as "recall".
        labels: names.
        right: how often, of each label.
        number: out of how many, of each label.
        least: labels with a smaller number do not count.
    """
    rows = [row for row in zip(labels, right, number, strict=True) if row[2] >= least and row[1] < row[2]]
    rows = sorted(rows, key=lambda row: (row[1] / row[2], -row[2], row[0]))[:WORST]
    return [worst(name, label, total, found / total) for label, found, total in rows]


def worst(name: str, label: str, number: int, value: float) -> Measured:
    """The figure of a label that is among the worst; an interval would be too optimistic for it."""
    return Measured(f"{name}/{label}", f"lowest {name}: {label}", number, value=value)


def bootstrap_ratio(above: np.ndarray, below: np.ndarray, groups: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of sum(above) / sum(below) by the bootstrap over groups (Bisani and Ney 2004): the percentiles
    of 1,000 draws, which are the same in every call.

    Args:
        above: of each item, such as the word errors of an utterance; [N].
        below: of each item, such as its words; [N]. Items without any do not count.
        groups: of each item, such as its speaker; integers [N]. Where all items are of one group, each is its own.

    Returns:
        Its ends; None for fewer than two items that count.
    """
    counted = below > 0
    above, below, groups = above[counted], below[counted], groups[counted]
    if len(above) < 2:
        return None
    names, places = np.unique(groups, return_inverse=True)
    if len(names) == 1:
        places = np.arange(len(above))
    tops, bottoms = (np.bincount(places, weights=each) for each in (above, below))
    generator, number = np.random.default_rng(0), len(tops)
    rates = np.empty(DRAWS)
    for draw in range(DRAWS):
        times = np.bincount(generator.integers(number, size=number), minlength=number)
        rates[draw] = (times @ tops) / (times @ bottoms)
    low, high = np.percentile(rates, (2.5, 97.5))
    return float(low), float(high)


def speaker_of(name: str) -> str:
    """The speaker in the name of an utterance as LibriSpeech has them, speaker-chapter-utterance; else the name."""
    found = re.fullmatch(r"(\w+)-\w+-\w+", PurePath(name).stem)
    return found[1] if found else name
