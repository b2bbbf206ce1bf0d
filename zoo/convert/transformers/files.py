"""The files that `save_pretrained` of transformers writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.convert.source import LARGEST, Section
from zoo.convert.yaml_config import BYTES, config_of
from zoo.text import from_json, one_line, reason
from zoo.weights.files import read_tensors
from zoo.weights.hub.errors import explain

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
_FILES += ["README.md"]


def located(name: str, files: Sequence[str] = _FILES, **hub: Any) -> Path:
    """The folder that holds these files of OWNER/NAME[@REVISION] on the Hub; `hub` are arguments of its client."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f"{name} is neither a folder with config.json and model.safetensors nor OWNER/NAME on the Hub")
    given: dict[str, Any] = hub | {"revision": hub.get("revision") or revision or None}
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*files], **given))
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        why = explain(error, repository, hub.get("token"))
        raise ValueError(
            one_line(f"folder {name} not found, and it cannot be downloaded from the Hub: {why}")
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


def license_of(folder: Path) -> str:
    """The license that the front matter of README.md names, as on the Hub; "unknown" if there is none that can be
    read."""
    path = folder / "README.md"
    try:
        with open(path, "rb") as file:
            front = re.match(rb"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", file.read(BYTES), re.S | re.M)
        said = config_of(front[1], str(path)).get("license") if front else None
    except (OSError, ValueError):
        said = None
    return said if isinstance(said, str) and re.fullmatch(r"[\w.+-]{1,100}", said) else "unknown"


def id_names(values: Mapping[str, Any], whole: Section) -> list[str]:
    """The names of the classes in a config, in the order of their ids; without id2label as transformers makes them."""
    number = values.get("num_labels")
    usual = {str(id): f"LABEL_{id}" for id in range(number if type(number) is int and 0 <= number <= LARGEST else 2)}
    try:
        by_id = {int(id): str(name) for id, name in (values.get("id2label") or usual).items()}
    except (AttributeError, TypeError, ValueError):
        raise whole.refused("id2label", "it must be an object with a name for each id") from None
    if sorted(by_id) != list(range(len(by_id))):
        raise whole.refused("id2label", f"its ids must be 0 to {len(by_id) - 1}")
    return [by_id[id] for id in sorted(by_id)]


def read_folder(folder: Path, name: str = "model") -> dict[str, Tensor]:
    """The tensors of the file NAME.safetensors, or of several that an index names."""
    if (folder / f"{name}.safetensors").is_file():
        return read_tensors(folder / f"{name}.safetensors")
    index = folder / f"{name}.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{folder} has no {name}.safetensors; only safetensors are read, never a pickle")
    listed = read_json(index).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) else set()
    tensors: dict[str, Tensor] = {}
    for part in sorted(map(str, names)):
        if Path(part).name != part:
            raise ValueError(f"{index} names {part!r}, which is not a file of this folder")
        tensors |= read_tensors(folder / part)
    return tensors
