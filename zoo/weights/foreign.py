"""Pretrained models of other libraries by name, converted when they are loaded."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.models import family_of
from zoo.models.base import Model
from zoo.text import from_json, one_line, reason, unknown
from zoo.weights.files import CheckpointError
from zoo.weights.names import name_of, repository_of
from zoo.weights.read import Checkpoint

PREFIXES = ("timm:", "nemo:", "hf:")
PIPELINE = "model_index.json"  # of a repository of diffusers


def foreign(name: str | os.PathLike[str], hub: Mapping[str, Any]) -> Checkpoint | None:
    """The model of another library that the name describes; None if it is a checkpoint of the zoo."""
    prefix, colon, rest = name_of(name).partition(":")
    if not isinstance(name, str) or prefix + colon not in PREFIXES:
        return None
    if prefix == "hf" and not _is_path(rest) and is_ours(rest, hub):
        return None
    try:
        return {"timm": _timm, "nemo": _nemo, "hf": _huggingface}[prefix](rest, hub)
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{one_line(name, 200)}: {reason(error)}") from error


def _made(model: Any, preprocess: Any, labels: Any, base: Mapping[str, Any], license: str) -> Checkpoint:
    assert isinstance(model, Model)
    model.preprocess, model.labels, model.preset = preprocess, labels, None
    model.about = {"base": dict(base), "license": license, "source": f"converted from {base['address']}"}
    written = {"family": family_of(model), "preset": None, "model": asdict(model.config), "fused": False}
    return Checkpoint(model.eval(), preprocess, labels, written | dict(model.about))


def _timm(name: str, hub: Mapping[str, Any]) -> Checkpoint:
    """A pretrained model of timm with the preprocessing and the license of its config."""
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset  # pyright: ignore[reportPrivateImportUsage]

    from zoo.convert import from_timm, timm_preprocess

    if refused := [key for key in ("revision", "token", "force_download", "local_files_only") if hub[key]]:
        raise ValueError(f"timm downloads its models itself; {refused[0]} has no effect, so omit it")
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(unknown("model of timm", name, timm.list_models(pretrained=True)))
    try:
        model: Any = timm.create_model(name, pretrained=True, cache_dir=hub["cache_dir"])
    except Exception as error:  # of the Hub's client, the network or the file
        raise ValueError(f"its weights cannot be read: {reason(error)}") from error
    given = model.pretrained_cfg
    preprocess = timm_preprocess(given)
    labels = None
    if (subset := infer_imagenet_subset(model)) is not None:
        info = ImageNetInfo(subset)
        said = [info.index_to_description(index) for index in range(info.num_classes())]
        # A few descriptions name two classes.
        labels = tuple(
            each if said.count(each) == 1 else f"{each} ({info.index_to_label_name(index)})"
            for index, each in enumerate(said)
        )
    repository = given.get("hf_hub_id")
    address = f"https://huggingface.co/{repository}" if repository else given.get("url") or name
    base = {"address": address, "commit": None, "layout": "timm"}
    return _made(from_timm(model), preprocess, labels, base, given.get("license") or "unknown")


def _nemo(name: str, hub: Mapping[str, Any]) -> Checkpoint:
    """A .nemo file."""
    from zoo.convert import from_nemo

    found = from_nemo(name)
    base = {"address": os.path.basename(name), "commit": None, "layout": "nemo"}
    return _made(found.model, found.preprocess, found.tokenizer, base, "unknown")


def _huggingface(name: str, hub: Mapping[str, Any]) -> Checkpoint:
    """A model of transformers, or a DiT of diffusers, on the Hub or in a folder, with the license of its README.md."""
    from zoo.convert import from_transformers
    from zoo.convert.dit.pipeline import FILES, convert_pipeline
    from zoo.convert.transformers.files import license_of, located

    repository = commit = None
    if _is_path(name):
        folder = Path(name).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError("folder not found")
        address, piped = folder.name, (folder / PIPELINE).is_file()
    else:
        repository, revision = repository_of(name, hub["revision"])
        piped = _json_of(name, "config.json", hub) is None  # `is_ours` has seen the other file
        files = {"files": FILES} if piped else {}
        folder = located(repository, **files, **{**hub, "revision": revision})
        address, commit = f"https://huggingface.co/{repository}", folder.name
    model, preprocess, labels = convert_pipeline(folder, repository) if piped else from_transformers(folder)
    base = {"address": address, "commit": commit, "layout": "diffusers" if piped else "transformers"}
    return _made(model, preprocess, labels, base, license_of(folder))


def _is_path(name: str) -> bool:
    """Whether what follows `hf:` is the path of a folder, which OWNER/NAME is not."""
    return name.startswith(("/", "./", "../", "~"))


def is_ours(name: str, hub: Mapping[str, Any]) -> bool:
    """Whether a repository on the Hub holds a checkpoint of the zoo. True, too, if it cannot be read: the download then
    says why."""
    found = _json_of(name, "config.json", hub)
    return "family" in found if found is not None else _json_of(name, PIPELINE, hub) is None


def _json_of(name: str, file: str, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object in a JSON file of a repository on the Hub; None if it cannot be read or is none."""
    from huggingface_hub import hf_hub_download

    repository, revision = repository_of(name, hub["revision"])
    given: dict[str, Any] = {**hub, "revision": revision}
    try:
        found = from_json(Path(hf_hub_download(repository, file, **given)).read_bytes())
    except Exception:  # the client raises its own errors, those of its network library, and the system's
        return None
    return found if isinstance(found, dict) else None
