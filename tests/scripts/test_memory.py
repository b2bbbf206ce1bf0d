"""Memory that mixers need at inference, as the operating system sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ON_PICTURES

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIDES = (28, 56, 112)
CHILD = """
import sys
from benchmarks.peak import main

for mixer in sys.argv[1:]:
    print(mixer)
    main(mixer, "192", "3", "float32", "1", "28", "56", "112")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_every_mixer_grows_linearly_with_tokens():
    """From 784 to 12,544 tokens, softmax included. A matrix of all pairs of tokens would take 630 MiB in one head."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, *ON_PICTURES]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout
    words, peaks = said.split(), {}
    for at, word in enumerate(words):
        if word in ON_PICTURES:
            peaks[word] = [float(number) for number in words[at + 1 : at + 1 + len(SIDES)]]
    assert set(peaks) == set(ON_PICTURES)
    tokens = [side * side for side in SIDES]
    for mixer, (first, second, third) in peaks.items():
        early, late = (second - first) / (tokens[1] - tokens[0]), (third - second) / (tokens[2] - tokens[1])
        assert 0 < late < 1.4 * early, (mixer, peaks[mixer])
        assert third < 200, (mixer, peaks[mixer])
