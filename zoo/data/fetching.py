"""Shards that are not local: read by commands or over HTTP, and kept in the cache folder."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from zoo.aside import aside
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
            command = place.startswith("pipe:")
            raise OSError(f"{'the command' if command else 'curl'} ended with status {status[1]}") from error
        raise


class OtherShard(OSError):
    """A shard whose size or hash is not that of the index."""


class Tar:
    """An open file, which is closed with the last reference to it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was not opened
            os.close(self.descriptor)


class Fetched:
    """The cache of an address: whole shards in a folder, of which the longest unused are removed.

    Processes share it. They open a shard before another one could remove it, and read on if it is removed.

    Args:
        root: the address.
    """

    def __init__(self, root: str):
        self.folder = cache_folder() / "shards" / hashlib.sha256(root.encode()).hexdigest()[:16]

    def opened(self, place: str, size: int, sha256: str) -> Tar:
        """The shard at an address, open, fetched if need be.

        Raises:
            OtherShard: its size or hash is not the given one.
            OSError: it cannot be fetched now.
        """
        path = self.folder / f"{sha256[:32]}.tar"
        lock = path.with_suffix(".lock")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # so that it is fetched once; if it were fetched twice, nothing else would be wrong
            try:
                return _kept(path, size) or self._fetched(place, path, size, sha256)
            finally:
                lock.unlink(missing_ok=True)

    def _fetched(self, place: str, path: Path, size: int, sha256: str) -> Tar:
        self._make_room(size)
        digest, read = hashlib.sha256(), 0
        with aside(self.folder) as empty:
            with _stream(place) as stream, open(empty / path.name, "wb") as file:
                while (piece := stream.read(PIECE)) and read <= size:
                    file.write(piece)
                    digest.update(piece)
                    read += len(piece)
            if read != size or digest.hexdigest() != sha256:
                what = "hash is not that" if read == size else f"{read:,} bytes are not the {size:,}"
                raise OtherShard(f"its {what} of the index")
            tar = Tar(empty / path.name)
            os.replace(empty / path.name, path)
            return tar

    def _make_room(self, size: int) -> None:
        kept = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
        used = sum(each for _, each, _ in kept)
        most = SHARE * (shutil.disk_usage(self.folder).free + used)
        for _, each, path in sorted(kept):
            if used + size <= most:
                break
            used -= each
            path.unlink(missing_ok=True)


def _kept(path: Path, size: int) -> Tar | None:
    """A shard of the cache, open, as used now; None if it is not there or has another size."""
    with contextlib.suppress(FileNotFoundError):
        tar = Tar(path)
        if os.fstat(tar.descriptor).st_size == size:
            os.utime(tar.descriptor)
            return tar
    return None
