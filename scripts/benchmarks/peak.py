"""python -m benchmarks.peak MIXER DIM HEADS DTYPE THREADS SIDE...: for each side of a grid a line with the peak of
resident memory, in MiB, above what the process held before the first. A mixer along time has side * side frames."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import zoo
from benchmarks.measure import DTYPES, NotMeasured, randomise
from zoo.layer import Context, Place
from zoo.spec import make, parse


def resident(field: str) -> float:
    """MiB of a line of /proc/self/status: VmRSS now, VmHWM at most since the peak was reset."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) / 1024


def check_peaks() -> None:
    """NotMeasured where the system does not tell the peak of a process."""
    if sys.platform != "linux":
        raise NotMeasured(f"peak memory is read as Linux tells it, and this is {sys.platform}")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise NotMeasured("/proc/self/clear_refs, which resets the peak, cannot be written")


def said_alone(module: str, *arguments: str) -> list[str]:
    """The lines that a module of this folder prints in a process of its own; RuntimeError with its last words."""
    folder = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    # What is freed goes back to the system at once.
    environment = os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the memory of {arguments[0]} was not measured: {said[-1]}")
    return done.stdout.splitlines()


@torch.no_grad()
def main(mixer: str, dim: str, heads: str, dtype: str, threads: str, *sides: str) -> None:
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    axes = max(zoo.MIXERS[parse(mixer)[0]].dimensions)
    layer = randomise(make(zoo.MIXERS, mixer, int(dim), int(heads), Place(axes=axes))).to(DTYPES[dtype]).eval()

    def run(side: int) -> None:
        grid = (side, side) if axes == 2 else (side * side,)
        layer(torch.randn(1, side * side, int(dim), dtype=DTYPES[dtype]), Context(grid=grid))

    run(7)  # excludes what is loaded once
    start = resident("VmRSS")
    for side in map(int, sides):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        run(side)
        print(resident("VmHWM") - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
