"""Shards that are not local: read by commands or over HTTP, and kept in the cache folder."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

from filelock import FileLock

from zoo.kernels.native import cache_folder

ADDRESSES = ("http://", "https://", "pipe:")
MISSING = 'shards at an address need webdataset; run: pip install "zoo[shards]"'
SHARE = 0.5  # of the free disk, which fetched shards may fill
PIECE = 2**20


def is_address(root: str | os.PathLike[str]) -> bool:
    """Whether a root is an address and not a folder."""
    return str(root).startswith(ADDRESSES)


def read_address(place: str) -> bytes:
    """The content of a small file; OSError if it cannot be read."""
    with _stream(place) as stream:
        return stream.read()


@contextlib.contextmanager
def _stream(place: str) -> Iterator[Any]:
    try:
        from webdataset.gopen import gopen
    except ModuleNotFoundError as error:
        raise ValueError(MISSING) from error
    try:
        with gopen(place) as stream:
            yield stream
    except OSError as error:
        if status := re.search(r"exit (\d+)", str(error)):
            tool = "the command" if place.startswith("pipe:") else "curl"
            raise OSError(f"{tool} ended with status {status[1]}") from error
        raise


class Fetched:
    """The cache of an address: whole shards in a folder, of which the longest unused are removed.

    Args:
        root: the address.
    """

    def __init__(self, root: str):
        self.folder = cache_folder() / "shards" / hashlib.sha256(root.encode()).hexdigest()[:16]

    def local(self, place: str, size: int, sha256: str) -> str:
        """The path of the shard at an address, fetched if need be.

        Raises:
            OSError: it cannot be fetched, or its size or hash is not the given one.
        """
        path = self.folder / f"{sha256[:32]}.tar"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists() and path.stat().st_size == size:
                os.utime(path)  # used now
                return str(path)
            self._make_room(size)
            aside, digest, read = path.with_suffix(".new"), hashlib.sha256(), 0
            try:
                with _stream(place) as stream, open(aside, "wb") as file:
                    while (piece := stream.read(PIECE)) and read <= size:
                        file.write(piece)
                        digest.update(piece)
                        read += len(piece)
                if read != size or digest.hexdigest() != sha256:
                    what = "hash is not that" if read == size else f"{read:,} bytes are not the {size:,}"
                    raise OSError(f"its {what} of the index")
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        return str(path)

    def _make_room(self, size: int) -> None:
        kept = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in kept)
        most = SHARE * (shutil.disk_usage(self.folder).free + used)
        for path in kept:
            if used + size <= most:
                break
            used -= path.stat().st_size
            path.unlink(missing_ok=True)  # processes that have it open still read it
