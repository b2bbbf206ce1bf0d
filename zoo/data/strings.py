"""Many strings in two arrays: worker processes share them, where a list of strings would be copied."""

from collections.abc import Iterable
from typing import Self

import numpy as np


class Strings:
    """Strings as the bytes of all, uint8, and where each ends, int64 [N + 1]."""

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode(errors="surrogatepass") for string in strings]
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def of(cls, bytes: np.ndarray, ends: np.ndarray) -> Self:
        """Strings from their two arrays; ValueError if they do not fit."""
        if (bytes.dtype.kind, ends.dtype.kind, bytes.ndim, ends.ndim) != ("u", "i", 1, 1) or bytes.itemsize != 1:
            raise ValueError("strings must be bytes and where each ends")
        if not len(ends) or ends[0] != 0 or ends[-1] != len(bytes) or (np.diff(ends) < 0).any():
            raise ValueError("the ends of strings must rise from 0 to the number of bytes")
        found = cls(())
        found.bytes, found.ends = bytes, ends
        return found

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode(errors="surrogatepass")
