"""A checkpoint by its name, changed for a new task if asked for."""

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import Tokenizer
from zoo.text import reason
from zoo.weights.adapt import adapt
from zoo.weights.foreign import foreign
from zoo.weights.names import locate
from zoo.weights.origin import origin_of
from zoo.weights.read import Checkpoint, read_checkpoint


def load_model(name: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The model of a checkpoint in eval mode, as in load_model("vit_micro.digits", classes=37). Arguments and errors
    are those of `load_checkpoint`.

    `model.preprocess` and `model.labels` are the checkpoint's; `save_model` keeps them and, as long as the weights are
    the same, the contents of its card.
    `model.loaded` says which weights were taken, resized, new or left out.
    """
    return load_checkpoint(name, **options).model


def load_checkpoint(
    name: str | os.PathLike[str],
    *,
    classes: int | Sequence[str] | LabelMap | None = None,
    tokenizer: Tokenizer | None = None,
    channels: int | None = None,
    image: int | None = None,
    fresh: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    check: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    **fields: Any,
) -> Checkpoint:
    """Reads a checkpoint: the model in eval mode and float32 on the CPU, its preprocessing, labels and config.json.
    Called with a raw input, such as a file, the result predicts.

    Args:
        name: a folder; the name of a folder in ./checkpoints or of a checkpoint of the zoo; or "owner/name" or
            "owner/name@revision" on the Hub. Explicit names never look at folders here: "zoo:NAME", a checkpoint of
            the zoo; "hf:OWNER/NAME", one on the Hub, also of transformers or a DiT of diffusers; "hf:./FOLDER", a
            folder that these saved; "timm:NAME", a pretrained model of timm; "nemo:FILE", a .nemo file.
        classes: another number of classes, or their names; rows of names that the checkpoint has are kept.
        tokenizer: another tokenizer, for a speech model; rows of pieces that the checkpoint has are kept.
        channels: another number of channels of the images; weights are summed or spread.
        image: another size of the images; learned position tables are resized where they are used.
        fresh: names of fields of the config that may differ; weights that do not fit then start untrained.
        device: of the model.
        dtype: of the model.
        check: run the probe, and raise if the output is off by more than 1e-4 of its largest value.
        revision: branch, tag or commit on the Hub.
        token: of the Hub; the stored one by default, False for none.
        cache_dir: the Hub's cache.
        force_download: download again what the cache holds.
        local_files_only: never ask the Hub; use what the cache holds.
        fields: other fields of the model's config, such as drop_path.

    Raises:
        CheckpointError: the checkpoint is not found; a file of it is missing, truncated, altered, a pickle, or does not
            fit the others; it was written by a newer zoo; or its probe fails.
        ValueError: a change does not fit the model.
    """
    if force_download and local_files_only:
        raise ValueError("force_download and local_files_only exclude each other; give one of them")
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub |= {"force_download": force_download, "local_files_only": local_files_only}
    found = foreign(name, hub)
    if found is not None and check:
        raise ValueError(f"{name} has no probe, so omit check")
    folder = None
    if found is None:
        folder = locate(name, **hub)
        found = read_checkpoint(folder, check)
    found.model.origin = origin_of(found.model, name, folder)
    config = found.model.config
    given = {"channels": channels, "image": image}
    changes = {key: value for key, value in given.items() if value is not None} | fields
    if classes is not None and tokenizer is not None:
        raise ValueError("give classes or tokenizer, not both")
    labels: Any = tokenizer
    if isinstance(classes, Integral) and not isinstance(classes, bool):
        changes[config.counted] = int(classes)
    elif isinstance(classes, LabelMap):
        labels = classes
    elif isinstance(classes, list | tuple):
        detects = config.labels == "categories" and all(isinstance(each, str) for each in classes)
        labels = LabelMap(tuple(classes), (*range(1, 1 + len(classes)),)) if detects else tuple(classes)
    elif classes is not None:
        raise ValueError(f"classes must be a number, a list of names or a LabelMap, got {type(classes).__name__}")
    found = adapt(found, changes, labels, fresh, name)
    if device is not None or dtype is not None:
        try:
            found.model.to(device=device, dtype=dtype)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"device {device} and dtype {dtype} are not possible: {reason(error)}") from error
    return found
