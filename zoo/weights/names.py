"""Finds a checkpoint in a folder, under ./checkpoints or on the Hub; and its files."""

import os
import re
from pathlib import Path
from typing import Any

import zoo
from zoo.quick import index
from zoo.text import near, one_line, reason, unknown
from zoo.weights.files import FILES, CheckpointError, record


def name_of(name: str | os.PathLike[str]) -> str:
    """The name of a checkpoint, or the path of one, as a string; CheckpointError if it is neither, or empty."""
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else None
    if not isinstance(text, str):
        raise CheckpointError(f"the name of a checkpoint must be a string or a path, got {one_line(repr(name), 60)}")
    if not text.strip() or "\0" in text:
        raise CheckpointError(f"{text[:60]!r} is not the name of a checkpoint")
    return str(text)


def public_name(name: str | os.PathLike[str]) -> str:
    """The name of a checkpoint without the folders of this machine: the last part of a path; other names as they
    are."""
    text = os.path.expanduser(name_of(name))
    if isinstance(name, str) and re.fullmatch(f"(hf:)?{REPOSITORY}", text) and not Path(text).exists():
        return text
    return Path(text).resolve().name


def locate(name: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder of a checkpoint; CheckpointError if it is not found or its place cannot be read.

    A name is searched as a folder here and in ./checkpoints, among the checkpoints of the zoo, and on the Hub, in this
    order; "zoo:NAME" and "hf:OWNER/NAME" in one of the last two alone. `hub` are arguments of `download`.
    """
    text = name_of(name)
    try:
        return _found(name, os.path.expanduser(text), hub)
    except (OSError, RuntimeError, UnicodeError) as error:  # a folder may not be read, a link leads to itself
        raise CheckpointError(f"checkpoint '{one_line(text, 200)}' cannot be read: {reason(error)}") from error


def _found(given: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path:
    prefix, colon, rest = str(name).partition(":")
    if isinstance(given, str) and prefix + colon in ("zoo:", "hf:"):
        return shipped(rest, **hub) if prefix == "zoo" else _downloaded(rest, **hub)
    for folder in (Path(name), Path("checkpoints", name)):
        if folder.is_dir():
            return folder
        if (previous := previous_of(folder.resolve())).is_dir():  # a save was killed between its two renames
            return previous
    if str(name).lower().endswith(".nemo"):
        raise CheckpointError(f"{name} is a NeMo file; load it as 'nemo:{name}'")
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder that holds {' and '.join(FILES[1:3])}")
    if name in index():
        return shipped(str(name), **hub)
    if config := _config_of(Path(name)):
        command = f"zoo {config.parent.name} fit --config {config}"
        raise CheckpointError(f"checkpoint {str(name)!r} not found; train it first: {command}")
    if isinstance(given, str) and re.fullmatch(REPOSITORY, name):
        return _downloaded(name, **hub)
    raise CheckpointError(f"checkpoint {str(name)!r} not found: {_where_it_is_not(str(name))}")


REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(@.+)?"


def _downloaded(name: str, revision: str | None = None, **hub: Any) -> Path:
    """The folder of "owner/name" or "owner/name@revision" on the Hub."""
    from zoo.weights.hub import download

    return download(*repository_of(name, revision), **hub)


def repository_of(name: str, revision: str | None) -> tuple[str, str | None]:
    """The repository and the revision in "owner/name" or "owner/name@revision"; CheckpointError if it is neither, or if
    another revision is given."""
    if not re.fullmatch(REPOSITORY, name):
        raise CheckpointError(f"'{one_line(name, 100)}' must be OWNER/NAME or OWNER/NAME@REVISION on the Hub")
    repository, _, written = name.partition("@")
    if revision and written and revision != written:
        raise CheckpointError(f"'{name}' names revision '{written}', but revision='{revision}' was given")
    return repository, revision or written or None


def shipped(name: str, revision: str | None = None, **hub: Any) -> Path:
    """The folder of a checkpoint of the zoo: beside an installation from the repository, else from the Hub, where its
    files have to be those of the index."""
    from zoo.weights.hub import download

    if name not in (known := index()):
        raise CheckpointError(unknown("checkpoint of the zoo", name, known))
    if revision:
        raise CheckpointError(f"'{name}' is a checkpoint of this version of zoo; omit revision, or give OWNER/NAME")
    entry, beside = known[name], Path(zoo.__file__).parent.parent / "checkpoints" / name
    if (beside / "config.json").is_file():
        return beside
    folder = download(entry["repository"], entry["commit"], **hub)
    for file, wanted in entry["files"].items():
        if record(folder / file) != wanted:
            where = f"{entry['repository']} on the Hub"
            raise CheckpointError(f"{file} of {where} is not that of checkpoint '{name}' of zoo {zoo.__version__}")
    return folder


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
    folders = [entry.name for entry in home.iterdir() if entry.is_dir()] if home.is_dir() else []
    stored = sorted({*index(), *folders})
    if found := near(name, stored):
        return f"did you mean {' or '.join(found)}?"
    return f"the checkpoints of the zoo and in ./checkpoints are: {', '.join(stored)}; for one elsewhere, give its path"


def previous_of(target: Path) -> Path:
    """Where a checkpoint is kept for the moment in which its successor replaces it."""
    return target.parent / f".{target.name}.previous"
