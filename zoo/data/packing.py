"""Writes the files of data sets into tars, as they are: the plan of which file goes where, the tars, and the index."""

import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from zoo.data.shards import BLOCK, INDEX, UNFINISHED, Index, Shard, member, read_index
from zoo.data.strings import Strings
from zoo.text import counted, from_json, one_line, plain, reason

LOCK = ".lock"
RECORD = 20 * BLOCK  # the size of a tar is a multiple of it
MISSING = 'zoo shard needs webdataset; run: pip install "zoo[shards]"'


@dataclass
class Split:
    """A split to be packed, in the order of the index.

    Args:
        name: as `data.train` or `data.val` will name it.
        paths: each file once.
        names: of the files in messages.
        arrays: what the samples need, besides their files.
        beside: from the number of a file to what is stored beside it, by extension.
    """

    name: str
    paths: Sequence[str] | Strings
    names: Strings
    arrays: dict[str, np.ndarray]
    beside: Callable[[int], dict[str, bytes]]


class Layout(NamedTuple):
    """Data to pack, of one of `KINDS`: the names of its classes or categories, the numbers of the categories of boxes,
    and its splits."""

    kind: str
    classes: Sequence[str]
    ids: Sequence[int]
    splits: list[Split]


@dataclass
class Plan:
    """Where the files of a split will be: their offsets and lengths, int64 [N], and for each tar its name, its first
    file and the one behind its last, and its size in bytes."""

    split: Split
    prefix: str
    offset: np.ndarray
    length: np.ndarray
    tars: list[tuple[str, int, int, int]]
    print: str  # a hash of all that the tars depend on
    crc: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint32))


def planned(split: Split, prefix: str, most: int) -> Plan:
    """Which files go into which tars of at most `most` bytes; ValueError if a file is larger or cannot be read."""
    digest = hashlib.sha256(repr((split.name, most)).encode())
    for name in sorted(split.arrays):
        digest.update(split.arrays[name].tobytes())
    offset, length, total = (np.zeros(len(split.paths), dtype=np.int64) for _ in range(3))
    for number in tqdm(range(len(split.paths)), "planning", unit="file", disable=None):
        path = split.paths[number]
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(plain(f"cannot read {path}: {reason(error)}")) from error
        extension = member(number, split.names[number])[1]
        beside = split.beside(number)
        for each in sorted([extension, *beside]):
            if each == extension:
                offset[number] = total[number] + BLOCK
            size = status.st_size if each == extension else len(beside[each])
            total[number] += BLOCK + _padded(size, BLOCK)
        length[number] = status.st_size
        digest.update(repr((path, status.st_size, status.st_mtime_ns, beside)).encode(errors="surrogatepass"))
    space = most // RECORD * RECORD - 2 * BLOCK
    if (total > space).any():
        largest = int(total.argmax())
        name, size = split.paths[largest], _padded(int(total[largest]) + 2 * BLOCK, RECORD)
        raise ValueError(plain(f"--size {most:,} bytes is too small: {name} needs {size:,} in a tar"))
    ends = np.concatenate([[0], total.cumsum()])
    tars, start = [], 0
    while start < len(total):
        end = int(np.searchsorted(ends, ends[start] + space, side="right")) - 1
        offset[start:end] += ends[start:end] - ends[start]
        size = _padded(int(ends[end] - ends[start]) + 2 * BLOCK, RECORD)
        tars.append((f"{prefix}-{len(tars):06d}.tar", start, end, size))
        start = end
    return Plan(split, prefix, offset, length, tars, digest.hexdigest())


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def pack(output: Path, data: Layout, most: int, command: str) -> Index:
    """Packs data into tars in `output` of at most `most` bytes each. What an earlier call with the same data and `most`
    has finished is kept; `command` is how to continue.

    Raises:
        ValueError: a file is larger than `most`, `output` holds something else, or another process writes there.
        OSError: a file changes, or the disk is full; the call can be repeated.
    """
    _check_unfinished(output)
    begun = output / UNFINISHED
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"{output} is not a folder; choose another OUT")
    own = {LOCK, UNFINISHED, f".{UNFINISHED}.new"}
    if output.is_dir() and not begun.exists() and {path.name for path in output.iterdir()} - own:
        raise ValueError(f"{output} is not empty; choose another OUT")
    if find_spec("webdataset") is None:
        raise ValueError(MISSING)
    plans = _plans(data.splits, most)
    _check_disk(output, plans)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        _check_unfinished(output)  # again: another process may have finished while this one was planning
        try:
            prints = {plan.prefix: plan.print for plan in plans}
            _drop_others(output, begun, prints)
            _write(begun, json.dumps({"command": command, "prints": prints}).encode())
            files = sum(len(plan.length) for plan in plans)
            with tqdm(total=files, desc="packing", unit="file", disable=None) as bar:
                parts = {plan.split.name: _packed(output, plan, bar) for plan in plans}
            classes = {"kind": data.kind, "classes": list(data.classes), "ids": list(data.ids)}
            content = {"format": 1, **classes, "splits": parts}
            _write(output / INDEX, json.dumps(content, indent=1).encode())
        except OSError as error:
            why = f"{reason(error)}; what is packed is kept, continue with: {command}"
            raise OSError(plain(f"cannot pack into {output}: {why}")) from error
        except KeyboardInterrupt:
            print(plain(f"zoo: stopped; what is packed is kept, continue with: {command}"), file=sys.stderr)
            raise
        begun.unlink()
        (output / LOCK).unlink()
    return read_index(str(output))


def _check_unfinished(output: Path) -> None:
    if (output / INDEX).exists():
        raise ValueError(f"{output} holds finished shards; delete it or choose another OUT")


def _plans(splits: Sequence[Split], most: int) -> list[Plan]:
    plans: list[Plan] = []
    for split in splits:
        prefix = re.sub(r"[^A-Za-z0-9_-]|^-", "_", split.name)
        if any(plan.prefix == prefix for plan in plans):
            prefix += f"_{len(plans)}"
        plans.append(planned(split, prefix, most))
    return plans


def _check_disk(output: Path, plans: Sequence[Plan]) -> None:
    place = next(each for each in (output, *output.absolute().parents) if each.is_dir())
    tars = [(output / name, size) for plan in plans for name, _, _, size in plan.tars]
    needed, free = sum(size for path, size in tars if not path.exists()), shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(f"{output} needs {needed:,} bytes of disk, and {free:,} are free")


def _locked(output: Path) -> Any:
    lock = FileLock(output / LOCK)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another `zoo shard` is writing into {output}") from None


def _drop_others(output: Path, begun: Path, prints: Mapping[str, str]) -> None:
    """Removes the tars of other data or another size, and what was not finished."""
    try:
        before = from_json(begun.read_bytes())["prints"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    same = [prefix for prefix in prints if before.get(prefix) == prints[prefix]]
    for path in output.iterdir():
        tar = re.fullmatch(r"(.+)-\d{6}\.tar", path.name)
        old = tar is not None and tar[1] in {*before, *prints} and tar[1] not in same
        if old or path.name.startswith(".") and path.name.endswith(".new"):
            path.unlink()


def _packed(output: Path, plan: Plan, bar: Any) -> dict[str, Any]:
    """Writes the tars of a split and its arrays; what the index says of them."""
    from safetensors.numpy import save

    plan.crc, shards = np.zeros(len(plan.length), dtype=np.uint32), []
    for name, start, end, size in plan.tars:
        path = output / name
        if not path.exists() or path.stat().st_size != size:
            _write_tar(path, plan, start, end, size)
        shards.append(asdict(Shard(name, size, _measured(path, plan, start, end), end - start)))
        bar.update(end - start)
    arrays = {"offset": plan.offset, "length": plan.length, "crc": plan.crc, **plan.split.arrays}
    arrays |= {"name": plan.split.names.bytes, "name_ends": plan.split.names.ends}
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    _write(output / f"{plan.prefix}.safetensors", content)
    return {"shards": shards, "arrays": f"{plan.prefix}.safetensors", "sha256": hashlib.sha256(content).hexdigest()}


def _write_tar(path: Path, plan: Plan, start: int, end: int, size: int) -> None:
    from webdataset.writer import TarWriter

    aside, split = path.with_name(f".{path.name}.new"), plan.split
    with open(aside, "wb") as file:
        with TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for number in range(start, end):
                key, extension = member(number, split.names[number])
                content = Path(split.paths[number]).read_bytes()
                if len(content) != plan.length[number]:
                    raise OSError(f"{split.paths[number]} changed meanwhile")
                tar.write({"__key__": key, extension: content, **split.beside(number)})
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != size:
            raise RuntimeError(f"{path} has {file.tell()} bytes, but {size} were planned")
    os.replace(aside, path)


def _measured(path: Path, plan: Plan, start: int, end: int) -> str:
    """The hash of a tar; also sets the checksums of its files."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        for number in range(start, end):
            offset = int(plan.offset[number])
            plan.crc[number] = zlib.crc32(view[offset : offset + int(plan.length[number])])
        return hashlib.sha256(view).hexdigest()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the files of finished shards, file by file: missing, another size, another hash."""
    index = read_index(str(folder))
    wanted = {part.arrays: (None, part.sha256) for part in index.parts.values()}
    wanted |= {shard.name: (shard.size, shard.sha256) for part in index.parts.values() for shard in part.shards}
    for name, (size, sha256) in tqdm(wanted.items(), "checking", unit="file", disable=None):
        path = folder / name
        try:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if size is not None and found != size:
                    yield f"{path}: {found:,} bytes instead of {size:,}"
                elif hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    yield f"{path}: its hash is not that of the index"
        except OSError as error:
            yield f"{path}: {reason(error)}"


def described(index: Index) -> str:
    """The content of shards in one line."""
    parts = []
    for name, part in index.parts.items():
        files = counted(sum(shard.files for shard in part.shards), "file")
        parts.append(f"{one_line(name, 60)} {files} in {counted(len(part.shards), 'shard')}")
    return f"{index.kind}: {', '.join(parts)}"
