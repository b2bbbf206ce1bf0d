"""The files that `save_pretrained` of transformers writes."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.text import from_json, one_line, reason
from zoo.weights.files import read_tensors

HARMLESS = (
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_attn_implementation_autoset",
    "_name_or_path",
)
"""Keys that every config may have, and that change nothing at inference."""
_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json", "p*processor_config.json"]


def located(name: str, **hub: Any) -> Path:
    """The folder that holds the files of OWNER/NAME[@REVISION] on the Hub; `hub` are arguments of its client."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f"{name} is neither a folder with config.json and model.safetensors nor OWNER/NAME on the Hub")
    given: dict[str, Any] = hub | {"revision": hub.get("revision") or revision or None}
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_FILES, **given))
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        raise ValueError(
            one_line(f"folder {name} not found, and it cannot be downloaded from the Hub: {error}")
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        values = from_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(one_line(f"{path} cannot be read as JSON: {reason(error)}")) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of one file, or of several that an index names."""
    if (folder / "model.safetensors").is_file():
        return read_tensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{folder} has no model.safetensors; only safetensors are read, never a pickle")
    listed = read_json(index).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) else set()
    tensors: dict[str, Tensor] = {}
    for name in sorted(map(str, names)):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of this folder")
        tensors |= read_tensors(folder / name)
    return tensors
