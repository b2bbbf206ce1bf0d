"""What the headers of files say, kept in the cache folder where there are many files."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from zoo.aside import aside
from zoo.kernels.native import cache_folder

SMALL = 1000
"""The headers of fewer files are read each time; those of more are kept in the cache folder."""


def measured(paths: Sequence[str], measure: Callable[[str], Any], what: str, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Numbers from the header of each file, read by 16 threads.

    Args:
        paths: the files; what is kept is read again if the path, the size or the time of one of them changes.
        measure: from a path to numbers of the given shape; it must not raise.
        what: the plural of what is measured, as in "durations".
        shape: of the numbers of one file.

    Returns:
        float64 [N, *shape].
    """

    def stamp(path: str) -> str:
        try:
            found = os.stat(path)
            return f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}\n"
        except OSError:
            return f"{os.path.abspath(path)}\n"

    def numbers(found: Any) -> np.ndarray:
        return np.array(list(found), dtype=np.float64).reshape(len(paths), *shape)

    with ThreadPoolExecutor(16) as pool:
        if len(paths) < SMALL:
            return numbers(pool.map(measure, paths))
        digest = hashlib.sha256("".join(pool.map(stamp, paths)).encode(errors="surrogatepass")).hexdigest()
        place = cache_folder() / f"{what}-{digest[:32]}.npy"
        try:
            kept = np.load(place, allow_pickle=False)
            if kept.shape == (len(paths), *shape) and kept.dtype == np.float64:
                return kept
        except (OSError, ValueError, EOFError):
            pass
        made = numbers(tqdm(pool.map(measure, paths), f"reading {what}", len(paths), unit="file", disable=None))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with aside(place.parent) as folder:
            np.save(folder / place.name, made)
            os.replace(folder / place.name, place)
    except OSError:  # a home that cannot be written: they are read again the next time
        pass
    return made
