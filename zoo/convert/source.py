"""Files of other libraries: their configs key by key, their tensors one by one, so that nothing is left unnoticed."""

import argparse
import contextlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from zoo.text import one_line, reason

_NOT_GIVEN: Any = object()
LARGEST = 1_000_000
"""The largest number in a network's shape, so that a config cannot request more than a file can hold."""


class Section:
    """One section of a config file. Every key must be used or be known to change nothing at inference.

    A key that is missing has the default of the library that wrote the file; null has the meaning that it has there
    (`null=`), or is refused.
    """

    def __init__(self, values: Any, name: str, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} has no section '{name}'")
        self.left, self.name, self.where = dict(values), f"{name}." if name else "", where

    def take(self, key: str, kind: type, default: Any = _NOT_GIVEN, *, null: Any = _NOT_GIVEN) -> Any:
        """The value of a key; a key without a default is required. ValueError if it has another type."""
        if key not in self.left:
            if default is _NOT_GIVEN:
                raise self.refused(key, "it is missing")
            return default
        value = self.left.pop(key)
        if value is None and null is not _NOT_GIVEN:
            return null
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise self.refused(key, f"it must be {_KINDS[kind]}, got {_shown(value)}")
        return value

    def whole(self, key: str, default: Any = _NOT_GIVEN, *, null: Any = _NOT_GIVEN) -> int:
        """An integer from 1 to LARGEST."""
        if not 1 <= (value := self.take(key, int, default, null=null)) <= LARGEST:
            raise self.refused(key, f"it must be from 1 to {LARGEST:,}, got {_shown(value)}")
        return value

    def seconds(self, key: str, default: float, rate: int) -> int:
        """A time in seconds, as samples, rounded down as NeMo does."""
        value = self.take(key, float, default)
        if not 1 <= value * rate <= LARGEST:
            raise self.refused(key, f"it must be from 1 to {LARGEST:,} samples at {rate} Hz, got {_shown(value)} s")
        return int(value * rate)

    def fixed(self, key: str, *allowed: Any) -> Any:
        """The value of a key that must be one of those; the first if it is missing."""
        value = self.left.pop(key, allowed[0])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise self.refused(key, f"the zoo supports {' or '.join(map(_shown, allowed))}, not {_shown(value)}")
        return value

    def finish(self, *harmless: str) -> None:
        """ValueError if a key is unused that is not known to be harmless."""
        if unknown := [key for key in self.left if key not in harmless]:
            value = _shown(self.left[unknown[0]])
            raise self.refused(unknown[0], f"the zoo does not know this key (its value is {value})")

    def refused(self, key: Any, why: str) -> ValueError:
        return ValueError(one_line(f"{self.where}: {self.name}{key}: {why}"))


_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _shown(value: Any) -> str:
    """A value as config files spell it, shortened if it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)[:80]


def refusal(error: Exception) -> str:
    """Why torch.load did not read a file, without its advice to read it with weights_only=False."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values; that could run code and is never read"
    return reason(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason(error)}"


CLAIMED = 4
"""The most bytes of all tensors of a file, as a multiple of its size: some share their values."""
_FILLED = (b"__builtin__\nbytearray\n", b"builtins\nbytearray\n")  # made of a number, it is that many bytes of zeros
_CHUNK = 1 << 24


def loaded(source: Path | io.BytesIO, classes: Sequence[type] = ()) -> Any:
    """What torch.save wrote to a file or to memory. Only tensors, plain values and these classes are read; raises
    errors of many kinds. What would become larger than the file is refused before it is read."""
    with contextlib.nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        _check_parts(file)
        file.seek(0)
    with torch.serialization.safe_globals([*classes]):
        return torch.load(source, map_location="cpu", weights_only=True)


def _check_parts(file: IO[bytes]) -> None:
    """ValueError if a file of torch.save has parts that expand, or asks for memory by a mere number."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(each.compress_type for each in entries) or sum(each.file_size for each in entries) > size:
            raise ValueError("its parts are compressed or overlap, which torch.save never writes")
    file.seek(0)
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:"):
        raise ValueError("it is a tar archive, which PyTorch wrote before version 0.2; save its state dict again")
    file.seek(0)
    end = b""
    while chunk := file.read(_CHUNK):
        if any(word in end + chunk for word in _FILLED):
            raise ValueError("it holds a bytearray, which tensors and plain values do not need")
        end = chunk[-32:]


def check_claims(tensors: Mapping[str, Tensor], size: int, where: str) -> None:
    """ValueError if tensors have far more values than a file of this size can hold: nothing was allocated for them yet,
    but copies of them would be."""
    if sum(each.numel() * each.element_size() for each in tensors.values()) > CLAIMED * size:
        raise ValueError(f"{where}: its tensors claim far more values than it stores")


def state_dict_of(path: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """The state dict in a file of PyTorch, of which only tensors and plain values are read: under one of the keys, the
    first that is there, then inside that again, or at the top.

    ValueError, in one line, if it cannot be read or holds none, or if its tensors claim more than CLAIMED times its
    size.
    """
    try:
        found, size = loaded(path, [argparse.Namespace]), path.stat().st_size
    except Exception as error:  # of the system, of zip files, and of what the file asks for
        raise ValueError(one_line(f"{path} cannot be read: {refusal(error)}", 300)) from error
    for key in keys:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f"{path} holds no state dict, neither at the top nor under {' or '.join(map(repr, keys))}")
    state = {str(name): tensor for name, tensor in found.items()}
    check_claims(state, size, str(path))
    return state


class Source:
    """The tensors of a file, in the widest dtype among them. Each must be used once; counts of batches are dropped.

    ValueError, in one line, if a tensor is missing, unused, of a wrong shape, not of floating-point numbers, or NaN or
    infinite.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.where = where
        self.left = {name: each for name, each in tensors.items() if not name.endswith(".num_batches_tracked")}
        dtype, self.device = None, torch.device("cpu")
        for name, tensor in self.left.items():
            if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
                raise ValueError(f"{where}: '{name}' must be a floating-point tensor, got {tensor.dtype}")
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
            self.device = tensor.device
        self.dtype = dtype or torch.float32

    def take(self, names: Sequence[str], shape: torch.Size) -> Tensor:
        """A new tensor of this shape, that these are, joined; each may have further axes of length 1."""
        return torch.cat([self._one(name, shape[0] // len(names), *shape[1:]) for name in names])

    def _one(self, name: str, *shape: int) -> Tensor:
        if name not in self.left:
            raise ValueError(f"{self.where}: the tensor '{name}' is missing")
        value = self.left.pop(name).detach()
        if value.shape[: len(shape)] != shape or value.shape[len(shape) :].numel() != 1:
            found, wanted = list(value.shape), list(shape)
            raise ValueError(f"{self.where}: '{name}' has shape {found}, but this model needs {wanted}")
        if not value.isfinite().all():
            raise ValueError(f"{self.where}: '{name}' is NaN or infinite")
        return value.reshape(shape).to(self.dtype)

    def finish(self) -> None:
        """ValueError if a tensor was not used."""
        if self.left:
            raise ValueError(f"{self.where}: the tensor '{next(iter(self.left))}' is not used by this model")
