"""The checkpoint that a model was read from, and what it says that still holds for the model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from zoo.inputs import Preprocess
from zoo.models.base import Model
from zoo.tensors import fingerprint
from zoo.weights.names import public_name

Base = Mapping[str, str | None]


class Origin(NamedTuple):
    """The checkpoint that a model was read from: `model.origin`."""

    base: Base  # its address without the folders of this machine, its commit, and the layout of its files
    weights: Mapping[str, int]  # their fingerprint
    preprocess: Preprocess | None


def origin_of(model: Model, name: str | os.PathLike[str], folder: Path | None) -> Origin:
    """The origin of a model that was just read from the checkpoint of this name, in a folder; or, without one, from the
    files of another library, which `model.about` has as its base."""
    if folder is None:
        base = dict(model.about["base"])
    else:
        commit = folder.name if folder.parent.name == "snapshots" else None  # of the Hub's cache
        base = {"address": public_name(name), "commit": commit, "layout": "zoo"}
    return Origin(base, fingerprint(model), model.preprocess)


def still_true(model: Model, weights: nn.Module, preprocess: Preprocess | None) -> Mapping[str, Any]:
    """What `model.about` says that holds for these weights, those of the model on the CPU, with this preprocessing:
    all of it if both are those of the checkpoint that the model was read from, or if it was read from none."""
    origin: Origin | None = model.origin
    if origin is None or (origin.preprocess in (None, preprocess) and origin.weights == fingerprint(weights)):
        return model.about
    return made_from(model.about, origin.base)


def inherit(made: Model, model: Model) -> None:
    """Gives a model that was made from another what that one has of its checkpoint."""
    made.preset, made.preprocess, made.labels = model.preset, model.preprocess, model.labels
    made.about, made.origin = dict(model.about), model.origin


def made_from(about: Mapping[str, Any], base: Base | None) -> dict[str, Any]:
    """What is still true of a changed model: its license, its data and what it was made from; source, card and figures
    are not."""
    return {key: about[key] for key in ("license", "datasets") if key in about} | {"base": base and dict(base)}
