"""95 % intervals."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from zoo.tasks.intervals import bootstrap_ratio, lowest, speaker_of, wilson


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10)[0] < 1.0 == wilson(10, 10)[1]


def test_a_ratio_of_single_words_is_near_the_normal_approximation():
    errors, words = np.arange(200) % 2, np.ones(200)
    low, high = bootstrap_ratio(errors, words, np.arange(200)) or (0.0, 0.0)
    half = 1.96 * (0.25 / 200) ** 0.5
    assert low == pytest.approx(0.5 - half, abs=0.015) and high == pytest.approx(0.5 + half, abs=0.015)
    assert bootstrap_ratio(errors, words, np.arange(200)) == (low, high)


def test_speakers_are_drawn_whole():
    """Half of the speakers have only errors; over their 400 utterances the interval would be much narrower."""
    speakers = np.arange(400) // 40
    errors, words = (speakers % 2).astype(float), np.ones(400)
    low, high = bootstrap_ratio(errors, words, speakers) or (0.0, 0.0)
    rates = (np.arange(10) % 2).astype(float)
    wanted = bootstrap((rates,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((wanted.low, wanted.high), abs=0.1) and high - low > 0.4
    narrow = bootstrap_ratio(errors, words, np.arange(400)) or (0.0, 0.0)
    assert narrow[1] - narrow[0] < 0.12
    assert bootstrap_ratio(errors, words, np.zeros(400)) == narrow  # a single speaker


def test_utterances_weigh_by_their_words():
    """One long utterance without an error among short ones that are wrong."""
    errors, words = np.array([0.0, *[1.0] * 20]), np.array([100.0, *[1.0] * 20])
    low, high = bootstrap_ratio(errors, words, np.arange(21)) or (0.0, 0.0)
    assert low < 20 / 120 < high == 1.0
    one, two = np.ones(1), np.ones(2)
    assert bootstrap_ratio(one, one, one) is None
    assert bootstrap_ratio(two, np.array([3.0, 0.0]), two) is None


@pytest.mark.parametrize(
    ("name", "speaker"),
    [
        ("1089-134686-0000", "1089"),
        ("wavs/1089-134686-0001.flac", "1089"),
        ("synthetic/val/7", "synthetic/val/7"),
        ("a-b.wav", "a-b.wav"),
    ],
)
def test_speakers_are_in_the_names_of_librispeech(name: str, speaker: str):
    assert speaker_of(name) == speaker


def test_lowest_proportions():
    labels, right, number = ["a", "b", "c", "d", "e", "f"], [1, 4, 1, 0, 0, 0], [2, 4, 5, 2, 1, 3]
    found = lowest("recall", labels, right, number, least=2)
    assert [(each.metric, each.value, each.n) for each in found] == [
        ("lowest recall: f", 0.0, 3),  # of equal ones first that with more samples
        ("lowest recall: d", 0.0, 2),
        ("lowest recall: c", 0.2, 5),
    ]
    assert found[0].interval is None and not lowest("recall", ["e", "b"], [0, 4], [1, 4], least=2)
