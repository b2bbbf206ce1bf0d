"""Finds a checkpoint in a folder, under ./checkpoints or on the Hub; and its files."""

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from zoo.text import reason

FILES = ("README.md", "config.json", "model.safetensors", "probe.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line with the file and the reason."""


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; CheckpointError if it is not found."""
    given, name = name, os.path.expanduser(name)
    for folder in (Path(name), Path("checkpoints", name)):
        if folder.is_dir():
            return folder
        if (previous := previous_of(folder.resolve())).is_dir():  # a save was killed between its two renames
            return previous
    if str(name).lower().endswith(".nemo"):
        raise CheckpointError(f"{name} is a NeMo file; convert it with zoo.convert.from_nemo and zoo.save_model")
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder that holds {' and '.join(FILES[1:3])}")
    repository, _, revision = str(name).partition("@")
    if isinstance(given, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        from zoo.weights.hub import download

        return download(repository, revision or None)
    raise CheckpointError(f"checkpoint {str(name)!r} not found: {_where_it_is_not(str(name))}")


def _where_it_is_not(name: str) -> str:
    """Where a checkpoint was searched, and similar names."""
    from zoo.models import PRESETS

    home = Path("checkpoints").resolve()
    looked = f"{Path(name).absolute()} and {home / name} are not folders, and the name is not OWNER/NAME on the Hub"
    stored = [entry.name for entry in home.iterdir() if entry.is_dir()] if home.is_dir() else []
    if near := difflib.get_close_matches(name, [*stored, *PRESETS], n=1):
        made = f"zoo.create_model({near[0]!r}), which builds it untrained" if near[0] in PRESETS else near[0]
        return f"{looked}; did you mean {made}?"
    return looked


def previous_of(target: Path) -> Path:
    """Where a checkpoint is kept for the moment in which its successor replaces it."""
    return target.parent / f".{target.name}.previous"


def file_of(folder: Path, name: str) -> Path:
    """A file of a checkpoint; CheckpointError if it is missing."""
    path = folder / name
    if path.is_file():
        return path
    if pickles := sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in PICKLES):
        raise CheckpointError(f"{folder} holds {pickles[0]} and no {name}; only safetensors are read, never a pickle")
    raise CheckpointError(f"{folder} has no {name}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError if it is invalid or incomplete."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        kind = "is not a complete safetensors file"
        with suppress(OSError), open(path, "rb") as file:
            if file.read(2).startswith((b"\x80", b"PK")):
                kind = "seems to be a pickle, which is never read"
        raise CheckpointError(f"{path} {kind}: {reason(error)}") from error
