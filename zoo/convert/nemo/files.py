"""The files inside a `.nemo` archive, read with limits: a small archive cannot cause large use of memory or time,
nothing is written to disk, and no code is run."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from zoo.convert.source import check_claims, loaded, refusal
from zoo.text import one_line

HEADER, PIECES, MEMBERS = 2**20, 2**26, 10_000
"""The most bytes of a header of the archive and of a sentencepiece model, and files of an archive."""
EXPANDED, SPARE = 50, 2**26
"""An archive expands to at most EXPANDED times its size and SPARE bytes."""


class _Bounded(io.BufferedIOBase):
    """A file that refuses to read more than `most` bytes at once, as headers of an archive may request any number."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.most = file, HEADER

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.most:
            raise tarfile.ReadError(f"a part of more than {self.most} bytes")
        return self.file.read(size)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)


class Archive:
    """The plain files of an archive by name, without "./" in front."""

    def __init__(self, path: Path, bounded: _Bounded, tar: tarfile.TarFile) -> None:
        self.path, self.bounded, self.tar = path, bounded, tar
        self.members: dict[str, tarfile.TarInfo] = {}
        total, allowed = 0, EXPANDED * path.stat().st_size + SPARE
        for number, member in enumerate(tar):
            total += member.size
            if total > allowed or number == MEMBERS:
                raise ValueError(
                    f"{path} is refused: it expands to far more than its own size, or holds too many files"
                )
            parts = [part for part in member.name.replace("\\", "/").split("/") if part != "."]
            if not parts or parts[0] == "" or ".." in parts or not (member.isfile() or member.isdir()):
                raise ValueError(
                    one_line(f"{path} is not a NeMo model: its member {member.name!r} is not a plain file")
                )
            if member.isfile():
                self.members["/".join(parts)] = member

    def content(self, name: str, most: int | None = None) -> bytes:
        """The bytes of a file; ValueError if there are more than `most`."""
        if name not in self.members:
            raise ValueError(f"{self.path} is not a NeMo model: it has no {name}")
        member = self.members[name]
        if most is not None and member.size > most:
            raise ValueError(one_line(f"{self.path}: {name} has {member.size:,} bytes; at most {most:,} are read"))
        file = self.tar.extractfile(member)
        assert file is not None  # it is a plain file
        self.bounded.most = max(HEADER, member.size)
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive, plain or compressed by gzip; ValueError in one line where it cannot be read."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            bounded = _Bounded(gzip.GzipFile(fileobj=raw) if packed else raw)  # pyright: ignore[reportArgumentType]
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                yield Archive(path, bounded, tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(one_line(f"{path} cannot be read as a .nemo archive: {error}")) from error


def tensors_of(content: bytes, where: str) -> dict[str, Tensor]:
    """The tensors by name that torch.save wrote; ValueError if there is anything else, or more than is stored."""
    try:
        found = loaded(io.BytesIO(content))
    except Exception as error:  # unpickling other data raises errors of many kinds
        raise ValueError(one_line(f"{where} is not a complete file of plain tensors: {refusal(error)}")) from error
    tensors = named(found, where)
    check_claims(tensors, len(content), where)
    return tensors


def named(loaded: Any, where: str) -> dict[str, Tensor]:
    """A state dict as a plain dict; ValueError if it holds anything but tensors by name."""
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{where} holds no tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(one_line(f"{where} holds {name!r}, which is not a tensor with a name"))
    return dict(loaded)
