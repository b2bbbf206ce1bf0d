"""Finds a checkpoint in a folder, under ./checkpoints or on the Hub; and its files."""

import os
import re
from pathlib import Path

from zoo.text import near
from zoo.weights.files import FILES, CheckpointError


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
    if config := _config_of(Path(name)):
        command = f"zoo {config.parent.name} fit --config {config}"
        raise CheckpointError(f"checkpoint {str(name)!r} not found; train it first: {command}")
    repository, _, revision = str(name).partition("@")
    if isinstance(given, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        from zoo.weights.hub import download

        return download(repository, revision or None)
    raise CheckpointError(f"checkpoint {str(name)!r} not found: {_where_it_is_not(str(name))}")


def _config_of(path: Path) -> Path | None:
    """The config whose run would write to this path, which is runs/NAME or a checkpoint in it."""
    run = path.parent if path.name in ("best", "last") else path
    found = sorted(Path("configs").glob("*/*.yaml")) if run.parent.name == "runs" else []
    return next((config for config in found if config.stem == run.name), None)


def _where_it_is_not(name: str) -> str:
    """Where a checkpoint was searched, and what may be meant."""
    from zoo.models import PRESETS

    home = Path("checkpoints")
    if Path(name).name != name:
        places = list(dict.fromkeys(str(folder.absolute()) for folder in (Path(name), home / name)))
        return f"{' and '.join(places)} {'is not a folder' if len(places) == 1 else 'are not folders'}"
    if name in PRESETS:
        return "this is the name of an untrained model, see `zoo list checkpoints`"
    stored = [entry.name for entry in home.iterdir() if entry.is_dir()] if home.is_dir() else []
    if found := near(name, stored):
        return f"did you mean {' or '.join(found)}?"
    there = f"which has: {', '.join(sorted(stored))}" if stored else "but this folder has no ./checkpoints"
    return f"names of checkpoints are searched in ./checkpoints, {there}; for one elsewhere, give its path"


def previous_of(target: Path) -> Path:
    """Where a checkpoint is kept for the moment in which its successor replaces it."""
    return target.parent / f".{target.name}.previous"
