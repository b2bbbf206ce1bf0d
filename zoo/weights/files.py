"""The files of a checkpoint: which there are, their hashes, and how tensors are read from them."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from zoo.quick import FILES
from zoo.text import reason

TENSORS = FILES[2:]
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
CHUNK = 1 << 24  # bytes that are read and hashed at a time


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line with the file and the reason."""


def file_of(folder: Path, name: str) -> Path:
    """A file of a checkpoint; CheckpointError if it is missing or cannot be read."""
    path = folder / name
    try:
        if path.is_file():
            with open(path, "rb"):
                return path
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in PICKLES)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {reason(error)}") from error
    if pickles:
        raise CheckpointError(f"{folder} holds {pickles[0]} and no {name}; only safetensors are read, never a pickle")
    raise CheckpointError(f"{folder} has no {name}")


def record(path: Path) -> dict[str, Any]:
    """The size in bytes and the sha256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_tensors(path: Path, wanted: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own, so that the file may change afterwards.

    Args:
        path: the file.
        wanted: its `record`, if known.

    Raises:
        CheckpointError: the file is invalid, incomplete, or not the wanted one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if wanted is not None and (size := path.stat().st_size) != wanted["size"]:
            raise ValueError(f"it has {size:,} bytes, but config.json says {wanted['size']:,}; {AGAIN}")
        with safe_open(path, "pt") as given:  # checks the header and the size; the values stay on the disk
            parts = {name: given.get_slice(name) for name in given.keys()}  # noqa: SIM118 (it is no dict)
            dtypes = {name: part.get_dtype() for name, part in parts.items()}
        if odd := sorted({*dtypes.values()} - DTYPES.keys()):
            raise ValueError(f"dtype {odd[0]} is not supported, only {', '.join(DTYPES)}")
        with open(path, "rb") as file:
            tensors, sha256 = _values(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        kind = "is not a complete safetensors file"
        with suppress(OSError), open(path, "rb") as file:
            if file.read(2).startswith((b"\x80", b"PK")):
                kind = "seems to be a pickle, which is never read"
        raise CheckpointError(f"{path} {kind}: {reason(error)}") from error
    if wanted is not None and sha256 != wanted["sha256"]:
        raise CheckpointError(f"{path} is not the file that config.json describes: its sha256 differs; {AGAIN}")
    return tensors


AGAIN = "download or save the checkpoint again"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}


def _values(file: IO[bytes]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file whose header is valid, and the sha256 of the file. Each is read straight into
    its own memory: a mapped file would count twice."""
    hashed = hashlib.sha256()

    def take(number: int) -> bytes:
        got = file.read(number)
        if len(got) != number:
            raise OSError("it ends too early")
        hashed.update(got)
        return got

    header = json.loads(take(int.from_bytes(take(8), "little")))
    header.pop("__metadata__", None)
    found: dict[str, Tensor] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="cpu")
        start, end = entry["data_offsets"]
        if tensor.nbytes != end - start:
            raise OSError(f"'{name}' has {end - start} bytes, but its shape needs {tensor.nbytes}")
        room: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        for first in range(0, len(room), CHUNK):
            part = room[first : first + CHUNK]
            if file.readinto(part) != len(part):  # pyright: ignore[reportAttributeAccessIssue]
                raise OSError("it ends too early")
            hashed.update(part)
        found[name] = tensor
    hashed.update(file.read())
    return found, hashed.hexdigest()


def sync_folder(folder: Path) -> None:
    """Asks the system to keep a folder's entries through a loss of power."""
    with suppress(OSError):  # not every system can open or sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
