"""Checkpoints on the Hugging Face Hub: downloaded by name, published after their probe has passed."""

from pathlib import Path
from typing import Any

from zoo.text import reason
from zoo.weights.files import FILES, CheckpointError


def download(repository: str, revision: str | None, **hub: Any) -> Path:
    """The folder of a repository's files, downloaded if not here yet; CheckpointError if that fails."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES), **hub))
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        at = f" at '{revision}'" if revision else ""
        why = f"folder {repository} not found, and it cannot be downloaded from the Hub{at}: {reason(error)}"
        raise CheckpointError(why) from error


def publish(folder: Path, name: str, private: bool = False, tag: str | None = None) -> str:
    """Uploads the four files of a checkpoint, and returns their address.

    Args:
        folder: a checkpoint as `zoo.save_model` writes it.
        name: "owner/name" on the Hub; the repository is created if it does not exist.
        private: create it as private.
        tag: a tag for this upload, so that "owner/name@tag" always loads it.

    Raises:
        ValueError: the folder is not a complete checkpoint, its probe fails, the name is not OWNER/NAME, or no
            token is found.
        OSError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    from zoo.weights.read import read_checkpoint

    validate_repo_id(name)
    if "/" not in name:
        raise ValueError(f"the name must be OWNER/NAME, got '{name}'")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise ValueError(f"{folder} has no {missing[0]}; scripts/publish takes a folder that save_model wrote")
    read_checkpoint(folder.resolve(), check=True)
    if get_token() is None:
        raise ValueError("no Hub token found; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        message = f"Publish {folder.resolve().name}"
        commit = api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message=message)
        if tag is not None:
            api.create_tag(name, tag=tag, revision=commit.oid)
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        raise OSError(f"the Hub refused {name}: {error}") from error
    return str(address)
