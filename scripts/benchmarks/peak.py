"""python -m benchmarks.peak MIXER DIM HEADS DTYPE THREADS SIDE...: for each side of a grid a line with the peak of
resident memory, in MiB, above what the process held before the first."""

import re
import sys
from pathlib import Path

import torch

import zoo
from benchmarks.measure import DTYPES, randomise
from zoo.layer import Context, make


def resident(field: str) -> float:
    """MiB of a line of /proc/self/status: VmRSS now, VmHWM at most since the peak was reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) / 1024


@torch.no_grad()
def main(mixer: str, dim: str, heads: str, dtype: str, threads: str, *sides: str) -> None:
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    layer = randomise(make(zoo.MIXERS, mixer, int(dim), int(heads), 2)).to(DTYPES[dtype]).eval()

    def run(side: int) -> None:
        layer(torch.randn(1, side * side, int(dim), dtype=DTYPES[dtype]), Context(grid=(side, side)))

    run(7)  # what is loaded once is no part of it
    start = resident("VmRSS")
    for side in map(int, sides):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        run(side)
        print(resident("VmHWM") - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
