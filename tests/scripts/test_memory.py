"""Memory that mixers need at inference, as the operating system sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.mixers import MIXERS

pytestmark = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIDES, SMALL_SIDES = (28, 56, 112), (14, 28, 56)
CHILD = """
import functools
import os
import sys
from benchmarks import peak
from benchmarks.peak import main
from zoo.layer import Context, Order

if os.environ.get("ORDERED"):
    peak.Context = functools.partial(Context, order=Order())
for mixer in sys.argv[2:]:
    print(mixer)
    main(mixer, "64", "2", "float32", "1", *sys.argv[1].split(","))
"""
QUADRATIC = [name for name, row in MIXERS.items() if row.quadratic]
LINEAR = [name for name in MIXERS if name not in QUADRATIC]


def growth(mixers: list[str], sides: tuple[int, ...], **more: str) -> dict[str, tuple[float, float, float]]:
    """For each mixer the MiB for each token more, in the first and in the second step, and the peak of the last."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "MALLOC_MMAP_THRESHOLD_": "65536"} | more
    command = [sys.executable, "-c", CHILD, ",".join(map(str, sides)), *mixers]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True).stdout
    words, found = said.split(), {}
    for at, word in enumerate(words):
        if word in mixers:
            first, second, third = (float(number) for number in words[at + 1 : at + 4])
            few, more, most = (side * side for side in sides)
            found[word] = (second - first) / (more - few), (third - second) / (most - more), third
    assert set(found) == set(mixers)
    return found


@linux
@pytest.mark.parametrize("part", range(8))
def test_peak_memory_of_every_mixer_grows_linearly_with_tokens(part: int):
    """From 784 to 12,544 tokens, softmax included. A matrix of all pairs of tokens would take 1.2 GiB in two heads."""
    for mixer, (early, late, most) in growth(LINEAR[part::8], SIDES).items():
        assert 0 < late < 1.4 * early + 1e-3, (mixer, early, late)
        assert most < 200, (mixer, most)


@linux
def test_peak_memory_of_causal_models_grows_linearly_too():
    names = ["softmax", "gqa", "moh", "moa", "mssa", "symmetric", "relaxed"]
    for mixer, (early, late, most) in growth(names, SIDES, ORDERED="1").items():
        assert 0 < late < 1.4 * early + 1e-3, (mixer, early, late)
        assert most < 200, (mixer, most)


@linux
@pytest.mark.skipif(not QUADRATIC, reason="no mixer is declared quadratic")
def test_only_mixers_that_need_it_are_declared_quadratic():
    for mixer, (early, late, _) in growth(QUADRATIC, SMALL_SIDES).items():
        assert late > 2 * early, (mixer, early, late)
