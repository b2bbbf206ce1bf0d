"""Data in tars and an index, as `zoo shard` writes them: what the index holds, and files read at its offsets."""

import bisect
import hashlib
import itertools
import math
import os
import re
import shlex
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from zoo.data.fetching import Fetched, OtherShard, Tar, is_address, read_address
from zoo.data.strings import Strings
from zoo.text import counted, from_json, one_line, plain, reason

INDEX = "shards.json"
UNFINISHED = ".unfinished.json"  # what `zoo shard` has begun, until the index is written
BLOCK = 512  # bytes of a header in a tar, and of what files are padded to
MOST_OPEN = 32  # tars that a process holds open
AGAIN = 300.0  # seconds after which a tar that could not be opened is tried again
KINDS = {"images": "classify or generate", "boxes": "detect", "speech": "transcribe"}
BESIDE = ("cls", "json", "txt")  # extensions of what is stored beside a file
IMAGES = {"ids": ("i", ()), "sizes": ("i", (2,))}
OBJECTS = {
    "labels_of": ("i", ()),
    "boxes": ("f", (4,)),
    "areas": ("f", ()),
    "object_ids": ("i", ()),
    "crowd": ("b", ()),
}
"""The arrays of a source of images with objects: of its images, and of its objects; the kind of their dtype, and the
shape of a row."""
ROWS = {
    "images": {"label": ("i", ())},
    "boxes": IMAGES,
    "speech": {"file": ("i", ()), "start": ("f", ()), "seconds": ("f", ()), "duration": ("f", ())},
}
"""What samples need besides their files, by kind, where a row is a file or an utterance."""
LONGEST = 1e9  # seconds of a file
STRINGS = ("text", "utterance")  # what speech has besides
HASH = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # an address may be a command, to which names are appended
NAMED = 10  # damaged shards that are named


@dataclass(frozen=True)
class Shard:
    """A tar: its name, its size in bytes, its hash, and the number of its files that the index lists."""

    name: str
    size: int
    sha256: str
    files: int


@dataclass(frozen=True)
class Part:
    """A split: its shards, and the name and hash of the file with what its samples need."""

    shards: tuple[Shard, ...]
    arrays: str
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of shards.json, and its hash. `classes` are the names of classes or categories, and `ids` the numbers
    of categories."""

    kind: str
    classes: list[str]
    ids: list[int]
    parts: dict[str, Part]
    digest: str


def read_index(root: str) -> Index:
    """The index below a folder or an address; ValueError, in one line, if it is missing or invalid."""
    place = joined(root, INDEX)
    try:
        content = read_address(place) if is_address(root) else Path(place).read_bytes()
    except FileNotFoundError:
        raise ValueError(_missing(Path(root).expanduser())) from None
    except OSError as error:
        raise ValueError(f"cannot read {place}: {reason(error)}") from error
    try:
        return _index(from_json(content), hashlib.sha256(content).hexdigest())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else reason(error)
        raise ValueError(one_line(f"{place} is not the index of shards: {why}; run `zoo shard` again")) from error


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        words = shlex.split(from_json((folder / UNFINISHED).read_bytes())["command"])
        if words[:2] != ["zoo", "shard"]:
            raise ValueError("another command")
        return one_line(f"the shards in {folder} are not finished; continue with: {shlex.join(words)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{folder} has no {INDEX}; write shards with: zoo shard FOLDER {folder}"


def _index(found: Any, digest: str) -> Index:
    if found["format"] != 1:
        raise ValueError(f"format must be 1, got {one_line(repr(found['format']), 60)}")
    parts = {}
    for split, each in found["splits"].items():
        shards = tuple(Shard(**shard) for shard in each["shards"])
        parts[split] = Part(shards, each["arrays"], each["sha256"])
        for name in (each["arrays"], *(shard.name for shard in shards)):
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{one_line(repr(name), 60)} is not the name of a file")
        if not all(HASH.fullmatch(each.sha256) for each in (parts[split], *shards)):
            raise ValueError(f"the hashes of {split!r} must have 64 hexadecimal digits")
        numbers = [number for shard in shards for number in (shard.size, shard.files)]
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"the sizes and files of the shards of {split!r} must be integers >= 0")
    kind, classes, ids = (found[name] for name in ("kind", "classes", "ids"))
    if kind not in KINDS or not _list_of(str, classes) or not _list_of(int, ids):
        raise ValueError(f"kind must be {', '.join(KINDS)}, classes a list of names, and ids a list of integers")
    return Index(kind, classes, ids, parts, digest)


def _list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def joined(root: str, name: str) -> str:
    """The path or address of a file below a folder or an address."""
    return f"{root.rstrip('/')}/{name}" if is_address(root) else str(Path(root).expanduser() / name)


def member(number: int, name: str) -> tuple[str, str]:
    """The key and the extension in the tar of the file `name`, which is the one of that number in its split."""
    extension = os.path.splitext(name)[1][1:].lower()
    usable = re.fullmatch("[a-z0-9]{1,16}", extension) and extension not in BESIDE
    return f"{number:09d}", extension if usable else "bin"


class Shards:
    """The files of a split of shards, in the order of the index.

    What a worker process holds is the index, as arrays, and at most `MOST_OPEN` open tars. Shards that are missing or
    truncated are reported in one warning; their files are not among `kept`.

    Args:
        root: the folder of the shards, or an address: http, https, or `pipe:` and a command that ends in a folder.
        split: its name.
        kind: one of `KINDS`.
        error: the exception for a file that is damaged.

    Attributes:
        arrays: what the samples need.
        kept: the numbers of the files that can be read, int64 [N].
        groups: where in `kept` the files of each shard begin, and their end, int64.
        fingerprint: a hash of the index, and the number and a checksum of `kept`.

    Raises:
        ValueError: the index is missing or invalid, it is of another kind, it lacks the split, or no file can be read.
    """

    def __init__(self, root: str, split: str, kind: str, error: type[ValueError]):
        self.root, self.split, self.error, self.index = root, split, error, read_index(root)
        if self.index.kind != kind:
            raise ValueError(f"{root} holds {self.index.kind}, for `zoo {KINDS[self.index.kind]}`, not {kind}")
        if split not in self.index.parts:
            raise ValueError(f"{root} has no split {split!r}; it has {', '.join(self.index.parts)}")
        part = self.index.parts[split]
        self.fetched = Fetched(root) if is_address(root) else None
        self.places = [joined(root, shard.name) for shard in part.shards]
        self.sizes = [shard.size for shard in part.shards]
        self.hashes = [shard.sha256 for shard in part.shards]
        self.first = [0, *itertools.accumulate(shard.files for shard in part.shards)]
        self.arrays = self._arrays(part)
        try:
            self.names = Strings.of(self.arrays.pop("name"), self.arrays.pop("name_ends"))
            self.offset, self.length, self.crc = (self.arrays.pop(name) for name in ("offset", "length", "crc"))
            self._check()
        except (KeyError, ValueError, TypeError) as fault:
            why = f"it has no {fault}" if isinstance(fault, KeyError) else reason(fault)
            place = joined(root, part.arrays)
            raise ValueError(f"{place} does not fit {INDEX}: {why}; run `zoo shard` again") from fault
        self.kept = self._kept()
        self.groups = np.searchsorted(self.kept, self.first)
        self.fingerprint = f"{self.index.digest}, {len(self.kept)} files, {zlib.crc32(self.kept.tobytes()):08x}"
        self._open: dict[int, Tar] = {}
        self._failed: dict[int, tuple[str, float]] = {}  # why, and until when it is not opened again
        self._checked = np.zeros(self.first[-1], dtype=bool)

    def _arrays(self, part: Part) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        place = joined(self.root, part.arrays)
        try:
            content = Path(place).read_bytes() if self.fetched is None else read_address(place)
        except OSError as error:
            raise ValueError(f"cannot read {place}: {reason(error)}") from error
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise ValueError(f"{place} does not match {INDEX}; run `zoo shard` again")
        try:
            return load(content)
        except SafetensorError as error:
            raise ValueError(f"{place}: {one_line(error)}") from error

    def _check(self) -> None:
        """ValueError or KeyError if the arrays are not those of the kind, or of another number of files."""
        columns = (self.offset, self.length, self.crc)
        if {len(self.names), *map(len, columns)} != {self.first[-1]}:
            raise ValueError("they have different numbers of files")
        if any(column.ndim != 1 or column.dtype.kind not in "iu" for column in columns):
            raise ValueError("offsets, lengths and checksums must be integers")
        sizes = np.repeat(np.array(self.sizes, dtype=np.int64), np.diff(self.first))
        if not ((self.offset >= BLOCK) & (self.length >= 0) & (self.length <= sizes - self.offset)).all():
            raise ValueError("an offset is outside its tar")
        count, rows = self.first[-1], ROWS[self.index.kind]
        if self.index.kind == "speech":
            texts, names = (Strings.of(self.arrays[name], self.arrays[f"{name}_ends"]) for name in STRINGS)
            if len(names) != (count := len(texts)):
                raise ValueError("they have different numbers of utterances")
        self._check_rows(rows, count)
        if self.index.kind == "speech":
            start, seconds = self.arrays["start"], self.arrays["seconds"]
            if not ((start >= 0) & (start < LONGEST) & ~((seconds < 0) | (seconds >= LONGEST))).all():
                raise ValueError("a start or a duration is none of a file")
        if self.index.kind == "boxes":
            self._check_rows({"starts": ("i", ())}, count + 1)
            starts = self.arrays["starts"]
            if starts[0] != 0 or (np.diff(starts) < 0).any():
                raise ValueError("starts must rise from 0")
            self._check_rows(OBJECTS, int(starts[-1]))
            labels = self.arrays["labels_of"]
            if not ((labels >= 0) & (labels < len(self.index.classes))).all():
                raise ValueError(f"labels are none of the {len(self.index.classes)} classes")
            if not (np.isfinite(self.arrays["boxes"]).all() and (self.arrays["sizes"] > 0).all()):
                raise ValueError("boxes must be finite, and sizes above 0")

    def _check_rows(self, rows: Mapping[str, tuple[str, tuple[int, ...]]], count: int) -> None:
        """ValueError or KeyError unless there are arrays of these kinds and shapes."""
        for name, (kind, shape) in rows.items():
            array = self.arrays[name]
            if array.dtype.kind != kind or array.shape != (count, *shape):
                raise ValueError(f"{name!r} has another dtype or shape")

    def _kept(self) -> np.ndarray:
        kept = np.ones(self.first[-1], dtype=bool)
        faults = []
        for shard, place in enumerate(self.places if self.fetched is None else ()):
            try:
                size = os.stat(place).st_size
            except OSError as error:
                size, why = 0, reason(error)
            else:
                why = f"{size:,} bytes instead of {self.sizes[shard]:,}"
            if size == self.sizes[shard]:
                continue
            files = slice(self.first[shard], self.first[shard + 1])
            # Of a truncated tar the beginning can be read; a longer one is another.
            kept[files] = (self.offset[files] + self.length[files] <= size) & (size < self.sizes[shard])
            faults.append(f"{place}: {why}")
        if faults:
            omitted = counted(int((~kept).sum()), "file")
            named = faults[:NAMED] + [f"{len(faults) - NAMED} more"] * (len(faults) > NAMED)
            number = counted(len(faults), "damaged shard")
            said = f"{self.root}: omitted {omitted} of {number} ({'; '.join(named)})"
            if not kept.any():
                raise ValueError(plain(f"{said}; none is left of {self.split!r}"))
            rank_zero_warn(plain(said))
        return np.flatnonzero(kept)

    def name(self, number: int) -> str:
        """The tar of a file, and the name that the file had."""
        return f"{self.places[bisect.bisect_right(self.first, number) - 1]}: {self.names[number]}"

    def read(self, number: int) -> bytes:
        """The bytes of a file; `error`, with its name and the reason, if they are not those that were packed.

        A process compares the checksum of a file when it first reads it.
        """
        shard = bisect.bisect_right(self.first, number) - 1
        offset, length = self.offset.item(number), self.length.item(number)
        try:
            found = read_at(self._opened(shard), BLOCK + length, offset - BLOCK)
        except OSError as error:
            raise self.error(f"{self.name(number)}: {reason(error)}") from error
        # A header begins with the name, and has the length as octal digits.
        if found[:10] != b"%09d." % number or found[124:135] != b"%011o" % length:
            raise self.error(f"{self.name(number)}: the tar is not that of the index, or is truncated")
        content = found[BLOCK:]
        if not self._checked.item(number):
            if zlib.crc32(content) != self.crc.item(number):
                raise self.error(f"{self.name(number)}: damaged, its checksum is wrong")
            self._checked[number] = True
        return content

    def _opened(self, shard: int) -> int:
        """The descriptor of a tar, of which the last used stay open; positions are not shared, so forks may use it."""
        tar = self._open.pop(shard, None)
        if tar is None:
            why, until = self._failed.get(shard, ("", 0.0))
            if time.monotonic() < until:
                raise OSError(why)
            place = self.places[shard]
            try:
                if self.fetched is None:
                    tar = Tar(place)
                else:
                    tar = self.fetched.opened(place, self.sizes[shard], self.hashes[shard])
            except OSError as error:
                lasting = isinstance(error, OtherShard)
                self._failed[shard] = reason(error), math.inf if lasting else time.monotonic() + AGAIN
                raise
            while len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
        self._open[shard] = tar
        return tar.descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def read_at(file: int, length: int, offset: int) -> bytes:
    """Bytes of an open file, fewer at its end; one call of the system reads at most 2 GiB."""
    found = os.pread(file, length, offset)
    while 0 < len(found) < length and (more := os.pread(file, length - len(found), offset + len(found))):
        found += more
    return found


def is_packed(root: str | os.PathLike[str]) -> bool:
    """Whether a root is a folder of finished shards, or an address."""
    return is_address(root) or Path(root, INDEX).expanduser().is_file()
