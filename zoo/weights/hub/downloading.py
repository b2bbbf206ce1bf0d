"""A checkpoint from the Hub: its config.json is judged before any weight is fetched, and every file is checked."""

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled, RemoteEntryNotFoundError, RevisionNotFoundError

import zoo
from zoo.text import unknown
from zoo.weights.files import FILES, CheckpointError
from zoo.weights.format import read_config
from zoo.weights.hub.errors import OFFLINE, explain


def download(
    repository: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint on the Hub, in the client's cache. Only what the cache lacks is downloaded.

    config.json is fetched and read first, then the files that it names, all from the same commit. A file whose size or
    sha256 differs from config.json, or whose bytes differ from its hash in the cache, is downloaded once more.

    Args:
        repository: "owner/name".
        revision: a branch, a tag or a commit; the newest commit of `main` if None.
        token: of the Hub; None is the stored one or HF_TOKEN, False is none.
        cache_dir: of the client; None is its usual one.
        force_download: download what the cache has, too.
        local_files_only: use the cache alone, as HF_HUB_OFFLINE=1 does.

    Raises:
        CheckpointError: the download fails, or the repository holds no valid checkpoint of the zoo; one line that says
            what to do.
    """
    fetch: Callable[..., str] = partial(
        hf_hub_download,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        library_name="zoo",
        library_version=zoo.__version__,
    )
    file = "config.json"
    try:
        config = _fetched(fetch, repository, file, revision, {})
        for file, stated in _files(read_config(config)).items():
            _fetched(fetch, repository, file, config.parent.name, stated)
    except CheckpointError:
        raise
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        name = f"{repository}@{revision}" if revision else repository
        if isinstance(error, RemoteEntryNotFoundError):
            why = f"it has no {file}, so it is not a complete checkpoint of the zoo"
        elif isinstance(error, RevisionNotFoundError):
            why = _revisions(repository, str(revision), token)
        else:
            why = explain(error, repository, token)
        raise CheckpointError(f"checkpoint '{name}' is not a folder, and cannot be downloaded: {why}") from error
    return config.parent


def _files(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The files beside config.json, with their size and sha256 if it states them (from format 4)."""
    stated = config.get("files") or {}
    return {name: stated.get(name, {}) for name in FILES if name != "config.json" and (name in stated or not stated)}


def _fetched(
    fetch: Callable[..., str], repository: str, file: str, revision: str | None, stated: Mapping[str, Any]
) -> Path:
    """A file in the cache; fetched again if it is damaged there."""
    path = Path(fetch(repository, file, revision=revision))
    if intact(path, stated):
        return path
    try:
        path = Path(fetch(repository, file, revision=revision, force_download=True))
    except ValueError as error:  # the client is offline, or the Hub gave no answer
        cause = error.__cause__
        why = OFFLINE if cause is None or isinstance(cause, OfflineModeIsEnabled) else explain(cause, repository)
        raise CheckpointError(f"{path} is truncated or altered, and {why}") from error
    if intact(path, stated):
        return path
    path.resolve().unlink(missing_ok=True)
    raise CheckpointError(
        f"{file} of {repository} differs from its sha256 even when downloaded again; the repository is damaged, or "
        "something between it and here changes files: try another network, or tell its owner"
    )


def intact(path: Path, stated: Mapping[str, Any]) -> bool:
    """Whether a file has the size and sha256 that are stated, and the hash by which the Hub's cache names it."""
    size, name = path.stat().st_size, path.resolve().name
    if stated and size != stated["size"]:
        return False
    wanted = {stated["sha256"]} if stated else set()
    wanted |= {name} if re.fullmatch("[0-9a-f]{64}", name) else set()
    if wanted and wanted != {sha256_of(path)}:
        return False
    return not re.fullmatch("[0-9a-f]{40}", name) or name == git_blob(path.read_bytes())


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob(data: bytes) -> str:
    """The hash by which git names a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _revisions(repository: str, revision: str, token: str | bool | None) -> str:
    """A message that a revision does not exist, with those that do."""
    try:
        refs = HfApi(token=token).list_repo_refs(repository)
    except Exception:  # the message is about another error
        return f"it has no revision '{revision}'"
    return unknown("revision", revision, [each.name for each in (*refs.tags, *refs.branches)])
